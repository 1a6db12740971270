"""Baselines of SAC and the fit in PyTorch, each as fast as its way of doing it allows.

A baseline takes the parameters of a fresh `SAC` or `Fit`; calling it does the work of one round. Its `state`
names parameters as the reference does, so that tests can compare them. SAC has the authors' options: all
gradients are taken at the parameters before the update, the critics' loss is half the MSE, alpha is not
clamped. REDQ's options `target_critics` and `actor_q` are taken from the config.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig
from mopo_fast.data.transitions import Transitions
from mopo_fast.ensemble import mlp, soft_clamp_logvar
from mopo_fast.fit import Fit
from mopo_fast.sac import SAC
from mopo_fast.utils.cuda_graphs import Graph, records

ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminals")
BETAS, EPS = (0.9, 0.999), 1e-8


class _SACBaseline:
    """SAC whose batches are drawn as in other code: by torch's generator, one update at a time."""

    def __init__(self, sac: SAC, data: Transitions, buffer: RingBuffer, updates: int) -> None:
        self.config, self.target_entropy, self.updates = sac.config, sac.target_entropy, updates
        self.rows, self.act_dim = sac.batch_rows, sac.actor.act_dim
        self.sources = [
            # Contiguous arrays, as other code has them.
            [getattr(source, name).contiguous() for name in ARRAYS]
            for source in (data, buffer.storage[: len(buffer)])
        ]

    def __call__(self) -> None:
        for _ in range(self.updates):
            self.draw_and_update()

    def draw_and_update(self) -> None:
        device = self.sources[0][0].device
        parts = []
        for arrays, count in zip(self.sources, self.rows, strict=True):
            rows = torch.randint(len(arrays[0]), (count,), device=device)
            parts.append([array[rows] for array in arrays])
        batch = [torch.cat(pair) for pair in zip(*parts, strict=True)]
        noise = torch.randn(2, self.config.batch_size, self.act_dim, device=device)
        drawn = None
        if self.config.target_critics is not None:
            drawn = torch.rand(self.config.critics, device=device).argsort()[: self.config.target_critics]
        self.update(batch, *noise, drawn)

    def update(
        self,
        batch: Sequence[torch.Tensor],
        noise: torch.Tensor,
        next_noise: torch.Tensor,
        drawn: torch.Tensor | None = None,
    ) -> None:
        """Make one update on the five arrays of `ARRAYS`; `drawn` is that of `SAC.update`."""
        raise NotImplementedError

    def _actor_q(self, q: torch.Tensor) -> torch.Tensor:
        return q.mean(0) if self.config.actor_q == "mean" else q.min(0).values


class PlainSAC(_SACBaseline):
    """SAC as OfflineRL-Kit does it: one network at a time, three optimisers, backward() through all."""

    def __init__(self, sac: SAC, data: Transitions, buffer: RingBuffer, updates: int) -> None:
        super().__init__(sac, data, buffer, updates)
        config = self.config
        self.actor = linears(sac.actor.weights, sac.actor.biases)
        self.critics, self.targets = (
            nn.ModuleList(
                linears([weight[i] for weight in critic.weights], [bias[i] for bias in critic.biases])
                for i in range(config.critics)
            )
            for critic in (sac.critic, sac.target)
        )
        self.log_alpha = sac.log_alpha.detach().clone().requires_grad_()
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), config.actor_learning_rate)
        self.critic_adam = torch.optim.Adam(self.critics.parameters(), config.critic_learning_rate)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], config.alpha_learning_rate)

    def update(
        self,
        batch: Sequence[torch.Tensor],
        noise: torch.Tensor,
        next_noise: torch.Tensor,
        drawn: torch.Tensor | None = None,
    ) -> None:
        observations, actions, rewards, next_observations, terminals = batch
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, next_log_prob = _squash(self.actor(next_observations), next_noise, self.config)
            targets = self.targets if drawn is None else [self.targets[i] for i in drawn.tolist()]
            next_q = self._values(targets, next_observations, next_actions).min(0).values
            future = (1.0 - terminals.to(rewards)) * (next_q - alpha * next_log_prob)
            target_q = rewards + self.config.discount * future

        policy_actions, log_prob = _squash(self.actor(observations), noise, self.config)
        policy_q = self._actor_q(self._values(self.critics, observations, policy_actions))
        self.actor_adam.zero_grad()
        (alpha * log_prob - policy_q).mean().backward()

        # The actor's loss leaves gradients at the critics too, which are discarded.
        self.critic_adam.zero_grad()
        q = self._values(self.critics, observations, actions)
        (0.5 * (q - target_q).square().mean(1).sum()).backward()

        self.alpha_adam.zero_grad()
        (-self.log_alpha * (log_prob.detach() + self.target_entropy).mean()).backward()

        for adam in (self.actor_adam, self.critic_adam, self.alpha_adam):
            adam.step()
        for old, new in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
            old.data.lerp_(new.data, self.config.polyak)

    @staticmethod
    def _values(
        critics: Iterable[nn.Module], observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        inputs = torch.cat([observations, actions], dim=-1)
        return torch.cat([critic(inputs) for critic in critics], dim=-1).T

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {"log_alpha": self.log_alpha}
        for i, layer in enumerate(self.actor[::2]):
            tensors |= {f"actor.weights.{i}": layer.weight.T, f"actor.biases.{i}": layer.bias}
        for name, critics in (("critic", self.critics), ("target", self.targets)):
            for i, layers in enumerate(zip(*(critic[::2] for critic in critics), strict=True)):
                tensors[f"{name}.weights.{i}"] = torch.stack([layer.weight.T for layer in layers])
                tensors[f"{name}.biases.{i}"] = torch.stack([layer.bias for layer in layers])
        return tensors


class CompiledSAC(_SACBaseline):
    """SAC with the reference's batched critics; gradients, Adam and targets in one graph of torch.compile."""

    def __init__(self, sac: SAC, data: Transitions, buffer: RingBuffer, updates: int) -> None:
        super().__init__(sac, data, buffer, updates)
        self.names = [f"actor.{name}" for name, _ in sac.actor.named_parameters()]
        self.names += [f"critic.{name}" for name, _ in sac.critic.named_parameters()]
        # One element, not a scalar: compiled by torch 2.13, in-place writes to a scalar tensor are lost.
        log_alpha = sac.log_alpha.view(1)
        parameters = [*sac.actor.parameters(), *sac.critic.parameters(), log_alpha]
        self.parameters = [parameter.detach() for parameter in parameters]
        self.target = [parameter.detach() for parameter in sac.target.parameters()]
        self.actor_end = len(list(sac.actor.parameters()))
        rates = [self.config.actor_learning_rate] * self.actor_end
        rates += [self.config.critic_learning_rate] * len(self.target)
        self.adam = _WrittenAdam(self.parameters, [*rates, self.config.alpha_learning_rate])
        self.compiled = torch.compile(self._update)

    def update(
        self,
        batch: Sequence[torch.Tensor],
        noise: torch.Tensor,
        next_noise: torch.Tensor,
        drawn: torch.Tensor | None = None,
    ) -> None:
        self.compiled(*batch, noise, next_noise, drawn)

    def _update(self, *batch: torch.Tensor | None) -> None:
        self.adam.step(torch.func.grad(self._loss)(self.parameters, *batch))
        for old, new in zip(self.target, self.parameters[self.actor_end : -1], strict=True):
            old.lerp_(new, self.config.polyak)

    def _loss(
        self,
        parameters: list[torch.Tensor],
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        next_observations: torch.Tensor,
        terminals: torch.Tensor,
        noise: torch.Tensor,
        next_noise: torch.Tensor,
        drawn: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the sum of the three losses, of which none depends on the others' parameters."""
        actor, critic = parameters[: self.actor_end], parameters[self.actor_end : -1]
        log_alpha = parameters[-1].squeeze(0)
        alpha = log_alpha.detach().exp()
        next_actions, next_log_prob = self._sample(_detached(actor), next_observations, next_noise)
        target = self.target if drawn is None else [parameter[drawn] for parameter in self.target]
        next_q = self._values(target, next_observations, next_actions).min(0).values
        future = torch.where(terminals, 0.0, next_q - alpha * next_log_prob)
        target_q = rewards + self.config.discount * future
        q = self._values(critic, observations, actions)
        policy_actions, log_prob = self._sample(actor, observations, noise)
        policy_q = self._actor_q(self._values(_detached(critic), observations, policy_actions))
        return (
            0.5 * (q - target_q).square().mean(1).sum()
            + (alpha * log_prob - policy_q).mean()
            - log_alpha * (log_prob.detach() + self.target_entropy).mean()
        )

    def _sample(
        self, actor: list[torch.Tensor], observations: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _squash(mlp(observations, *_halves(actor), "relu"), noise, self.config)

    @staticmethod
    def _values(
        critic: list[torch.Tensor], observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        return mlp(torch.cat([observations, actions], dim=-1), *_halves(critic), "relu").squeeze(-1)

    def state(self) -> dict[str, torch.Tensor]:
        targets = [name.replace("critic", "target") for name in self.names[self.actor_end :]]
        *networks, log_alpha = self.parameters
        tensors = dict(zip([*self.names, *targets], [*networks, *self.target], strict=True))
        return tensors | {"log_alpha": log_alpha.squeeze(0)}


class BFloat16SAC(PlainSAC):
    """PlainSAC under autocast to bfloat16."""

    dtype = torch.bfloat16

    def update(self, *arguments: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            super().update(*arguments)


class CompiledBFloat16SAC(CompiledSAC):
    """CompiledSAC under autocast to bfloat16."""

    dtype = torch.bfloat16

    def _update(self, *batch: torch.Tensor | None) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            super()._update(*batch)


class RecordedSAC(CompiledSAC):
    """CompiledSAC in CUDA graphs of up to 10 updates, drawing of the batches included.

    The graphs are recorded here, since torch.compile's own (mode "reduce-overhead") leave out functions that
    change their inputs in place.
    """

    def __init__(self, sac: SAC, data: Transitions, buffer: RingBuffer, updates: int) -> None:
        super().__init__(sac, data, buffer, updates)
        self.graph: Graph | None = None
        self.recorded = math.gcd(updates, 10)

    def __call__(self) -> None:
        if not records(self.parameters[0].device):
            return super().__call__()
        if self.graph is None:
            state = [*self.parameters, *self.target, *self.adam.state()]
            self.graph = Graph(self._several, [], state)
        for _ in range(self.updates // self.recorded):
            self.graph()

    def _several(self) -> torch.Tensor:
        for _ in range(self.recorded):
            self.draw_and_update()
        return self.parameters[0]


class EagerFit:
    """The fit with the ensemble as one batch of matrices, autograd and torch's fused Adam."""

    def __init__(self, fit: Fit, rows: torch.Tensor) -> None:
        self.fit, self.rows = fit, rows
        # Contiguous arrays, as other code has them.
        self.inputs, self.targets = fit.inputs.contiguous(), fit.targets.contiguous()
        decays = zip(fit.parameters, fit.optimizer.weight_decay, strict=True)
        groups = [{"params": [parameter], "weight_decay": decay} for parameter, decay in decays]
        self.optimizer = torch.optim.Adam(groups, lr=fit.config.learning_rate, fused=True)

    def __call__(self) -> None:
        for batch in self.rows.split(self.fit.config.batch_size, dim=1):
            self.step(self.inputs[batch], self.targets[batch])

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        _fit_loss(self.fit.parameters, inputs, targets, self.fit).backward()
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.fit.model.named_parameters())


class CompiledFit(EagerFit):
    """The fit with gradient and Adam in one graph of torch.compile."""

    def __init__(self, fit: Fit, rows: torch.Tensor) -> None:
        super().__init__(fit, rows)
        self.parameters = _detached(fit.parameters)
        rates = [fit.config.learning_rate] * len(self.parameters)
        self.adam = _WrittenAdam(self.parameters, rates, fit.optimizer.weight_decay)
        self.step = torch.compile(self._step)

    def _step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.adam.step(torch.func.grad(_fit_loss)(self.parameters, inputs, targets, self.fit))


class RecordedFit(CompiledFit):
    """CompiledFit in a CUDA graph, the gathering of the batch included."""

    def __init__(self, fit: Fit, rows: torch.Tensor) -> None:
        super().__init__(fit, rows)
        self.graphs: dict[torch.Size, Graph] = {}

    def __call__(self) -> None:
        if not records(self.rows.device):
            return super().__call__()
        for batch in self.rows.split(self.fit.config.batch_size, dim=1):
            if batch.shape not in self.graphs:
                state = [*self.parameters, *self.adam.state()]
                self.graphs[batch.shape] = Graph(self._gather_and_step, [batch], state)
            self.graphs[batch.shape](batch)

    def _gather_and_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.step(self.inputs[batch], self.targets[batch])
        return self.parameters[0]


class BFloat16Fit(EagerFit):
    """EagerFit under autocast to bfloat16."""

    dtype = torch.bfloat16

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            super().step(inputs, targets)


class CompiledBFloat16Fit(CompiledFit):
    """CompiledFit under autocast to bfloat16."""

    dtype = torch.bfloat16

    def _step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            super()._step(inputs, targets)


class _WrittenAdam:
    """Adam in plain operations that a compiler can fuse."""

    def __init__(
        self, parameters: list[torch.Tensor], learning_rates: list[float], decay: list[float] | None = None
    ) -> None:
        self.parameters, self.learning_rates = parameters, learning_rates
        self.decay = decay or [0.0] * len(parameters)
        self.exp_avgs = [torch.zeros_like(parameter) for parameter in parameters]
        self.exp_avg_sqs = [torch.zeros_like(parameter) for parameter in parameters]
        # One element, as CompiledSAC's log_alpha. On the parameters' device, or no graph could be recorded.
        self.steps = torch.zeros(1, dtype=torch.float64, device=parameters[0].device)

    def state(self) -> list[torch.Tensor]:
        """Return all tensors that a step changes besides the parameters."""
        return [*self.exp_avgs, *self.exp_avg_sqs, self.steps]

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        self.steps.add_(1.0)
        scale, scale_sq = ((1.0 - beta**self.steps).to(gradients[0].dtype) for beta in BETAS)
        for parameter, gradient, avg, avg_sq, rate, decay in zip(
            self.parameters,
            gradients,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.learning_rates,
            self.decay,
            strict=True,
        ):
            gradient = gradient + decay * parameter if decay else gradient
            avg.lerp_(gradient, 1.0 - BETAS[0])
            avg_sq.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
            parameter.sub_(rate * (avg / scale) / ((avg_sq / scale_sq).sqrt() + EPS))


def linears(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Make a perceptron of nn.Linear with these parameters."""
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        linear = nn.Linear(*weight.shape, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def _squash(head: torch.Tensor, noise: torch.Tensor, config: SACConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw actions of the tanh-Gaussian from the actor's outputs; return them and their log-probabilities."""
    mean, log_std = head.chunk(2, dim=-1)
    log_std = log_std.clamp(config.log_std_min, config.log_std_max)
    raw = mean + log_std.exp() * noise
    squash = 2.0 * (math.log(2.0) - raw - functional.softplus(-2.0 * raw))
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi) - squash
    return torch.tanh(raw), log_prob.sum(-1)


def _fit_loss(
    parameters: Sequence[torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor, fit: Fit
) -> torch.Tensor:
    """Return the Gaussian negative log-likelihood; parameters are weights, biases, max_logvar, min_logvar."""
    *layers, max_logvar, min_logvar = parameters
    mean, logvar = mlp(inputs, *_halves(layers), fit.model.activation).chunk(2, dim=-1)
    logvar = soft_clamp_logvar(logvar, max_logvar, min_logvar)
    likelihood = ((mean - targets).square() * torch.exp(-logvar) + logvar).mean((1, 2)).sum()
    return likelihood + fit.config.logvar_bound_weight * (max_logvar.sum() - min_logvar.sum())


def _halves(layers: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Split a list of parameters into weights and biases."""
    return layers[: len(layers) // 2], layers[len(layers) // 2 :]


def _detached(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in tensors]
