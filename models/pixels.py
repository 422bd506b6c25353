"""Bijections of pixels: the first layer of every f_w for images.

Logit or MarginalGaussian, which the option `pixels` names; or, in model pyramid, ConditionalPixels.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .bijections import Bijection, Shape, sum_per_sample

# Of MarginalGaussian.fit. On images that were left out, 5,000 of MNIST and 143 of digits, they are
# within 0.0004 and 0.003 bits/dim of the best that was found, and they let float32 resolve each
# grey level to 1e-4 of its width.
PSEUDO_COUNTS, EVEN_SHARE, LARGEST_SHARE = 1 / 20, 0.7, 0.995


class Logit(Bijection):
    """x' = x (1 - alpha) + alpha / 2; z = log x' - log(1 - x'), for x in [0, 1].

    As in the authors' code; a symmetric variant of Dinh et al. 2017 (arXiv 1605.08803), section
    4.1. A positive alpha keeps z finite at 0 and 1.
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * (1 - self.alpha) + self.alpha / 2
        log_x, log_1mx = x.log(), torch.log1p(-x)
        return log_x - log_1mx, sum_per_sample(math.log(1 - self.alpha) - log_x - log_1mx)

    def inverse(self, z: Tensor) -> Tensor:
        return (torch.sigmoid(z) - self.alpha / 2) / (1 - self.alpha)


class MarginalGaussian(Bijection):
    """z_j = Phi^-1(F_j(x_j)): each value gets a standard normal marginal, for x in [0, 1].

    F_j is the piecewise linear distribution function of value j, whose grey level v, between v / L
    and (v + 1) / L, has probability p_j(v): the marginal step of Gaussianization (Chen & Gopinath
    2000; Meng et al. 2020, arXiv 2003.01941). With the standard normal density phi,

        ldj = sum_j [ log(L p_j(v_j)) - log phi(z_j) ].

    p (D, L), a buffer, is uniform until `fit`. Where F_j is above 1/2, z_j comes from 1 - F_j,
    which is then the more accurate one, and all is computed in double precision. A value at the
    very edge of its grey level is moved inside by a quarter of the machine epsilon of x, half the
    step of the dequantisation noise, so that z is finite.

    forward raises ValueError for x outside [0, 1]; on a GPU, which would have to be waited for, its
    z and ldj are NaN instead.
    """

    p: Tensor

    def __init__(self, shape: Sequence[int], grey_levels: int):
        super().__init__()
        uniform = torch.full((math.prod(shape), grey_levels), 1 / grey_levels)
        self.register_buffer("p", uniform)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Estimate p from images (N, C, H, W) of integer grey levels from 0 to L - 1.

        Black, level 0, is estimated by itself: (n_0 + 1) / (N + 2) if n_0 of N images have it. The
        other levels share the rest in proportion to their counts plus N * PSEUDO_COUNTS
        pseudo-counts, EVEN_SHARE of them spread evenly and the others distributed as in all pixels
        together. No level has more than LARGEST_SHARE, or float32 could not resolve the others.
        """
        n, levels = len(images), self.p.shape[1]
        values = images.flatten(1).long() + levels * torch.arange(len(self.p), device=images.device)
        counts = torch.bincount(values.flatten(), minlength=self.p.numel()).view_as(self.p).double()
        of_all = counts[:, 1:].sum(0) + 1
        prior = (1 - EVEN_SHARE) * of_all / of_all.sum() + EVEN_SHARE / (levels - 1)
        black = (counts[:, :1] + 1) / (n + 2)
        others = counts[:, 1:] + n * PSEUDO_COUNTS * prior
        p = torch.cat((black, (1 - black) * others / others.sum(1, keepdim=True)), 1)
        largest = p.amax(1, keepdim=True)
        capped = largest.clamp(max=LARGEST_SHARE)
        self.p.copy_(torch.where(p == largest, capped, p * (1 - capped) / (1 - largest)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self._normalised()
        levels, (level, passed, left) = p.shape[1], self._position(x.flatten(1).t())  # (D, B) each
        p_level = p.gather(1, level)
        below = (p.cumsum(1) - p).gather(1, level) + p_level * passed
        above = (p.flip(1).cumsum(1).flip(1) - p).gather(1, level) + p_level * left
        z = _normal_quantile(below, above)
        ldj = (levels * p_level).log() + z ** 2 / 2 + math.log(2 * math.pi) / 2
        return z.t().reshape(x.shape).to(x.dtype), ldj.sum(0).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        p = self._normalised()
        x = _grey_value(p, z.flatten(1).t())                                        # (D, B)
        return x.t().reshape(z.shape).to(z.dtype)

    def _position(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x -> its grey level, and the shares of the level's width below x and above it, in double
        precision."""
        inside = (x >= 0) & (x <= 1)
        if not x.is_cuda and not inside.all():
            raise ValueError("x has values outside [0, 1], where images have no density")
        levels, edge = self.p.shape[1], torch.finfo(x.dtype).eps / 4
        v = x.masked_fill(~inside, math.nan).double() * levels
        level = v.detach().nan_to_num().long().clamp(max=levels - 1)
        return level, (v - level).clamp(min=edge), (level + 1 - v).clamp(min=edge)

    def _normalised(self) -> Tensor:
        """p in double precision, with rows that sum to 1."""
        p = self.p.double()
        return p / p.sum(1, keepdim=True)


class ConditionalPixels(MarginalGaussian):
    """z_j = Phi^-1(F_j(x_j | coarser pixels, z_f)), from coarse to fine, for images (1, H, W).

    The first group of pixels is each fourth one of each fourth row. Then, for the strides s = 2 and
    1, the pixels between those of stride 2s follow in three groups, each given all earlier pixels
    of stride s: at rows and columns (s, s), (0, s) and (s, 0) modulo 2s. It is a parallel
    autoregressive order as in Reed et al. 2017 (arXiv 1703.03664): z comes from x in one pass, and
    x from z in one pass for each group.

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

    network(c_in, c_out, size) makes the network of a group: (B, c_in, *size) -> (B, c_out, *size);
    its input are the earlier pixels, and n_maps images made from z_f. shift(c_in, size, n) makes
    that of t: (B, c_in, *size) -> (B, n). context(n, n_out), (B, n) -> (B, n_out), makes that of
    z_f, which computes l of the first group and the maps of each stride. z (B, D) has the groups
    in their order.
    """

    bin_of: Tensor
    order: Tensor

    def __init__(self, shape: Sequence[int], grey_levels: int, n_bins: int,
                 network: Callable[[int, int, tuple[int, int]], nn.Module],
                 shift: Callable[[int, tuple[int, int], int], nn.Module],
                 context: Callable[[int, int], nn.Module], n_maps: int):
        super().__init__(shape, grey_levels)
        _, h, w = shape
        self.shape, self.n_bins, self.n_maps = (1, h, w), n_bins, n_maps
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
    def fit(self, images: Tensor) -> None:
        """Estimate the marginal distributions, as MarginalGaussian, and choose the bins."""
        super().fit(images)
        self._choose_bins()

    def _choose_bins(self) -> None:
        """A bin for level 0. The others are ranked by how much of their mass is below them; those
        of equal rank share a bin."""
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
        return first.view(len(z_f), self.n_bins, -1), coarse, fine

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
        levels, (level, passed, left) = p.shape[1], self._position(x)
        bins = self.bin_of[level]                                               # (B, n)
        in_table = level + levels * torch.arange(len(pixels), device=x.device)
        # Of the bin's mass, which is 1 as that of each bin before it: below the level, and in it.
        below, p_level = (table.flatten()[in_table] for table in (p.cumsum(1) - p, p))
        below = below - bins
        share_below = (below + p_level * passed).to(x.dtype)
        share_above = (1 - below - p_level + p_level * left).to(x.dtype)
        log_q_bin = log_q.gather(1, bins[:, None])[:, 0]
        q, q_bin = log_q.exp(), log_q_bin.exp()
        each = torch.arange(self.n_bins, device=x.device)[:, None]
        z = _normal_quantile((q * (each < bins[:, None])).sum(1) + q_bin * share_below,
                             (q * (each > bins[:, None])).sum(1) + q_bin * share_above)
        log_density = log_q_bin + (levels * p_level).log().to(x.dtype)
        return z, log_density + z ** 2 / 2 + math.log(2 * math.pi) / 2

    def _from_gaussian(self, z: Tensor, pixels: Tensor, logits: Tensor) -> Tensor:
        """The inverse of `_to_gaussian`: z (B, n) -> x (B, n)."""
        p, log_q = self._distributions(pixels, logits)
        q_level = log_q.double().exp()[:, self.bin_of].transpose(1, 2)          # (B, n, L)
        p_given = (p * q_level).flatten(0, 1)                                   # (B * n, L)
        p_given = p_given / p_given.sum(1, keepdim=True)
        return _grey_value(p_given, z.reshape(-1, 1)).view_as(z).to(z.dtype)

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


def _normal_quantile(below: Tensor, above: Tensor) -> Tensor:
    """Phi^-1(below), where above is 1 - below and may be the more accurate one."""
    tail = torch.minimum(below, above).clamp(min=torch.finfo(below.dtype).tiny)
    z = torch.special.ndtri(tail)
    return torch.where(below < above, z, -z)


def _grey_value(p: Tensor, z: Tensor) -> Tensor:
    """x of z = Phi^-1(F(x)), where F is the distribution function of grey levels with the
    probabilities p: p (D, L), z (D, B) -> (D, B), from 0 to 1."""
    z = z.double()
    tail = torch.special.ndtr(-z.abs()).contiguous()
    levels = p.shape[1]
    return torch.where(z < 0, _quantile(p, tail), levels - _quantile(p.flip(1), tail)) / levels


def _quantile(p: Tensor, probability: Tensor) -> Tensor:
    """The inverse of the distribution function of grey levels: p (D, L), probability (D, B) ->
    (D, B), from 0 to L."""
    cdf = p.cumsum(1)
    level = torch.searchsorted(cdf, probability, right=True).clamp(max=p.shape[1] - 1)
    below = (cdf - p).gather(1, level)
    return level + ((probability - below) / p.gather(1, level)).clamp(0, 1)


def _marginal(shape: Shape, grey_levels: int | None) -> MarginalGaussian:
    if grey_levels is None:
        raise ValueError("pixels marginal needs the number of grey levels of the images")
    return MarginalGaussian(shape, grey_levels)


PIXELS: dict[str, Callable[[Shape, int | None], Bijection]] = {
    "logit": lambda shape, grey_levels: Logit(),
    "marginal": _marginal,
}
