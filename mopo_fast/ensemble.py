"""The probabilistic ensemble of dynamics models: parameters, forward pass, files.

Source: mopo/models/bnn.py and fc.py of the authors' code. All members are computed as one batch of matrices.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mopo_fast.config import (
    ACTIVATIONS,
    LAYER_NORM_EPSILON,
    LOG_SCALES,
    MAX_MEMBERS,
    Activation,
    LogScale,
)
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import read_json_as, write_json
from mopo_fast.utils.machine import check_memory
from mopo_fast.utils.tensors import (
    as_float32,
    check_sizes,
    layer_weights,
    load_into,
    load_tensors,
    save_tensors,
    tensors_sha256,
)

FORMAT_VERSION = 3

# The scales and the shifts of the hidden layers' norms, [members, out] of each layer.
Norms = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class _Declared:
    """The fields of dynamics.json. Version 1 has no `log_scale`, version 2 no `layer_norm`."""

    format_version: int
    obs_dim: int
    act_dim: int
    activation: Activation
    log_scale: LogScale | None = None
    layer_norm: bool | None = None


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply an activation, one of `config.ACTIVATIONS`."""
    if activation == "silu":
        return functional.silu(x)
    if activation == "relu":
        return functional.relu(x)
    return torch.tanh(x)


def round_factor(x: torch.Tensor, operands: str) -> torch.Tensor:
    """Round a factor of a product to the type `operands`; the result has the dtype of `x`.

    tfloat32 is float32 with 10 fraction bits, rounded to nearest, ties to even. bfloat16x3 is the sum of two
    numbers in bfloat16: `x` rounded, and the rounded error of that.

    Args:
        x: the factor.
        operands: one of `config.ROLLOUT_DTYPES`.
    """
    if operands in ("float16", "bfloat16"):
        return x.to(getattr(torch, operands)).to(x.dtype)
    if operands == "bfloat16x3":
        high, low = _two_parts(x)
        return high + low
    if operands == "tfloat32":
        bits = x.view(torch.int32)
        rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
        return torch.where(x.isnan(), x, rounded.view(torch.float32))
    return x


def round_factors(
    left: torch.Tensor, right: torch.Tensor, operands: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a matrix product [..., n, k] [..., k, m] in the precision `operands`.

    For bfloat16x3 both have three times as many terms: the low part of `left` times the high part of `right`,
    then high times high, then high times low.

    Args:
        left: [..., n, k].
        right: [..., k, m].
        operands: one of `config.ROLLOUT_DTYPES`.
    """
    if operands != "bfloat16x3":
        return round_factor(left, operands), round_factor(right, operands)
    (high, low), (other_high, other_low) = _two_parts(left), _two_parts(right)
    return torch.cat([low, high, high], -1), torch.cat([other_high, other_high, other_low], -2)


def _two_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` in bfloat16 and its error, in bfloat16 too, as tensors of the dtype of `x`."""
    high = round_factor(x, "bfloat16")
    return high, round_factor(x - high, "bfloat16")


def mlp(
    x: torch.Tensor,
    weights: Iterable[torch.Tensor],
    biases: Iterable[torch.Tensor],
    activation: str,
    operands: str = "float32",
    *,
    norms: Norms | None = None,
) -> torch.Tensor:
    """Compute a multi-layer perceptron with a linear last layer, or several at once.

    Args:
        x: inputs [batch, in], or [members, batch, in] for several networks.
        weights: [in, out] of each layer, or [members, in, out]. More dimensions in front broadcast.
        biases: [out] of each layer, or [members, out].
        activation: one of `config.ACTIVATIONS`, after every layer but the last.
        operands: precision of the products' factors, see `round_factors`. Sums are not rounded.
        norms: layer norms of the hidden layers, each before the activation; None for none.

    Returns:
        Outputs [batch, out], or [members, batch, out].
    """
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if layer:
            x = activate(normalise(x, norms, layer - 1), activation)
        x, weight = round_factors(x, weight, operands)
        if weight.ndim == 2:
            x = torch.addmm(bias, x, weight)
        elif weight.ndim == 3:
            x = torch.baddbmm(bias.unsqueeze(1), x.expand(weight.shape[0], -1, -1), weight)
        else:
            x = x @ weight + bias.unsqueeze(-2)
    return x


def normalise(x: torch.Tensor, norms: Norms | None, layer: int) -> torch.Tensor:
    """Apply the norm of hidden layer number `layer` to its outputs x [..., members, batch, out].

    Source: Ba et al., "Layer normalization", 2016; the variance is that of the outputs, not an estimate.
    """
    if not norms:
        return x
    scale, shift = (some[layer].unsqueeze(-2) for some in norms)
    return functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON) * scale + shift


def trained_mlp(
    operands: str | None, *, first: str | None = None, last: str | None = None
) -> Callable[..., torch.Tensor]:
    """Return `mlp`, without its last argument, for training in a precision.

    Args:
        operands: precision of the products' factors, forwards and backwards: one of `config.TRAINING_DTYPES`,
            or None for float32.
        first: precision of the first layer's, if it is another one.
        last: precision of the last layer's, if it is another one.
    """
    if operands in (None, "float32"):
        return mlp
    return functools.partial(_rounded_mlp, operands=operands, first=first, last=last)


def _rounded_mlp(
    x: torch.Tensor,
    weights: Iterable[torch.Tensor],
    biases: Iterable[torch.Tensor],
    activation: str,
    *,
    operands: str,
    first: str | None,
    last: str | None,
    norms: Norms | None = None,
) -> torch.Tensor:
    weights = list(weights)
    precisions = {0: first, len(weights) - 1: last}
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = activate(normalise(x, norms, layer - 1), activation) if layer else x
        x = _RoundedLayer.apply(x, weight, bias.unsqueeze(-2), precisions.get(layer) or operands)
    return x


class _RoundedLayer(torch.autograd.Function):
    """x @ weight + bias, with the factors of the three products in a precision `operands`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, operands: str
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.operands = operands
        return _product(x, weight, operands) + bias

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            _product(grad, weight.mT, ctx.operands).sum_to_size(x.shape) if to_x else None,
            _product(x.mT, grad, ctx.operands).sum_to_size(weight.shape) if to_weight else None,
            # The kernels sum this column of the weight's gradient like all others.
            round_factor(grad, ctx.operands).sum_to_size(bias.shape) if to_bias else None,
            None,
        )


def _product(left: torch.Tensor, right: torch.Tensor, operands: str) -> torch.Tensor:
    left, right = round_factors(left, right, operands)
    return left @ right


def mlp_bytes(networks: int, sizes: Sequence[int], batch_size: int = 0) -> int:
    """Return the bytes of the parameters of float32 perceptrons and of their layers' outputs for a batch."""
    return 4 * networks * sum((fan_in + 1 + batch_size) * out for fan_in, out in itertools.pairwise(sizes))


def norm_tensors(norms: Norms) -> dict[str, torch.Tensor]:
    """Return the scales and shifts of all layer norms by their names in a file."""
    scales, shifts = norms
    named = {f"norm_scale_{i}": scale for i, scale in enumerate(scales)}
    return named | {f"norm_shift_{i}": shift for i, shift in enumerate(shifts)}


def layer_tensors(weights: Iterable[torch.Tensor], biases: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights and biases of all layers by their names in a file."""
    named = {f"weight_{i}": weight for i, weight in enumerate(weights)}
    return named | {f"bias_{i}": bias for i, bias in enumerate(biases)}


def soft_clamp_logvar(
    logvar: torch.Tensor, max_logvar: torch.Tensor, min_logvar: torch.Tensor
) -> torch.Tensor:
    """Bound `logvar` smoothly by the learned bounds, as the authors do: from above, then from below."""
    logvar = max_logvar - functional.softplus(max_logvar - logvar)
    return min_logvar + functional.softplus(logvar - min_logvar)


def soft_clamp_variance(
    logvar: torch.Tensor, max_logvar: torch.Tensor, min_logvar: torch.Tensor
) -> torch.Tensor:
    """Compute exp(soft_clamp_logvar(...)) in closed form: e^min + 1 / (e^-max + e^-logvar).

    It calls fewer transcendental functions, and it is right at both infinities.
    """
    return torch.exp(min_logvar) + 1.0 / (torch.exp(-max_logvar) + torch.exp(-logvar))


class EnsembleDynamics(nn.Module):
    """Gaussian models of (delta observation, reward) given (observation, action).

    `log_scale`, `member_bounds` and `absolute` describe models of other code; the fit makes no such models.

    Args:
        obs_dim: size of an observation.
        act_dim: size of an action.
        members: number of models, at most `config.MAX_MEMBERS`.
        elites: number of members that rollouts draw from.
        hidden: sizes of the hidden layers.
        activation: one of `config.ACTIVATIONS`.
        layer_norm: normalise the outputs of every hidden layer before the activation.
        max_logvar: initial upper bound of the log-variances.
        min_logvar: initial lower bound of the log-variances.
        log_scale: "variance", or "std" if the log-variances and their bounds are log standard deviations
            instead (Polixir, d3rlpy).
        member_bounds: each member has bounds of its own (d3rlpy).
        absolute: observation dimensions for which the next observation itself is predicted, not its change
            (mbrl-lib).
        generator: random numbers of the initial weights; None takes torch's.

    Attributes:
        weights: parameters [members, in, out] of each layer. The last one's outputs are obs_dim + 1 means of
            (delta observation, reward) in raw units, then as many unbounded log-variances.
        biases: parameters [members, out] of each layer.
        norm_scales: parameters [members, out] of the hidden layers' norms; empty without `layer_norm`.
        norm_shifts: likewise.
        max_logvar: parameter [obs_dim + 1], or [members, obs_dim + 1] with `member_bounds`.
        min_logvar: likewise.
        input_mean: buffer [obs_dim + act_dim], subtracted from the inputs.
        input_std: buffer [obs_dim + act_dim], by which the inputs are then divided.
        elites: buffer int64, numbers of the members that rollouts draw from, best first.
        absolute: buffer bool [obs_dim].

    Raises:
        InputError: a size is out of range.
    """

    input_mean: torch.Tensor
    input_std: torch.Tensor
    elites: torch.Tensor
    absolute: torch.Tensor

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        *,
        members: int = 7,
        elites: int = 5,
        hidden: tuple[int, ...] = (200, 200, 200, 200),
        activation: Activation = "silu",
        layer_norm: bool = False,
        max_logvar: float = 0.5,
        min_logvar: float = -10.0,
        log_scale: LogScale = "variance",
        member_bounds: bool = False,
        absolute: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"unknown activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
        if not 1 <= members <= MAX_MEMBERS:
            raise InputError(f"members must be 1 to {MAX_MEMBERS}, got {members}")
        if not 1 <= elites <= members:
            raise InputError(f"elites must be 1 to members ({members}), got {elites}")
        if min((obs_dim, act_dim, *hidden)) < 1:
            raise InputError(f"sizes must be positive, got obs {obs_dim}, act {act_dim}, hidden {hidden}")
        if log_scale not in LOG_SCALES:
            raise InputError(f"unknown log_scale {log_scale!r}; there are: {', '.join(LOG_SCALES)}")
        if any(not 0 <= dim < obs_dim for dim in absolute):
            raise InputError(
                f"absolute must name observation dimensions 0..{obs_dim - 1}, got {list(absolute)}"
            )
        self.obs_dim, self.act_dim, self.activation = obs_dim, act_dim, activation
        self.log_scale = log_scale
        sizes = [obs_dim + act_dim, *hidden, 2 * (obs_dim + 1)]
        what = f"an ensemble with obs {obs_dim}, act {act_dim}, hidden {hidden}"
        # Every ensemble is made on the CPU and moved from there.
        check_memory(what, mlp_bytes(members, sizes), "cpu", "members or these sizes")
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            # As the authors do: normal weights truncated at two std, std 1 / (2 sqrt(fan_in)), zero biases.
            std = 1.0 / (2.0 * math.sqrt(fan_in))
            weight = torch.empty(members, fan_in, fan_out)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(members, fan_out)))
        normed = hidden if layer_norm else ()
        self.norm_scales = nn.ParameterList(nn.Parameter(torch.ones(members, width)) for width in normed)
        self.norm_shifts = nn.ParameterList(nn.Parameter(torch.zeros(members, width)) for width in normed)
        bounds = (members, obs_dim + 1) if member_bounds else (obs_dim + 1,)
        self.max_logvar = nn.Parameter(torch.full(bounds, float(max_logvar)))
        self.min_logvar = nn.Parameter(torch.full(bounds, float(min_logvar)))
        self.register_buffer("input_mean", torch.zeros(obs_dim + act_dim))
        self.register_buffer("input_std", torch.ones(obs_dim + act_dim))
        self.register_buffer("elites", torch.arange(elites))
        mask = torch.zeros(obs_dim, dtype=torch.bool)
        mask[list(absolute)] = True
        # Not in the state dict, so that fits' checkpoints keep their format: the fit makes no such models.
        self.register_buffer("absolute", mask, persistent=False)

    @property
    def members(self) -> int:
        """Number of members."""
        return int(self.weights[0].shape[0])

    @property
    def hidden(self) -> tuple[int, ...]:
        """Sizes of the hidden layers."""
        return tuple(weight.shape[2] for weight in self.weights[:-1])

    @property
    def layer_norm(self) -> bool:
        """True where the hidden layers have layer norms."""
        return len(self.norm_scales) > 0

    @property
    def norms(self) -> Norms | None:
        """Parameters of the layer norms, as `mlp` takes them."""
        return (list(self.norm_scales), list(self.norm_shifts)) if self.layer_norm else None

    def __repr__(self) -> str:
        return (
            f"EnsembleDynamics(obs_dim={self.obs_dim}, act_dim={self.act_dim}, members={self.members},"
            f" elites={self.elites.tolist()}, hidden={self.hidden}, activation={self.activation!r},"
            f"{' layer_norm=True,' if self.layer_norm else ''} device='{self.input_mean.device}')"
        )

    def raw_heads(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return means and unbounded log-variances (or log stds), each [members, batch, obs_dim + 1].

        Args:
            inputs: [batch, obs_dim + act_dim] for all members, or [members, batch, obs_dim + act_dim]; not
                standardised.
        """
        x = (inputs - self.input_mean) / self.input_std
        heads = mlp(x, self.weights, self.biases, self.activation, norms=self.norms)
        mean, logvar = heads.chunk(2, dim=-1)
        return mean, logvar

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return means and bounded log-variances, each [members, batch, obs_dim + 1]; see `raw_heads`."""
        mean, logvar = self.raw_heads(inputs)
        bounds = (bound.expand(self.members, -1).unsqueeze(1) for bound in (self.max_logvar, self.min_logvar))
        bounded = soft_clamp_logvar(logvar, *bounds)
        return mean, 2.0 * bounded if self.log_scale == "std" else bounded

    def next_observations(self, observations: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Return next observations, from observations [batch, obs_dim] and mean [..., batch, obs_dim + 1]."""
        return torch.where(self.absolute, mean[..., :-1], observations + mean[..., :-1])

    def sha256(self) -> str:
        """Return a digest of the parameters, the buffers, `activation` and `log_scale`."""
        # Only models with a `log_scale` of "std" or with `absolute` add it: others keep their older digests.
        kind = self.activation + (".std" if self.log_scale == "std" else "")
        named = {f"{kind}.{name}": value for name, value in self.state_dict().items()}
        if bool(self.absolute.any()):
            named["absolute"] = self.absolute
        return tensors_sha256(named)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write dynamics.safetensors and dynamics.json, each atomically.

        Raises:
            InputError: the folder cannot be written, or the elites are not members.
        """
        self.check_elites()
        folder, tensors = Path(folder), self._stored_tensors()
        if bool(self.absolute.any()):
            tensors["absolute"] = self.absolute
        save_tensors(folder / "dynamics.safetensors", tensors)
        write_json(
            folder / "dynamics.json",
            {
                "format_version": FORMAT_VERSION,
                "obs_dim": self.obs_dim,
                "act_dim": self.act_dim,
                "activation": self.activation,
                "log_scale": self.log_scale,
                "layer_norm": self.layer_norm,
            },
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> "EnsembleDynamics":
        """Read an ensemble that `save` wrote.

        Raises:
            InputError: a file is missing, truncated or of another version, or its shapes do not agree.
        """
        folder = Path(folder)
        meta = read_json_as(folder / "dynamics.json", _Declared)
        path = folder / "dynamics.safetensors"
        tensors = as_float32(path, load_tensors(path))
        version = meta.format_version
        if not 1 <= version <= FORMAT_VERSION:
            raise InputError(
                f"{folder / 'dynamics.json'} has format_version {version}, this mopo_fast reads 1 to"
                f" {FORMAT_VERSION}"
            )
        log_scale: LogScale | None = "variance" if version == 1 else meta.log_scale
        layer_norm = False if version < 3 else meta.layer_norm
        if log_scale is None or layer_norm is None:
            lacking = "log_scale" if log_scale is None else "layer_norm"
            raise InputError(f"{folder / 'dynamics.json'} lacks {lacking}")
        weights = layer_weights(path, tensors, ndim=3)
        check_sizes(path, weights, meta.obs_dim + meta.act_dim, 2 * (meta.obs_dim + 1))
        if "elites" not in tensors:
            raise InputError(f"{path} holds no elites; it is not an ensemble")
        absolute: list[int] = []
        if "absolute" in tensors:
            mask = torch.zeros(meta.obs_dim, dtype=torch.bool)
            load_into(path, tensors, {"absolute": mask})
            absolute = mask.nonzero()[:, 0].tolist()
        bounds = tensors.get("max_logvar")
        model = cls(
            meta.obs_dim,
            meta.act_dim,
            members=weights[0].shape[0],
            elites=max(1, tensors["elites"].numel()),
            hidden=tuple(weight.shape[-1] for weight in weights[:-1]),
            activation=meta.activation,
            layer_norm=layer_norm,
            log_scale=log_scale,
            member_bounds=bounds is not None and bounds.ndim == 2,
            absolute=absolute,
        )
        stored = model._stored_tensors()
        if unknown := sorted(name for name in tensors if name.startswith("norm_") and name not in stored):
            raise InputError(
                f"{path} has {unknown[0]}, which dynamics.json does not announce by layer_norm; the two files"
                " are not of one ensemble"
            )
        load_into(path, tensors, stored)
        model.check_elites()
        if not bool((model.input_std > 0).all()):
            raise InputError(f"{path}: input_std must be positive everywhere")
        return model.to(device)

    def _stored_tensors(self) -> dict[str, torch.Tensor]:
        names = ("input_mean", "input_std", "max_logvar", "min_logvar", "elites")
        layers = layer_tensors(self.weights, self.biases)
        norms = norm_tensors(self.norms) if self.norms else {}
        return layers | norms | {name: getattr(self, name) for name in names}

    def check_elites(self) -> None:
        """Raise `InputError` unless `elites` are distinct members, one or more."""
        check_members("elites", self.elites, self.members)


def check_members(name: str, numbers: torch.Tensor, members: int) -> None:
    """Raise `InputError` unless `numbers`, int64 [n], are distinct members, one or more."""
    if numbers.dtype != torch.int64 or numbers.ndim != 1:
        raise InputError(f"{name} must be int64 [n], got {numbers.dtype} {list(numbers.shape)}")
    _check_distinct(name, numbers.tolist(), members)


def elites_of(elites: Any, members: int) -> list[int]:
    """Return a list or tuple `elites` as ints; raise `InputError` unless they are distinct members."""
    given = list(elites) if isinstance(elites, list | tuple) else []
    if not given or not all(isinstance(e, int | np.integer) and not isinstance(e, bool) for e in given):
        raise InputError("elites must be whole numbers, one or more")
    _check_distinct("elites", given, members)
    return [int(e) for e in given]


def _check_distinct(name: str, found: list[int], members: int) -> None:
    if not found or len(set(found)) != len(found) or not all(0 <= one < members for one in found):
        raise InputError(f"{name} must be distinct members 0..{members - 1}, got {str(found)[:100]}")
