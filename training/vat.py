"""Virtual adversarial training (Miyato et al. 2018, arXiv 1704.03976)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

XI = 0.1        # the length of the step along which the most sensitive direction is estimated


def virtual_adversarial_loss(logits: Callable[[Tensor], Tensor], x: Tensor, eps: float) -> Tensor:
    """KL[p(y | x) || p(y | x + r)], in nats, for each image: x (B, C, H, W) -> (B,).

    r is the change of length `eps`, in the Euclidean norm over an image, that increases this
    divergence the most, found by one power iteration from a random direction, as there.
    p(y | x) and r get no gradient. logits: x -> log p(y | x) up to a term that does not
    depend on y, (B, K).
    """
    with torch.no_grad():
        p = logits(x).softmax(1)

    def divergence(r: Tensor) -> Tensor:
        return F.kl_div(logits(x + r).log_softmax(1), p, reduction="none").sum(1)

    def of_length(length: float, r: Tensor) -> Tensor:
        return length * F.normalize(r.flatten(1)).view_as(x)
    r = of_length(XI, torch.randn_like(x)).requires_grad_()
    gradient, = torch.autograd.grad(divergence(r).sum(), r)
    return divergence(of_length(eps, gradient))
