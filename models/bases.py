"""The base densities of the latent variables."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DiagonalGaussian(nn.Module):
    """N(0, diag(sigma^2)) with sigma = softplus(logsigma), logsigma trained, 0 at the start.

    The paper has sigma = 1. The authors' code trains it, starting at softplus(0) = 0.693, as we do.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.logsigma = nn.Parameter(torch.zeros(dim))

    @property
    def sigma(self) -> Tensor:
        """The standard deviations, (dim,)."""
        return F.softplus(self.logsigma)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, diag(sigma^2)), in nats: (B, dim) -> (B,)."""
        log_p = -0.5 * (z / self.sigma) ** 2 - self.sigma.log() - 0.5 * math.log(2 * math.pi)
        return log_p.sum(-1)

    def sample(self, eps: Tensor) -> Tensor:
        """Transform standard normal noise eps (B, dim) into a sample: (B, dim)."""
        return self.sigma * eps
