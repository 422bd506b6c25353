"""The loss of a batch.

With w_i = sup_weight for a labelled row and 1 for an unlabelled one, normalised to sum to 1 over
the batch, the loss is

    - sum_{i labelled} w_i log p(x_i, y_i) - sum_{j unlabelled} w_j u(x_j)
    + cl_weight * L_clf + cons_weight * L_cons + vat_weight * L_vat

    ssl_alg sgd:  u(x) = log p(x)
    ssl_alg em:   u(x) = sum_y q(y) log p(x, y), where q(y) = p(y | x) gets no gradient

L_clf, from the paper, is the mean of -log p(y_i | x_i) over the labelled rows.

L_cons, which the paper does not have, is for images and uses an augmented copy x' of each image x
(`augment` in utils/data.py): where the largest class probability of an unlabelled image exceeds the
threshold `confidence`, its posterior is the target for the copy,

    mean_{j unlabelled} [ - sum_y q_j(y) log p(y | x'_j)  if max_y q_j(y) > confidence,
                          0                               otherwise ],

where q_j(y) = p(y | x_j) gets no gradient. With `clf_noise` train, it is that of x_j without
dequantisation noise; with `target_weights` averaged, that of the moving average of the weights, as
in Tarvainen & Valpola 2017 (arXiv 1703.01780). With `spread_labels` the image has a prior of its
own, r_j, from label spreading (`log_prior_ratio` in utils/data.py), and q_j(y) is proportional to
p(x_j | y) r_j(y). Soft targets under a confidence mask are those of UDA (Xie et al. 2020, arXiv
1904.12848); FixMatch (Sohn et al. 2020, arXiv 2001.07685) has hard ones. With this term L_clf is
the mean of those of x_i and x'_i.

L_vat, which the paper does not have, is the mean over all rows of `virtual_adversarial_loss`
(vat.py) with perturbations of length vat_eps. It is for model pyramid: what is perturbed is the
image that the network which writes into z_f sees.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import Settings


cross_entropy = partial(F.cross_entropy, reduction="none")     # of each row


class Terms(NamedTuple):
    """The loss of a batch and the logged quantities, each of shape ()."""

    loss: Tensor
    log_likelihood: Tensor   # the weighted mean of log p(x, y) and u(x), in nats
    cl_loss: Tensor          # L_clf, in nats
    cons_loss: Tensor        # L_cons, in nats
    vat_loss: Tensor         # L_vat, in nats
    confident: Tensor        # share of the unlabelled rows above the confidence threshold
    correct: Tensor          # number of labelled rows that argmax p(y | x) classifies correctly
    labelled: Tensor         # number of labelled rows


def objective(log_joint: Tensor, y: Tensor, settings: Settings,
              batch_y: Tensor | None = None, log_joint_augmented: Tensor | None = None,
              target: Tensor | None = None, divergence: Tensor | None = None) -> Terms:
    """The loss of a batch, or the contribution of a micro-batch to it (module docstring).

    log_joint: log p(x, y), (B, K); y: (B,), -1 where the label is hidden; settings: ssl_alg,
    sup_weight, cl_weight, cons_weight, confidence, vat_weight; batch_y: the labels of the whole
    batch if the rows are a micro-batch of it; log_joint_augmented: log p(x', y) up to a term that
    does not depend on y, (B, K), or None without augmented copies; target: log q(y) up to such a
    term, or None where q(y) is p(y | x); divergence: the virtual adversarial loss of each row,
    (B,), or None. The terms of all micro-batches sum to those of the batch.
    """
    batch_y = y if batch_y is None else batch_y
    labelled = y >= 0
    n_labelled = (batch_y >= 0).sum()
    log_p_xy = log_joint.gather(1, y.clamp(min=0)[:, None])[:, 0]  # log p(x, y) of the label
    log_p_x = log_joint.logsumexp(1)
    if settings.ssl_alg == "em":
        unlabelled_term = (log_joint.softmax(1).detach() * log_joint).sum(1)
    else:
        unlabelled_term = log_p_x

    def row_weights(y: Tensor) -> Tensor:
        return torch.ones_like(y, dtype=log_joint.dtype).masked_fill(y >= 0, settings.sup_weight)
    weighted = row_weights(y) * torch.where(labelled, log_p_xy, unlabelled_term)
    log_likelihood = weighted.sum() / row_weights(batch_y).sum()

    # In float32 the difference log p(x) - log p(x, y) of numbers in the thousands would be coarse.
    nll = cross_entropy(log_joint, y.clamp(min=0))  # -log p(y | x)
    cons_loss = confident = torch.zeros_like(log_likelihood)
    if log_joint_augmented is not None:
        nll = (nll + cross_entropy(log_joint_augmented, y.clamp(min=0))) / 2
        q = (log_joint if target is None else target).detach().softmax(1)
        is_confident = ~labelled & (q.amax(1) > settings.confidence)
        n_unlabelled = (len(batch_y) - n_labelled).clamp(min=1)
        of_copies = cross_entropy(log_joint_augmented, q)
        cons_loss = (of_copies * is_confident).sum() / n_unlabelled
        confident = is_confident.sum() / n_unlabelled
    cl_loss = nll.masked_fill(~labelled, 0).sum() / n_labelled.clamp(min=1)
    vat_loss = torch.zeros_like(log_likelihood)
    if divergence is not None:
        vat_loss = divergence.sum() / len(batch_y)

    loss = -log_likelihood
    for weight, term in ((settings.cl_weight, cl_loss), (settings.cons_weight, cons_loss),
                         (settings.vat_weight, vat_loss)):
        loss = loss + weight * term if weight else loss
    correct = (labelled & (log_joint.argmax(1) == y)).sum()
    return Terms(loss, log_likelihood, cl_loss, cons_loss, vat_loss, confident,
                 correct.to(loss.dtype), labelled.sum().to(loss.dtype))
