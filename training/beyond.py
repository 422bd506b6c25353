"""Beyond the paper: terms of the loss that use unlabelled images as classification examples.

    loss = paper's loss + cons_weight * L_cons + vat_weight * L_vat

L_cons, consistency, uses an augmented copy x' of each image x (`augment` in utils/data.py): where
the largest class probability of an unlabelled image exceeds CONFIDENCE, its posterior is the target
for the copy,

    L_cons = mean_{j unlabelled} [ - sum_y q_j(y) log p(y | x'_j)  if max_y q_j(y) > CONFIDENCE,
                                   0                               otherwise ],

where q_j(y) = p(y | x_j) gets no gradient. With `clf_noise` train, x_j has no dequantisation noise
there; with `target_weights` averaged, q_j comes from the moving average of the weights, as in
Tarvainen & Valpola 2017 (arXiv 1703.01780). With `spread_labels` the image has a prior of its own,
r_j, from label spreading (`log_prior_ratio` in utils/data.py), and q_j(y) is proportional to
p(x_j | y) r_j(y). UDA (Xie et al. 2020, arXiv 1904.12848) uses such soft targets above a confidence
threshold, FixMatch (Sohn et al. 2020, arXiv 2001.07685) hard ones. In a run with this term L_clf is
the mean over x_i and x'_i.

L_vat is the mean over all rows of `virtual_adversarial_loss`, with perturbations of length vat_eps.
It is for model pyramid and perturbs the image that t, the network which shifts z_f, sees.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import Settings
from utils.data import Batch

from .objective import Terms
from .optim import Optimizer
from .speed import Accelerated

CONFIDENCE = 0.95   # of the targets of L_cons
XI = 0.1            # the length of the step along which the most sensitive direction is estimated


class Beyond:
    """Adds L_cons and L_vat to the paper's loss.

    accelerated: the model
    optimizer: has the moving average of its weights
    settings: cons_weight, target_weights, vat_weight, vat_eps
    """

    def __init__(self, accelerated: Accelerated, optimizer: Optimizer, settings: Settings):
        self.accelerated, self.optimizer, self.settings = accelerated, optimizer, settings

    @torch.no_grad()
    def targets(self, parts: Sequence[Batch]) -> list[Tensor | None]:
        """log q(y) of the images in each micro-batch, up to a term that does not depend on y,
        (B, K); None where it comes from the same log p(x, y) as the paper's loss."""
        averaged = self.settings.target_weights == "averaged"
        if not averaged and parts[0].clean is None:
            return [None] * len(parts)
        with self.optimizer.averaged(averaged):
            return [self.accelerated.logits(part.x if part.clean is None else part.clean)
                    for part in parts]

    def add(self, terms: Terms, part: Batch, batch_y: Tensor, log_joint: Tensor,
            copy_logits: Tensor | None, target: Tensor | None) -> Terms:
        """The terms of a micro-batch with L_cons and L_vat in the loss.

        terms: from `objective`
        part, batch_y: the micro-batch, and the labels of its batch
        log_joint: log p(x, y), (B, K)
        copy_logits: log p(y | x') up to a term that does not depend on y, (B, K), or None
        target: from `targets`

        -> also cons_loss and vat_loss, in nats, and confident, the share of the unlabelled rows
        whose q exceeds CONFIDENCE, where the loss has these terms.
        """
        settings, terms = self.settings, dict(terms)
        if copy_logits is not None:
            log_q = log_joint if target is None else target
            if part.log_prior_ratio is not None:
                log_q = log_q + part.log_prior_ratio
            terms["cons_loss"], terms["confident"] = consistency(
                log_q, copy_logits, part.y, batch_y, CONFIDENCE)
            terms["loss"] = terms["loss"] + settings.cons_weight * terms["cons_loss"]
        if settings.vat_weight:
            with torch.no_grad():
                last = self.accelerated.call("last_group", part.x)
            divergence = virtual_adversarial_loss(
                lambda seen: self.accelerated.call("logits_seeing", seen, last), part.x,
                settings.vat_eps)
            terms["vat_loss"] = divergence.sum() / len(batch_y)
            terms["loss"] = terms["loss"] + settings.vat_weight * terms["vat_loss"]
        return terms


def consistency(log_q: Tensor, logits: Tensor, y: Tensor, batch_y: Tensor,
                confidence: float) -> tuple[Tensor, Tensor]:
    """L_cons of a batch, or the contribution of a micro-batch, and the share of confident rows.

    log_q: log q(y) of the images up to a term that does not depend on y, (B, K)
    logits: log p(y | x') of their copies, likewise
    y, batch_y: the labels of the rows, and of the whole batch, -1 where they are hidden
    confidence: the confidence threshold
    """
    q = log_q.detach().softmax(1)
    confident = (y < 0) & (q.amax(1) > confidence)
    n_unlabelled = (batch_y < 0).sum().clamp(min=1)
    cross_entropy = F.cross_entropy(logits, q, reduction="none")
    return (cross_entropy * confident).sum() / n_unlabelled, confident.sum() / n_unlabelled


def virtual_adversarial_loss(logits: Callable[[Tensor], Tensor], x: Tensor, eps: float) -> Tensor:
    """KL[p(y | x) || p(y | x + r)] of each image, (B,) nats (Miyato et al. 2018, arXiv 1704.03976).

    r is the change of length `eps`, in the Euclidean norm over an image, that increases this
    divergence the most, found by one power iteration from a random direction, as there.
    p(y | x) and r get no gradient.

    logits: x -> log p(y | x) up to a term that does not depend on y, (B, K)
    x: images (B, C, H, W)
    eps: the length of r, where white is 1
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
