"""Test RolloutEngine: refusals, results, torch.compile, and termination functions of the user."""

import math

import pytest
import torch
from kernel_cases import check_without_penalties, inputs, make_ensemble, make_policy

from mopo_fast import backends
from mopo_fast.backends import cpu
from mopo_fast.backends.choose import _say_once
from mopo_fast.backends.reference import penalise
from mopo_fast.buffer import RingBuffer
from mopo_fast.config import PENALTIES
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine
from mopo_fast.tasks import TASKS, Task, make_box

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def engine(request):
    return RolloutEngine(make_ensemble(5, 2), backend=request.param)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": "variance"}, "unknown penalty 'variance'; there are: max_aleatoric"),
        ({"penalty_coef": -1.0}, "penalty_coef must be finite and not negative"),
        ({"penalty_coef": math.nan}, "penalty_coef must be finite"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; there are: float32, float64, tfloat32"),
        ({"threads": 0}, "threads must be a whole number, 1 <= threads"),
        ({"threads": 2.5}, "threads must be a whole number"),
        ({"penalty_coef": "1"}, "penalty_coef must be finite and not negative, got '1'"),
        ({"termination": 5}, "termination must be a name, a Task, a Box, a function or None, got 5"),
        ({"penalty_members": "best"}, "penalty_members must be"),
        ({"termination": "hoper"}, "unknown termination 'hoper'; there are: halfcheetah, hopper"),
        (
            {"termination": "hopper"},
            "the termination box has 11 dimensions, the ensemble's observations have 5",
        ),
        ({"penalties": False}, "penalty_coef=1 needs penalties; leave penalties=False out"),
        ({"penalties": "no"}, "penalties must be True, False or None, got 'no'"),
        ({"backend": "gpu"}, "unknown backend 'gpu'; there are: auto, cpu, cuda, triton, reference"),
        ({"backend": "cpu", "dtype": "float64"}, "cpu: serves float32, bfloat16, bfloat16x3, not float64"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InputError, match=message):
        RolloutEngine(make_ensemble(5, 2), **arguments)


def test_bad_step_arguments(engine):
    observations, actions = inputs(8, 5, 2)
    broken = observations.clone()
    broken[3, 1] = math.nan

    def refused(message, *args, **kwargs):
        with pytest.raises(InputError, match=message):
            engine.step(*args, **{"seed": 0, **kwargs})

    refused(r"observations must be \[batch, 5\], got shape \[8, 2\]", actions, actions)
    refused(r"actions must be \[batch, 2\], got shape \[2\]", observations, actions[0])
    refused("there are 8 observations but 7 actions", observations, actions[:7])
    refused("observations has no rows", observations[:0], actions[:0])
    refused("observations is not finite at row 3", broken, actions)
    refused("observations must be floating-point, got torch.int64", observations.long(), actions)
    refused("actions must be a tensor, a NumPy array or an array with DLPack, got list",
            observations, actions.tolist())  # fmt: skip
    refused("seed must be a whole number", observations, actions, seed=-1)
    refused("seed must be a whole number", observations, actions, seed=2**64)
    refused("seed must be a whole number", observations, actions, seed=1.5)
    refused("step must be a whole number", observations, actions, step=2**32)
    refused(r"rows must be int64 \[8\], got torch.int64 \[7\]", observations, actions, rows=torch.arange(7))
    refused(r"rows must be int64 \[8\], got torch.float32", observations, actions, rows=torch.arange(8.0))
    refused("observations must be on the ensemble's cpu, got meta", observations.to("meta"), actions)


def test_bad_rollout_arguments(engine):
    start, policy = inputs(8, 5, 2)[0], make_policy(5, 2)

    def refused(message, *args, **kwargs):
        with pytest.raises(InputError, match=message):
            engine.rollout(*args, **{"seed": 0, **kwargs})

    refused("the policy is for 6 observation and 2 action dimensions, the ensemble for 5 and 2",
            make_policy(6, 2), start, 1)  # fmt: skip
    refused("horizon must be a whole number, 1 <= horizon", policy, start, 0)
    refused(r"start_observations must be \[batch, 5\]", policy, start[:, :4], 1)
    refused("8 rollouts of 3 steps can make 24 transitions, the buffer holds 23", policy, start, 3,
            out=RingBuffer(23, 5, 2))  # fmt: skip
    refused(r"the buffer's observations must be torch.float32 \[24, 5\] .*, got torch.float32 \[24, 4\]",
            policy, start, 3, out=RingBuffer(24, 4, 2))  # fmt: skip
    refused("the buffer's observations must be .* on cpu, got .* on meta", policy, start, 3,
            out=RingBuffer(24, 5, 2, "meta"))  # fmt: skip
    refused("policy must be .* a function .*, got 'mine'; .* loop over `engine.step`", "mine", start, 3)

    class Own(Actor):
        def act(self, observations, noise=None):
            return torch.zeros(len(observations), 2)

    refused("Own has a forward or act of its own, .* loop over `engine.step`", Own(5, 2), start, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_penalties(backend):
    engine = RolloutEngine(make_ensemble(5, 2), penalty_coef=0.0, backend=backend)
    check_without_penalties(engine, make_policy(5, 2), inputs(50, 5, 2)[0], 3)


def test_penalties_on_request(engine):
    """`penalties` is None unless they are in the rewards or asked for, also for arrays of another kind."""
    observations, actions = (array.numpy() for array in inputs(8, 5, 2))
    penalised = engine.step(observations, actions, seed=0).penalties
    without = RolloutEngine(engine.ensemble, penalty_coef=0.0, backend=engine.backend)
    asked = RolloutEngine(engine.ensemble, penalty_coef=0.0, backend=engine.backend, penalties=True)
    assert without.step(observations, actions, seed=0).penalties is None
    assert (asked.step(observations, actions, seed=0).penalties == penalised).all()


def test_a_ring_for_penalties_that_are_refused():
    engine = RolloutEngine(make_ensemble(5, 2), penalty_coef=0.0, penalties=False)
    policy, start = make_policy(5, 2), inputs(8, 5, 2)[0]
    with pytest.raises(InputError, match="the buffer stores penalties, which this engine does not compute"):
        engine.rollout(policy, start, 1, seed=0, out=RingBuffer(8, 5, 2))
    made = engine.rollout(policy, start, 1, seed=0, out=RingBuffer(8, 5, 2, penalties=False))
    assert len(made) == 8 and made.penalties is None


def test_bad_elites():
    ensemble = make_ensemble(5, 2, members=3)
    ensemble.elites.fill_(3)
    with pytest.raises(InputError, match=r"elites must be distinct members 0\.\.2, got \[3\]"):
        RolloutEngine(ensemble)


def test_elites_are_checked_at_every_call(engine):
    engine.ensemble.elites[0] = 99
    with pytest.raises(InputError, match="elites must be distinct members"):
        engine.step(*inputs(8, 5, 2), seed=0)
    with pytest.raises(InputError, match="elites must be distinct members"):
        engine.rollout(make_policy(5, 2), inputs(8, 5, 2)[0], 1, seed=0)


def test_a_long_horizon_takes_memory_for_its_rows_alone():
    """Memory grows with the rows that are made: a horizon of 20 million steps ends at its first step."""
    engine = RolloutEngine(make_ensemble(5, 2), termination=make_box(5, {0: (100.0, 101.0)}), backend="cpu")
    result = engine.rollout(make_policy(5, 2), inputs(1, 5, 2)[0], 20_000_000, seed=0)
    assert len(result) == 1 and result.terminals.all()


def test_the_ensemble_may_change_between_calls(engine):
    observations, actions = inputs(8, 5, 2)
    before = engine.step(observations, actions, seed=0, deterministic=True)
    with torch.no_grad():
        # Changing `.data` does not change the version counter, so nothing may be cached by it.
        engine.ensemble.biases[-1].data[:, 5] += 1.0
    after = engine.step(observations, actions, seed=0, deterministic=True)
    torch.testing.assert_close(after.raw_rewards, before.raw_rewards + 1.0)
    torch.testing.assert_close(after.next_observations, before.next_observations)


def test_penalty_coef_lowers_rewards(engine):
    observations, actions = inputs(20, 5, 2)
    result = RolloutEngine(engine.ensemble, penalty_coef=2.5, backend=engine.backend).step(
        observations, actions, seed=0
    )
    assert (result.penalties > 0).all()
    torch.testing.assert_close(result.rewards, result.raw_rewards - 2.5 * result.penalties)


def test_members_are_elites_and_uniform(engine):
    observations, actions = inputs(1, 5, 2)
    result = engine.step(observations.expand(20_000, -1), actions.expand(20_000, -1), seed=3)
    counts = result.members.bincount(minlength=7)
    assert set(counts.nonzero().flatten().tolist()) == set(engine.ensemble.elites.tolist())
    assert (counts[engine.ensemble.elites] - 4000).abs().max() < 5 * math.sqrt(4000)


def test_numbers_whose_sum_is_beyond_float32_are_finite(engine):
    observations, actions = inputs(4, 5, 2)
    observations[1] = torch.finfo(torch.float32).max
    assert len(engine.step(observations, actions, seed=0).rewards) == 4
    observations[2, 3] = -math.inf
    with pytest.raises(InputError, match="observations is not finite at row 2"):
        engine.step(observations, actions, seed=0)


def test_rows_are_numbered_from_zero_at_every_call(engine):
    for batch in (3, 1, 1, 2000, 3, 2000):
        observations, actions = inputs(batch, 5, 2)
        found = engine.step(observations, actions, seed=4)
        expected = engine.step(observations, actions, seed=4, rows=torch.arange(batch))
        assert torch.equal(found.next_observations, expected.next_observations)
        assert torch.equal(found.members, expected.members)


def test_samples_have_the_predicted_moments(engine):
    """Samples of next observations and rewards have the mean and spread that each member predicts."""
    observations, actions = inputs(1, 5, 2)
    n = 60_000
    result = engine.step(observations.expand(n, -1), actions.expand(n, -1), seed=3)
    one = engine.step(observations, actions, seed=0, distributions=True)
    assert one.mean is not None and one.std is not None
    for member in engine.ensemble.elites.tolist():
        chosen = result.members == member
        count = int(chosen.sum())
        sample = torch.cat([result.next_observations - observations, result.raw_rewards[:, None]], 1)[chosen]
        z = (sample - one.mean[member, 0]) / one.std[member, 0]
        assert z.mean(0).abs().max() < 5 / math.sqrt(count)
        assert (z.var(0) - 1).abs().max() < 5 * math.sqrt(2 / count)


def test_penalties_by_hand():
    """Two members, two observation dimensions and a reward, with values that can be checked by hand."""
    mean = torch.tensor([[[0.0, 0.0, 7.0]], [[6.0, 8.0, 9.0]]])
    variance = torch.tensor([[[4.0, 4.0, 1.0]], [[1.0, 2.0, 1.0]]])
    expected = {
        "max_aleatoric": 3.0,
        "max_deviation": 5.0,
        "max_pairwise": 10.0,
        "ensemble_std": math.sqrt((9 + 16) / 2),
        "mixture_std": math.sqrt((9 + 2.5) + (16 + 3) + (1 + 1)),
    }
    assert set(expected) == set(PENALTIES)
    for penalty, value in expected.items():
        assert float(penalise(penalty, mean, variance)) == pytest.approx(value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_termination_function_equals_its_box(backend):
    ensemble, policy, start = make_ensemble(5, 2), make_policy(5, 2), inputs(500, 5, 2)[0]
    box = make_box(5, {0: (-1.5, 1.5)})
    shapes = []

    def termination(observations, actions, next_observations):
        shapes.append((observations.shape[1], actions.shape[1]))
        return ~box.contains(next_observations)[:, None].numpy()

    by_box = RolloutEngine(ensemble, termination=box, backend=backend)
    by_function = RolloutEngine(ensemble, termination=termination, backend=backend)
    expected, result = (e.rollout(policy, start, 4, seed=1) for e in (by_box, by_function))
    assert expected.terminals.any() and set(shapes) == {(5, 2)}
    assert torch.equal(result.rollout_index, expected.rollout_index)
    assert torch.equal(result.terminals, expected.terminals)
    torch.testing.assert_close(result.next_observations, expected.next_observations)
    torch.testing.assert_close(result.rewards, expected.rewards)


def test_a_bad_termination_function():
    engine = RolloutEngine(make_ensemble(5, 2), termination=lambda s, a, n: n[:, 0])
    with pytest.raises(InputError, match=r"must return bool \[8\], got torch.float32 \[8\]"):
        engine.step(*inputs(8, 5, 2), seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_that_ends_at_once(backend):
    """If all rollouts end at their first step, each has one row."""
    engine = RolloutEngine(make_ensemble(5, 2), termination=make_box(5, {0: (100.0, 101.0)}), backend=backend)
    result = engine.rollout(make_policy(5, 2), inputs(30, 5, 2)[0], 7, seed=0)
    assert len(result) == 30 and result.terminals.all() and not result.step.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_finite_at_all(backend):
    ensemble = make_ensemble(5, 2)
    with torch.no_grad():
        ensemble.biases[-1].fill_(math.inf)
    result = RolloutEngine(ensemble, backend=backend).rollout(
        make_policy(5, 2), inputs(30, 5, 2)[0], 7, seed=0
    )
    assert len(result) == 0 and result.info["non_finite"] == 30


def test_no_gradient_passes(engine):
    """Results require no gradient, even if parameters, observations or actions do."""
    observations, actions = (array.requires_grad_() for array in inputs(6, 5, 2))
    result = engine.step(observations, actions, seed=0, distributions=True)
    assert result.mean is not None and not result.mean.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        result.rewards.sum().backward()


def test_a_rollout_is_seen_by_autograd(engine):
    """A rollout into a buffer invalidates tensors that autograd has saved from the buffer."""
    ring, weight = RingBuffer(100, 5, 2), torch.ones(10, 5, requires_grad=True)
    loss = (ring.storage.observations[:10] * weight).sum()
    engine.rollout(make_policy(5, 2), inputs(6, 5, 2)[0], 3, seed=0, out=ring)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", ["step", "rollout"])
def test_torch_compile_breaks_its_graph_once(method):
    """The code before a call and the code after it are compiled to one graph each."""
    engine, policy, graphs = RolloutEngine(make_ensemble(5, 2), backend="cpu"), make_policy(5, 2), []
    observations, actions = inputs(6, 5, 2)

    def doubled(observations):
        if method == "step":
            result = engine.step(observations * 1.0, actions, seed=5)
        else:
            result = engine.rollout(policy, observations * 1.0, 3, seed=5)
        return result.next_observations * 2.0

    def kept(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = doubled(observations)
    assert torch.equal(torch.compile(doubled, backend=kept)(observations), expected)
    assert len(graphs) == 2


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("MOPO_FAST_BACKEND", "reference")
    assert RolloutEngine(make_ensemble(5, 2)).backend == "reference"
    assert RolloutEngine(make_ensemble(5, 2), backend="cpu").backend == "cpu"
    monkeypatch.setenv("MOPO_FAST_BACKEND", "gpu")
    with pytest.raises(InputError, match="unknown backend 'gpu'"):
        RolloutEngine(make_ensemble(5, 2))
    monkeypatch.delenv("MOPO_FAST_BACKEND")
    assert RolloutEngine(make_ensemble(5, 2)).backend == "cpu"
    monkeypatch.setenv("MOPO_FAST_BACKEND", "")
    assert RolloutEngine(make_ensemble(5, 2)).backend == "cpu"
    assert RolloutEngine(make_ensemble(5, 2), dtype="float64").backend == "reference"


def test_the_choice_is_logged_once_with_its_reasons(caplog):
    _say_once.cache_clear()
    with caplog.at_level("INFO", logger="mopo_fast"):
        for _ in range(3):
            RolloutEngine(make_ensemble(5, 2), dtype="float64")
    (message,) = (record.message for record in caplog.records)
    assert message.startswith(
        "backend: reference (cpu: serves float32, bfloat16, bfloat16x3, not float64; cuda: "
    )


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("MOPO_FAST_ISA", "avx9")
    with pytest.raises(InputError, match="MOPO_FAST_ISA=avx9 cannot run on this processor; it has: "):
        cpu.isa()


def test_a_missing_extension_is_a_reason(monkeypatch, caplog):
    """Without the compiled extension, the reference backend is used and a message gives the reason."""
    cpu._load.cache_clear()
    _say_once.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "mopo_fast._cpu", None)
    try:
        status = {status.name: status for status in backends.available()}
        assert not status["cpu"].available and "pip install" in status["cpu"].reason
        for _ in range(2):
            assert RolloutEngine(make_ensemble(5, 2)).backend == "reference"
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert [record.getMessage()[:52] for record in warnings] == [
            "PyTorch computes everything, which is several times "
        ]
        with pytest.raises(InputError, match=r"the C\+\+ kernels were not built; install g\+\+ 11 or newer"):
            RolloutEngine(make_ensemble(5, 2), backend="cpu")
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()


def assert_same(one: Transitions, other: Transitions) -> None:
    assert one.arrays().keys() == other.arrays().keys()
    for name, array in one.arrays().items():
        torch.testing.assert_close(array, other.arrays()[name], msg=name)


class TestFunctionsAsPolicies:
    """A function chooses the actions, and the backend makes one model step at a time."""

    def test_equals_the_same_actor(self, engine):
        policy, start = make_policy(5, 2), inputs(50, 5, 2)[0]
        engine.ensemble.biases[-1].data[:, 0] += 0.5
        engine = RolloutEngine(
            engine.ensemble, termination=make_box(5, {0: (-5.0, 2.0)}), backend=engine.backend
        )
        fused = engine.rollout(policy, start, 4, seed=3, deterministic=True)
        assert 50 < len(fused) < 200
        assert_same(engine.rollout(policy.act, start, 4, seed=3, deterministic=True), fused)
        # NumPy arrays are taken too, as start states and as actions.
        assert_same(engine.rollout(policy.predict, start.numpy(), 4, seed=3, deterministic=True), fused)

    def test_equals_steps(self, engine):
        observations = inputs(8, 5, 2)[0]
        found = engine.rollout(lambda o: torch.full((len(o), 2), 0.25), observations, 2, seed=7)
        actions = torch.full((8, 2), 0.25)
        first = engine.step(observations, actions, seed=7)
        second = engine.step(first.next_observations, actions, seed=7, step=1)
        assert found.next_observations[0::2].equal(first.next_observations)
        assert found.rewards[1::2].equal(second.rewards)
        assert found.step.tolist() == [0, 1] * 8

    def test_fills_a_buffer(self, engine):
        buffer, start = RingBuffer(30, 5, 2), inputs(8, 5, 2)[0]
        found = engine.rollout(lambda o: torch.zeros(len(o), 2), start, 3, seed=0, out=buffer)
        assert buffer.size == len(found) == 24
        with pytest.raises(InputError, match=r"the buffer's observations must be .* got .*\[24, 4\]"):
            engine.rollout(lambda o: torch.zeros(len(o), 2), start, 3, seed=0, out=RingBuffer(24, 4, 2))

    def test_goes_with_a_termination_function(self):
        ended = []

        def rule(observations, actions, next_observations):
            ended.append(len(observations))
            return torch.arange(len(observations)) == 0

        engine = RolloutEngine(make_ensemble(5, 2), termination=rule)
        engine.rollout(lambda o: torch.zeros(len(o), 2), inputs(3, 5, 2)[0], 5, seed=0)
        assert ended == [3, 2, 1]

    def test_keeps_no_graph_and_changes_no_observation(self, engine):
        module = torch.nn.Linear(5, 2)

        def policy(observations):
            actions = module(observations)
            observations.fill_(0.0)
            return actions

        start = inputs(4, 5, 2)[0]
        found = engine.rollout(policy, start, 1, seed=0)
        assert not found.actions.requires_grad
        assert found.observations.equal(start)

    @pytest.mark.parametrize(
        ("policy", "message"),
        [
            (
                lambda o: torch.zeros(len(o), 3),
                r"actions of the policy must be \[batch, 2\], got shape \[4, 3\]",
            ),
            (
                lambda o: torch.zeros(1, 2),
                "returned 1 actions for 4 observations; .* loop over `engine.step`",
            ),
            (lambda o: torch.full((4, 2), math.nan), "actions of the policy is not finite at row 0"),
            (lambda o: None, "actions of the policy must be a tensor, a NumPy array .* got NoneType"),
        ],
    )
    def test_refusals(self, engine, policy, message):
        with pytest.raises(InputError, match=message):
            engine.rollout(policy, inputs(4, 5, 2)[0], 2, seed=0)


def test_tasks_give_their_termination_rule(monkeypatch):
    task = Task("mine", "", 5, 2, make_box(5, {0: (100.0, 101.0)}))
    monkeypatch.setitem(TASKS, "mine", task)
    for given in ("mine", task):
        engine = RolloutEngine(make_ensemble(5, 2), termination=given)
        assert engine.step(*inputs(4, 5, 2), seed=0).terminals.all()


def test_reprs_are_short():
    ensemble = make_ensemble(5, 2)
    assert repr(ensemble).startswith("EnsembleDynamics(obs_dim=5, act_dim=2, members=")
    engine = RolloutEngine(ensemble, backend="reference", termination=TASKS["hopper"].box.contains, threads=2)
    assert repr(engine) == (
        f"RolloutEngine({ensemble!r}, penalty='max_aleatoric', penalty_coef=1.0, termination='contains',"
        " backend='reference', dtype='float32', threads=2, penalty_members='all', penalties=None)"
    )
    assert len(repr(engine)) < 400
