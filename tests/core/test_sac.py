"""Test SAC against an independent implementation in float64, its options, its state, and its refusals."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from kernel_cases import to_double
from small_sacs import ACT, BATCH, CONFIG, OBS, filled, transitions
from torch import nn

from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError
from mopo_fast.sac import METRICS, SAC

VARIANTS = {
    "authors": {},
    "act_dim": {"target_entropy": "act_dim"},
    "offlinerl-kit": {
        "order": "critic_first",
        "critic_loss": "mse",
        "alpha_max": 1.0,
        "log_std_min": -5.0,
        "actor_learning_rate": 1e-4,
        "alpha_learning_rate": 1e-2,
    },
    "unifloral": {
        "order": "actor_first",
        "adam_epsilon": 1e-3,
        "critic_loss": "mse",
        "critics": 3,
        "target_entropy": "act_dim",
        "alpha_learning_rate": 1e-1,
        "polyak": 0.1,
    },
    "epsilon": {"log_prob_epsilon": 1e-2},
    "mobile": {
        "order": "critic_first",
        "critic_loss": "mean_mse",
        "critics": 3,
        "entropy_backup": False,
        "target_min": 0.0,
        "discount": 0.9,
    },
    "redq": {
        "critics": 10,
        "target_critics": 2,
        "actor_q": "mean",
        "order": "critic_first",
        "critic_loss": "mse",
    },
    "redq's targets": {"critics": 3, "target_critics": 1, "order": "actor_first", "polyak": 0.1},
    "ten critics, three layers": {"critics": 10, "hidden": (24, 16, 24)},
    "real only": {"real_ratio": 1.0, "discount": 0.9, "polyak": 0.1},
}


class Plain:
    """A plain implementation of SAC: nn.Linear, one critic at a time, backward() and step()."""

    def __init__(self, sac: SAC) -> None:
        self.config, self.target_entropy = sac.config, sac.target_entropy
        self.actor = self.mlp(sac.actor.weights, sac.actor.biases)
        self.critics = self.split(sac.critic)
        self.targets = self.split(sac.target)
        self.log_alpha = sac.log_alpha.detach().clone().requires_grad_()
        c = self.config

        def adam(parameters: Any, rate: float) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, rate, eps=c.adam_epsilon)

        self.actor_adam = adam(self.actor.parameters(), c.actor_learning_rate)
        self.critic_adams = [adam(q.parameters(), c.critic_learning_rate) for q in self.critics]
        self.alpha_adam = adam([self.log_alpha], c.alpha_learning_rate)

    @staticmethod
    def mlp(weights: Any, biases: Any) -> nn.Sequential:
        layers: list[nn.Module] = []
        for weight, bias in zip(weights, biases, strict=True):
            linear = nn.Linear(*weight.shape, dtype=weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(weight.T)
                linear.bias.copy_(bias)
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def split(self, critic: Any) -> list[nn.Sequential]:
        return [
            self.mlp([w[k] for w in critic.weights], [b[k] for b in critic.biases])
            for k in range(self.config.critics)
        ]

    def sample(self, observations: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.actor(observations).split(ACT, dim=-1)
        std = log_std.clamp(self.config.log_std_min, self.config.log_std_max).exp()
        gaussian = torch.distributions.Normal(mean, std)
        raw = mean + std * noise
        actions = raw.tanh()
        log_prob = gaussian.log_prob(raw) - (1 - actions.square() + self.config.log_prob_epsilon).log()
        return actions, log_prob.sum(-1)

    def alpha(self) -> float:
        alpha = math.exp(self.log_alpha.item())
        return alpha if self.config.alpha_max is None else min(alpha, self.config.alpha_max)

    def update(
        self, batch: Transitions, noise: torch.Tensor, next_noise: torch.Tensor, drawn: list[int]
    ) -> None:
        order = self.config.order
        if order == "actor_first":
            self.temperature_gradient(batch, noise)
            self.alpha_adam.step()
            self.actor_gradient(batch, noise)
            self.actor_adam.step()
            self.move_targets()
            self.critic_gradients(batch, next_noise, drawn)
            self.critic_step()
            return
        self.critic_gradients(batch, next_noise, drawn)
        held = [[p.grad.clone() for p in q.parameters()] for q in self.critics]
        if order == "critic_first":
            self.critic_step()
        self.actor_gradient(batch, noise)
        self.temperature_gradient(batch, noise)
        if order == "simultaneous":
            # The actor's loss has added to the critics' gradients, so restore their own.
            for q, gradients in zip(self.critics, held, strict=True):
                for parameter, gradient in zip(q.parameters(), gradients, strict=True):
                    parameter.grad = gradient
            self.critic_step()
        self.actor_adam.step()
        self.alpha_adam.step()
        self.move_targets()

    def critic_gradients(self, batch: Transitions, next_noise: torch.Tensor, drawn: list[int]) -> None:
        config = self.config
        s, a, r, s2 = batch.observations, batch.actions, batch.rewards, batch.next_observations
        with torch.no_grad():
            a2, log_prob2 = self.sample(s2, next_noise)
            targets = [self.targets[number] for number in drawn]
            q2 = torch.stack([q(torch.cat([s2, a2], -1))[:, 0] for q in targets]).min(0).values
            if config.entropy_backup:
                q2 -= self.alpha() * log_prob2
            y = r + (1 - batch.terminals.to(r)) * config.discount * q2
            if config.target_min is not None:
                y = torch.maximum(y, torch.tensor(config.target_min))
        for q, adam in zip(self.critics, self.critic_adams, strict=True):
            adam.zero_grad()
            scale = {"half_mse": 0.5, "mse": 1.0, "mean_mse": 1 / config.critics}[config.critic_loss]
            (scale * (q(torch.cat([s, a], -1))[:, 0] - y).square().mean()).backward()

    def critic_step(self) -> None:
        for adam in self.critic_adams:
            adam.step()

    def actor_gradient(self, batch: Transitions, noise: torch.Tensor) -> None:
        s = batch.observations
        actions, log_prob = self.sample(s, noise)
        q = torch.stack([q(torch.cat([s, actions], -1))[:, 0] for q in self.critics])
        value = {"min": q.min(0).values, "mean": sum(q) / len(q)}[self.config.actor_q]
        self.actor_adam.zero_grad()
        (self.alpha() * log_prob - value).mean().backward()

    def temperature_gradient(self, batch: Transitions, noise: torch.Tensor) -> None:
        _, log_prob = self.sample(batch.observations, noise)
        self.alpha_adam.zero_grad()
        (-(self.log_alpha * (log_prob + self.target_entropy).detach()).mean()).backward()

    def move_targets(self) -> None:
        polyak = self.config.polyak
        with torch.no_grad():
            for target, q in zip(self.targets, self.critics, strict=True):
                for old, new in zip(target.parameters(), q.parameters(), strict=True):
                    old.copy_((1 - polyak) * old + polyak * new)

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {"log_alpha": self.log_alpha}
        nets = {"actor": [self.actor], "critic": self.critics, "target": self.targets}
        for name, copies in nets.items():
            for i in range(len(copies[0][::2])):
                weights = [net[2 * i].weight.T for net in copies]
                biases = [net[2 * i].bias for net in copies]
                single = name == "actor"
                tensors[f"{name}.weights.{i}"] = weights[0] if single else torch.stack(weights)
                tensors[f"{name}.biases.{i}"] = biases[0] if single else torch.stack(biases)
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_equal_a_plain_implementation(variant: str) -> None:
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    sac = to_double(SAC(OBS, ACT, config, seed=3))
    with torch.no_grad():
        # Make the targets differ from the critics, and set an alpha that a clamp would change.
        for target in sac.target.parameters():
            target.mul_(1.3).add_(0.01)
        sac.log_alpha.fill_(0.4)
    plain = Plain(sac)
    g = torch.Generator().manual_seed(0)
    before = plain.state()
    for i in range(3):
        batch = transitions(BATCH, seed=i, dtype=torch.float64)
        noise, next_noise = torch.randn(2, BATCH, ACT, generator=g, dtype=torch.float64)
        count = config.target_critics
        drawn = None if count is None else torch.randperm(config.critics, generator=g)[:count]
        sac.update(batch, noise, next_noise, drawn)
        plain.update(batch, noise, next_noise, list(range(config.critics) if drawn is None else drawn))
        ours, theirs = sac.state(), plain.state()
        for name, expected in theirs.items():
            moved = (expected - before[name]).abs().max()
            assert moved > 1e-6, f"{name} did not move, so nothing was compared"
            error = (ours[name] - expected).abs().max()
            assert error < 1e-6 * moved, f"{name}, update {i}: {error} beside a movement of {moved}"


def test_the_drawn_critics_must_be_given() -> None:
    batch, noise = transitions(BATCH, seed=1), torch.zeros(BATCH, ACT)
    sac = SAC(OBS, ACT, dataclasses.replace(CONFIG, critics=3, target_critics=2))
    for drawn in (None, torch.tensor([1])):
        with pytest.raises(InputError, match="an update with target_critics=2 needs as many numbers"):
            sac.update(batch, noise, noise, drawn)
    with pytest.raises(InputError, match="an update with target_critics=None needs as many numbers, got 2"):
        SAC(OBS, ACT, CONFIG).update(batch, noise, noise, torch.tensor([0, 1]))


def test_metrics_are_of_the_state_before_the_update() -> None:
    sac = SAC(OBS, ACT, CONFIG)
    batch, noise = transitions(BATCH, seed=1), torch.zeros(BATCH, ACT)
    with torch.no_grad():
        q = sac.critic(batch.observations, batch.actions)
        actions, log_prob = sac.actor.sample(batch.observations, noise)
        actor_loss = (log_prob - sac.critic(batch.observations, actions).min(0).values).mean()
    *values, first, second = sac.update(batch, noise, noise).tolist()
    metrics = dict(zip(METRICS, values, strict=True))
    assert first != second and metrics["critic_loss"] == pytest.approx(first + second, rel=1e-5)
    assert metrics["q"] == pytest.approx(q.mean().item(), rel=1e-5)
    assert metrics["actor_loss"] == pytest.approx(actor_loss.item(), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(-log_prob.mean().item(), rel=1e-5)
    assert metrics["alpha"] == 1.0


def test_metrics_of_actor_first() -> None:
    """The losses are those before their steps; alpha is that of the actor's and the critics' losses."""
    config = dataclasses.replace(CONFIG, order="actor_first", alpha_learning_rate=0.5)
    sac = SAC(OBS, ACT, config)
    with torch.no_grad():
        sac.log_alpha.fill_(0.4)
        batch, noise = transitions(BATCH, seed=1), torch.zeros(BATCH, ACT)
        actions, log_prob = sac.actor.sample(batch.observations, noise)
        least = sac.critic(batch.observations, actions).min(0).values
        q = sac.critic(batch.observations, batch.actions)
    *values, _, _ = sac.update(batch, noise, noise).tolist()
    metrics = dict(zip(METRICS, values, strict=True))
    alpha, entropy = sac.alpha.item(), -log_prob.mean().item()
    assert abs(alpha - math.exp(0.4)) > 0.1
    assert metrics["alpha"] == pytest.approx(alpha)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert metrics["alpha_loss"] == pytest.approx(0.4 * (entropy - sac.target_entropy), rel=1e-5)
    assert metrics["actor_loss"] == pytest.approx(-alpha * entropy - least.mean().item(), rel=1e-5)
    assert metrics["q"] == pytest.approx(q.mean().item(), rel=1e-5)


class TestMeasure:
    def test_values_equal_those_by_hand(self) -> None:
        """One row of each source leaves nothing to chance, and a narrow policy acts by its mean."""
        config = dataclasses.replace(CONFIG, entropy_backup=False, log_std_min=-20.0, log_std_max=-19.0)
        sac = SAC(OBS, ACT, config, seed=3)
        with torch.no_grad():
            sac.actor.biases[-1][0] = 4.0
            sac.actor.biases[-1][ACT:] = -50.0
            for target in sac.target.parameters():
                target.mul_(1.3)
        data, buffer = transitions(1, seed=1), filled(1)
        rows = [data, buffer.storage[:1]]
        q = [sac.critic(row.observations, row.actions) for row in rows]
        errors = []
        for row, value in zip(rows, q, strict=True):
            action = torch.tanh(sac.actor(row.next_observations)[0])
            least = sac.target(row.next_observations, action).min(0).values
            target = row.rewards + config.discount * (~row.terminals) * least
            errors.append((value - target).abs().mean().item())
        found = sac.measure(data, buffer, 50, seed=9)
        real, model = (value.mean().item() for value in q)
        assert found["q_std"] == pytest.approx(abs(real - model) / 2, rel=1e-5)
        assert found["td_error_real"] == pytest.approx(errors[0], rel=1e-5)
        assert found["td_error_model"] == pytest.approx(errors[1], rel=1e-5)
        assert errors[0] != pytest.approx(errors[1], rel=0.05)
        assert found["log_std"] == -20.0
        assert found["saturation"] == 0.5

    def test_the_seed_decides(self) -> None:
        sac, data, buffer = SAC(OBS, ACT, CONFIG), transitions(40, seed=1), filled(30)
        state = {name: value.clone() for name, value in sac.state().items()}
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first, again, other = (sac.measure(data, buffer, 8, seed) for seed in (1, 1, 2))
        assert first == again != other
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(value, sac.state()[name]) for name, value in state.items())

    def test_both_sources_are_needed(self) -> None:
        sac = SAC(OBS, ACT, dataclasses.replace(CONFIG, real_ratio=1.0))
        with pytest.raises(InputError, match="3 real and 0 model rows"):
            sac.measure(transitions(3, seed=1), RingBuffer(5, OBS, ACT), 8, 0)

    def test_a_value_that_is_not_finite(self) -> None:
        sac = SAC(OBS, ACT, CONFIG)
        with torch.no_grad():
            sac.critic.biases[-1].fill_(math.inf)
        with pytest.raises(InputError, match=r"SAC diverged before update 0: .* is not finite"):
            sac.measure(transitions(3, seed=1), filled(5), 8, 0)


def test_learns_the_value_of_a_constant_reward() -> None:
    config = dataclasses.replace(CONFIG, discount=0.5, polyak=0.5, critic_learning_rate=1e-2, real_ratio=1.0)
    sac = SAC(OBS, ACT, config)
    with torch.no_grad():
        sac.log_alpha.fill_(-20.0)
    data = dataclasses.replace(
        transitions(200, seed=0), rewards=torch.ones(200), terminals=torch.zeros(200, dtype=torch.bool)
    )
    sac.update_many(data, RingBuffer(1, OBS, ACT), 120, seed=0)
    q = sac.critic(data.observations, data.actions)
    assert q.mean().item() == pytest.approx(2.0, abs=0.1)


class TestUpdateMany:
    def test_same_seed_same_parameters(self) -> None:
        states = []
        for seed in (5, 5, 6):
            sac = SAC(OBS, ACT, CONFIG)
            sac.update_many(transitions(50, seed=1), filled(60), 4, seed=seed)
            states.append({name: tensor.clone() for name, tensor in sac.state().items()})
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not torch.equal(states[0]["actor.weights.0"], states[2]["actor.weights.0"])

    @pytest.mark.parametrize(("ratio", "real"), [(0.05, 12), (0.0, 0), (1.0, 256), (0.5, 128)])
    def test_batches_mix_real_and_valid_model_rows(
        self, ratio: float, real: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sac = SAC(OBS, ACT, SACConfig(hidden=(4,), real_ratio=ratio), backend="reference")
        data, buffer = transitions(30, seed=1), filled(60)
        data.rewards[:] = torch.arange(30.0)
        buffer.storage.rewards[:60] = torch.arange(1000.0, 1060.0)
        seen: list[torch.Tensor] = []
        update = sac.update

        def spy(batch: Transitions, noise: torch.Tensor, next_noise: torch.Tensor, drawn: None) -> Any:
            seen.append(batch.rewards)
            assert noise.shape == next_noise.shape == (256, ACT)
            assert not torch.equal(noise, next_noise)
            return update(batch, noise, next_noise, drawn)

        monkeypatch.setattr(sac, "update", spy)
        sac.update_many(data, buffer, 20, seed=0)
        rewards = torch.stack(seen)
        assert rewards.shape == (20, 256)
        assert bool((rewards[:, :real] < 30).all()) and bool((rewards[:, real:] >= 1000).all())
        for rows, count in ((rewards[:, :real], 30), (rewards[:, real:], 60)):
            if rows.numel():
                # Each row is drawn, and within 5 standard deviations of the expected number of times.
                drawn = rows.unique(return_counts=True)[1].double()
                mean = rows.numel() / count
                assert len(drawn) == count
                assert bool(((drawn - mean).abs() < 5 * math.sqrt(mean)).all())

    def test_returns_means(self) -> None:
        sac = SAC(OBS, ACT, CONFIG)
        means = sac.update_many(transitions(50, seed=1), filled(60), 10, seed=0)
        assert set(means) == set(METRICS)
        assert sac.updates == 10
        # Each update changes alpha by at most the learning rate, and alpha is recorded before the update.
        assert abs(means["alpha"] - 1.0) < 10 * CONFIG.alpha_learning_rate

    def test_cosine_schedule_falls_to_zero(self) -> None:
        config = dataclasses.replace(CONFIG, actor_schedule="cosine")
        sac = SAC(OBS, ACT, config, total_updates=20)
        rates = []
        for _ in range(4):
            sac.update_many(transitions(50, seed=1), filled(60), 5, seed=0)
            rates.append(sac.optimizers["actor"].learning_rate)
        expected = [3e-4 * 0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]
        assert rates == pytest.approx(expected)
        before = {name: p.clone() for name, p in sac.actor.named_parameters()}
        sac.update_many(transitions(50, seed=1), filled(60), 1, seed=0)
        assert all(torch.equal(p, before[name]) for name, p in sac.actor.named_parameters())
        assert sac.optimizers["critic"].learning_rate == 3e-4

    def test_refuses_nothing_to_draw_from(self) -> None:
        sac = SAC(OBS, ACT, CONFIG)
        with pytest.raises(InputError, match="0 real and 16 model rows, but there are 50 and 0"):
            sac.update_many(transitions(50, seed=1), RingBuffer(9, OBS, ACT), 1, seed=0)
        with pytest.raises(InputError, match="updates must be at least 1, got 0"):
            sac.update_many(transitions(50, seed=1), filled(60), 0, seed=0)

    def test_refuses_rows_of_other_sizes(self) -> None:
        sac = SAC(OBS + 1, ACT, CONFIG)
        with pytest.raises(InputError, match=r"take 6 observation and 2 action .*, the data has 5 and 2"):
            sac.update_many(transitions(50, seed=1), filled(60), 1, seed=0)
        with pytest.raises(InputError, match=r"take 5 observation and 2 action .*, model has 5 and 3"):
            buffer = RingBuffer(9, OBS, ACT + 1)
            SAC(OBS, ACT, CONFIG).update_many(transitions(50, seed=1), buffer, 1, seed=0)

    def test_divergence_is_one_clear_error(self) -> None:
        sac, data = SAC(OBS, ACT, CONFIG), transitions(50, seed=1)
        buffer = filled(60)
        buffer.storage.rewards[:] = float("inf")
        with pytest.raises(InputError, match="SAC diverged before update 2"):
            sac.update_many(data, buffer, 2, seed=0)


class TestState:
    def test_restored_state_continues_bit_for_bit(self) -> None:
        data, buffer = transitions(50, seed=1), filled(60)
        config = dataclasses.replace(CONFIG, actor_schedule="cosine")
        straight = SAC(OBS, ACT, config, total_updates=100)
        straight.update_many(data, buffer, 5, seed=0)
        saved = {name: tensor.clone() for name, tensor in straight.state().items()}
        straight.update_many(data, buffer, 5, seed=1)
        resumed = SAC(OBS, ACT, config, seed=9, total_updates=100)
        resumed.load_state(saved)
        resumed.update_many(data, buffer, 5, seed=1)
        ours, theirs = resumed.state(), straight.state()
        assert ours.keys() == theirs.keys()
        assert any(name.startswith("adam.critic.") for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_does_not_keep_what_it_was_given(self) -> None:
        data, buffer = transitions(50, seed=1), filled(60)
        sac = SAC(OBS, ACT, CONFIG)
        sac.update_many(data, buffer, 2, seed=0)
        saved = {name: tensor.clone() for name, tensor in sac.state().items()}
        copies = {name: tensor.clone() for name, tensor in saved.items()}
        other = SAC(OBS, ACT, CONFIG)
        other.load_state(saved)
        other.update_many(data, buffer, 2, seed=1)
        assert all(torch.equal(saved[name], copies[name]) for name in saved)

    def test_a_fresh_state_can_be_loaded(self) -> None:
        one, other = SAC(OBS, ACT, CONFIG, seed=1), SAC(OBS, ACT, CONFIG, seed=2)
        other.load_state(one.state())
        assert torch.equal(one.actor.weights[0], other.actor.weights[0])

    @pytest.mark.parametrize("name", ["target.weights.1", "adam.actor.0.exp_avg", "log_alpha", "updates"])
    def test_refuses_a_missing_or_misshapen_tensor(self, name: str) -> None:
        sac = SAC(OBS, ACT, CONFIG)
        sac.update_many(transitions(50, seed=1), filled(60), 1, seed=0)
        state = sac.state()
        with pytest.raises(InputError, match=f"here lacks {name}"):
            sac.load_state({key: value for key, value in state.items() if key != name}, "here")
        with pytest.raises(InputError, match=f"here: {name} has shape"):
            sac.load_state(state | {name: torch.zeros(3, 3, 3, 3)}, "here")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("updates", -1, "Adam's steps are not its -1 updates"),
            ("updates", 2**62, "Adam's steps are not its"),
            ("adam.alpha.0.step", 2.0, "Adam's steps are not its 1 updates"),
            ("adam.critic.0.exp_avg_sq", -1.0, "a second moment of Adam is negative"),
        ],
    )
    def test_refuses_values_that_no_training_has(self, name: str, value: float, message: str) -> None:
        sac = SAC(OBS, ACT, CONFIG)
        sac.update_many(transitions(50, seed=1), filled(60), 1, seed=0)
        state = {key: tensor.clone() for key, tensor in sac.state().items()}
        state[name].fill_(value)
        with pytest.raises(InputError, match=f"here: {message}"):
            SAC(OBS, ACT, CONFIG).load_state(state, "here")

    def test_refuses_a_tensor_of_another_type(self) -> None:
        state = SAC(OBS, ACT, CONFIG).state()
        with pytest.raises(InputError, match=r"log_alpha is of torch\.float64, expected torch\.float32"):
            SAC(OBS, ACT, CONFIG).load_state(state | {"log_alpha": state["log_alpha"].double()}, "here")


def test_initial_parameters_depend_on_the_seed_alone() -> None:
    one, same, other = (SAC(OBS, ACT, CONFIG, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), same.state().values(), strict=True))
    assert not torch.equal(one.critic.weights[0], other.critic.weights[0])
    assert not torch.equal(one.critic.weights[0][0], one.critic.weights[0][1])
    assert all(
        torch.equal(a, b) for a, b in zip(one.critic.parameters(), one.target.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"real_ratio": 1.5}, r"real_ratio must be in \[0, 1\], got 1.5"),
        ({"real_ratio": math.nan}, "real_ratio"),
        ({"actor_learning_rate": 0.0}, "learning rates must be positive"),
        ({"critic_learning_rate": math.inf}, "learning rates must be positive"),
        ({"critics": 0}, "at least one critic and one hidden layer"),
        (
            {"target_critics": 0},
            "target_critics must be 1 to the number of critics, 2, or None for all, got 0",
        ),
        (
            {"target_critics": 3},
            "target_critics must be 1 to the number of critics, 2, or None for all, got 3",
        ),
        ({"actor_q": "max"}, "unknown actor_q 'max'; there are: min, mean"),
        ({"hidden": ()}, "at least one critic and one hidden layer"),
        ({"hidden": (8, 0)}, "at least one critic and one hidden layer"),
        ({"discount": 1.0}, "discount must be in"),
        ({"polyak": 0.0}, "polyak must be in"),
        ({"alpha_max": 0.0}, "alpha_max must be positive"),
        ({"target_entropy": "none"}, "target_entropy must be a number"),
        ({"critic_loss": "huber"}, "unknown critic_loss 'huber'; there are: half_mse, mse"),
        ({"order": "actor_last"}, "unknown order 'actor_last'; there are: simultaneous, critic_first, actor"),
        ({"adam_epsilon": 0.0}, r"adam_epsilon must be in \(0, 1\), got 0.0"),
        ({"actor_schedule": "cosine"}, "cosine schedule needs total_updates"),
        ({"log_std_min": 3.0}, "log_std_min 3.0 must be below"),
    ],
)
def test_refuses_a_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SAC(OBS, ACT, dataclasses.replace(CONFIG, **change))
