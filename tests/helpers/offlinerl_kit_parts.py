"""Stand-ins for those parts of OfflineRL-Kit whose work the kernels take over, with their attributes.

Tests load this file as a module of a package called offlinerlkit, as the adapter looks at that name.
"""

import copy
import itertools
from typing import Any

import numpy as np
import torch
from torch import nn

OBS, ACT, HIDDEN = 3, 2, (8, 6)


def mlp(inputs: int) -> nn.Module:
    body = nn.Module()
    sizes = (inputs, *HIDDEN)
    pairs = itertools.pairwise(sizes)
    body.model = nn.Sequential(*(one for pair in pairs for one in (nn.Linear(*pair), nn.ReLU())))
    return body


class TanhDiagGaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma = nn.Linear(HIDDEN[-1], ACT), nn.Linear(HIDDEN[-1], ACT)
        self._unbounded = self._c_sigma = True
        self._max, self._sigma_min, self._sigma_max = 1.0, -5.0, 2.0


class ActorProb(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.dist_net = mlp(OBS), TanhDiagGaussian()

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, head = self.backbone.model(observations), self.dist_net
        return head.mu(hidden), head.sigma(hidden).clamp(-5.0, 2.0).exp()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.last = mlp(OBS + ACT), nn.Linear(HIDDEN[-1], 1)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.last(self.backbone.model(torch.cat([observations, actions], 1)))
        return value


class SACPolicy(nn.Module):
    def actforward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = self.actor(observations)
        normal = torch.distributions.Normal(mean, std)
        raw = normal.rsample()
        actions = torch.tanh(raw)
        log_prob = normal.log_prob(raw) - torch.log(1 - actions**2 + 1e-6)
        return actions, log_prob.sum(-1, keepdim=True)

    def select_action(self) -> None:
        raise NotImplementedError

    def _sync_weight(self) -> None:
        for number in (1, 2):
            critic, old = getattr(self, f"critic{number}"), getattr(self, f"critic{number}_old")
            for slow, fast in zip(old.parameters(), critic.parameters(), strict=True):
                slow.data.lerp_(fast.data, self._tau)


class MOPOPolicy(SACPolicy):
    def __init__(self, alpha: float | None = None) -> None:
        super().__init__()
        self.actor, self.critic1, self.critic2 = ActorProb(), Critic(), Critic()
        self.critic1_old, self.critic2_old = copy.deepcopy(self.critic1), copy.deepcopy(self.critic2)
        self._tau, self._gamma = 0.1, 0.9
        self._is_auto_alpha = alpha is None
        if alpha is None:
            self._target_entropy = 4.0
            self._log_alpha = torch.zeros(1, requires_grad=True)
            self.alpha_optim = torch.optim.Adam([self._log_alpha], lr=1e-2)
            self._alpha = self._log_alpha.detach().exp()
        else:
            self._alpha = alpha
        self.actor_optim = torch.optim.Adam(self.actor.parameters(), lr=3e-3)
        self.critic1_optim = torch.optim.Adam(self.critic1.parameters(), lr=1e-2)
        self.critic2_optim = torch.optim.Adam(self.critic2.parameters(), lr=1e-2)

    def rollout(self) -> None:
        raise NotImplementedError

    def learn(self, batch: dict[str, Any]) -> dict[str, float]:
        rows = {name: torch.cat([batch["real"][name], batch["fake"][name]]) for name in batch["real"]}
        observations, successors = rows["observations"], rows["next_observations"]
        with torch.no_grad():
            actions, log_prob = self.actforward(successors)
            least = torch.min(self.critic1_old(successors, actions), self.critic2_old(successors, actions))
            target = least - self._alpha * log_prob
            target = rows["rewards"] + self._gamma * (1 - rows["terminals"]) * target
        losses = {}
        for number in (1, 2):
            q = getattr(self, f"critic{number}")(observations, rows["actions"])
            loss = losses[f"loss/critic{number}"] = (q - target).square().mean()
            self._step(getattr(self, f"critic{number}_optim"), loss)
        actions, log_prob = self.actforward(observations)
        least = torch.min(self.critic1(observations, actions), self.critic2(observations, actions))
        losses["loss/actor"] = (self._alpha * log_prob - least).mean()
        self._step(self.actor_optim, losses["loss/actor"])
        if self._is_auto_alpha:
            entropy = -(log_prob.detach() + self._target_entropy)
            losses["loss/alpha"] = (self._log_alpha * entropy).mean()
            self._step(self.alpha_optim, losses["loss/alpha"])
            losses["alpha"] = self._alpha = self._log_alpha.detach().exp().clamp(0.0, 1.0)
        self._sync_weight()
        return {name: loss.item() for name, loss in losses.items()}

    def _step(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class MOBILEPolicy(nn.Module):
    """Without a `learn` of its own: a recording has what the original's makes."""

    def __init__(self, dynamics: Any) -> None:
        super().__init__()
        self.dynamics, self.actor = dynamics, ActorProb()
        self.critics = nn.ModuleList([Critic(), Critic()])
        self.critics_old = copy.deepcopy(self.critics)
        self._tau, self._gamma, self._is_auto_alpha, self._target_entropy = 0.1, 0.9, True, 4.0
        self._penalty_coef, self._num_samples = 0.7, 4
        # The spelling is the original's.
        self._deteterministic_backup, self._max_q_backup = True, False
        self._log_alpha = torch.zeros(1, requires_grad=True)
        self._alpha = self._log_alpha.detach().exp()
        self.alpha_optim = torch.optim.Adam([self._log_alpha], lr=1e-2)
        self.actor_optim = torch.optim.Adam(self.actor.parameters(), lr=3e-3)
        self.critics_optim = torch.optim.Adam(self.critics.parameters(), lr=1e-2)

    def learn(self) -> None:
        raise NotImplementedError

    def compute_lcb(self) -> None:
        raise NotImplementedError

    def actforward(self) -> None:
        raise NotImplementedError

    def select_action(self) -> None:
        raise NotImplementedError

    def rollout(self) -> None:
        raise NotImplementedError

    def _sync_weight(self) -> None:
        raise NotImplementedError


class ReplayBuffer:
    def __init__(self, size: int, dtype: type = np.float32) -> None:
        self._ptr, self._size, self._max_size = 0, 0, size
        self.observations = np.zeros((size, OBS), dtype)
        self.next_observations = np.zeros((size, OBS), dtype)
        self.actions = np.zeros((size, ACT), dtype)
        self.rewards, self.terminals = np.zeros((size, 1), np.float32), np.zeros((size, 1), np.float32)

    def add_batch(self, **rows: np.ndarray) -> None:
        indexes = np.arange(self._ptr, self._ptr + len(rows["rewards"])) % self._max_size
        for name, array in rows.items():
            getattr(self, name)[indexes] = array
        self._ptr = (self._ptr + len(indexes)) % self._max_size
        self._size = min(self._size + len(indexes), self._max_size)

    def sample(self, batch_size: int) -> dict[str, torch.Tensor]:
        drawn = np.random.randint(0, self._size, size=batch_size)
        names = ("observations", "actions", "next_observations", "rewards", "terminals")
        return {name: torch.tensor(getattr(self, name)[drawn]) for name in names}


class MBPolicyTrainer:
    def __init__(self, policy: Any, real: Any, fake: Any, freq: int = 30, dynamics_freq: int = 0) -> None:
        self.policy, self.real_buffer, self.fake_buffer = policy, real, fake
        self._rollout_freq, self._step_per_epoch, self._dynamics_update_freq = freq, 250, dynamics_freq
        self._batch_size, self._real_ratio, self._rollout_batch_size = 40, 0.125, 10
        self._epoch, self.seen, self.losses = 2, [], []
        self.look: Any = lambda trainer, batch, steps: None

    def train(self) -> str:
        steps = 0
        for _ in range(self._epoch):
            for _ in range(self._step_per_epoch):
                if steps % self._rollout_freq == 0:
                    start = self.real_buffer.sample(self._rollout_batch_size)["observations"].cpu().numpy()
                    rows, _ = self.policy.rollout(start, 1)
                    self.fake_buffer.add_batch(**rows)
                size = int(self._batch_size * self._real_ratio)
                batch = {
                    "real": self.real_buffer.sample(batch_size=size),
                    "fake": self.fake_buffer.sample(batch_size=self._batch_size - size),
                }
                self.look(self, batch, steps)
                self.losses.append(self.policy.learn(batch))
                steps += 1
                if self._dynamics_update_freq and steps % self._dynamics_update_freq == 0:
                    self.policy.update_dynamics(self.real_buffer)
            self.policy.eval()
            self.seen.append((steps, updates_of(self.policy)))
            self.policy.state_dict()
        return "done"


def updates_of(policy: Any) -> float:
    return float(policy.actor_optim.state[policy.actor.dist_net.mu.weight]["step"])
