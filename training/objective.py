"""The paper's loss.

With w_i = sup_weight for a labelled row and 1 for an unlabelled one, normalised to sum to 1 over
the batch, the loss is

    - sum_{i labelled} w_i log p(x_i, y_i) - sum_{j unlabelled} w_j u(x_j) + cl_weight * L_clf

    ssl_alg sgd:  u(x) = log p(x)
    ssl_alg em:   u(x) = sum_y q(y) log p(x, y), where q(y) = p(y | x) gets no gradient

    L_clf = mean_{i labelled} [ -log p(y_i | x_i) ]

(Atanov et al. 2019, arXiv 1905.00505; `em` is its EM-SGD, `sup_weight` is from the authors' code.)
What is added beyond the paper is in beyond.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import Settings

Terms = dict[str, Tensor]       # the loss and what is logged of a batch, each of shape ()


def objective(log_joint: Tensor, y: Tensor, batch_y: Tensor, settings: Settings,
              copy_logits: Tensor | None = None) -> Terms:
    """The loss of a batch, or the contribution of a micro-batch to it.

    log_joint: log p(x, y) of the rows, in nats, (B, K)
    y: their labels, (B,), -1 where the label is hidden
    batch_y: the labels of the whole batch, of which these rows may be a micro-batch
    settings: ssl_alg, sup_weight, cl_weight
    copy_logits: None, or of augmented copies x' (beyond the paper) log p(y | x') up to a term that
        does not depend on y, (B, K): L_clf is then the mean over x and x'

    -> loss; log_likelihood, the weighted mean of log p(x, y) and u(x), and cl_loss, L_clf, in nats;
    correct: how many of the labelled rows argmax p(y | x) classifies correctly; labelled: how many
    there are. The terms of all micro-batches sum to the batch's.
    """
    labelled = y >= 0
    log_p_xy = log_joint.gather(1, y.clamp(min=0)[:, None])[:, 0]      # log p(x, y) of the label
    if settings.ssl_alg == "em":
        u = (log_joint.softmax(1).detach() * log_joint).sum(1)
    else:
        u = log_joint.logsumexp(1)

    def weights(y: Tensor) -> Tensor:
        return torch.ones_like(y, dtype=log_joint.dtype).masked_fill(y >= 0, settings.sup_weight)
    weighted = weights(y) * torch.where(labelled, log_p_xy, u)
    log_likelihood = weighted.sum() / weights(batch_y).sum()
    nll = negative_log_posterior(log_joint, y)
    if copy_logits is not None:
        nll = (nll + negative_log_posterior(copy_logits, y)) / 2
    cl_loss = nll.masked_fill(~labelled, 0).sum() / (batch_y >= 0).sum().clamp(min=1)
    loss = -log_likelihood
    if settings.cl_weight:
        loss = loss + settings.cl_weight * cl_loss
    correct = (labelled & (log_joint.argmax(1) == y)).sum()
    return {"loss": loss, "log_likelihood": log_likelihood, "cl_loss": cl_loss,
            "correct": correct.to(loss.dtype), "labelled": labelled.sum().to(loss.dtype)}


def negative_log_posterior(logits: Tensor, y: Tensor) -> Tensor:
    """-log p(y | x) in nats, (B,), from logits (B, K); meaningless where y is -1.

    Computed by softmax, because log p(x) - log p(x, y), a difference of numbers in the thousands,
    would lose precision in float32.
    """
    return F.cross_entropy(logits, y.clamp(min=0), reduction="none")
