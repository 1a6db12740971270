"""A stand-in for OfflineRL-Kit's dynamics model with the recorded weights, and our dynamics on it."""

import types
from typing import Any

import numpy as np
import torch
from places import RECORDED
from torch import nn

from mopo_fast.compat import offlinerl_kit as kit

FOLDER = RECORDED / "offlinerl_kit"


class Layer(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.saved_weight, self.saved_bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.weight_decay = 1e-4


class Swish(nn.Module):
    pass


class Model(nn.Module):
    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        layers = [
            Layer(state[f"{name}.weight"], state[f"{name}.bias"])
            for name in ("backbones.0", "backbones.1", "output_layer")
        ]
        self.backbones, self.output_layer = nn.ModuleList(layers[:-1]), layers[-1]
        self.max_logvar = nn.Parameter(state["max_logvar"].clone())
        self.min_logvar = nn.Parameter(state["min_logvar"].clone())
        self.activation = Swish()
        self.set_elites(state["elites"].tolist())

    def set_elites(self, elites: list[int]) -> None:
        self.elites = nn.Parameter(torch.tensor(elites), requires_grad=False)


def load(name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(FOLDER / name, weights_only=True)
    return state


def make_dynamics(mode: str = "aleatoric", coef: float = 0.7, **options: Any) -> kit.EnsembleDynamics:
    model = Model(load("dynamics.pth"))
    scaler = types.SimpleNamespace(mu=np.load(FOLDER / "mu.npy"), std=np.load(FOLDER / "std.npy"))
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    terminal = options.pop("terminal_fn", termination("point2denv"))
    return kit.EnsembleDynamics(model, optim, scaler, terminal, coef, mode, **options)


def termination(task: str) -> Any:
    """Make a function with the module and name of one of OfflineRL-Kit's termination functions."""

    def function(*_: Any) -> Any:
        raise AssertionError("a rule that is a box is part of the kernel")

    function.__name__, function.__module__ = f"termination_fn_{task}", "offlinerlkit.utils.termination_fns"
    return function
