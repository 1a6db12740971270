"""Many small kernels in one launch of a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def records(device: torch.device) -> bool:
    """Whether launches on a device can be recorded."""
    return device.type == "cuda"


class Graph:
    """A function's kernels on a GPU, recorded once and played back with other arguments.

    Source: "CUDA Graphs" in PyTorch's notes on CUDA semantics.

    Args:
        function: of CUDA tensors; it may read and change other tensors in place, but the host may not look at
            their values.
        arguments: of the shapes that it will be called with.
        state: all that it changes, to be put back after the run that warms it up.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
    ) -> None:
        self.arguments = [argument.clone() for argument in arguments]
        before = [tensor.detach().clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*self.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function(*self.arguments)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """What `function` returns, good until the next call."""
        for mine, argument in zip(self.arguments, arguments, strict=True):
            mine.copy_(argument)
        self.graph.replay()
        return self.result


class Recorder:
    """Plays a function from graphs of its own, one for each shape of arguments and place of its state."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Graph] = {}

    def play(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """function(*arguments), recorded at the first call with such; see `Graph`."""
        what = (*(argument.shape for argument in arguments), *(tensor.data_ptr() for tensor in state))
        if what not in self._graphs:
            self._graphs[what] = Graph(function, arguments, state)
        return self._graphs[what](*arguments)
