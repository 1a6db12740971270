"""Many small kernels in one launch of a GPU."""

from collections.abc import Callable, Sequence

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
