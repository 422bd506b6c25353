"""Beyond the paper: a first layer of f_w that gives each pixel a Gaussian marginal distribution."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bijections import Bijection
from .checks import check_grey_levels, check_shape

# Of MarginalGaussian.fit. On images that were left out, 5,000 of MNIST and 143 of digits, they are
# within 0.0004 and 0.003 bits/dim of the best that was found, and they let float32 resolve each
# grey level to 1e-4 of its width.
PSEUDO_COUNTS, EVEN_SHARE, LARGEST_SHARE = 1 / 20, 0.7, 0.995
ROWS = 1000     # of images counted at a time, to save memory
# Half the step of dequantisation noise in float32. Being the same for every type of x, it gives the
# same z.
EDGE = 2**-25


class MarginalGaussian(Bijection):
    """z_j = Phi^-1(F_j(x_j)): each value gets a standard normal marginal, for x in [0, 1].

    F_j is the piecewise linear distribution function of value j, whose grey level v, between v / L
    and (v + 1) / L, has probability p_j(v): the marginal step of Gaussianization (Chen & Gopinath
    2000; Meng et al. 2020, arXiv 2003.01941). With the standard normal density phi,

        ldj = sum_j [ log(L p_j(v_j)) - log phi(z_j) ].

    p (D, L), a buffer, is uniform until `fit`. All is computed in double precision, and z_j from
    1 - F_j where this is the smaller one, and so the more accurate. A value at the very edge of its
    grey level is moved inside by EDGE of the level's width, so that z is finite.

    shape: (C, H, W) of x, D values in all
    grey_levels: L

    Raises ValueError if grey_levels is None. forward raises it for x outside [0, 1]; on a GPU,
    which would have to be waited for, its z and ldj are NaN instead.
    """

    p: Tensor

    def __init__(self, shape: Sequence[int], grey_levels: int | None):
        super().__init__()
        if grey_levels is None:
            raise ValueError("pixels marginal needs the number of grey levels of the images")
        self.shape = tuple(shape)
        uniform = torch.full((math.prod(shape), grey_levels), 1 / grey_levels)
        self.register_buffer("p", uniform)

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        return bool((self.p != self.p[0, 0]).any())

    @torch.no_grad()
    def fit(self, images: Tensor | None) -> None:
        """Estimate p from images (N, C, H, W) of integer grey levels from 0 to L - 1.

        Black, level 0, has the share (n_0 + 1) / (N + 2) if n_0 of N images have it. The other
        levels share the rest in proportion to their counts plus N * PSEUDO_COUNTS pseudo-counts,
        EVEN_SHARE of them spread evenly and the others distributed as in all pixels together. No
        level has more than LARGEST_SHARE, or float32 could not resolve the others.

        Raises ValueError without images, or if they are not as described.
        """
        if images is None or not len(images):
            raise ValueError("pixels marginal is fitted to the training images: give them")
        n, levels = len(images), self.p.shape[1]
        check_shape("images", images, self.shape)
        check_grey_levels("images", images, levels)
        first = levels * torch.arange(len(self.p), device=images.device)
        counts = torch.zeros(self.p.numel(), dtype=torch.long, device=images.device)
        for part in images.split(ROWS):
            counts += torch.bincount((part.flatten(1).long() + first).flatten(),
                                     minlength=len(counts))
        counts = counts.view_as(self.p).double()
        in_all_pixels = counts[:, 1:].sum(0) + 1
        prior = ((1 - EVEN_SHARE) * in_all_pixels / in_all_pixels.sum()
                 + EVEN_SHARE / (levels - 1))
        black = (counts[:, :1] + 1) / (n + 2)
        others = counts[:, 1:] + n * PSEUDO_COUNTS * prior
        p = torch.cat((black, (1 - black) * others / others.sum(1, keepdim=True)), 1)
        largest = p.amax(1, keepdim=True)
        capped = largest.clamp(max=LARGEST_SHARE)
        self.p.copy_(torch.where(p == largest, capped, p * (1 - capped) / (1 - largest)))

    def in_domain(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self._normalised()
        level, share_below, share_above = self._position(x.flatten(1).t())         # (D, B) each
        p_level = p.gather(1, level)
        below = (p.cumsum(1) - p).gather(1, level) + p_level * share_below
        above = (p.flip(1).cumsum(1).flip(1) - p).gather(1, level) + p_level * share_above
        z = normal_quantile(below, above)
        ldj = (p.shape[1] * p_level).log() + z ** 2 / 2 + math.log(2 * math.pi) / 2
        return z.t().reshape(x.shape).to(x.dtype), ldj.sum(0).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        p = self._normalised()
        x = grey_value(p, z.flatten(1).t())                                         # (D, B)
        return x.t().reshape(z.shape).to(z.dtype)

    def _position(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x -> its grey level, and the shares of the level's width below x and above it, in double
        precision."""
        inside = self.in_domain(x)
        if not x.is_cuda and not inside.all():
            raise ValueError("x has values outside [0, 1], where images have no density")
        levels = self.p.shape[1]
        v = x.masked_fill(~inside, math.nan).double() * levels
        level = v.detach().nan_to_num().long().clamp(max=levels - 1)
        return level, (v - level).clamp(min=EDGE), (level + 1 - v).clamp(min=EDGE)

    def _normalised(self) -> Tensor:
        """p in double precision, with rows that sum to 1."""
        p = self.p.double()
        return p / p.sum(1, keepdim=True)


def normal_quantile(below: Tensor, above: Tensor) -> Tensor:
    """Phi^-1 of probabilities `below`, from the smaller of them and `above`, which is 1 - below."""
    tail = torch.minimum(below, above).clamp(min=torch.finfo(below.dtype).tiny)
    z = torch.special.ndtri(tail)
    return torch.where(below < above, z, -z)


def grey_value(p: Tensor, z: Tensor) -> Tensor:
    """The inverse of z = Phi^-1(F(x)), where F is the distribution function of grey levels.

    p: their probabilities, (D, L)
    z: (D, B)

    Returns x (D, B), from 0 to 1, in double precision.
    """
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
