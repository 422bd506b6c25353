"""Beyond the paper: model `pyramid`, an f_w of pixels from coarse to fine.

Its z_f needs a small part of f_w only, and so does p(y | x).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .bijections import (Affine, Bijection, ChannelCoupling, MultiScale, Shape, Split, scale_shift,
                         sum_per_sample)
from .conv1x1 import invertible_conv
from .marginal import MarginalGaussian, grey_value, normal_quantile
from .networks import Network, resnet1x1, resnet3x3
from .scnf import SemiConditionalFlow

NORM_GROUPS = 8     # of the channels of an ImageNetwork


class ConditionalPixels(MarginalGaussian):
    """z_j = Phi^-1(F_j(x_j | coarser pixels, z_f)), from coarse to fine, for images (1, H, W).

    The first group of pixels is every fourth one of every fourth row. Then, for the strides s = 2
    and 1, the pixels between those of stride 2s follow in three groups, at rows and columns (s, s),
    (0, s) and (s, 0) modulo 2s, each conditioned on all earlier pixels of stride s. This order is a
    parallel autoregressive one as in Reed et al. 2017 (arXiv 1703.03664): z comes from x in one
    pass, and x from z in one pass for each group.

    Given the pixels c before it, pixel j has grey level v with probability

        p_j(v | c, z_f) = p_j(v) exp(l_jb) / sum_u p_j(u) exp(l_jb(u)),      b = b(v),

    where p_j(v) is the marginal distribution, b(v) one of n_bins bins of adjacent grey levels, and
    l(c, z_f) the output of the group's network, 0 at the start. F_j is piecewise linear, as in
    MarginalGaussian. The bins come from `fit`: black has one, and the others about equal shares.

    The last group of z is z_f = Phi^-1(F(x | c)) + t(c): its F does not depend on z_f, and t, a
    network of the whole image c before it, writes into z_f what the image shows. The other groups
    read it there, so that in sampling the class decides about all pixels. The Jacobian is
    triangular nevertheless: z_f is a function of the last pixels given c, and then, z_f being
    fixed, each z_j one of x_j given coarser pixels.

    shape: (1, H, W)
    grey_levels: L
    n_bins: of grey levels
    network: network(c_in, c_out, size) makes a group's network, (B, c_in, *size) ->
        (B, c_out, *size), whose input are the earlier pixels and n_maps images made from z_f
    shift: shift(c_in, size, n) makes t, (B, c_in, *size) -> (B, n)
    context: context(n, n_out) makes the network of z_f, (B, n) -> (B, n_out), which computes l of
        the first group and the maps of each stride
    n_maps: images made from z_f for each stride

    z (B, D) has the groups in their order. Raises ValueError as MarginalGaussian does.
    """

    bin_of: Tensor
    order: Tensor

    def __init__(self, shape: Sequence[int], grey_levels: int, n_bins: int,
                 network: Callable[[int, int, tuple[int, int]], nn.Module],
                 shift: Callable[[int, tuple[int, int], int], nn.Module],
                 context: Callable[[int, int], nn.Module], n_maps: int):
        super().__init__(shape, grey_levels)
        _, h, w = shape
        self.n_bins, self.n_maps = n_bins, n_maps
        numbers = torch.arange(h * w).view(1, 1, h, w)
        groups, networks = [numbers[..., ::4, ::4]], []
        for s in (2, 1):
            size = (h // (2 * s), w // (2 * s))
            for k in (1, 2, 3):
                is_last = (s, k) == (1, 3)
                groups.append(_subgrids(numbers, s)[k])
                networks.append(network(k if is_last else k + n_maps, n_bins, size))
        self.networks = nn.ModuleList(networks)
        self.group_sizes = [group.numel() for group in groups]
        n_first, *_, self.n_last = self.group_sizes
        self.shift = shift(3, size, self.n_last)
        # Of the context: l of the first group, and the maps of the strides 2 and 1.
        self.context_sizes = [n_bins * n_first, n_maps * n_first, n_maps * self.n_last]
        self.context = context(self.n_last, sum(self.context_sizes))
        self.register_buffer("order", torch.cat([group.flatten() for group in groups]),
                             persistent=False)
        self.register_buffer("bin_of", torch.zeros(grey_levels, dtype=torch.long))
        self._choose_bins()

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    @torch.no_grad()
    def fit(self, images: Tensor | None) -> None:
        """Estimate the marginal distributions, as MarginalGaussian, and choose the bins."""
        super().fit(images)
        self._choose_bins()

    def _choose_bins(self) -> None:
        """A bin for black. The other grey levels are ranked by how much of their mass is below
        them; levels of equal rank share a bin."""
        share = self._normalised().mean(0)[1:]
        below = (share.cumsum(0) - share / 2) / share.sum()
        rank = (below * (self.n_bins - 1)).long()
        self.bin_of[1:] = 1 + torch.unique(rank, return_inverse=True)[1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z_f, ldj_f = self.last_group(x)
        z_f = z_f + self.shift_of(x)
        context = self._context(z_f)
        logits = torch.cat([self._logits(x, group, context)
                            for group in range(len(self.networks))], 2)
        pixels = self.order[:-self.n_last]
        z, ldj = self._to_gaussian(x.flatten(1)[:, pixels], pixels, logits)
        return torch.cat((z, z_f), 1), ldj.sum(1) + ldj_f

    def last_group(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, H, W) -> z_f (B, n) before t is added, and its part of ldj (B,)."""
        pixels = self.order[-self.n_last:]
        z, ldj = self._to_gaussian(x.flatten(1)[:, pixels], pixels, self._last_logits(x))
        return z, ldj.sum(1)

    def shift_of(self, x: Tensor) -> Tensor:
        """t of the last group: x (B, 1, H, W) -> (B, n)."""
        return self.shift(torch.cat(_subgrids(x, 1)[:3], 1))

    def inverse(self, z: Tensor) -> Tensor:
        x = z.new_zeros(len(z), math.prod(self.shape))
        images = x.view(-1, *self.shape)
        *groups, z_f = z.split(self.group_sizes, 1)
        *pixels_of, last = self.order.split(self.group_sizes)
        context = self._context(z_f)
        for group, (part, pixels) in enumerate(zip(groups, pixels_of)):
            x[:, pixels] = self._from_gaussian(part, pixels, self._logits(images, group, context))
        x[:, last] = self._from_gaussian(z_f - self.shift_of(images), last,
                                         self._last_logits(images))
        return images

    def _context(self, z_f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_f (B, n) -> l of the first group, and the maps of the strides 2 and 1: (B, n_bins, n_1)
        and (B, n_maps, H', W')."""
        _, h, w = self.shape
        first, *maps = self.context(z_f).split(self.context_sizes, 1)
        coarse, fine = (m.view(len(z_f), self.n_maps, h // s, w // s) for m, s in zip(maps, (4, 2)))
        return first.unflatten(1, (self.n_bins, -1)), coarse, fine

    def _logits(self, x: Tensor, group: int, context: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """l of a group, not the last, of n pixels: x (B, 1, H, W) -> (B, n_bins, n)."""
        if group == 0:
            return context[0]
        stride, k = 2 - (group - 1) // 3, (group - 1) % 3
        before = (*_subgrids(x, stride)[:k + 1], context[3 - stride])
        return self.networks[group - 1](torch.cat(before, 1)).flatten(2)

    def _last_logits(self, x: Tensor) -> Tensor:
        """l of the last group: x (B, 1, H, W) -> (B, n_bins, n)."""
        return self.networks[-1](torch.cat(_subgrids(x, 1)[:3], 1)).flatten(2)

    def _to_gaussian(self, x: Tensor, pixels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, n) of these pixels (n,), logits (B, n_bins, n) -> z, ldj, (B, n) each."""
        p, log_q = self._distributions(pixels, logits)
        levels, (level, share_below, share_above) = p.shape[1], self._position(x)
        bins = self.bin_of[level]                                               # (B, n)
        in_table = level + levels * torch.arange(len(pixels), device=x.device)
        # Shares of the bin's mass, which is 1 as in each bin before it: below the level, and in it.
        below, p_level = (table.flatten()[in_table] for table in (p.cumsum(1) - p, p))
        below = below - bins
        in_bin_below = (below + p_level * share_below).to(x.dtype)
        in_bin_above = (1 - below - p_level + p_level * share_above).to(x.dtype)
        log_q_bin = log_q.gather(1, bins[:, None])[:, 0]
        q, q_bin = log_q.exp(), log_q_bin.exp()
        every_bin = torch.arange(self.n_bins, device=x.device)[:, None]
        z = normal_quantile((q * (every_bin < bins[:, None])).sum(1) + q_bin * in_bin_below,
                             (q * (every_bin > bins[:, None])).sum(1) + q_bin * in_bin_above)
        log_density = log_q_bin + (levels * p_level).log().to(x.dtype)
        return z, log_density + z ** 2 / 2 + math.log(2 * math.pi) / 2

    def _from_gaussian(self, z: Tensor, pixels: Tensor, logits: Tensor) -> Tensor:
        """The inverse of `_to_gaussian`: z (B, n) -> x (B, n)."""
        p, log_q = self._distributions(pixels, logits)
        q_level = log_q.double().exp()[:, self.bin_of].transpose(1, 2)          # (B, n, L)
        p_levels = (p * q_level).flatten(0, 1)                                  # (B * n, L)
        p_levels = p_levels / p_levels.sum(1, keepdim=True)
        return grey_value(p_levels, z.reshape(-1, 1)).view_as(z).to(z.dtype)

    def _distributions(self, pixels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of n pixels: the distributions of the grey levels within each bin, (n, L), in double
        precision; and the log-probabilities of the bins, (B, n_bins, n)."""
        p = self._normalised()[pixels]
        p_bin = p @ nn.functional.one_hot(self.bin_of, self.n_bins).to(p.dtype)  # (n, n_bins)
        log_q = (p_bin.log().to(logits.dtype).t() + logits).log_softmax(1)
        return p / p_bin[:, self.bin_of], log_q


def _subgrids(x: Tensor, s: int) -> list[Tensor]:
    """The pixels of x (B, 1, H, W) at rows and columns (0, 0), (s, s), (0, s) and (s, 0) modulo 2s:
    each (B, 1, H / 2s, W / 2s)."""
    return [x[..., dy::2 * s, dx::2 * s] for dy, dx in ((0, 0), (s, s), (0, s), (s, 0))]


class SplitCoupling(Bijection):
    """On vectors x = (x1, x2) with x2 (B, n): z1 = (x1 + t) s and z2 = x2, where
    (raw, t) = net(x2) and s = sigmoid(raw + 2) + 1e-6.

    With x2 = z_f and a Gaussian base of z1, z_aux given z_f is a diagonal Gaussian: the prior of
    Kingma & Dhariwal 2018 (arXiv 1807.03039) for the part that leaves the flow at a split.

    net: maps n dimensions to twice as many as x1, first raw, then t
    n: dimensions of x2
    """

    def __init__(self, net: nn.Module, n: int):
        super().__init__()
        self.net, self.n = net, n

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x[:, :-self.n], x[:, -self.n:]
        s, t = scale_shift(self.net, x2)
        return torch.cat(((x1 + t) * s, x2), 1), sum_per_sample(s.log())

    def inverse(self, z: Tensor) -> Tensor:
        z1, x2 = z[:, :-self.n], z[:, -self.n:]
        s, t = scale_shift(self.net, x2)
        return torch.cat((z1 / s - t, x2), 1)


class ImageNetwork(Network):
    """A network of a whole image: (B, c_in, H, W) -> (B, n_out).

    A 3x3 convolution, one of stride 2, residual blocks, another one of stride 2, each after group
    norm (Wu & He 2018, arXiv 1803.08494) and ReLU; and a linear layer, zero at the start.

    c_in: channels of the images
    size: (H, W)
    n_out: numbers per image
    width: channels of the blocks, twice those before them
    n_blocks: number of residual blocks
    """

    def __init__(self, c_in: int, size: tuple[int, int], n_out: int, width: int, n_blocks: int):
        super().__init__()
        def norm_relu(c: int) -> list[nn.Module]:
            return [nn.GroupNorm(NORM_GROUPS, c), nn.ReLU()]
        def conv(c_in: int, c_out: int, stride: int) -> nn.Module:
            return nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.convs = nn.Sequential(
            conv(c_in, width // 2, 1), *norm_relu(width // 2), conv(width // 2, width, 2),
            *(NormedBlock(width) for _ in range(n_blocks)), *norm_relu(width),
            conv(width, width, 2), *norm_relu(width), nn.Flatten())
        pixels = math.prod(-(-side // 4) for side in size)
        self.last = nn.Linear(width * pixels, n_out)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None,
                            cache_enabled=False):
            return self.last(self.convs(x)).to(x.dtype)


class NormedBlock(nn.Module):
    """x + conv2(relu(norm2(conv1(relu(norm1(x)))))), with 3x3 convolutions and group norm."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(*(
            layer for _ in range(2) for layer in (nn.GroupNorm(NORM_GROUPS, width), nn.ReLU(),
                                                  nn.Conv2d(width, width, 3, padding=1))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class PixelPyramid(SemiConditionalFlow):
    """The model whose f_w is a `pixel_pyramid`: z_f, and so p(y | x), come from its last pixels."""

    cheap_logits = True

    def logits(self, x: Tensor) -> Tensor:
        """log p(z_f, y), as in SemiConditionalFlow, without the other groups of pixels."""
        self._check("x", x, self.data_shape)
        return self.logits_seeing(x, self.last_group(x))

    def last_group(self, x: Tensor) -> Tensor:
        """z_f before the networks write into it what x shows: x (B, 1, H, W) -> (B, ssl_dim)."""
        pixels: Any = self.f_w.levels[0][0]
        return pixels.last_group(x)[0]

    def logits_seeing(self, seen: Tensor, last: Tensor) -> Tensor:
        """`logits` of images with the last pixels of other images, (B, K).

        seen: the images that the network sees which shifts z_f, (B, 1, H, W)
        last: `last_group` of the others, (B, ssl_dim)
        """
        pixels: Any = self.f_w.levels[0][0]
        z_f = last + pixels.shift_of(seen)
        for bijection in self.f_w.levels[-1]:
            z_f = bijection(z_f) if isinstance(bijection, Affine) else bijection(z_f)[0]
        return self.log_zf_joint(z_f)


def pixel_pyramid(shape: Shape, options: SimpleNamespace, width: int = 64, n_blocks: int = 2,
                  n_bins: int = 32, n_maps: int = 8, shift_width: int = 64, shift_blocks: int = 2,
                  vector_width: int = 512, vector_steps: int = 3) -> MultiScale:
    """f_w of pixels from coarse to fine, each conditioned on the coarser ones and z_f.

    z_f are the pixels of odd rows and even columns, which come last.

    shape: (1, H, W)
    options: grey_levels, ssl_dim, conv and hh_factors; width and n_blocks, which override those
        below if positive
    width, n_blocks: of the networks of the pixels
    n_bins: of grey levels
    n_maps: images made from z_f in the input of these networks
    shift_width, shift_blocks: width and blocks of the network that shifts z_f
    vector_width: of the network that makes the maps, and of the couplings of vectors: of z_aux
        given z_f, and in the flow steps of z_f
    vector_steps: flow steps of z_f

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
        option = "position_bias" if options.position_bias else f"pixels {options.pixels}"
        raise ValueError(f"{option} is for other models: {options.model} has its own first layer")
    n_last = h * w // 4
    if options.ssl_dim != n_last:
        raise ValueError(f"model {options.model} needs ssl_dim {n_last}, a quarter of the pixels, "
                         f"not {options.ssl_dim}")

    def network(c_in: int, c_out: int, size: tuple[int, int]) -> nn.Module:
        return resnet3x3(c_in, c_out, options.width or width, options.n_blocks or n_blocks,
                         "zeros", size)

    shift = partial(ImageNetwork, width=shift_width, n_blocks=shift_blocks)
    vectors = partial(resnet1x1, width=vector_width, n_blocks=1)
    return MultiScale(shape, [
        ConditionalPixels(shape, options.grey_levels, n_bins, network, shift, vectors, n_maps),
        SplitCoupling(vectors(n_last, 2 * (h * w - n_last)), n_last),
        Split(h * w - n_last),
        *[layer for _ in range(vector_steps) for layer in (
            invertible_conv(options.conv, n_last, options.hh_factors),
            ChannelCoupling(vectors(n_last // 2, n_last), vectors(n_last // 2, n_last)))]])
