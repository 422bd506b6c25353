"""Base densities of the latent variables."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class DiagonalGaussian(nn.Module):
    """N(0, diag(sigma^2)), sigma = softplus(logsigma) trained, logsigma zero at start.

    The paper has sigma = 1; the published code trains it, from softplus(0) = 0.693.
    """

    def __init__(self, dim):
        super().__init__()
        self.logsigma = nn.Parameter(torch.zeros(dim))

    @property
    def sigma(self):
        return F.softplus(self.logsigma)

    def log_prob(self, z):
        """log N(z; 0, diag(sigma^2)), in nats: (B, dim) -> (B,)."""
        return (-0.5 * (z / self.sigma) ** 2 - self.sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, eps):
        """The draw that standard normal noise eps (B, dim) stands for: (B, dim)."""
        return self.sigma * eps
