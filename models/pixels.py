"""The first layer of an f_w for images in the paper: the logit. marginal.py has another one."""

import math

import torch
from torch import Tensor

from .bijections import Bijection, sum_per_sample


class Logit(Bijection):
    """x' = x (1 - alpha) + alpha / 2; z = log x' - log(1 - x'), for x in [0, 1].

    As in the authors' code; a symmetric variant of Dinh et al. 2017 (arXiv 1605.08803), section
    4.1. A positive alpha keeps z finite at 0 and 1, and up to 0.026 beyond.
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        self.alpha = alpha

    def in_domain(self, x: Tensor) -> Tensor:
        x = self._moved_inside(x)
        return (x > 0) & (x < 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._moved_inside(x)
        log_x, log_1mx = x.log(), torch.log1p(-x)
        return log_x - log_1mx, sum_per_sample(math.log(1 - self.alpha) - log_x - log_1mx)

    def inverse(self, z: Tensor) -> Tensor:
        return (torch.sigmoid(z) - self.alpha / 2) / (1 - self.alpha)

    def _moved_inside(self, x: Tensor) -> Tensor:
        return x * (1 - self.alpha) + self.alpha / 2
