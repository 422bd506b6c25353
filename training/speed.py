"""The functions of a model as a run computes them: precision, compilation, CUDA graphs,
micro-batches.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

from models import SemiConditionalFlow
from models.bijections import Affine, ChannelCoupling, CheckerboardCoupling
from models.networks import Conv3x3, Linear, Network, NetworkNorm
from utils.data import Batch
from utils.terminal import say

# Graphs that torch.compile may make of a function: one per shape, with and without gradient.
COMPILED_GRAPHS = 256
# Of the largest activation on a CPU: larger micro-batches take more memory and more time, as they
# do not fit its caches.
MICRO_BATCH_BYTES = 2**23
WARM_UP_CALLS = 3      # before the capture of a CUDA graph: libraries choose their algorithms


class Speed(NamedTuple):
    """How a run computes: the options of Accelerated."""

    precision: str = "fp32"     # of the couplings' networks: fp32, tf32, bf16
    compile: bool = False       # by torch.compile
    cuda_graph: bool = False    # training steps, and batches of evaluation, as CUDA graphs
    micro_bs: int = 0           # micro-batch size; 0: chosen


class Accelerated(nn.Module):
    """The functions of a model, with its parameters, as the options of Speed want them computed.

    model: on its device, where it has to stay
    precision: with bf16 the networks compute in bfloat16, but for the first layers of ResNets
        (models/networks.py); scales, log-determinants, base densities and logsumexp keep the type
        of the model. Points have too few dimensions for these errors to average out
    compile: each coupling and each affine layer is one graph of torch.compile. Equal ones share a
        graph, so that a deep flow compiles in little more time than a shallow one. In bf16 their
        networks' weights, and the gradients of these, are then cast by one kernel for all of them
    cuda_graph: tells the callers whether to capture their calls as CUDA graphs
    micro_bs: the `micro_batch_size`, the number of rows for which one pass is efficient; 0: what
        takes little memory on a CPU, or any number on a GPU. At most so many that h_phi computes
        all classes in one pass: several would be computed again outside of `call`

    Raises ValueError for another precision, and for bf16 if the model is one of points or in double
    precision.
    """

    def __init__(self, model: SemiConditionalFlow, precision: str = "fp32", compile: bool = False,
                 cuda_graph: bool = False, micro_bs: int = 0):
        super().__init__()
        if precision not in ("fp32", "tf32", "bf16"):
            raise ValueError(f"precision must be fp32, tf32 or bf16, not {precision}")
        if precision == "bf16" and not model.image:
            raise ValueError("precision bf16 is for images: log p(x) of points would be coarse")
        if precision == "bf16" and model.log_p_y.dtype != torch.float32:
            raise ValueError("precision bf16 is for a model in float32")
        self.methods, self.cuda_graph = _Methods(model), cuda_graph
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.networks = [part for part in model.modules() if isinstance(part, Network)]
        self.cast_together = _names_of_weights(self.methods) if compile and self.dtype else []
        self.micro_batch_size = min(model.h_phi.largest_batch, micro_bs or (
            sys.maxsize if model.log_p_y.is_cuda else _fitting_batch(model, self.dtype)))
        if compile:
            limit = max(torch._dynamo.config.recompile_limit, COMPILED_GRAPHS)
            torch._dynamo.config.recompile_limit = limit
            for part in model.modules():
                is_layer = isinstance(part, CheckerboardCoupling | ChannelCoupling | Affine)
                if is_layer and not isinstance(part, NetworkNorm):
                    part.compile(fullgraph=True, dynamic=False)

    @property
    def model(self) -> SemiConditionalFlow:
        """The model itself."""
        return self.methods.model

    def forward(self, x: Tensor, copies: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, C, H, W) -> log p(x, y), (B, K), and None.

        With `copies`, images (B', C, H, W), the second is log p(y | x) of these, up to a term that
        does not depend on y, (B', K).
        """
        if copies is None:
            return self.log_joint(x), None
        if self.model.cheap_logits:
            return self.log_joint(x), self.logits(copies)
        log_joint = self.log_joint(torch.cat((x, copies)))
        return log_joint[:len(x)], log_joint[len(x):]

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y): x (B, C, H, W) -> (B, K)."""
        return self.call("log_joint", x)

    def logits(self, x: Tensor) -> Tensor:
        """log p(y | x) up to a term that does not depend on y: x (B, C, H, W) -> (B, K)."""
        return self.call("logits", x)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """`batch` in parts for which one pass is efficient."""
        n = max(self.micro_batch_size // (1 if batch.copies is None else 2), 1)
        return [batch.rows(slice(i, i + n)) for i in range(0, len(batch.x), n)]

    def call(self, method: str, *args: Tensor) -> Any:
        """The method of the model with these arguments."""
        with self._as_in_training():
            if not self.cast_together:
                return self.methods(method, *args)
            weights = [self.methods.get_parameter(name) for name in self.cast_together]
            cast = dict(zip(self.cast_together, _CastTogether.apply(*weights)))
            return functional_call(self.methods, cast, (method, *args))

    @contextlib.contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """The networks compute in the precision chosen, and no values of arguments are checked."""
        for network in self.networks:
            network.dtype = self.dtype
        checks, self.model.checks_values = self.model.checks_values, False
        try:
            yield
        finally:
            self.model.checks_values = checks
            for network in self.networks:
                network.dtype = None


class _Methods(nn.Module):
    """The methods of a model as one function, as functional_call wants it."""

    def __init__(self, model: SemiConditionalFlow):
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Tensor) -> Any:
        return getattr(self.model, method)(*args)


def _names_of_weights(module: nn.Module) -> list[str]:
    """The names, within `module`, of the weights and biases that its networks use in their `dtype`:
    those of their first layers too, where they are biases of a GPU's convolutions."""
    networks = [(name, part) for name, part in module.named_modules() if isinstance(part, Network)]
    layers = [(f"{name}.{layer}", part, layer.startswith("first")) for name, network in networks
              for layer, part in network.named_modules() if isinstance(part, Conv3x3 | Linear)]
    return [*(f"{name}.weight" for name, _, is_first in layers if not is_first),
            *(f"{name}.bias" for name, part, is_first in layers
              if not is_first or (isinstance(part, Conv3x3) and part.bias.is_cuda))]


class _CastTogether(torch.autograd.Function):
    """Tensors in float32 -> the same in bfloat16."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)        # p(y | x) alone may not need all of them
        return _cast(tensors, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast(tuple(g for g in grads if g is not None), torch.float32))
        return tuple(None if g is None else next(cast) for g in grads)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(t, dtype=dtype) for t in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


@torch.no_grad()
def _fitting_batch(model: SemiConditionalFlow, dtype: torch.dtype | None) -> int:
    """How many images of the largest activation fit MICRO_BATCH_BYTES: a power of two, as batch
    sizes are. dtype: of the activations in networks, which the largest is one of, if not None."""
    largest = 1

    def record(part: nn.Module, inputs: Any, out: Any) -> None:
        nonlocal largest
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, Tensor):
            largest = max(largest, out.numel() * (dtype or out.dtype).itemsize)
    hook = register_module_forward_hook(record)
    try:
        model.log_joint(model.log_p_y.new_full((1, *model.data_shape), 0.5))
    finally:
        hook.remove()
    return 1 << max(MICRO_BATCH_BYTES // largest, 1).bit_length() - 1


class Captured:
    """`function` of tensors of fixed shapes on a GPU, captured after WARM_UP_CALLS plain calls.

    The next call overwrites the tensors that a call returned. Side effects on the device belong to
    the graph; those on the host happen in the plain calls and during capture only. If capture
    fails, a line says why, and all calls are plain ones.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.side_stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor | None) -> Any:
        if self.graph is None:
            self.calls += 1
            if self.calls == WARM_UP_CALLS + 1:
                self.graph = self._capture(inputs)
            if self.graph is None:
                return self._plain(inputs)
        for static, x in zip(self.inputs, inputs):
            assert (static is None) == (x is None), "inputs are the same ones in each call"
            if static is not None and x is not None:
                static.copy_(x)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: tuple[Tensor | None, ...]) -> torch.cuda.CUDAGraph | None:
        """Record the graph, which executes nothing. -> None if that failed."""
        self.inputs = [None if x is None else x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            reason, *_ = str(error).splitlines()
            say("Slow", f"not captured as a CUDA graph: {reason}")
            return None
        return graph

    def _plain(self, inputs: tuple[Tensor | None, ...]) -> Any:
        """A plain call on a side stream, as the calls before capture have to be."""
        main = torch.cuda.current_stream()
        self.side_stream.wait_stream(main)
        with torch.cuda.stream(self.side_stream):
            output = self.function(*inputs)
        main.wait_stream(self.side_stream)
        return output
