"""Stand-ins for mbrl-lib's SAC and its buffer, with their attributes and arithmetic.

Tests load this file as a module of a package called mbrl, as the adapter looks at that name.
tests/beside/mbrl_lib_updates.py compares them with mbrl-lib's own.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

LOG_SIG_MAX, LOG_SIG_MIN, epsilon = 2, -20, 1e-6


class QNetwork(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(obs_dim + act_dim, hidden), nn.Linear(hidden, hidden)
        self.linear3 = nn.Linear(hidden, 1)
        self.linear4, self.linear5 = nn.Linear(obs_dim + act_dim, hidden), nn.Linear(hidden, hidden)
        self.linear6 = nn.Linear(hidden, 1)

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.cat([state, action], 1)
        first = self.linear3(self.linear2(self.linear1(inputs).relu()).relu())
        return first, self.linear6(self.linear5(self.linear4(inputs).relu()).relu())


class GaussianPolicy(nn.Module):
    def __init__(self, obs_dim: int, act_dim: int, hidden: int, action_space: Any) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden)
        self.mean_linear, self.log_std_linear = nn.Linear(hidden, act_dim), nn.Linear(hidden, act_dim)
        self.action_scale = torch.FloatTensor((action_space.high - action_space.low) / 2.0)
        self.action_bias = torch.FloatTensor((action_space.high + action_space.low) / 2.0)

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.linear2(self.linear1(state).relu()).relu()
        return self.mean_linear(hidden), self.log_std_linear(hidden).clamp(LOG_SIG_MIN, LOG_SIG_MAX)

    def sample(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_std = self.forward(state)
        normal = torch.distributions.Normal(mean, log_std.exp())
        raw = normal.rsample()
        squashed = torch.tanh(raw)
        log_prob = normal.log_prob(raw) - torch.log(self.action_scale * (1 - squashed.pow(2)) + epsilon)
        return squashed * self.action_scale + self.action_bias, log_prob.sum(1, keepdim=True), mean


class DeterministicPolicy(nn.Module):
    pass


class SAC:
    def __init__(self, num_inputs: int, action_space: Any, args: Any) -> None:
        self.gamma, self.tau, self.alpha = args.gamma, args.tau, args.alpha
        self.target_update_interval = args.target_update_interval
        self.automatic_entropy_tuning = args.automatic_entropy_tuning
        act_dim = action_space.shape[0]
        self.critic, self.critic_target = (QNetwork(num_inputs, act_dim, args.hidden_size) for _ in range(2))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_optim = torch.optim.Adam(self.critic.parameters(), lr=args.lr)
        if self.automatic_entropy_tuning:
            self.target_entropy = args.target_entropy
            self.log_alpha = torch.zeros(1, requires_grad=True)
            self.alpha_optim = torch.optim.Adam([self.log_alpha], lr=args.lr)
        self.policy = GaussianPolicy(num_inputs, act_dim, args.hidden_size, action_space)
        self.policy_optim = torch.optim.Adam(self.policy.parameters(), lr=args.lr)

    def update_parameters(
        self, memory: Any, batch_size: int, updates: int, logger: Any = None, reverse_mask: bool = False
    ) -> tuple[float, ...]:
        drawn = memory.sample(batch_size).astuple()
        state, action, successor, reward, mask = (
            torch.as_tensor(array, dtype=torch.float32) for array in drawn[:5]
        )
        reward, mask = reward[:, None], mask[:, None]
        if reverse_mask:
            mask = mask.logical_not()
        with torch.no_grad():
            next_action, log_pi, _ = self.policy.sample(successor)
            least = torch.min(*self.critic_target(successor, next_action)) - self.alpha * log_pi
            target = reward + mask * self.gamma * least
        losses = [(q - target).square().mean() for q in self.critic(state, action)]
        self._step(self.critic_optim, losses[0] + losses[1])
        pi, log_pi, _ = self.policy.sample(state)
        policy_loss = (self.alpha * log_pi - torch.min(*self.critic(state, pi))).mean()
        self._step(self.policy_optim, policy_loss)
        alpha_loss = torch.tensor(0.0)
        if self.automatic_entropy_tuning:
            alpha_loss = -(self.log_alpha * (log_pi + self.target_entropy).detach()).mean()
            self._step(self.alpha_optim, alpha_loss)
            self.alpha = self.log_alpha.exp()
        if updates % self.target_update_interval == 0:
            for slow, fast in zip(self.critic_target.parameters(), self.critic.parameters(), strict=True):
                slow.data.copy_(slow.data * (1.0 - self.tau) + fast.data * self.tau)
        if logger is not None:
            entropy = self.target_entropy if self.automatic_entropy_tuning else 0
            for name, value in {
                "train/batch_reward": reward.mean(),
                "train_critic/loss": losses[0] + losses[1],
                "train_actor/loss": policy_loss,
                "train_actor/target_entropy": entropy,
                "train_actor/entropy": -log_pi.mean(),
                "train_alpha/loss": alpha_loss,
                "train_alpha/value": self.alpha,
            }.items():
                logger.log(name, value, updates)
        alpha = torch.as_tensor(self.alpha).item()
        return *(loss.item() for loss in losses), policy_loss.item(), alpha_loss.item(), alpha

    def _step(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def save_checkpoint(self, ckpt_path: Any) -> None:
        torch.save({name: getattr(self, name).state_dict() for name in _SAVED}, ckpt_path)

    def load_checkpoint(self, ckpt_path: Any) -> None:
        for name, state in torch.load(ckpt_path).items():
            getattr(self, name).load_state_dict(state)


_SAVED = ("policy", "critic", "critic_target", "critic_optim", "policy_optim")


class ReplayBuffer:
    """A full buffer.

    Args:
        arrays: obs, action, next_obs, reward, terminated and truncated.
        rng: generator of the rows of batches.
    """

    def __init__(self, arrays: list[Any], rng: np.random.Generator) -> None:
        self.arrays, self._rng = arrays, rng

    def sample(self, batch_size: int) -> Any:
        rows = self._rng.choice(len(self.arrays[0]), size=batch_size)
        batch = tuple(array[rows] for array in self.arrays)
        return SimpleNamespace(astuple=lambda: batch)
