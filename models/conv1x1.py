"""Invertible 1x1 convolutions (Kingma & Dhariwal 2018, arXiv 1807.03039, section 3.2).

z = W x over the channels, at every pixel; the log-determinant is H W log|det W|. The four kinds
differ in how W follows from the parameters, and so in the cost of its determinant.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .bijections import Affine

# Up to this many channels, broadcasting beats a matrix product on images.
BROADCAST_CHANNELS = 16
# PyTorch's LU of fewer matrices may not be the batched one, which CUDA graphs can capture.
MIN_GPU_BATCH = 3


class LogAbsDet(torch.autograd.Function):
    """log|det W| of each W (N, C, C) -> (N,), by LU in double precision; d log|det W| / dW = W^-T.

    It never synchronises with the device: a singular W gives -inf, and a gradient that is not
    finite.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        n, c, _ = w.shape
        matrices = w.double()
        if w.is_cuda and n < MIN_GPU_BATCH:
            identity = torch.eye(c, dtype=matrices.dtype, device=w.device)
            matrices = torch.cat((matrices, identity.expand(MIN_GPU_BATCH - n, c, c)))
        lu, pivots = _per_matrix_on_cpu(lambda w: torch.linalg.lu_factor_ex(w)[:2], matrices)
        ctx.save_for_backward(lu, pivots)
        return lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)[:n].to(w.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        lu, pivots = ctx.saved_tensors
        eye = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device).expand_as(lu)
        inverse_t, = _per_matrix_on_cpu(
            lambda *args: (torch.linalg.lu_solve(*args, adjoint=True),), lu, pivots, eye)
        return (grad[:, None, None] * inverse_t[:len(grad)]).to(grad.dtype)


def _per_matrix_on_cpu(f: Callable[..., tuple[Tensor, ...]],
                       *batched: Tensor) -> tuple[Tensor, ...]:
    """f(*batched) on a GPU; on a CPU the stacked results of f for each entry of the batch.

    On a CPU, PyTorch 2.14 with MKL factorises a batch wrongly after torch.set_num_threads.
    """
    if batched[0].is_cuda:
        return f(*batched)
    return tuple(map(torch.stack, zip(*map(f, *batched))))


def log_abs_dets(matrices: Sequence[Tensor]) -> Tensor:
    """log|det W| of each of N_1 matrices, N_2 others of another size, and so on: (N,).

    matrices: (N_1, C_1, C_1), (N_2, C_2, C_2), ... On a GPU they are one batch of the largest size,
    which it factorises at the same time.
    """
    if matrices[0].is_cuda:
        largest = max(len(w[0]) for w in matrices)
        matrices = [torch.cat([extended(w, largest) for w in matrices])]
    return torch.cat([LogAbsDet.apply(w) for w in matrices])


def extended(w: Tensor, size: int) -> Tensor:
    """w (N, C, C) -> (N, size, size) with the identity in the other rows and columns."""
    more = size - w.shape[1]
    if not more:
        return w
    ones = torch.cat((w.new_zeros(w.shape[1]), w.new_ones(more)))
    return F.pad(w, (0, more, 0, more)) + ones.diag()


def over_channels(w: Tensor, x: Tensor) -> Tensor:
    """W x at every pixel: w (C, C), x (B, C, ...) -> (B, C, ...)."""
    if x.shape[2:].numel() == 1:
        return (x.flatten(1) @ w.T).view_as(x)
    if len(w) <= BROADCAST_CHANNELS:
        return (w[:, :, None, None] * x[:, None]).sum(2)  # (B, C, C, H, W) -> (B, C, H, W)
    return (w @ x.flatten(2)).view_as(x)


class InvertibleConv(Affine):
    """z = W x. Each kind defines `matrix()`, which returns W (C, C)."""

    def matrix(self) -> Tensor:
        """W (C, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return over_channels(self.matrix(), x)

    def inverse(self, z: Tensor) -> Tensor:
        w = self.matrix()
        return over_channels(torch.linalg.inv(w.double()).to(w.dtype), z)


class FullConv(InvertibleConv):
    """An unconstrained matrix W, the identity at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.W = nn.Parameter(torch.eye(channels))

    def matrix(self) -> Tensor:
        return self.W

    def log_det_weights(self) -> Tensor:
        return self.W

    @staticmethod
    def log_dets(weights: Sequence[Tensor]) -> Tensor:
        return log_abs_dets(weights)


class HouseholderConv(InvertibleConv):
    """W = Q = H_1 H_2 ..., a product of reflections H_i = I - 2 v_i v_i^T / |v_i|^2.

    Hence log|det W| = 0 (Tomczak & Welling 2016, arXiv 1611.09630). At the start each v_i is
    uniform in [-1, 1]^C, normalised.
    """

    def __init__(self, channels: int, hh_factors: int):
        super().__init__()
        v = torch.rand(hh_factors, channels) * 2 - 1
        self.v = nn.Parameter(F.normalize(v))

    def orthogonal(self) -> Tensor:
        """Q (C, C)."""
        q = torch.eye(self.v.shape[1], dtype=self.v.dtype, device=self.v.device)
        for v in self.v:
            q = q - 2 * torch.outer(q @ v, v) / v.dot(v)  # q H_i
        return q

    def matrix(self) -> Tensor:
        return self.orthogonal()

    def log_det_weights(self) -> Tensor:
        return self.v[0]

    @staticmethod
    def log_dets(weights: Sequence[Tensor]) -> Tensor:
        return torch.cat([v.new_zeros(len(v)) for v in weights])


class QRConv(HouseholderConv):
    """W = Q R with R = diag(softplus(s)) + the strictly upper triangle of r.

    Hoogeboom et al. 2019 (arXiv 1901.11137), with Q a product of reflections; s and r start at 0.
    """

    def __init__(self, channels: int, hh_factors: int):
        super().__init__(channels, hh_factors)
        self.s = nn.Parameter(torch.zeros(channels))
        self.r = nn.Parameter(torch.zeros(channels, channels))

    def diagonal(self) -> Tensor:
        """The diagonal of R, (C,)."""
        return F.softplus(self.s)

    def matrix(self) -> Tensor:
        return self.orthogonal() @ (torch.diag(self.diagonal()) + self.r.triu(1))

    def log_det_weights(self) -> Tensor:
        return self.diagonal()

    @staticmethod
    def log_dets(weights: Sequence[Tensor]) -> Tensor:
        return torch.cat([diagonals.abs().log().sum(1) for diagonals in weights])


class QRAbsConv(QRConv):
    """QRConv with diag(s) instead of diag(softplus(s)); s is 1 at the start.

    Hence log|det W| = sum log|s|.
    """

    def __init__(self, channels: int, hh_factors: int):
        super().__init__(channels, hh_factors)
        nn.init.ones_(self.s)

    def diagonal(self) -> Tensor:
        return self.s


CONVS: dict[str, Callable[[int, int], InvertibleConv]] = {
    "full": lambda channels, hh_factors: FullConv(channels),
    "qr": QRConv,
    "qr-abs": QRAbsConv,
    "hh": HouseholderConv,
}


def invertible_conv(kind: str, channels: int, hh_factors: int) -> InvertibleConv:
    """The invertible 1x1 convolution of `kind`, a key of CONVS, on `channels` channels."""
    return CONVS[kind](channels, hh_factors)
