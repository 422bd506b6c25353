"""How a few functions are computed fast, and where a GPU needs help; each says what it computes.

Nothing here knows the model.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# A GPU's convolutions in bfloat16 want a multiple of so many channels.
CHANNELS = 8
# PyTorch's LU of fewer matrices may not be the batched one, which CUDA graphs can capture.
MIN_GPU_BATCH = 3


class LogAbsDet(torch.autograd.Function):
    """log|det W| by LU in double precision, W (..., C, C) -> (...); d log|det W| / dW = W^-T.

    It never waits for a GPU: a singular W gives -inf, and a gradient that means nothing.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        exact = w.double()
        lu, pivots, _ = torch.linalg.lu_factor_ex(exact)
        ctx.save_for_backward(lu, pivots)
        diagonal = lu.diagonal(dim1=-2, dim2=-1).abs()
        # Rounding errors put a number of that size where a pivot of a singular W is 0. On a GPU
        # the size and the largest entry are those of the padded W.
        rounding = w.shape[-1] * torch.finfo(exact.dtype).eps * exact.abs().amax((-2, -1))
        diagonal = diagonal.masked_fill(diagonal <= rounding[..., None], 0)
        return diagonal.log().sum(-1).to(w.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        lu, pivots = ctx.saved_tensors
        identity = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device).expand_as(lu)
        inverse_t = torch.linalg.lu_solve(lu, pivots, identity, adjoint=True)
        return (grad[..., None, None] * inverse_t).to(grad.dtype)


def log_abs_dets(matrices: Sequence[Tensor]) -> Tensor:
    """log|det W| of N = N_1 + N_2 + ... matrices of several sizes, (N,).

    matrices: (N_1, C_1, C_1), (N_2, C_2, C_2), ...
    """
    if not matrices[0].is_cuda:
        # One by one: PyTorch 2.14 with MKL factorises batches wrongly after torch.set_num_threads.
        return torch.stack([LogAbsDet.apply(w) for same_size in matrices for w in same_size])
    n, largest = sum(map(len, matrices)), max(w.shape[1] for w in matrices)
    batch = [extended(w, largest) for w in matrices]    # which a GPU factorises at the same time
    if n < MIN_GPU_BATCH:
        identity = torch.eye(largest, dtype=batch[0].dtype, device=batch[0].device)
        batch.append(identity.expand(MIN_GPU_BATCH - n, -1, -1))
    return LogAbsDet.apply(torch.cat(batch))[:n]


def extended(w: Tensor, size: int) -> Tensor:
    """w (N, C, C) -> (N, size, size), with the identity in the other rows and columns."""
    more = size - w.shape[1]
    if not more:
        return w
    diagonal = torch.cat((w.new_zeros(w.shape[1]), w.new_ones(more)))
    return F.pad(w, (0, more, 0, more)) + diagonal.diag()


def beside(function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Start a function of `inputs` on a side stream -> a function that waits for its result."""
    if not inputs[0].is_cuda or torch.distributed.is_initialized():     # hooks expect one stream
        return function
    main, side = torch.cuda.current_stream(), _side_stream(inputs[0].device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function()
    for tensor in inputs:
        tensor.record_stream(side)

    def wait() -> Tensor:
        main.wait_stream(side)
        result.record_stream(main)
        return result
    return wait


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _ChannelsLastGradient(torch.autograd.Function):
    """The identity, with a channels-last gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous(memory_format=torch.channels_last)
        # TorchInductor keeps what as_strided gets, in this format, instead of computing it again
        # wherever it is used.
        return grad.as_strided(grad.shape, grad.stride())


def channels_last(x: Tensor) -> Tensor:
    """Images x in channels-last memory, and so, on a GPU, their gradient; vectors as they are.

    Reflection padding, among others, loses the format of gradients on a GPU, whose convolutions
    would copy them.
    """
    if x.dim() != 4:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    return _ChannelsLastGradient.apply(x) if x.is_cuda else x


def gpu_conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: Any) -> Tensor:
    """F.conv2d to bfloat16, as a GPU's kernels want it: with multiples of CHANNELS channels.

    x, weight: in bfloat16, or in float32; then each is the sum of two numbers in bfloat16, and the
        result that of a convolution of 3C channels, which is more exact than TF32:
        x w = x_high w_high + x_low w_high + x_high w_low
    bias, padding: as for F.conv2d

    Returns images in bfloat16, with a channels-last gradient.
    """
    if x.dtype != torch.bfloat16:
        (x_high, x_low), (w_high, w_low) = _high_and_low(x), _high_and_low(weight)
        x, weight = torch.cat((x_high, x_low, x_high), 1), torch.cat((w_high, w_high, w_low), 1)
    out = F.conv2d(_padded(x, 1).contiguous(memory_format=torch.channels_last),
                   _padded(_padded(weight, 1), 0), _padded(bias.bfloat16(), 0), padding=padding)
    return channels_last(out)[:, :len(weight)]


def _high_and_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = high + low, both in bfloat16, to 16 bits. The gradient flows through high."""
    high = x.bfloat16()
    return high, (x - high).detach().bfloat16()


def _padded(x: Tensor, dim: int) -> Tensor:
    """x with zeros at the end of `dim`, up to a multiple of CHANNELS."""
    padding = [0, 0] * (x.dim() - dim - 1) + [0, -x.shape[dim] % CHANNELS]
    return F.pad(x, padding) if padding[-1] else x
