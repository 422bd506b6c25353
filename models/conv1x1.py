"""Invertible 1x1 convolutions (Kingma & Dhariwal 2018, arXiv 1807.03039, section 3.2).

z = W x over the channels, at every pixel; the log-determinant is H W log|det W|. The four kinds
differ in how W follows from the parameters, and so in the cost of its determinant.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bijections import Affine
from .kernels import LogAbsDet, log_abs_dets

# Up to this many channels, broadcasting beats a matrix product on images.
BROADCAST_CHANNELS = 16
SHORTEST = 1e-30        # |v|^2 of a reflection: float32 has fewer digits of much smaller numbers


def over_channels(w: Tensor, x: Tensor) -> Tensor:
    """W x at every pixel: w (C, C), x (B, C, ...) -> (B, C, ...)."""
    if x.shape[2:].numel() == 1:
        return (x.flatten(1) @ w.T).view_as(x)
    if len(w) <= BROADCAST_CHANNELS:
        return (w[:, :, None, None] * x[:, None]).sum(2)  # (B, C, C, H, W) -> (B, C, H, W)
    return (w @ x.flatten(2)).view_as(x)


class InvertibleConv(Affine):
    """z = W x: each kind defines `matrix`. `inverse` raises ValueError if W has no inverse."""

    matrix: Callable[..., Tensor]   # the type to compute in, by default its own -> W (C, C)

    def forward(self, x: Tensor) -> Tensor:
        return over_channels(self.matrix(), x)

    def inverse(self, z: Tensor) -> Tensor:
        # In double precision: float32 would lose the small values of R in W = Q R, and those digits
        # of x in which large numbers cancel.
        w = self.matrix(torch.float64)
        if not LogAbsDet.apply(w.detach()).isfinite():
            raise ValueError(f"a 1x1 convolution of {len(w)} channels has no inverse: W is "
                             "singular, or not finite")
        return over_channels(torch.linalg.inv(w), z.double()).to(z.dtype)


class FullConv(InvertibleConv):
    """An unconstrained matrix W, the identity at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.W = nn.Parameter(torch.eye(channels))

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.W.to(dtype)

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

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        vectors = self.v.to(dtype)
        q = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        for v in vectors:
            length = v.dot(v)               # squared
            length = length.masked_fill(length < SHORTEST, torch.nan)
            q = q - 2 * torch.outer(q @ v, v) / length  # q H_i
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

    def diagonal(self, dtype: torch.dtype | None = None) -> Tensor:
        """The diagonal of R, (C,), computed in `dtype`."""
        return F.softplus(self.s.to(dtype))

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        r = self.diagonal(dtype).diag() + self.r.to(dtype).triu(1)
        return super().matrix(dtype) @ r

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

    def diagonal(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.s.to(dtype)


CONVS: dict[str, Callable[[int, int], InvertibleConv]] = {
    "full": lambda channels, hh_factors: FullConv(channels),
    "qr": QRConv,
    "qr-abs": QRAbsConv,
    "hh": HouseholderConv,
}


def invertible_conv(kind: str, channels: int, hh_factors: int) -> InvertibleConv:
    """The invertible 1x1 convolution of `kind`, a key of CONVS, on `channels` channels."""
    return CONVS[kind](channels, hh_factors)
