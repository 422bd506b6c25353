"""The architectures, as lists that read like the paper's figure: f_w by `model`, h_phi by `ssl_model`."""

from functools import partial

import torch
from torch import nn

from utils import BadInput

from .bijections import (ActNorm, ChannelCoupling, CheckerboardCoupling, ConditionalStep, Logit,
                         MultiScale, Squeeze, split_size)
from .conv1x1 import invertible_conv
from .networks import resnet1x1, resnet3x3, toy_network

LABEL_DIM = 10    # length of a label's embedding in h_phi


def masked_glow(shape, settings, width, n_blocks, squeezed=False, padding_mode="reflect"):
    """f_w for images: couplings with checkerboard masks and by channels, on three scales.

    width, n_blocks: of the couplings' networks, where settings.width and settings.n_blocks are 0. The
    latent's last part, after two squeezes and two splits, is 4 channels of a quarter of the height
    and width (for one input channel): z_f where `ssl_dim` is its size. `squeezed`: the first
    squeeze comes before the first couplings, which so work on a quarter of the pixels.
    """
    channels, height, width_px = shape
    if height % 4 or width_px % 4 or min(height, width_px) < 8:
        raise BadInput(f"model {settings.model} needs images with sides that are multiples of 4, at "
                       f"least 8, not data of shape {tuple(shape)}: use model toy for points")
    net = partial(resnet3x3, width=settings.width or width, n_blocks=settings.n_blocks or n_blocks,
                  padding_mode=padding_mode)
    inv = partial(invertible_conv, settings.conv, hh_factors=settings.hh_factors)

    def check(c, size, parity):
        return [inv(c), CheckerboardCoupling(net(c, 2 * c), size, parity), ActNorm(c)]

    def channel(c):
        return [inv(c), ChannelCoupling(net(c // 2, c), net(c // 2, c)), ActNorm(c)]

    c, full, half, quarter = channels, *((height // d, width_px // d) for d in (1, 2, 4))
    if squeezed:
        # 4c x H/2 x W/2
        first = [Squeeze(), *check(4 * c, half, 0), *check(4 * c, half, 1), *check(4 * c, half, 0)]
    else:
        # c x H x W                                                                     4c x H/2 x W/2
        first = [*check(c, full, 0), *check(c, full, 1), *check(c, full, 0), Squeeze()]
    return MultiScale([
        [Logit(), *first, *channel(4 * c), *channel(4 * c)],
        # 2c x H/2 x W/2                                                8c x H/4 x W/4
        [*check(2 * c, half, 0), *check(2 * c, half, 1), *check(2 * c, half, 0),
         Squeeze(), *channel(8 * c), *channel(8 * c)],
        # 4c x H/4 x W/4
        [*check(4 * c, quarter, 0), *check(4 * c, quarter, 1), *check(4 * c, quarter, 0),
         *channel(4 * c), *channel(4 * c)],
    ], shape)


def toy_flow(shape, settings):
    """f_w for points in the plane, given as 2 x 1 x 1: `l` steps of [inv, channel coupling, act]."""
    if tuple(shape) != (2, 1, 1):
        raise BadInput(f"model toy needs points of shape (2, 1, 1), not data of shape {tuple(shape)}")
    return MultiScale([[bijection for _ in range(settings.l) for bijection in (
        invertible_conv(settings.conv, 2, settings.hh_factors),
        ChannelCoupling(toy_network(1, 2), toy_network(1, 2)),
        ActNorm(2))]], shape)


FLOWS = {"mnist-masked": partial(masked_glow, width=64, n_blocks=4),
         "mnist-small": partial(masked_glow, width=32, n_blocks=1, squeezed=True, padding_mode="zeros"),
         "digits-masked": partial(masked_glow, width=16, n_blocks=1),
         "toy": toy_flow}


def embed(embedding, y):
    """embedding(y) as a product with one-hot rows, y (B,) -> (B, E).

    Its gradient is a product too: on a GPU a lookup's is sorted or added up in no fixed order.
    """
    weight = embedding.weight
    return (y[:, None] == torch.arange(len(weight), device=y.device)).to(weight.dtype) @ weight


class ConditionalFlow(nn.Module):
    """h_phi of SCNF-GLOW: `ssl_l` levels of `ssl_k` conditional steps, a split between two levels.

    The label enters by one embedding (K, 10) that all steps share: ones on its diagonal at start.
    """

    def __init__(self, dim, n_classes, settings):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, LABEL_DIM)
        nn.init.eye_(self.embedding.weight)
        levels, c = [], dim
        for level in range(settings.ssl_l):
            if level:
                c -= split_size(c)
            if c < 2 or c % 2:
                raise BadInput(f"ssl_dim {dim} cannot be split into ssl_l {settings.ssl_l} levels of an "
                               f"even number of dimensions (level {level + 1} would get {c})")
            levels.append([self._step(c, settings) for _ in range(settings.ssl_k)])
        self.flow = MultiScale(levels, (dim,))

    @staticmethod
    def _step(c, settings):
        def net():
            return resnet1x1(c // 2 + LABEL_DIM, c, width=settings.ssl_hd)
        return ConditionalStep(ActNorm(c), invertible_conv(settings.ssl_conv, c, settings.ssl_hh),
                               ChannelCoupling(net(), net()))

    def forward(self, z_f, y):
        """z_f (B, ssl_dim), y (B,) -> z_h (B, ssl_dim), ldj (B,)."""
        return self.flow(z_f, embed(self.embedding, y))

    def inverse(self, z_h, y):
        return self.flow.inverse(z_h, embed(self.embedding, y))


class ConditionalShift(nn.Module):
    """h_phi of SCNF-GMM: z_h = z_f - mu_y, so that z_f given y is a Gaussian around mu_y."""

    def __init__(self, dim, n_classes, settings):
        super().__init__()
        self.mu = nn.Embedding(n_classes, dim)                            # standard normal at start

    def forward(self, z_f, y):
        """z_f (B, ssl_dim), y (B,) -> z_h (B, ssl_dim), ldj (B,)."""
        return z_f - embed(self.mu, y), z_f.new_zeros(len(z_f))

    def inverse(self, z_h, y):
        return z_h + embed(self.mu, y)


HEADS = {"cond-flow": ConditionalFlow, "cond-shift": ConditionalShift}
