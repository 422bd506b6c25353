"""A function of tensors, captured as a CUDA graph and replayed without the CPU's overhead."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 3      # before capture, so that libraries have chosen their algorithms


class Captured:
    """`function` of tensors of fixed shapes on a GPU, captured after WARM_UP_CALLS plain calls.

    The next call overwrites the tensor that a call returned. Side effects on the device belong to
    the graph; those on the host happen in the plain calls and during capture only. If capture
    fails, a line says why, and all calls are plain ones.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls = function, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.side_stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            self.calls += 1
            if self.calls == WARM_UP_CALLS + 1:
                self.graph = self._capture(inputs)
            if self.graph is None:
                return self._plain(inputs)
        for own, x in zip(self.inputs, inputs):
            own.copy_(x)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph | None:
        """Record the graph, which executes nothing. -> None if that failed."""
        self.inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            reason, *_ = str(error).splitlines()
            print(f"Not captured as a CUDA graph, and therefore slower: {reason}")
            return None
        return graph

    def _plain(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """A plain call on a side stream, as the calls before capture have to be."""
        main = torch.cuda.current_stream()
        self.side_stream.wait_stream(main)
        with torch.cuda.stream(self.side_stream):
            output = self.function(*inputs)
        main.wait_stream(self.side_stream)
        return output
