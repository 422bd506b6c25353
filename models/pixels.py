"""The first layer of f_w for images, which the option `pixels` names: Logit or MarginalGaussian."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
        inside = (x >= 0) & (x <= 1)
        if not x.is_cuda and not inside.all():
            raise ValueError("x has values outside [0, 1], where images have no density")
        p = self._normalised()
        levels, edge = p.shape[1], torch.finfo(x.dtype).eps / 4
        v = x.masked_fill(~inside, math.nan).flatten(1).t().double() * levels       # (D, B)
        level = v.detach().nan_to_num().long().clamp(max=levels - 1)
        p_level = p.gather(1, level)
        below = (p.cumsum(1) - p).gather(1, level) + p_level * (v - level).clamp(min=edge)
        above = ((p.flip(1).cumsum(1).flip(1) - p).gather(1, level)
                 + p_level * (level + 1 - v).clamp(min=edge))
        sign = torch.where(below < above, 1.0, -1.0)
        z = torch.special.ndtri(torch.minimum(below, above)) * sign
        ldj = (levels * p_level).log() + z ** 2 / 2 + math.log(2 * math.pi) / 2
        return z.t().reshape(x.shape).to(x.dtype), ldj.sum(0).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        p = self._normalised()
        levels, z_t = p.shape[1], z.flatten(1).t().double()                         # (D, B)
        tail = torch.special.ndtr(-z_t.abs()).contiguous()
        v = torch.where(z_t < 0, _quantile(p, tail), levels - _quantile(p.flip(1), tail))
        return (v / levels).t().reshape(z.shape).to(z.dtype)

    def _normalised(self) -> Tensor:
        """p in double precision, with rows that sum to 1."""
        p = self.p.double()
        return p / p.sum(1, keepdim=True)


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
