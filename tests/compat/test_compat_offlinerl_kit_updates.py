"""Test OfflineRL-Kit's updates on the kernels: equality with recorded ones, and its trainer's loop."""

import copy
import gc
import importlib.util
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import offlinerl_kit_parts
import pytest
import torch
from offlinerl_kit_model import make_dynamics
from places import RECORDED
from torch import nn

from mopo_fast import InputError
from mopo_fast.compat import offlinerl_kit as kit
from mopo_fast.compat import torch_sac
from mopo_fast.compat.offlinerl_kit import policy as kit_policy
from mopo_fast.compat.torch_sac import SharedSAC
from mopo_fast.sac import SAC

FOLDER = RECORDED / "offlinerl_kit"
# The recorded updates have 40 rows, the first 5 of them from the data.
REAL = 5


def load_parts() -> Any:
    path = Path(offlinerl_kit_parts.__file__)
    spec = importlib.util.spec_from_file_location("offlinerlkit.parts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parts = load_parts()
OBS, ACT = parts.OBS, parts.ACT


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "learn.npz") as file:
        return dict(file)


def recorded_policy(**options: Any) -> Any:
    """Make the policy that the recording began with, taken over by `fuse_learn`."""
    policy: Any = parts.MOPOPolicy()
    with np.load(FOLDER / "learn.npz") as file:
        policy.load_state_dict(
            {name: torch.from_numpy(file[f"before {name}"]) for name in policy.state_dict()}
        )
    return kit.fuse_learn(policy, **options)


def batch_of(recorded: dict[str, np.ndarray], update: int) -> dict[str, dict[str, torch.Tensor]]:
    names = ("observations", "actions", "next_observations", "rewards", "terminals")
    parts = {"real": slice(0, REAL), "fake": slice(REAL, None)}
    return {
        part: {name: torch.from_numpy(recorded[name][update][rows]) for name in names}
        for part, rows in parts.items()
    }


def learn_as_recorded(
    policy: Any, recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(policy.actor_optim, len(recorded["rewards"]))
    losses = []
    for update in range(len(recorded["rewards"])):
        # The noise of the recorded updates has these seeds.
        monkeypatch.setattr(kit_policy, "draw_seed", lambda update=update: update)
        losses.append(policy.learn(batch_of(recorded, update)))
        schedule.step()
    return losses


# --- equality


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_updates_are_the_originals(
    recorded: dict[str, np.ndarray], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test six updates with clamped alpha, actions close to the bounds, and a cosine schedule."""
    policy = recorded_policy(backend=backend)
    losses = learn_as_recorded(policy, recorded, monkeypatch)
    assert losses[0].keys() == {"loss/actor", "loss/critic1", "loss/critic2", "loss/alpha", "alpha"}
    for name in losses[0]:
        theirs = recorded[f"loss {name}"]
        np.testing.assert_allclose(
            [one[name] for one in losses], theirs, rtol=2e-5, atol=2e-5 * abs(theirs).max()
        )
    assert recorded["loss alpha"][0] == 1.0 == float(policy._alpha)
    for name, value in policy.state_dict().items():
        theirs = recorded[f"after {name}"]
        np.testing.assert_allclose(value, theirs, rtol=1e-4, atol=1e-5 * abs(theirs).max(), err_msg=name)
    np.testing.assert_allclose(policy._log_alpha.detach(), recorded["log_alpha"], rtol=1e-5)
    for network in ("actor", "critic1", "critic2"):
        state = getattr(policy, f"{network}_optim").state
        for name, parameter in getattr(policy, network).named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                theirs = recorded[f"{moment} {network}.{name}"]
                np.testing.assert_allclose(
                    state[parameter][moment], theirs, rtol=1e-3, atol=1e-5 * abs(theirs).max(), err_msg=name
                )
            assert float(state[parameter]["step"]) == len(recorded["rewards"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_mobiles_updates_are_the_originals(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test six updates with their penalties, which only rows from the model have."""
    with np.load(FOLDER / "learn_mobile.npz") as file:
        recorded = dict(file)
    policy = recorded_mobile(recorded, backend)
    seeds = iter(range(100))
    monkeypatch.setattr(kit_policy, "draw_seed", lambda: next(seeds))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(policy.actor_optim, len(recorded["rewards"]))
    losses = []
    for update in range(len(recorded["rewards"])):
        losses.append(policy.learn(batch_of(recorded, update)))
        schedule.step()
    assert losses[0].keys() == {"loss/actor", "loss/critic", "loss/alpha", "alpha"}
    for name in losses[0]:
        theirs = recorded[f"loss {name}"]
        ours = [one[name] for one in losses]
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * abs(theirs).max(), err_msg=name)
    for name, value in policy.state_dict().items():
        theirs = recorded[f"after {name}"]
        np.testing.assert_allclose(value, theirs, rtol=1e-4, atol=1e-5 * abs(theirs).max(), err_msg=name)
    # Without the penalty the critics learn something else.
    unpenalised = recorded_mobile(recorded, backend)
    unpenalised._penalty_coef = 0.0
    assert unpenalised.learn(batch_of(recorded, 0))["loss/critic"] != pytest.approx(
        losses[0]["loss/critic"], rel=1e-2
    )


def recorded_mobile(recorded: dict[str, np.ndarray], backend: str) -> Any:
    policy = parts.MOBILEPolicy(make_dynamics(coef=0.0, backend=backend))
    policy.load_state_dict(
        {name: torch.from_numpy(recorded[f"before {name}"]) for name in policy.state_dict()}
    )
    return kit.fuse_learn(policy, backend=backend)


def test_mobiles_batches_without_model_rows_and_options_that_it_lacks() -> None:
    with np.load(FOLDER / "learn_mobile.npz") as file:
        recorded = dict(file)
    policy, batch = recorded_mobile(recorded, "cpu"), batch_of(recorded, 0)
    batch["fake"] = {name: array[:0] for name, array in batch["fake"].items()}
    rewards = batch["real"]["rewards"].clone()
    assert np.isfinite(policy.learn(batch)["loss/critic"])
    policy.learn(batch_of(recorded, 0))
    assert torch.equal(batch["real"]["rewards"], rewards)
    policy._max_q_backup = True
    with pytest.raises(InputError, match="have no max_q_backup"):
        policy.learn(batch_of(recorded, 0))
    with pytest.raises(InputError, match=r"dynamics must be mopo_fast\.compat"):
        kit.fuse_learn(parts.MOBILEPolicy(None))


def test_training_goes_on_in_the_original(
    recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Test that a checkpoint of a fused policy, with its optimizers, continues in the original and back."""
    fused = recorded_policy()
    learn_as_recorded(fused, recorded, monkeypatch)
    names = ("actor_optim", "critic1_optim", "critic2_optim", "alpha_optim")
    checkpoint = {name: getattr(fused, name).state_dict() for name in names}
    torch.save(
        checkpoint | {"policy": fused.state_dict(), "log_alpha": fused._log_alpha}, tmp_path / "all.pt"
    )

    def load(policy: Any) -> Any:
        saved = torch.load(tmp_path / "all.pt", weights_only=True)
        policy.load_state_dict(saved["policy"])
        for name in names:
            getattr(policy, name).load_state_dict(saved[name])
        policy._log_alpha.data.copy_(saved["log_alpha"])
        policy._alpha = policy._log_alpha.detach().exp().clamp(0.0, 1.0)
        return policy

    # One that has been trained otherwise, so that loading replaces tensors that are shared already.
    other = recorded_policy()
    other.learn(batch_of(recorded, 3))
    noise = kit_noise(7)
    monkeypatch.setattr(
        torch.distributions.Normal, "rsample", lambda self: self.loc + self.scale * noise.pop(0)
    )
    original = load(parts.MOPOPolicy())
    expected = original.learn(batch_of(recorded, 0))
    assert not noise
    monkeypatch.setattr(kit_policy, "draw_seed", lambda: 7)
    for policy in (load(other), fused):
        losses = policy.learn(batch_of(recorded, 0))
        assert losses == pytest.approx(expected, rel=1e-4, abs=1e-4)
        for name, value in original.state_dict().items():
            torch.testing.assert_close(policy.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        for name in names:
            steps = [state["step"].item() for state in getattr(policy, name).state.values()]
            assert steps == [7.0] * len(steps)


def kit_noise(seed: int) -> list[torch.Tensor]:
    """Return the kernel's noise of an update, in the order in which the original draws its own."""
    from mopo_fast.backends.philox import ACTION_STREAM, NEXT_ACTION_STREAM, random_normals

    rows, zeros = torch.arange(40), torch.zeros(40, dtype=torch.int64)
    return [
        random_normals(rows, zeros, stream, ACT, seed, torch.float32)
        for stream in (NEXT_ACTION_STREAM, ACTION_STREAM)
    ]


def test_actions_of_a_fused_policy(recorded: dict[str, np.ndarray]) -> None:
    """Test deterministic and sampled actions, also after the parameters were changed or replaced."""
    policy = recorded_policy()
    observations = recorded["observations"][0]

    def expected() -> np.ndarray:
        mean: torch.Tensor = policy.actor(torch.from_numpy(observations))[0]
        return torch.tanh(mean).detach().numpy()

    def check() -> None:
        made = policy.select_action(observations, deterministic=True)
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, expected(), rtol=1e-5, atol=1e-6)

    check()
    one = policy.select_action(observations[:1].astype(np.float64), deterministic=True)
    np.testing.assert_allclose(one, expected()[:1], rtol=1e-5)
    policy.learn(batch_of(recorded, 0))
    check()
    policy.actor.dist_net.mu.bias.data = torch.tensor([0.1, -0.2])
    check()
    with torch.no_grad():
        policy.actor.dist_net.mu.weight.mul_(0.5)
    check()
    many = np.repeat(observations[:1], 20_000, axis=0)
    torch.manual_seed(0)
    raw = np.arctanh(policy.select_action(many).astype(np.float64).clip(-0.999999, 0.999999))
    mean, std = (some[0].detach().numpy() for some in policy.actor(torch.from_numpy(many[:1])))
    np.testing.assert_allclose(raw.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(raw.std(0), std, rtol=0.05)
    torch.manual_seed(0)
    again = policy.select_action(many)
    assert np.array_equal(np.arctanh(again.astype(np.float64).clip(-0.999999, 0.999999)), raw)


def test_a_select_action_of_ones_own_stays(recorded: dict[str, np.ndarray]) -> None:
    mine = type("MyPolicy", (parts.MOPOPolicy,), {"__module__": "my", "select_action": lambda *_: "mine"})
    assert kit.fuse_learn(mine()).select_action(None) == "mine"


def test_memory_that_pytorch_moves(recorded: dict[str, np.ndarray]) -> None:
    """Test that actions and updates follow parameters whose memory is shared with other processes."""
    policy = recorded_policy()
    observations = recorded["observations"][0]
    before = policy.select_action(observations, deterministic=True)
    policy.share_memory()
    gc.collect()
    assert np.array_equal(policy.select_action(observations, deterministic=True), before)
    policy.learn(batch_of(recorded, 0))
    mean = policy.actor(torch.from_numpy(observations))[0]
    made = policy.select_action(observations, deterministic=True)
    np.testing.assert_allclose(made, torch.tanh(mean).detach(), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(made, before)


@pytest.mark.parametrize("shape", [(OBS,), (2, 4, OBS)])
def test_actions_for_observations_of_any_shape(shape: tuple[int, ...]) -> None:
    policy = recorded_policy()
    observations = torch.randn(shape, requires_grad=True)
    expected = torch.tanh(policy.actor(observations)[0]).detach()
    made = policy.select_action(observations, deterministic=True)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


def test_a_policy_that_is_pickled(
    recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "offlinerlkit", types.ModuleType("offlinerlkit"))
    monkeypatch.setitem(sys.modules, "offlinerlkit.parts", parts)
    policy = recorded_policy()
    policy.learn(batch_of(recorded, 0))
    torch.save(policy, tmp_path / "policy.pt")
    loaded = torch.load(tmp_path / "policy.pt", weights_only=False)
    monkeypatch.setattr(kit_policy, "draw_seed", lambda: 3)
    assert loaded.learn(batch_of(recorded, 1)) == policy.learn(batch_of(recorded, 1))
    assert loaded.learn.args == (loaded,)
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_second_call_of_fuse_learn_counts(recorded: dict[str, np.ndarray]) -> None:
    policy = recorded_policy()
    assert kit_policy.shared_sac(policy).sac.backend == "cpu"
    kit.fuse_learn(policy, backend="reference", dtype="bfloat16", threads=1)
    shared = kit_policy.shared_sac(policy)
    assert (shared.sac.backend, shared.sac.config.dtype, shared.sac.threads) == ("reference", "bfloat16", 1)


def test_parameters_that_are_replaced(recorded: dict[str, np.ndarray]) -> None:
    """Test that new parameters in old layers need new optimizers, as they do in the original."""
    policy = recorded_policy()
    policy.learn(batch_of(recorded, 0))
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.load_state_dict(state, assign=True)
    with pytest.raises(InputError, match="must have one group, of all its parameters"):
        policy.learn(batch_of(recorded, 0))
    for name in ("actor", "critic1", "critic2"):
        optimizer = torch.optim.Adam(getattr(policy, name).parameters(), lr=1e-2)
        setattr(policy, f"{name}_optim", optimizer)
    policy.alpha_optim = torch.optim.Adam([policy._log_alpha], lr=1e-2)
    policy.learn(batch_of(recorded, 0))
    assert not torch.equal(policy.state_dict()["critic1.last.weight"], state["critic1.last.weight"])


def test_counts_that_an_interrupt_left_behind(recorded: dict[str, np.ndarray]) -> None:
    """Test that counts of steps, some of them set, are completed before the next update."""
    policy = recorded_policy()
    policy.learn(batch_of(recorded, 0))
    shared = kit_policy.shared_sac(policy)
    shared.sac.updates, shared._counts_are_due = 5, True
    policy.actor_optim.state[policy.actor.dist_net.mu.weight]["step"].fill_(5.0)
    policy.learn(batch_of(recorded, 0))
    for optimizer in (policy.actor_optim, policy.critic1_optim, policy.critic2_optim, policy.alpha_optim):
        assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda policy: policy.double(), "a parameter has become torch.float64"),
        (lambda policy: policy.actor.requires_grad_(False), "has requires_grad=False"),
        (
            lambda policy: policy.actor.dist_net.mu.weight.register_hook(lambda g: g),
            "a parameter of .* has one",
        ),
        (lambda policy: policy.critic1.last.register_forward_hook(lambda *_: None), "call no hooks"),
        (lambda policy: policy.actor_optim.register_step_post_hook(lambda *_: None), "an optimizer has one"),
        (
            lambda policy: policy.critic1_optim.add_param_group({"params": [torch.zeros(1)]}),
            "must have one group",
        ),
    ],
)
def test_changes_that_the_updates_would_leave_out(
    change: Any, message: str, recorded: dict[str, np.ndarray]
) -> None:
    policy = recorded_policy()
    policy.learn(batch_of(recorded, 0))
    change(policy)
    with pytest.raises(InputError, match=message):
        policy.learn(batch_of(recorded, 0))


def test_a_copy_learns_by_itself(recorded: dict[str, np.ndarray]) -> None:
    policy = recorded_policy()
    policy.learn(batch_of(recorded, 0))
    copied = copy.deepcopy(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    copied.learn(batch_of(recorded, 1))
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in before.items())
    moved = [name for name, value in copied.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    assert float(copied.actor_optim.state[copied.actor.dist_net.mu.weight]["step"]) == 2.0
    assert float(policy.actor_optim.state[policy.actor.dist_net.mu.weight]["step"]) == 1.0


def test_hyperparameters_that_change(recorded: dict[str, np.ndarray]) -> None:
    """Test that learning rates, tau, gamma and the target entropy count as they are at the time of a call."""

    def after(**changes: Any) -> dict[str, torch.Tensor]:
        policy = recorded_policy()
        np.random.seed(0)
        policy.learn(batch_of(recorded, 0))
        for name, value in changes.items():
            if name.endswith("optim"):
                getattr(policy, name).param_groups[0]["lr"] = value
            else:
                setattr(policy, name, value)
        policy.learn(batch_of(recorded, 1))
        return {**policy.state_dict(), "log_alpha": policy._log_alpha.detach().clone()}

    plain = after()
    for name, value, moved in (
        ("actor_optim", 0.1, "actor."),
        ("alpha_optim", 0.1, "log_alpha"),
        ("_tau", 0.5, "_old"),
        ("_gamma", 0.1, "critic"),
        ("_target_entropy", -100.0, "log_alpha"),
    ):
        changed = after(**{name: value})
        different = [key for key in plain if not torch.equal(plain[key], changed[key])]
        assert different and all(moved in key or name == "_gamma" for key in different), name
    with pytest.raises(InputError, match="different learning rates"):
        after(critic1_optim=0.5)
    both = after(critic1_optim=0.1, critic2_optim=0.1)
    assert not torch.equal(both["critic1.last.weight"], plain["critic1.last.weight"])


def test_a_fixed_temperature(recorded: dict[str, np.ndarray]) -> None:
    policy: Any = parts.MOPOPolicy(alpha=0.2)
    kit.fuse_learn(policy)
    losses = policy.learn(batch_of(recorded, 0))
    assert losses.keys() == {"loss/actor", "loss/critic1", "loss/critic2"} and policy._alpha == 0.2
    assert float(kit_policy.shared_sac(policy).sac.alpha) == pytest.approx(0.2)
    policy._alpha = 0.5
    policy.learn(batch_of(recorded, 0))
    assert float(kit_policy.shared_sac(policy).sac.alpha) == pytest.approx(0.5)


def test_parts_that_are_replaced(recorded: dict[str, np.ndarray]) -> None:
    """Test that a new optimizer and a new critic count from the next update on."""
    policy = recorded_policy()
    policy.learn(batch_of(recorded, 0))
    policy.critic1, policy.critic2 = parts.Critic(), parts.Critic()
    with pytest.raises(InputError, match="must have one group, of all its parameters"):
        policy.learn(batch_of(recorded, 0))
    for number in (1, 2):
        critic = getattr(policy, f"critic{number}")
        setattr(policy, f"critic{number}_optim", torch.optim.Adam(critic.parameters(), lr=1e-2))
    policy.actor_optim = torch.optim.Adam(policy.actor.parameters(), lr=1e-2)
    policy.alpha_optim = torch.optim.Adam([policy._log_alpha], lr=1e-2)
    before = policy.critic2.last.bias.clone()
    policy.learn(batch_of(recorded, 0))
    assert not torch.equal(policy.critic2.last.bias, before)
    assert float(policy.critic2_optim.state[policy.critic2.last.bias]["step"]) == 1.0


def test_policies_whose_updates_cannot_be_fused() -> None:
    def refuse(message: str, change: Any) -> None:
        policy: Any = parts.MOPOPolicy()
        change(policy)
        with pytest.raises(InputError, match=message):
            kit.fuse_learn(policy)

    mine = type("MyPolicy", (parts.MOPOPolicy,), {"__module__": "my", "learn": lambda *_: None})
    with pytest.raises(InputError, match=r"MyPolicy has a method learn of its own.*call fuse_rollout"):
        kit.fuse_learn(mine())
    combo = type("COMBOPolicy", (parts.MOPOPolicy,), {"__module__": "offlinerlkit", "learn": parts.mlp})
    with pytest.raises(InputError, match="COMBOPolicy has a method learn of its own"):
        kit.fuse_learn(combo())

    def adamw(policy: Any) -> None:
        policy.critic2_optim = torch.optim.AdamW(policy.critic2.parameters())

    refuse("the optimizer of the critic is AdamW", adamw)
    decay = torch.optim.Adam
    refuse(
        "'weight_decay': 0.1",
        lambda policy: setattr(policy, "actor_optim", decay(policy.actor.parameters(), weight_decay=0.1)),
    )
    refuse(
        "must have one group, of all its parameters",
        lambda policy: setattr(policy, "actor_optim", decay(policy.actor.backbone.parameters())),
    )

    def share_a_critic(policy: Any) -> None:
        policy.critic2_old = policy.critic1_old

    refuse("share no layer", share_a_critic)
    mine_too = type("MyLinear", (nn.Linear,), {})
    refuse("torch.nn.Linear, got MyLinear", lambda policy: setattr(policy.critic1, "last", mine_too(6, 1)))
    refuse("linear layers with ReLU", lambda policy: policy.critic1.backbone.model.append(nn.Tanh()))

    def tanh(policy: Any) -> None:
        policy.actor.backbone.model[1] = policy.actor.backbone.model[3] = nn.Tanh()

    refuse("actor with ReLU", tanh)
    refuse(
        r"must have the actor's hidden layers \[8, 6\], got \[8\]",
        lambda policy: setattr(policy.critic1.backbone, "model", policy.critic1.backbone.model[:2]),
    )
    refuse("with biases, in float32, got .* in torch.float64", lambda policy: policy.double())
    refuse("on meta; choose the device cpu", lambda policy: policy.to("meta"))
    refuse("learning rates must be|in \\[0, 1\\)", lambda policy: setattr(policy, "_gamma", 1.5))


def test_losses_that_are_not_finite(recorded: dict[str, np.ndarray]) -> None:
    policy, batch = recorded_policy(), batch_of(recorded, 0)
    batch["fake"]["rewards"][0] = torch.nan
    with pytest.raises(InputError, match="critic_loss is not finite"):
        policy.learn(batch)
    batch = batch_of(recorded, 0)
    batch["real"]["terminals"][0] = 0.5
    with pytest.raises(InputError, match="terminals that are 0 or 1"):
        policy.learn(batch)


# --- the trainer


def make_trainer(**options: Any) -> Any:
    """Make a trainer whose model buffer grows by 10 rows at each rollout."""
    torch.manual_seed(0)
    np.random.seed(0)
    policy: Any = parts.MOPOPolicy()
    random = np.random.default_rng(0)
    sizes = {"observations": OBS, "next_observations": OBS, "actions": ACT, "rewards": 1, "terminals": 1}

    def rows(count: int) -> dict[str, np.ndarray]:
        arrays = {name: random.normal(size=(count, size)) for name, size in sizes.items()}
        return arrays | {"terminals": arrays["terminals"] > 1.0}

    real = parts.ReplayBuffer(200)
    real.add_batch(**rows(200))
    trainer: Any = parts.MBPolicyTrainer(policy, real, parts.ReplayBuffer(100), **options)
    trainer.rollouts = []

    def rollout(start: np.ndarray, length: int) -> Any:
        assert start.shape == (10, OBS) and length == 1
        trainer.rollouts.append(parts.updates_of(policy) if trainer.losses else 0.0)
        return rows(10), {}

    def update_dynamics(buffer: Any) -> None:
        assert buffer.sample(3)["rewards"].shape == (3, 1)
        trainer.seen.append(("dynamics", parts.updates_of(policy)))

    policy.update_dynamics = update_dynamics
    return trainer, rollout


def fused_trainer(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    trainer, rollout = make_trainer(**options)
    # Rollouts have tests of their own.
    monkeypatch.setattr("mopo_fast.compat.offlinerl_kit.training.fuse_rollout", lambda policy: policy)
    assert kit.fuse_trainer(trainer) is trainer
    trainer.policy.rollout = rollout
    return trainer


def test_the_loop_sees_the_updates_that_it_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fused_trainer(monkeypatch, dynamics_freq=70)
    calls: list[int] = []
    update = SharedSAC.update

    def count(self: Any, draws: Any, *others: Any) -> Any:
        calls.append(draws.updates)
        return update(self, draws, *others)

    monkeypatch.setattr(SharedSAC, "update", count)
    before = (
        dict(vars(trainer.policy)),
        {name: id(value) for name, value in vars(trainer.real_buffer).items()},
    )
    assert trainer.train() == "done"
    assert trainer.rollouts == [30.0 * i for i in range(17)]
    dynamics = [("dynamics", float(steps)) for steps in range(70, 500, 70)]
    assert [one for one in trainer.seen if one[0] == "dynamics"] == dynamics
    assert [one for one in trainer.seen if one[0] != "dynamics"] == [(250, 250.0), (500, 500.0)]
    assert sum(calls) == 500 == len(trainer.losses) and 17 <= len(calls) <= 17 + 7 + 2
    assert trainer.losses[0] == trainer.losses[29] != trainer.losses[30]
    # Nothing of the training's own stays behind.
    assert vars(trainer.policy).keys() - before[0].keys() == set() and "sample" not in vars(
        trainer.real_buffer
    )
    assert trainer.policy.learn == before[0]["learn"]


def test_batches_come_from_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the shares of the two buffers, and that only rows in use are drawn, by rewards that tell them."""
    trainer = fused_trainer(monkeypatch, freq=10**6)
    policy, real, fake = trainer.policy, trainer.real_buffer, trainer.fake_buffer
    real.rewards[:], fake.rewards[:], fake.terminals[:] = 100.0, np.nan, 1.0
    real.terminals[:] = 1.0
    rows = {
        name: getattr(fake, name)[:20].copy() for name in ("observations", "next_observations", "actions")
    }
    zero = np.zeros((20, 1), np.float32)
    policy.rollout = lambda start, length: ({**rows, "rewards": zero, "terminals": zero + 1.0}, {})
    for network in (policy.critic1, policy.critic2):
        for parameter in network.parameters():
            parameter.data.zero_()
    for name in ("critic1_optim", "critic2_optim"):
        getattr(policy, name).param_groups[0]["lr"] = 1e-12
    trainer._epoch, trainer._step_per_epoch = 1, 10
    trainer.train()
    # Critics are zero, so that their loss is the mean of squared rewards: 5 rows of 40 are real ones.
    assert [loss["loss/critic1"] for loss in trainer.losses] == pytest.approx([5 / 40 * 100.0**2] * 10)


def test_the_logged_temperature_is_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that it is the mean over the updates of one call, by a temperature that falls at a known rate."""
    trainer = fused_trainer(monkeypatch)
    policy = trainer.policy
    # So far from the entropy that all gradients are equal, and a step of Adam is the learning rate.
    policy._target_entropy = -1000.0
    policy.alpha_optim.param_groups[0]["lr"] = 0.01
    trainer._epoch, trainer._step_per_epoch = 1, 30
    trainer.train()
    after = np.exp(-0.01 * np.arange(1, 31))
    assert [loss["alpha"] for loss in trainer.losses] == pytest.approx([after.mean()] * 30, rel=1e-4)
    assert float(policy._alpha) == pytest.approx(after[-1], rel=1e-3)


def test_a_seed_repeats_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        trainer = fused_trainer(monkeypatch)
        np.random.seed(seed)
        trainer.train()
        state: dict[str, torch.Tensor] = trainer.policy.state_dict()
        return state

    first, second, other = run(1), run(1), run(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_trained_policy_is_like_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that losses and temperature of 500 updates agree with those of the original loop."""
    ours = fused_trainer(monkeypatch)
    ours.train()
    theirs, rollout = make_trainer()
    theirs.policy.rollout = rollout
    theirs.train()
    for name in ours.losses[0]:
        mine, others = (np.array([one[name] for one in trainer.losses[300:]]) for trainer in (ours, theirs))
        assert abs(mine.mean() - others.mean()) < 0.15 * abs(others.mean()) + 0.05, name


def test_a_loop_that_looks_into_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that batches that the loop has read or changed are learnt from as they are, one by one."""
    trainer = fused_trainer(monkeypatch)

    def shift(trainer: Any, batch: Any, steps: int) -> None:
        batch["fake"]["rewards"].add_(1.0)

    trainer.look = shift
    trainer._epoch = 1
    trainer.train()
    assert trainer.seen == [(250, 250.0)] and len({loss["loss/actor"] for loss in trainer.losses}) == 250
    trainer = fused_trainer(monkeypatch)
    trainer.look = lambda trainer, batch, steps: batch["real"]["rewards"] if steps % 7 == 6 else None
    with pytest.raises(InputError, match=r"looks into some batches and not into others.*call fuse_rollout"):
        trainer.train()
    assert "sample" not in vars(trainer.real_buffer)


def test_a_loop_that_looks_at_the_policy_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fused_trainer(monkeypatch)
    trainer.look = lambda trainer, batch, steps: trainer.policy.state_dict() if steps == 45 else None
    with pytest.raises(InputError, match=r"calls the policy's state_dict at update 45.* 15 updates further"):
        trainer.train()
    # A second training starts afresh.
    trainer.look, trainer.losses = lambda *_: None, []
    assert trainer.train() == "done"


def test_an_interrupt_leaves_the_temperatures_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that Ctrl-C waits until the policy has its new temperature, not only the logarithm."""
    trainer = fused_trainer(monkeypatch)
    policy, make = trainer.policy, SAC.make
    policy._target_entropy = -1000.0

    def interrupted(self: Any, draws: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return make(self, draws)

    monkeypatch.setattr(SAC, "make", interrupted)
    # A process in the background may have been told to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert float(policy._alpha) == float(policy._log_alpha.detach().exp()) < 1.0


def test_trainers_that_cannot_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = make_trainer()
    monkeypatch.setattr("mopo_fast.compat.offlinerl_kit.training.fuse_rollout", lambda policy: policy)
    trainer.fake_buffer = parts.ReplayBuffer(100, np.float64)
    with pytest.raises(InputError, match="rows of float32, got observations float64"):
        kit.fuse_trainer(trainer)
    trainer, _ = make_trainer()
    trainer.real_buffer.sample = lambda batch_size: {}
    with pytest.raises(InputError, match="ReplayBuffer has a method sample of its own"):
        kit.fuse_trainer(trainer)
    trainer, _ = make_trainer()
    trainer.train = lambda: None
    with pytest.raises(InputError, match="MBPolicyTrainer has a method train of its own"):
        kit.fuse_trainer(trainer)
    trainer = fused_trainer(monkeypatch)
    trainer.policy = parts.MOPOPolicy()
    with pytest.raises(InputError, match="another policy than when it was fused"):
        trainer.train()
    trainer = fused_trainer(monkeypatch)
    trainer.policy.rollout = lambda start, length: (
        {name: np.zeros((0, size), np.float32) for name, size in (("rewards", 1), ("terminals", 1))},
        {},
    )
    with pytest.raises(InputError, match="a buffer that is empty"):
        trainer.train()


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("trainer", "_rollout_freq"),
        ("policy", "_tau"),
        ("policy", "critic2_old"),
        ("policy", "_log_alpha"),
        ("policy.actor", "dist_net"),
        ("policy.actor.dist_net", "_sigma_max"),
        ("policy.critic1", "last"),
        ("fake_buffer", "_size"),
    ],
)
def test_another_version_that_lacks_what_is_read(of: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that the error names the attribute and the version that the adapter was written for."""
    monkeypatch.setattr("mopo_fast.compat.offlinerl_kit.training.fuse_rollout", lambda policy: policy)
    trainer, _ = make_trainer()
    thing = trainer
    for part in of.split(".") if of != "trainer" else []:
        thing = getattr(thing, part)
    delattr(thing, name)
    message = f"{type(thing).__name__} has no {name}; this adapter was written for OfflineRL-Kit at commit"
    with pytest.raises(InputError, match=message):
        kit.fuse_trainer(trainer)


def test_an_alpha_above_1_is_refused() -> None:
    policy: Any = parts.MOPOPolicy()
    with torch.no_grad():
        policy._log_alpha.fill_(0.5)
    policy._alpha = policy._log_alpha.detach().exp()
    with pytest.raises(
        InputError, match=r"an alpha of at most 1, .* got 1\.64872: begin with a log_alpha of at"
    ):
        kit.fuse_learn(policy)
    assert "learn" not in vars(policy)


def test_two_threads_share_one_sac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that two threads which use a policy for the first time at once make one SharedSAC."""
    policy = copy.deepcopy(recorded_policy())
    made, ready = [], threading.Barrier(2)

    class Slow(SharedSAC):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(self)
            time.sleep(0.2)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(torch_sac, "SharedSAC", Slow)

    def use() -> None:
        ready.wait()
        kit_policy.shared_sac(policy)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_hyperparameters_are_built_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, built = recorded_policy(), []
    with np.load(FOLDER / "learn.npz") as file:
        batch = batch_of(dict(file), 0)
    config = kit_policy.sac_config
    monkeypatch.setattr(kit_policy, "sac_config", lambda policy: built.append(1) or config(policy))
    policy.learn(batch)
    policy.select_action(np.zeros((1, OBS), np.float32))
    assert len(built) == 1
