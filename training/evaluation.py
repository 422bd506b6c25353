"""Log-likelihood and accuracy on a set of examples."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import set_stance

from models.checks import check_grey_levels
from utils import Settings
from utils.data import SemiSupervisedData
from utils.errors import Failed
from utils.examples import Examples
from utils.metrics import average_is_better
from utils.terminal import bar, say

from .distributed import Processes
from .optim import Optimizer
from .speed import Accelerated, Captured


class Inference:
    """A model's functions without gradient, in micro-batches: x (B, C, H, W) -> (B, K).

    compiled: whether to use what is compiled, or to call the same functions as they are

    log_joint: log p(x, y)
    logits: log p(y | x) up to a term that does not depend on y
    log_p_y: of the model, (K,)
    predictions: what `predict` returned in the last call of `evaluate`, if any

    With CUDA graphs the functions accept batches of one size only: build an Inference for each set
    of examples.
    """

    def __init__(self, accelerated: Accelerated, compiled: bool = True):
        def build(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            @torch.no_grad()
            def infer(x: Tensor) -> Tensor:
                with contextlib.nullcontext() if compiled else set_stance("force_eager"):
                    return torch.cat([function(part)
                                      for part in x.split(accelerated.micro_batch_size)])
            return Captured(infer) if accelerated.cuda_graph else infer
        self.log_joint, self.logits = build(accelerated.log_joint), build(accelerated.logits)
        self.log_p_y = accelerated.model.log_p_y
        self.predictions: tuple[Tensor, Tensor] | None = None


def predict(infer: Inference, data: SemiSupervisedData, images: Tensor, batch_size: int,
            seed: int, processes: Processes | None = None) -> tuple[Tensor, Tensor]:
    """log p(x), (N,), in nats, and log p(y | x) up to a term that does not depend on y, (N, K).

    images: grey levels, or points, (N, C, H, W)
    seed: of the dequantisation noise: two calls with the same weights on the same device agree
    processes: each computes its share of the batches, and gets all of the results; None: this
        process computes alone

    Unless data.clf_noise is "true", the x that is classified has no noise, and so needs a pass of
    its own. Raises ValueError if there are no images, or for others than described.
    """
    rank, size = (processes.rank, processes.size) if processes else (0, 1)
    generator = torch.Generator(data.device).manual_seed(seed)
    n = len(images)
    if not n:
        raise ValueError("there are no examples to evaluate")
    if data.grey_levels is not None:
        check_grey_levels("images", images, data.grey_levels)
    n_batches = -(-n // batch_size)
    batch_size = -(-n // n_batches)
    results = infer.log_p_y.new_zeros(n, 1 + len(infer.log_p_y))        # log p(x) and logits
    for i in bar(range(n_batches), f"evaluating {n:,} examples", unit="batch"):
        first = i * batch_size
        rows = torch.arange(first, first + batch_size, device=data.device)
        rows = rows.clamp(max=n - 1)        # the last batch is filled up
        x = data.dequantize(images[rows], generator)  # by all processes: the noise stays the same
        if i % size == rank:
            logits = log_joint = infer.log_joint(x)
            log_p = log_joint.logsumexp(1, keepdim=True)
            if data.clf_noise != "true":
                logits = infer.logits(data.middle_of_levels(images[rows]))
            results[first:first + batch_size] = torch.cat((log_p, logits), 1)[:n - first]
    if processes:
        results = processes.sum(results)
    return results[:, 0], results[:, 1:]


def evaluate(infer: Inference, data: SemiSupervisedData, examples: Examples, batch_size: int,
             seed: int, processes: Processes) -> tuple[float, float]:
    """`summary` of `examples`. The other arguments are as in `predict`."""
    images, y = examples
    infer.predictions = predict(infer, data, images, batch_size, seed, processes)
    return summary(*infer.predictions, y)


def summary(log_p: Tensor, logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean log p(x), in nats, and the accuracy of argmax p(y | x), from 0 to 1, of N examples.

    log_p, logits: what `predict` returns
    y: the classes, (N,), or all -1, for an accuracy of NaN

    Raises Failed if these are not finite, and ValueError if y has classes that the model lacks.
    """
    if int(y.max()) >= logits.shape[1]:
        raise ValueError(f"the examples have class {int(y.max())}, and the model has "
                         f"{logits.shape[1]} classes")
    broken = [(int((~finite).sum()), name) for name, finite in (
        ("log p(x)", log_p.isfinite()), ("log p(y | x)", logits.isfinite().all(1)))]
    if any(n for n, _ in broken):
        counts = " and ".join(f"{name} of {n}" for n, name in broken if n)
        raise Failed(f"Not finite: {counts} of the {len(y)} examples")
    correct = (logits.argmax(1) == y).double().where(y >= 0, torch.nan)
    mean_log_p, accuracy = torch.stack((log_p.double(), correct)).mean(1).tolist()
    return mean_log_p, accuracy


class RunEvaluation:
    """The evaluation of a run on its validation and test examples.

    settings: epochs, ema, test, test_bs, seed

    evaluation(optimizer, epoch) -> val_log_p, val_acc, val_bpd, if there are validation
    examples; the same with the prefix ema_, of the averaged weights, if there are such; and
    test_log_p, test_acc, test_bpd of the weights that the run would keep after that epoch. With
    validation examples the test set is evaluated after the last epoch only, and with settings.test
    false never. It calls nothing that is compiled: compiling would take longer than it saves.

    Raises Failed if the evaluation of the weights that the run would keep is not finite. If only
    that of the last or of the averaged weights is finite, the run would keep these, and the metrics
    of the others are left out.
    """

    def __init__(self, accelerated: Accelerated, data: SemiSupervisedData,
                 settings: Settings, processes: Processes):
        self.accelerated, self.data = accelerated, data
        self.settings, self.processes = settings, processes
        self.examples = {"val": (data.val_x, data.val_y), "test": (data.test_x, data.test_y)}
        self.infer = {name: Inference(accelerated, compiled=False) for name in self.examples}

    def __call__(self, optimizer: Optimizer, epoch: int) -> dict[str, float]:
        has_validation, row = len(self.data.val_x) > 0, dict[str, float]()
        weights = (("", "last"), ("ema_", "averaged"))[:1 + bool(self.settings.ema)]
        failures = []
        for prefix, which in weights if has_validation else ():
            try:
                with optimizer.averaged(which == "averaged"):
                    metrics = self._evaluate("val", f"{which} weights of epoch {epoch}")
                row.update({f"{prefix}{key}": value for key, value in metrics.items()})
            except Failed as failure:
                failures.append(failure)
        if failures and not row:
            raise Failed("; ".join(map(str, failures)))
        if failures:
            say("Weights", f"{failures[0]}; the others are kept")
        if self.settings.test and (epoch == self.settings.epochs or not has_validation):
            with optimizer.averaged(average_is_better(row)):
                row.update(self._evaluate("test", f"epoch {epoch}"))
        return row

    def _evaluate(self, name: str, when: str) -> dict[str, float]:
        try:
            log_p, accuracy = evaluate(self.infer[name], self.data, self.examples[name],
                                       self.settings.test_bs, self.settings.seed, self.processes)
        except Failed as failure:
            kind = "validation" if name == "val" else name
            raise Failed(f"{failure} ({kind} set, {when})") from None
        return {f"{name}_log_p": log_p, f"{name}_acc": accuracy,
                f"{name}_bpd": self.data.bits_per_dim(log_p)}
