"""h_phi: the conditional flow on z_f, which the option `ssl_model` names (HEADS).

The paper has two kinds, ConditionalFlow (SCNF-GLOW) and ConditionalShift (SCNF-GMM). All have

    __init__(dim, n_classes, options)   dim: ssl_dim; n_classes: K; options: ssl_...
    forward(z_f, y) -> (z_h, ldj)       z_f, z_h: (B, ssl_dim); y: labels (B,); ldj: (B,), in nats
    inverse(z_h, y) -> z_f
    log_prob(z_f, base) -> (B, K)       log p(z_f | y) of every class, in nats; base: of z_h, a
                                        DiagonalGaussian

They raise ValueError for arguments of other shapes, and for labels that are not integers from 0 to
K - 1.
"""

import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .bijections import ActNorm, ChannelCoupling, MultiScale, Split, split_size
from .checks import check_labels, check_shape, check_tensor
from .conv1x1 import invertible_conv
from .networks import resnet1x1

EMBEDDING_DIM = 10      # of a label
MOST_ROWS = 2**15       # of z_f times classes, that are computed at a time
FARTHEST = 1e100        # |z_f|, clamped so that its square over sigma^2 stays finite


def embed(embedding: nn.Embedding, y: Tensor) -> Tensor:
    """embedding(y) as a product with one-hot rows: y (B,) -> (B, E).

    The gradient is then a matrix product, deterministic on a GPU, unlike the gradient of a lookup.
    """
    weight = embedding.weight
    return (y[:, None] == torch.arange(len(weight), device=y.device)).to(weight.dtype) @ weight


class Conditional(nn.Module):
    """Base class of the kinds of h_phi."""

    checks_values = True    # see SemiConditionalFlow

    def __init__(self, dim: int, n_classes: int):
        super().__init__()
        self.dim, self.n_classes = dim, n_classes
        self.largest_batch = max(MOST_ROWS // n_classes, 1)     # for one pass of all classes

    def check(self, name: str, z: Tensor, y: Tensor) -> None:
        """Raise ValueError unless z, called `name`, is (B, ssl_dim) and y (B,) are labels."""
        check_shape(name, z, (self.dim,))
        check_tensor("y", y)
        if len(z) != len(y):
            raise ValueError(f"there are {len(y)} labels for {len(z)} rows")
        if self.checks_values:
            check_labels(y, self.n_classes)

    def log_prob(self, z_f: Tensor, base: Any) -> Tensor:
        """log p(z_f | y) of all classes: z_f (B, ssl_dim) -> (B, K).

        If these are more than MOST_ROWS rows, a few classes are computed at a time. Their
        activations are not kept, but computed again for the gradient.
        """
        classes = torch.arange(self.n_classes, device=z_f.device)
        parts = classes.split(max(MOST_ROWS // max(len(z_f), 1), 1))
        if len(parts) == 1:
            return self.log_prob_of(classes, z_f, base)
        if not torch.is_grad_enabled():
            return torch.cat([self.log_prob_of(part, z_f, base) for part in parts], 1)
        return torch.cat([checkpoint(self.log_prob_of, part, z_f, base, use_reentrant=False,
                                     preserve_rng_state=False) for part in parts], 1)

    def log_prob_of(self, classes: Tensor, z_f: Tensor, base: Any) -> Tensor:
        """log p(z_f | y) of these classes (C,), in one pass: (B, C)."""
        z_h, ldj = self(z_f.repeat_interleave(len(classes), 0), classes.repeat(len(z_f)))
        return (ldj + base.log_prob(z_h)).view(-1, len(classes))


class ConditionalFlow(Conditional):
    """h_phi of SCNF-GLOW: `ssl_l` scales of `ssl_k` conditional flow steps, separated by splits.

    A flow step is an ActNorm, an invertible 1x1 convolution, and a channel coupling whose networks
    see the label: an embedding (K, 10) that all flow steps share. At the start it has ones on the
    diagonal, and random unit vectors for the classes after the tenth.

    Raises ValueError if `dim` cannot be split into that many scales.
    """

    def __init__(self, dim: int, n_classes: int, options: SimpleNamespace):
        super().__init__(dim, n_classes)
        self.embedding = nn.Embedding(n_classes, EMBEDDING_DIM)
        nn.init.eye_(self.embedding.weight)
        if n_classes > EMBEDDING_DIM:           # the other classes would all start at zero
            rows = torch.randn(n_classes - EMBEDDING_DIM, EMBEDDING_DIM)
            self.embedding.weight.data[EMBEDDING_DIM:] = F.normalize(rows)
        layers: list[nn.Module | Split] = []
        c = dim
        for scale in range(options.ssl_l):
            if scale:
                layers.append(Split())
                c -= split_size(c)
            if c < 2 or c % 2:
                raise ValueError(f"ssl_dim {dim} cannot be split into ssl_l {options.ssl_l} levels "
                                 "of an even number of dimensions "
                                 f"(level {scale + 1} would get {c})")
            layers += [_flow_step(c, options) for _ in range(options.ssl_k)]
        self.flow = MultiScale((dim,), layers)

    def forward(self, z_f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.check("z_f", z_f, y)
        return self.flow(z_f, embed(self.embedding, y))

    def inverse(self, z_h: Tensor, y: Tensor) -> Tensor:
        self.check("z_h", z_h, y)
        return self.flow.inverse(z_h, embed(self.embedding, y))


def _flow_step(c: int, options: SimpleNamespace) -> nn.Sequential:
    """A conditional flow step on c dimensions."""
    nets = (resnet1x1(c // 2 + EMBEDDING_DIM, c, options.ssl_hd) for _ in range(2))
    return nn.Sequential(OrderedDict(
        act=ActNorm(c), inv=invertible_conv(options.ssl_conv, c, options.ssl_hh),
        coupling=ChannelCoupling(*nets)))


class ConditionalShift(Conditional):
    """h_phi of SCNF-GMM: z_h = z_f - mu_y, hence z_f given y is Gaussian with mean mu_y.

    mu, an embedding (K, ssl_dim), is normal at the start, with standard deviation `ssl_std`.
    """

    def __init__(self, dim: int, n_classes: int, options: SimpleNamespace):
        super().__init__(dim, n_classes)
        self.largest_batch = sys.maxsize        # log_prob needs no passes
        self.mu = nn.Embedding(n_classes, dim)
        self.mu.weight.data *= options.ssl_std

    def forward(self, z_f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.check("z_f", z_f, y)
        return z_f - embed(self.mu, y), z_f.new_zeros(len(z_f))

    def inverse(self, z_h: Tensor, y: Tensor) -> Tensor:
        self.check("z_h", z_h, y)
        return z_h + embed(self.mu, y)

    def log_prob(self, z_f: Tensor, base: Any) -> Tensor:
        """log N(z_f; mu_y, diag(sigma^2)), with base's sigma."""
        return log_gaussians(z_f, self.mu.weight, base.sigma.expand_as(self.mu.weight))


class ConditionalGaussian(ConditionalShift):
    """Beyond the paper: SCNF-GMM with a diagonal covariance of each class.

        z_h = (z_f - mu_y) / sigma_y,   ldj = -sum_i log sigma_yi

    log sigma, an embedding (K, ssl_dim), is zero at the start.
    """

    def __init__(self, dim: int, n_classes: int, options: SimpleNamespace):
        super().__init__(dim, n_classes, options)
        self.log_sigma = nn.Embedding(n_classes, dim)
        nn.init.zeros_(self.log_sigma.weight)

    def forward(self, z_f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        shifted, _ = super().forward(z_f, y)
        log_sigma = embed(self.log_sigma, y)
        return shifted * (-log_sigma).exp(), -log_sigma.sum(1)

    def inverse(self, z_h: Tensor, y: Tensor) -> Tensor:
        self.check("z_h", z_h, y)
        return super().inverse(z_h * embed(self.log_sigma, y).exp(), y)

    def log_prob(self, z_f: Tensor, base: Any) -> Tensor:
        """log N(z_f; mu_y, diag((sigma_y sigma)^2)), with base's sigma."""
        return log_gaussians(z_f, self.mu.weight, self.log_sigma.weight.exp() * base.sigma)


def log_gaussians(z: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """log N(z; mu_k, diag(sigma_k^2)) of K Gaussians: z (B, D), mu, sigma (K, D) -> (B, K), nats.

        -1/2 sum_i (z_i - mu_ki)^2 / sigma_ki^2 - sum_i log sigma_ki - D/2 log 2 pi

    The square is expanded, so that matrix products replace B K differences of D dimensions. Its
    terms cancel, hence double precision.
    """
    z64, mu64, sigma64 = z.double().clamp(-FARTHEST, FARTHEST), mu.double(), sigma.double()
    precision = sigma64**-2
    squares = (z64**2 @ precision.T - 2 * z64 @ (mu64 * precision).T
               + (mu64**2 * precision).sum(1))
    log_norm = sigma64.log().sum(1) + 0.5 * z.shape[1] * math.log(2 * math.pi)
    return (-0.5 * squares - log_norm).to(z.dtype)


HEADS: dict[str, Callable[[int, int, SimpleNamespace], ConditionalFlow | ConditionalShift]] = {
    "cond-flow": ConditionalFlow,
    "cond-shift": ConditionalShift,
    "cond-gmm": ConditionalGaussian,
}
