"""f_w: the large flow, independent of the label, as lists that read like the paper's figure.

The option `model` names it. pyramid.py has one more.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from torch import nn

from .bijections import (
    ActNorm,
    Bijection,
    ChannelCoupling,
    CheckerboardCoupling,
    MultiScale,
    Shape,
    Split,
    Squeeze,
)
from .conv1x1 import invertible_conv
from .networks import PointNetwork, resnet3x3


def masked_glow(shape: Shape, options: SimpleNamespace, width: int, n_blocks: int,
                squeeze_first: bool = False, padding_mode: str = "reflect") -> MultiScale:
    """f_w for images: checkerboard and channel couplings on three scales.

    shape: (C, H, W)
    options: first_layer, called with the shape; conv and hh_factors; width and n_blocks, which
        override those below if positive; position_bias, with which the networks know where in the
        image they are
    width: channels of the couplings' networks
    n_blocks: residual blocks of these networks
    squeeze_first: whether the first squeeze precedes the first couplings, which then work on a
        quarter of the pixels
    padding_mode: of the networks' convolutions, "reflect" or "zeros"

    The last part of z has 4C channels of H/4 x W/4 pixels: it is z_f if `ssl_dim` is its size.
    Raises ValueError if the sides of the images are not multiples of 4, at least 8.
    """
    c, h, w = shape
    if h % 4 or w % 4 or min(h, w) < 8:
        for_points = ": use model toy for points" if h * w == 1 else ""
        raise ValueError(f"model {options.model} needs images with sides that are multiples of 4, "
                         f"at least 8, not data of shape {tuple(shape)}{for_points}")
    size1, size2, size4 = ((h // d, w // d) for d in (1, 2, 4))
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

    return MultiScale(shape, [
        options.first_layer(shape),
        # C x H x W, and from the squeeze on 4C x H/2 x W/2
        *([Squeeze(), *checkerboard(4 * c, size2)] if squeeze_first else
          [*checkerboard(c, size1), Squeeze()]),
        *channel(4 * c, size2),
        Split(),
        # 2C x H/2 x W/2, and from the squeeze on 8C x H/4 x W/4
        *checkerboard(2 * c, size2), Squeeze(), *channel(8 * c, size4),
        Split(),
        # 4C x H/4 x W/4
        *checkerboard(4 * c, size4), *channel(4 * c, size4),
    ])


def toy_flow(shape: Shape, options: SimpleNamespace) -> MultiScale:
    """f_w for points in the plane: `l` flow steps.

    shape: (2, 1, 1)
    options: l, conv and hh_factors

    Raises ValueError for other shapes, and for options.pixels and options.position_bias, which are
    for images.
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
        ChannelCoupling(PointNetwork(1, 2), PointNetwork(1, 2)),
        ActNorm(2))])


FLOWS: dict[str, Callable[..., MultiScale]] = {
    "mnist-masked": partial(masked_glow, width=64, n_blocks=4),
    "mnist-glow": partial(masked_glow, width=32, n_blocks=1, squeeze_first=True,
                           padding_mode="zeros"),
    "digits-masked": partial(masked_glow, width=16, n_blocks=1),
    "toy": toy_flow,
}
