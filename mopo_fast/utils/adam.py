"""Adam, the optimiser of the fit and of SAC."""

import os
from collections.abc import Iterable, Sequence

import torch
from torch.optim.adam import adam

from mopo_fast.errors import InputError


class Adam:
    """torch's fused Adam with its default betas, and with its state in public attributes.

    `torch.optim.Adam` would take more time than the arithmetic of networks of this size.

    Args:
        parameters: leaf tensors, which are changed in place.
        learning_rate: learning rate of the first step.
        weight_decay: a factor for each parameter, by which the parameter is added to its gradient. None
            stands for no decay.
        epsilon: number that is added to the root of the second moment.

    Attributes:
        parameters: the parameters.
        weight_decay: the factor of each parameter.
        epsilon: the number in the divisor.
        exp_avgs: running means of the gradients, of the parameters' shapes.
        exp_avg_sqs: running means of the squared gradients, of the parameters' shapes.
        steps: number of steps of each parameter, as float32 scalars.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        learning_rate: float,
        weight_decay: Sequence[float] | None = None,
        epsilon: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.epsilon = epsilon
        self.weight_decay = list(weight_decay or [0.0] * len(self.parameters))
        self.exp_avgs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.exp_avg_sqs = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=each.device) for each in self.parameters]
        # A CUDA graph reads the rate when it is replayed, so it must be in a tensor on the GPU.
        on_gpu = self.parameters[0].device.type == "cuda"
        self._rate = torch.zeros((), device=self.parameters[0].device) if on_gpu else None
        self.learning_rate = learning_rate

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = value
        if self._rate is not None:
            self._rate.fill_(value)

    def check_moments(self, source: str | os.PathLike[str]) -> None:
        """Raise `InputError` where a second moment is negative. `source` is the file it was read from."""
        if any(bool((square < 0).any()) for square in self.exp_avg_sqs):
            raise InputError(f"{source}: a second moment of Adam is negative")

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Make one step with `gradients`, one for each parameter."""
        for decay in sorted(set(self.weight_decay)):
            group = [i for i, other in enumerate(self.weight_decay) if other == decay]
            adam(
                [self.parameters[i] for i in group],
                [gradients[i] for i in group],
                [self.exp_avgs[i] for i in group],
                [self.exp_avg_sqs[i] for i in group],
                [],
                [self.steps[i] for i in group],
                fused=True,
                lr=self._learning_rate if self._rate is None else self._rate,
                beta1=0.9,
                beta2=0.999,
                eps=self.epsilon,
                weight_decay=decay,
                amsgrad=False,
                maximize=False,
            )
        # The fused function does not count its writes.
        for changed in (*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, *self.steps):
            torch.autograd.graph.increment_version(changed)
