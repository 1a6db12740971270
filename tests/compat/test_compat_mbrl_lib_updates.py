"""Test mbrl-lib's SAC updates on the kernels: equality with its own, checkpoints, copies and refusals."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import mbrl_lib_parts
import numpy as np
import pytest
import torch
from kernel_noise import drawn_by_torch, noise_of, seen_draws
from mbrl_lib_updates import ACT, BATCH, CASES, HIDDEN, OBS, assert_equal, compare, make_arrays, make_sac
from own_packages import run_with
from places import TESTS
from test_compat_mbrl_lib import PACKAGES

from mopo_fast import InputError
from mopo_fast.compat import mbrl_lib
from mopo_fast.compat.mbrl_lib import fuse_sac

BESIDE = TESTS / "beside" / "mbrl_lib_updates.py"


def load_parts() -> Any:
    spec = importlib.util.spec_from_file_location("mbrl.parts", mbrl_lib_parts.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parts = load_parts()


def make_memory(seed: int = 3) -> Any:
    return parts.ReplayBuffer(make_arrays(), np.random.default_rng(seed))


@pytest.mark.slow
def test_beside_the_real_one(tmp_path: Path) -> None:
    assert int(run_with(PACKAGES, BESIDE.read_text(), tmp_path).split()[-1]) == len(CASES) + 4


# --- equality


@pytest.mark.parametrize("case", CASES)
def test_updates_are_the_originals(case: str) -> None:
    compare(parts.SAC, parts.ReplayBuffer, **CASES[case])


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("interval", [1, 3])
def test_many_updates_at_once(automatic: bool, interval: int) -> None:
    compare(
        parts.SAC,
        parts.ReplayBuffer,
        updates=14,
        at_once=7,
        automatic_entropy_tuning=automatic,
        target_update_interval=interval,
    )


def test_kernel_calls_of_many_updates() -> None:
    """Test that one call makes up to 100 updates, and stops only where the targets move or alpha begins."""

    def calls(count: int, first: int = 0, **options: Any) -> list[int]:
        sac = fuse_sac(make_sac(parts.SAC, **options))
        with seen_draws() as seen:
            sac.update_many(make_memory(), BATCH, first, count)
        return [draws.updates for draws in seen]

    fixed: dict[str, Any] = {"automatic_entropy_tuning": False}
    assert calls(250, **fixed) == [100, 100, 50]
    assert calls(9, first=6, target_update_interval=4, **fixed) == [2, 1, 3, 1, 2]
    # The first update uses the alpha of the arguments, 0.2, and not the exponential of log_alpha, 1.
    assert calls(5) == [1, 4]
    assert calls(5, alpha=1.0) == [5]


def test_targets_stay_between_their_updates() -> None:
    sac = fuse_sac(make_sac(parts.SAC, target_update_interval=4))
    before = copy.deepcopy(sac.critic_target.state_dict())
    sac.update_many(make_memory(), BATCH, 1, 3, reverse_mask=True)
    assert all(torch.equal(before[name], value) for name, value in sac.critic_target.state_dict().items())
    sac.update_parameters(make_memory(), BATCH, 4, reverse_mask=True)
    assert not any(torch.equal(before[name], value) for name, value in sac.critic_target.state_dict().items())


def test_hyperparameters_that_change() -> None:
    """Test that they count as they are at the time of a call, and parts that have been replaced."""
    compared: list[float] = []
    for change in (
        lambda sac: setattr(sac, "gamma", 0.3),
        lambda sac: setattr(sac, "tau", 0.7),
        lambda sac: setattr(sac, "target_entropy", -3.0),
        lambda sac: sac.log_alpha.data.fill_(-1.0),
        lambda sac: sac.policy_optim.param_groups[0].update(lr=0.02),
        lambda sac: setattr(sac, "policy_optim", torch.optim.Adam(sac.policy.parameters(), 1e-3)),
        lambda sac: sac.critic.load_state_dict(make_sac(parts.SAC).critic.state_dict()),
        lambda sac: setattr(sac, "critic_target", copy.deepcopy(sac.critic)),
    ):
        theirs = make_sac(parts.SAC)
        sacs = fuse_sac(copy.deepcopy(theirs)), theirs
        memories = make_memory(), make_memory()
        for number in range(3):
            if number == 1:
                for sac in sacs:
                    change(sac)
                    if len(compared) == 5:
                        # A fresh optimizer's count of steps is its own.
                        for optimizer in (sac.critic_optim, sac.alpha_optim):
                            optimizer.state.clear()
            with seen_draws() as seen:
                sacs[0].update_parameters(memories[0], BATCH, number, reverse_mask=True)
            with drawn_by_torch(noise_of(seen[0].seed, 1, BATCH, ACT)):
                theirs.update_parameters(memories[1], BATCH, number, reverse_mask=True)
        compared.append(assert_equal(*sacs, 1e-4))
    assert len(compared) == 8


# --- checkpoints, copies, seeds


@pytest.mark.parametrize("automatic", [True, False])
def test_training_goes_on_in_the_original(automatic: bool, tmp_path: Path) -> None:
    """Test that a checkpoint of a fused SAC continues in the original and in another fused one.

    It stores neither the temperature nor its optimizer, whose count of steps is then another one.
    """
    fused = fuse_sac(make_sac(parts.SAC, automatic_entropy_tuning=automatic))
    fused.update_many(make_memory(), BATCH, 0, 5, reverse_mask=True)
    fused.save_checkpoint(tmp_path / "sac.pth")
    original = make_sac(parts.SAC, automatic_entropy_tuning=automatic)
    other = fuse_sac(make_sac(parts.SAC, automatic_entropy_tuning=automatic))
    # Loading replaces tensors that are shared already.
    other.update_parameters(make_memory(), BATCH, 0)
    original.load_checkpoint(tmp_path / "sac.pth")
    other.load_checkpoint(tmp_path / "sac.pth")
    if automatic:
        other.alpha, other.log_alpha.data[:] = 0.2, 0.0
        other.alpha_optim.state.clear()
    memories = make_memory(), make_memory()
    for number in range(3):
        with seen_draws() as seen:
            made = other.update_parameters(memories[0], BATCH, number, reverse_mask=True)
        with drawn_by_torch(noise_of(seen[0].seed, 1, BATCH, ACT)):
            expected = original.update_parameters(memories[1], BATCH, number, reverse_mask=True)
        assert made == pytest.approx(expected, rel=3e-5, abs=3e-5)
    assert_equal(other, original, 3e-5)
    steps = [float(state["step"]) for state in other.policy_optim.state.values()]
    assert steps == [8.0] * len(steps)
    if automatic:
        assert float(other.alpha_optim.state[other.log_alpha]["step"]) == 3.0


def test_a_copy_learns_by_itself() -> None:
    sac = fuse_sac(make_sac(parts.SAC))
    sac.update_many(make_memory(), BATCH, 0, 3)
    copied, unchanged = copy.deepcopy(sac), copy.deepcopy(sac)
    copied.update_many(make_memory(4), BATCH, 3, 2)
    assert assert_equal(sac, unchanged, 0.0) == 0.0
    with pytest.raises(AssertionError):
        assert_equal(copied, unchanged, 0.0)
    assert copied.update_many.args == (copied,)
    steps = [float(one.policy_optim.state[one.policy.linear1.weight]["step"]) for one in (copied, sac)]
    assert steps == [5.0, 3.0]


def test_a_seed_repeats_a_training() -> None:
    def train(seed: int) -> Any:
        sac = fuse_sac(make_sac(parts.SAC))
        torch.manual_seed(seed)
        sac.update_many(make_memory(), BATCH, 0, 5)
        return sac

    first = train(1)
    assert assert_equal(train(1), first, 0.0) == 0.0
    with pytest.raises(AssertionError):
        assert_equal(train(2), first, 0.0)


def test_a_lower_precision() -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        sac = fuse_sac(make_sac(parts.SAC), dtype=dtype)
        torch.manual_seed(0)
        losses.append(sac.update_many(make_memory(), BATCH, 0, 5))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.05)


# --- refusals


def refused(message: str, change: Any, **options: Any) -> None:
    sac = make_sac(parts.SAC, **options)
    change(sac)
    before = copy.deepcopy(sac.policy.state_dict())
    with pytest.raises(InputError, match=message):
        fuse_sac(sac)
    assert all(torch.equal(before[name], value) for name, value in sac.policy.state_dict().items())
    assert "update_parameters" not in vars(sac)


def test_sacs_that_cannot_be_fused() -> None:
    def own(base: type, method: str) -> Any:
        return type(f"My{base.__name__}", (base,), {"__module__": "my", method: lambda *_: None})

    with pytest.raises(InputError, match=r"pytorch_sac_pranz24.SAC, got object; a SACAgent has it"):
        fuse_sac(object())
    refused(
        "take a GaussianPolicy, got DeterministicPolicy; leave fuse_sac out",
        lambda sac: setattr(sac, "policy", parts.DeterministicPolicy()),
    )
    for name, method in (("policy", "sample"), ("policy", "forward"), ("critic_target", "forward")):
        refused(
            rf"has a method {method} of its own.*leave fuse_sac out",
            lambda sac, name=name, method=method: setattr(
                getattr(sac, name), "__class__", own(type(getattr(sac, name)), method)
            ),
        )
    with pytest.raises(InputError, match="MySAC has a method update_parameters of its own"):
        fuse_sac(make_sac(own(parts.SAC, "update_parameters")))
    refused(r"actions in \[-1, 1\], got action_scale \[0.4", lambda sac: sac.policy.action_scale.fill_(0.4))
    refused("action_bias .*RescaleAction", lambda sac: sac.policy.action_bias.fill_(0.1))
    for interval in (0, 2.5):
        refused("target_update_interval must be", lambda _: None, target_update_interval=interval)
    refused("fixed temperature must be positive, got 0", lambda _: None, alpha=0.0)
    refused(r"discount must be in \[0, 1\), got 1.0", lambda _: None, gamma=1.0)
    refused("with biases, in float32, got .* in torch.float64", lambda sac: sac.critic.double())

    def other_optimizer(name: str, kind: Any, **options: Any) -> Any:
        def change(sac: Any) -> None:
            setattr(sac, name, kind(getattr(sac, name).param_groups[0]["params"], **options))

        return change

    refused("optimizer of the critic is AdamW", other_optimizer("critic_optim", torch.optim.AdamW))
    decay = other_optimizer("alpha_optim", torch.optim.Adam, weight_decay=0.1)
    refused("optimizer of the alpha is Adam with .*'weight_decay': 0.1", decay)
    refused(
        "must have the actor's hidden layers",
        lambda sac: setattr(sac.critic, "linear5", torch.nn.Linear(HIDDEN, 8)),
    )


def test_updates_that_are_refused() -> None:
    sac = fuse_sac(make_sac(parts.SAC))
    memory = make_memory()
    with pytest.raises(InputError, match="count must be at least 1, got 0"):
        sac.update_many(memory, BATCH, 0, 0)
    memory.arrays[4] = np.full(len(memory.arrays[4]), 0.5)
    with pytest.raises(InputError, match="masks that are 0 or 1"):
        sac.update_parameters(memory, BATCH, 0)
    # logical_not makes 0 of any other mask.
    sac.update_parameters(memory, BATCH, 0, reverse_mask=True)
    memory.arrays[3][:] = np.nan
    with pytest.raises(InputError, match="critic_loss is not finite"):
        sac.update_parameters(memory, BATCH, 1, reverse_mask=True)
    with pytest.raises(
        InputError, match="take 3 observation and 2 action dimensions, the batches have 4 and 2"
    ):
        wrong = [np.zeros((len(memory.arrays[0]), OBS + 1), np.float32), *memory.arrays[1:]]
        sac.update_parameters(parts.ReplayBuffer(wrong, np.random.default_rng(0)), BATCH, 1, None, True)
    assert mbrl_lib._shared_sac(sac).sac.updates == 2


@pytest.mark.parametrize(
    "name", ["tau", "policy_optim", "log_alpha", "policy.mean_linear", "critic_target.linear6"]
)
def test_another_version_is_named(name: str) -> None:
    sac = make_sac(parts.SAC)
    *owners, attribute = name.split(".")
    owner = getattr(sac, owners[0]) if owners else sac
    delattr(owner, attribute)
    with pytest.raises(InputError, match=f"has no {attribute}; this adapter was written for mbrl-lib 0.2.0"):
        fuse_sac(sac)
    assert "update_parameters" not in vars(sac)
