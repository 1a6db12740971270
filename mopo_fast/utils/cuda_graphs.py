"""CUDA graphs: many small kernels of a GPU in one launch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def records(device: torch.device) -> bool:
    """Tell whether launches on a device can be recorded."""
    return device.type == "cuda"


class Graph:
    """The kernels of a function on a GPU, recorded once and replayed with other arguments.

    Source: "CUDA Graphs" in PyTorch's notes on CUDA semantics.

    Args:
        function: a function of CUDA tensors. It may read other tensors and change them in place, but may not
            read values back to the host.
        arguments: arguments of the shapes that the graph will be called with.
        state: all tensors that `function` changes. They are restored after its warm-up run.
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
        """Replay the function; its result is valid until the next call."""
        for mine, argument in zip(self.arguments, arguments, strict=True):
            mine.copy_(argument)
        self.graph.replay()
        return self.result


class Recorder:
    """Plays functions from graphs, one for each shape of the arguments and each address of the state."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Graph] = {}

    def play(
        self,
        function: Callable[..., torch.Tensor],
        arguments: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return function(*arguments), recorded at the first call. The arguments are those of `Graph`."""
        key = (*(argument.shape for argument in arguments), *(tensor.data_ptr() for tensor in state))
        if key not in self._graphs:
            self._graphs[key] = Graph(function, arguments, state)
        return self._graphs[key](*arguments)
