"""Invertible 1x1 convolutions (Kingma & Dhariwal 2018, arXiv 1807.03039, section 3.2).

z = W x over the channels, at every pixel; log-det = H W log|det W|. The four kinds differ in how
W is made of parameters, and so in what their determinant costs. `invertible_conv` picks one.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .bijections import Bijection

SMALL = 16    # channels up to which an image's product is written out: a call of a product costs more than its work
BATCH = 3     # matrices from which a GPU's LU is batched, which a CUDA graph is known to hold


class LogAbsDet(torch.autograd.Function):
    """log|det W| of each W (N, C, C) -> (N,): by LU in double precision; d log|det W| / dW = W^-T.

    Never waits for the device: a singular W gives -inf, and a gradient that is not finite.
    """

    @staticmethod
    def forward(ctx, w):
        n, c, _ = w.shape
        matrices = w.double()
        if w.is_cuda and n < BATCH:
            matrices = torch.cat((matrices, torch.eye(c, dtype=matrices.dtype, device=w.device).expand(BATCH - n, c, c)))
        lu, pivots = _batched(lambda w: torch.linalg.lu_factor_ex(w)[:2], matrices)
        ctx.save_for_backward(lu, pivots)
        return lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)[:n].to(w.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        lu, pivots = ctx.saved_tensors
        eye = torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device).expand_as(lu)
        inverse_t, = _batched(lambda *args: (torch.linalg.lu_solve(*args, adjoint=True),), lu, pivots, eye)
        return (grad[:, None, None] * inverse_t[:len(grad)]).to(grad.dtype)


def _batched(f, *tensors):
    """f of tensors with a leading batch dimension, called once a matrix on a CPU.

    There PyTorch (2.14 with MKL) computes a batch's LU wrongly once torch.set_num_threads was called.
    """
    if tensors[0].is_cuda:
        return f(*tensors)
    return tuple(map(torch.stack, zip(*map(f, *tensors))))


log_abs_det = LogAbsDet.apply


def over_channels(w, x):
    """W x at every pixel: w (C, C), x (B, C, ...) -> (B, C, ...)."""
    if x.dim() == 2:
        return x @ w.T
    if len(w) <= SMALL:
        return (w[:, :, None, None] * x[:, None]).sum(2)                  # (B, C, C, H, W) -> (B, C, H, W)
    return (w @ x.flatten(2)).view_as(x)


class InvertibleConv(Bijection):
    """z = W x. A kind of it gives `matrix() -> (W (C, C), log|det W| ())`."""

    def matrix(self):
        raise NotImplementedError

    def forward(self, x):
        w, logabsdet = self.matrix()
        pixels = math.prod(x.shape[2:])
        return over_channels(w, x), (logabsdet * pixels).expand(len(x))

    def inverse(self, z):
        w, _ = self.matrix()
        return over_channels(torch.linalg.inv(w.double()).to(w.dtype), z)


class FullConv(InvertibleConv):
    """A free matrix W, the identity at start."""

    def __init__(self, channels):
        super().__init__()
        self.W = nn.Parameter(torch.eye(channels))

    def transform(self, x):
        """W x, without the log-det."""
        return over_channels(self.W, x)

    def matrix(self):
        return self.W, log_abs_det(self.W[None])[0]


class HouseholderConv(InvertibleConv):
    """W = Q = H_1 H_2 ..., a product of reflections H_i = I - 2 v_i v_i^T / |v_i|^2; log-det 0.

    Tomczak & Welling 2016 (arXiv 1611.09630). v_i is drawn uniformly in [-1, 1], normalised.
    """

    def __init__(self, channels, hh_factors):
        super().__init__()
        v = torch.rand(hh_factors, channels) * 2 - 1
        self.v = nn.Parameter(F.normalize(v))

    def orthogonal(self):
        q = torch.eye(self.v.shape[1], dtype=self.v.dtype, device=self.v.device)
        for v in self.v:
            q = q - 2 * torch.outer(q @ v, v) / v.dot(v)                  # q H_i
        return q

    def matrix(self):
        return self.orthogonal(), self.v.new_zeros(())


class QRConv(HouseholderConv):
    """W = Q R, R = diag(softplus(s)) + the strictly upper triangle of r; s and r zero at start.

    Hoogeboom et al. 2019 (arXiv 1901.11137), with Q a product of reflections.
    """

    def __init__(self, channels, hh_factors):
        super().__init__(channels, hh_factors)
        self.s = nn.Parameter(torch.zeros(channels))
        self.r = nn.Parameter(torch.zeros(channels, channels))

    def diagonal(self):
        return F.softplus(self.s)

    def matrix(self):
        d = self.diagonal()
        r = torch.diag(d) + self.r.triu(1)
        return self.orthogonal() @ r, d.abs().log().sum()


class QRAbsConv(QRConv):
    """As QRConv with diag(s) in place of diag(softplus(s)), s one at start: log-det sum log|s|."""

    def __init__(self, channels, hh_factors):
        super().__init__(channels, hh_factors)
        nn.init.ones_(self.s)

    def diagonal(self):
        return self.s


CONVS = {"full": lambda channels, hh_factors: FullConv(channels),
         "qr": QRConv, "qr-abs": QRAbsConv, "hh": HouseholderConv}


def invertible_conv(kind, channels, hh_factors):
    """The invertible 1x1 convolution of `kind`, a key of CONVS, over `channels` channels."""
    return CONVS[kind](channels, hh_factors)
