"""The architectures of f_w and h_phi, as lists that read like the paper's figure.

The option `model` names that of f_w (FLOWS), and `ssl_model` that of h_phi (HEADS).
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bijections import (
    ActNorm,
    Bijection,
    ChannelCoupling,
    CheckerboardCoupling,
    ConditionalFlowStep,
    MultiScale,
    Shape,
    Split,
    SplitCoupling,
    Squeeze,
    split_size,
)
from .conv1x1 import invertible_conv
from .networks import ImageNetwork, resnet1x1, resnet3x3, toy_network
from .pixels import PIXELS, ConditionalPixels

EMBEDDING_DIM = 10    # of a label, in h_phi


def masked_glow(shape: Shape, options: SimpleNamespace, width: int, n_blocks: int,
                squeeze_first: bool = False, padding_mode: str = "reflect") -> MultiScale:
    """f_w for images (C, H, W): checkerboard and channel couplings on three scales.

    width, n_blocks: channels and residual blocks of the couplings' networks; options.width and
    options.n_blocks override them if positive; with options.position_bias the networks know where
    in the image they are (PositionBias). The last part of z has 4C channels of H/4 x W/4
    pixels: it is z_f if `ssl_dim` is its size. With `squeeze_first` the first squeeze precedes the
    first couplings, which then work on a quarter of the pixels.

    Raises ValueError if the sides of the images are not multiples of 4, at least 8, or if
    options.pixels needs options.grey_levels, the number of grey levels, and that is None.
    """
    c, h, w = shape
    if h % 4 or w % 4 or min(h, w) < 8:
        raise ValueError(f"model {options.model} needs images with sides that are multiples of 4, "
                         f"at least 8, not data of shape {tuple(shape)}: use model toy for points")
    full, half, quarter = ((h // d, w // d) for d in (1, 2, 4))
    inv = partial(invertible_conv, options.conv, hh_factors=options.hh_factors)

    def net(c_in: int, c_out: int, size: tuple[int, int]) -> nn.Module:
        return resnet3x3(c_in, c_out, options.width or width, options.n_blocks or n_blocks,
                         padding_mode, size if options.position_bias else None)

    def checkerboard(c: int, size: tuple[int, int]) -> list[Bijection]:
        """Three flow steps on C channels of `size` pixels, with masks of parity 0, 1 and 0."""
        return [layer for parity in (0, 1, 0) for layer in (
            inv(c), CheckerboardCoupling(net(c, 2 * c, size), size, parity), ActNorm(c))]

    def channel(c: int, size: tuple[int, int]) -> list[Bijection]:
        """Two flow steps on C channels of `size` pixels."""
        return [layer for _ in range(2) for layer in (
            inv(c), ChannelCoupling(net(c // 2, c, size), net(c // 2, c, size)), ActNorm(c))]

    if squeeze_first:
        first = [Squeeze(), *checkerboard(4 * c, half)]
    else:
        first = [*checkerboard(c, full), Squeeze()]
    return MultiScale(shape, [
        PIXELS[options.pixels](shape, options.grey_levels),
        # C x H x W, and from the squeeze on 4C x H/2 x W/2
        *first, *channel(4 * c, half),
        Split(),
        # 2C x H/2 x W/2, and from the squeeze on 8C x H/4 x W/4
        *checkerboard(2 * c, half), Squeeze(), *channel(8 * c, quarter),
        Split(),
        # 4C x H/4 x W/4
        *checkerboard(4 * c, quarter), *channel(4 * c, quarter),
    ])


class PixelPyramid(MultiScale):
    """A MultiScale that begins with ConditionalPixels, whose last group alone is not split off."""

    cheap_last_part = True

    def last_part(self, x: Tensor, n: int) -> Tensor:
        """z_f, without the other groups: x (B, 1, H, W) -> (B, n)."""
        return self.last_part_given(x)(x)

    def last_part_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """z_f of the last group of pixels in x, as a function of the image that the network which
        shifts it sees: (B, 1, H, W) -> (B, n)."""
        pixels: Any = self.levels[0][0]
        z, _ = pixels.last_group(x)

        def last_part(seen: Tensor) -> Tensor:
            z_f = z + pixels.shift_of(seen)
            for bijection in self.levels[-1]:
                z_f, _ = bijection(z_f)
            return z_f
        return last_part


def pixel_pyramid(shape: Shape, options: SimpleNamespace, width: int, n_blocks: int, n_bins: int,
                  n_maps: int, shift_width: int, shift_blocks: int, vector_width: int,
                  vector_steps: int) -> PixelPyramid:
    """f_w for images (1, H, W): pixels from coarse to fine, each given the coarser ones and z_f.

    z_f are the pixels of odd rows and even columns, which come last. width, n_blocks: of the
    networks of the pixels; options.width and options.n_blocks override them if positive. n_maps:
    of z_f, in their input. shift_width, shift_blocks: of the network that shifts z_f; vector_width:
    of the one that makes the maps, and of those of the couplings of vectors: of z_aux given z_f,
    then `vector_steps` flow steps of z_f.

    Raises ValueError for images of more than one channel or sides that are not multiples of 4, if
    options.grey_levels is None, if options.ssl_dim is not the number of the last pixels, or for
    options.pixels marginal and options.position_bias, which are for other models.
    """
    c, h, w = shape
    if c != 1 or h % 4 or w % 4:
        raise ValueError(f"model {options.model} needs images of one channel, with sides that are "
                         f"multiples of 4, not data of shape {tuple(shape)}")
    if options.grey_levels is None:
        raise ValueError(f"model {options.model} needs the number of grey levels of the images")
    if options.pixels != "logit" or options.position_bias:
        given = "position_bias" if options.position_bias else f"pixels {options.pixels}"
        raise ValueError(f"{given} is for other models: {options.model} has its own first layer")
    n_last = h * w // 4
    if options.ssl_dim != n_last:
        raise ValueError(f"model {options.model} needs ssl_dim {n_last}, a quarter of the pixels, "
                         f"not {options.ssl_dim}")

    def network(c_in: int, c_out: int, size: tuple[int, int]) -> nn.Module:
        return resnet3x3(c_in, c_out, options.width or width, options.n_blocks or n_blocks,
                         "zeros", size)

    def shift(c_in: int, size: tuple[int, int], n: int) -> nn.Module:
        return ImageNetwork(c_in, size, n, shift_width, shift_blocks)

    def of_vectors(c_in: int, c_out: int) -> nn.Module:
        return resnet1x1(c_in, c_out, vector_width, n_blocks=1)

    def half() -> nn.Module:
        return of_vectors(n_last // 2, n_last)

    return PixelPyramid(shape, [
        ConditionalPixels(shape, options.grey_levels, n_bins, network, shift, of_vectors, n_maps),
        SplitCoupling(of_vectors(n_last, 2 * (h * w - n_last)), n_last),
        Split(h * w - n_last),
        *[layer for _ in range(vector_steps) for layer in (
            invertible_conv(options.conv, n_last, options.hh_factors),
            ChannelCoupling(half(), half()))]])


def toy_flow(shape: Shape, options: SimpleNamespace) -> MultiScale:
    """f_w for points in the plane, given as 2 x 1 x 1: `l` flow steps.

    Raises ValueError for other shapes.
    """
    if tuple(shape) != (2, 1, 1):
        raise ValueError("model toy needs points of shape (2, 1, 1), "
                         f"not data of shape {tuple(shape)}")
    if options.pixels != "logit":
        raise ValueError(f"pixels {options.pixels} is for images, and model toy for points")
    if options.position_bias:
        raise ValueError("position_bias is for images, and model toy for points")
    return MultiScale(shape, [layer for _ in range(options.l) for layer in (
        invertible_conv(options.conv, 2, options.hh_factors),
        ChannelCoupling(toy_network(1, 2), toy_network(1, 2)),
        ActNorm(2))])


FLOWS: dict[str, Callable[[Shape, SimpleNamespace], MultiScale]] = {
    "mnist-masked": partial(masked_glow, width=64, n_blocks=4),
    "mnist-glow": partial(masked_glow, width=32, n_blocks=1, squeeze_first=True,
                           padding_mode="zeros"),
    "digits-masked": partial(masked_glow, width=16, n_blocks=1),
    "pyramid": partial(pixel_pyramid, width=64, n_blocks=2, n_bins=32, n_maps=8, shift_width=64,
                       shift_blocks=2, vector_width=512, vector_steps=3),
    "toy": toy_flow,
}


def embed(embedding: nn.Embedding, y: Tensor) -> Tensor:
    """embedding(y) as a product with one-hot rows: y (B,) -> (B, E).

    The gradient is then a matrix product, deterministic on a GPU, unlike the gradient of a lookup.
    """
    weight = embedding.weight
    return (y[:, None] == torch.arange(len(weight), device=y.device)).to(weight.dtype) @ weight


class ConditionalFlow(nn.Module):
    """h_phi of SCNF-GLOW: `ssl_l` levels of `ssl_k` conditional flow steps, separated by splits.

    The label enters as an embedding (K, 10) that all flow steps share. At the start it has ones on
    the diagonal, and random unit vectors for the classes after the tenth. Raises ValueError if
    `dim` cannot be split into that many levels.
    """

    def __init__(self, dim: int, n_classes: int, options: SimpleNamespace):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, EMBEDDING_DIM)
        nn.init.eye_(self.embedding.weight)
        if n_classes > EMBEDDING_DIM:           # the remaining rows would all be zero
            others = torch.randn(n_classes - EMBEDDING_DIM, EMBEDDING_DIM)
            self.embedding.weight.data[EMBEDDING_DIM:] = F.normalize(others)
        layers: list[Bijection | Split] = []
        c = dim
        for level in range(options.ssl_l):
            if level:
                layers.append(Split())
                c -= split_size(c)
            if c < 2 or c % 2:
                raise ValueError(f"ssl_dim {dim} cannot be split into ssl_l {options.ssl_l} levels "
                                 "of an even number of dimensions "
                                 f"(level {level + 1} would get {c})")
            layers += [self._flow_step(c, options) for _ in range(options.ssl_k)]
        self.flow = MultiScale((dim,), layers)

    @staticmethod
    def _flow_step(c: int, options: SimpleNamespace) -> ConditionalFlowStep:
        def net() -> nn.Module:
            return resnet1x1(c // 2 + EMBEDDING_DIM, c, width=options.ssl_hd)
        return ConditionalFlowStep(ActNorm(c), invertible_conv(options.ssl_conv, c, options.ssl_hh),
                                   ChannelCoupling(net(), net()))

    def forward(self, z_f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """z_f (B, ssl_dim), y (B,) -> z_h (B, ssl_dim), ldj (B,)."""
        return self.flow(z_f, embed(self.embedding, y))

    def inverse(self, z_h: Tensor, y: Tensor) -> Tensor:
        """z_h (B, ssl_dim), y (B,) -> z_f (B, ssl_dim)."""
        return self.flow.inverse(z_h, embed(self.embedding, y))


class ConditionalShift(nn.Module):
    """h_phi of SCNF-GMM: z_h = z_f - mu_y, hence z_f given y is Gaussian with mean mu_y.

    mu, an embedding (K, ssl_dim), is normal at the start, with standard deviation options.ssl_std.
    """

    def __init__(self, dim: int, n_classes: int, options: SimpleNamespace):
        super().__init__()
        self.mu = nn.Embedding(n_classes, dim)
        self.mu.weight.data *= options.ssl_std

    def forward(self, z_f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """z_f (B, ssl_dim), y (B,) -> z_h (B, ssl_dim), ldj (B,)."""
        return z_f - embed(self.mu, y), z_f.new_zeros(len(z_f))

    def inverse(self, z_h: Tensor, y: Tensor) -> Tensor:
        """z_h (B, ssl_dim), y (B,) -> z_f (B, ssl_dim)."""
        return z_h + embed(self.mu, y)


class ConditionalGaussian(ConditionalShift):
    """h_phi of a Gaussian mixture with a diagonal covariance of each class, which the paper does
    not have: z_h = (z_f - mu_y) / sigma_y, ldj = -sum_i log sigma_yi.

    log sigma, an embedding (K, ssl_dim), is zero at the start: then it is SCNF-GMM.
    """

    def __init__(self, dim: int, n_classes: int, options: SimpleNamespace):
        super().__init__(dim, n_classes, options)
        self.log_sigma = nn.Embedding(n_classes, dim)
        nn.init.zeros_(self.log_sigma.weight)

    def forward(self, z_f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """z_f (B, ssl_dim), y (B,) -> z_h (B, ssl_dim), ldj (B,)."""
        shifted, _ = super().forward(z_f, y)
        log_sigma = embed(self.log_sigma, y)
        return shifted * (-log_sigma).exp(), -log_sigma.sum(1)

    def inverse(self, z_h: Tensor, y: Tensor) -> Tensor:
        """z_h (B, ssl_dim), y (B,) -> z_f (B, ssl_dim)."""
        return super().inverse(z_h * embed(self.log_sigma, y).exp(), y)


HEADS: dict[str, Callable[[int, int, SimpleNamespace], ConditionalFlow | ConditionalShift]] = {
    "cond-flow": ConditionalFlow,
    "cond-shift": ConditionalShift,
    "cond-gmm": ConditionalGaussian,
}
