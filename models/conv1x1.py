"""Invertible 1x1 convolutions (Kingma & Dhariwal 2018, arXiv 1807.03039, section 3.2).

z = W x over the channels, at every pixel; the log-determinant is H W log|det W|. The four kinds
differ in how W follows from the parameters, and so in the cost of its determinant.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bijections import Affine
from .kernels import log_abs_dets

# Up to this many channels, broadcasting beats a matrix product on images.
BROADCAST_CHANNELS = 16


def over_channels(w: Tensor, x: Tensor) -> Tensor:
    """W x at every pixel: w (C, C), x (B, C, ...) -> (B, C, ...)."""
    if x.shape[2:].numel() == 1:
        return (x.flatten(1) @ w.T).view_as(x)
    if len(w) <= BROADCAST_CHANNELS:
        return (w[:, :, None, None] * x[:, None]).sum(2)  # (B, C, C, H, W) -> (B, C, H, W)
    return (w @ x.flatten(2)).view_as(x)


class InvertibleConv(Affine):
    """z = W x: each kind defines `matrix`."""

    matrix: Callable[[], Tensor]    # -> W (C, C)

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
        self.v = nn.Parameter(F.normalize(torch.rand(hh_factors, channels) * 2 - 1))

    def matrix(self) -> Tensor:
        q = torch.eye(self.v.shape[1], dtype=self.v.dtype, device=self.v.device)
        for v in self.v:
            q = q - 2 * torch.outer(q @ v, v) / v.dot(v)  # q H_i
        return q

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
        return super().matrix() @ (self.diagonal().diag() + self.r.triu(1))

    def log_det_weights(self) -> Tensor:
        return self.diagonal()

    @staticmethod
    def log_dets(weights: Sequence[Tensor]) -> Tensor:
        return torch.cat([diagonals.abs().log().sum(1) for diagonals in weights])


class QRAbsConv(QRConv):
    """QRConv with diag(s), s = 1 at the start, instead of diag(softplus(s)).

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
