"""Adam, as all that is trained here uses it."""

import os
from collections.abc import Iterable, Sequence

import torch
from torch.optim.adam import adam

from mopo_fast.errors import InputError


class Adam:
    """torch's fused Adam with its defaults, and its state in the open.

    `torch.optim.Adam` costs more than the arithmetic for networks of this size.

    Args:
        parameters: leaf tensors, changed in place.
        learning_rate: of the first step.
        weight_decay: one for each parameter; times it, added to its gradient. None: none.

    Attributes:
        exp_avgs, exp_avg_sqs: running moments, shaped as the parameters.
        steps: float32 scalars, how many steps each has made.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        learning_rate: float,
        weight_decay: Sequence[float] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.weight_decay = list(weight_decay or [0.0] * len(self.parameters))
        self.exp_avgs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=each.device) for each in self.parameters]
        # On a GPU in a tensor: a recorded step reads what it is when played.
        on_gpu = self.parameters[0].device.type == "cuda"
        self._rate = torch.zeros((), device=self.parameters[0].device) if on_gpu else None
        self.learning_rate = learning_rate

    @property
    def learning_rate(self) -> float:
        """May be changed between steps."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = value
        if self._rate is not None:
            self._rate.fill_(value)

    def check_moments(self, source: str | os.PathLike[str]) -> None:
        """Raise `InputError` where a second moment is negative; `source` names the file it was read from."""
        if any(bool((square < 0).any()) for square in self.exp_avg_sqs):
            raise InputError(f"{source}: a second moment of Adam is negative")

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Move the parameters against `gradients`, one for each."""
        for decay in sorted(set(self.weight_decay)):
            some = [i for i, other in enumerate(self.weight_decay) if other == decay]
            adam(
                [self.parameters[i] for i in some],
                [gradients[i] for i in some],
                [self.exp_avgs[i] for i in some],
                [self.exp_avg_sqs[i] for i in some],
                [],
                [self.steps[i] for i in some],
                fused=True,
                lr=self._learning_rate if self._rate is None else self._rate,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=decay,
                amsgrad=False,
                maximize=False,
            )
