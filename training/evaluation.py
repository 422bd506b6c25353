"""Log-likelihood and accuracy on a set of examples."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from utils import Settings
from utils.data import Examples, SemiSupervisedData
from utils.metrics import average_is_better

from .cuda_graph import Captured
from .device import device_name
from .fast import FastLogJoint
from .processes import Processes
from .step import TrainingStep

class Inference:
    """A model's functions without gradient, in micro-batches: x (B, C, H, W) -> (B, K).

    log_joint: log p(x, y); logits: log p(y | x) up to a term that does not depend on y. With CUDA
    graphs they accept batches of one size only: build them for each set of examples.
    """

    def __init__(self, model: FastLogJoint):
        def build(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            @torch.no_grad()
            def infer(x: Tensor) -> Tensor:
                return torch.cat([function(part) for part in x.split(model.micro_batch_size)])
            return Captured(infer) if model.cuda_graph else infer
        self.log_joint, self.logits = build(model), build(model.logits)


def evaluate(infer: Inference, data: SemiSupervisedData, examples: Examples, batch_size: int,
             seed: int, processes: Processes) -> tuple[float, float]:
    """Mean log p(x) of `examples`, in nats, and the accuracy of argmax p(y | x), from 0 to 1.

    infer: called with batches of one size, at most `batch_size`. `seed` determines the
    dequantisation noise, so two evaluations of the same weights on the same device agree. Unless
    data.clf_noise is "true", the x that is classified has no noise, and so needs a pass of its own.
    Each process evaluates its share of the batches.
    """
    generator = torch.Generator(data.device).manual_seed(seed)
    images, y = examples
    n = len(images)
    n_batches = -(-n // batch_size)
    batch_size = -(-n // n_batches)
    sums = torch.zeros(2, dtype=torch.float64, device=data.device)  # of log p(x), of correct
    for i in range(n_batches):
        rows = torch.arange(i * batch_size, (i + 1) * batch_size, device=data.device)
        counted, rows = rows < n, rows.clamp(max=n - 1)  # the last batch is filled up
        x = data.dequantize(images[rows], generator)  # by all processes: the noise stays the same
        if i % processes.size == processes.rank:
            logits = log_joint = infer.log_joint(x)
            log_p = log_joint.logsumexp(1).double()
            if data.clf_noise != "true":
                logits = infer.logits(data.middle_of_levels(images[rows]))
            correct = logits.argmax(1) == y[rows]
            values = torch.stack((log_p, correct.double()))
            sums += (values * counted).sum(1)
    mean_log_p, accuracy = (processes.sum(sums) / n).tolist()
    return mean_log_p, accuracy


class RunEvaluation:
    """The evaluation of a run on its validation and test examples.

    evaluation(training_step, epoch) -> val_log_p, val_acc, val_bpd, if there are validation
    examples; the same with the prefix ema_, of the averaged weights, if there are such; and
    test_log_p, test_acc, test_bpd of the weights that the run would keep after that epoch. With
    validation examples the test set is evaluated after the last epoch only, and with settings.test
    false never. settings: epochs, ema, test, test_bs, seed.
    """

    def __init__(self, log_joint: FastLogJoint, data: SemiSupervisedData,
                 settings: Settings, processes: Processes):
        self.data, self.settings, self.processes = data, settings, processes
        self.examples = {"val": (data.val_x, data.val_y), "test": (data.test_x, data.test_y)}
        self.infer = {name: Inference(log_joint) for name in self.examples}

    def __call__(self, training_step: TrainingStep, epoch: int) -> dict[str, float]:
        has_validation, row = len(self.data.val_x) > 0, {}
        if has_validation:
            row = self._evaluate("val")
        if has_validation and self.settings.ema:
            with training_step.averaged():
                averaged = self._evaluate("val")
            row.update({f"ema_{key}": value for key, value in averaged.items()})
        if self.settings.test and (epoch == self.settings.epochs or not has_validation):
            with training_step.averaged(average_is_better(row)):
                row.update(self._evaluate("test"))
        return row

    def _evaluate(self, name: str) -> dict[str, float]:
        log_p, accuracy = evaluate(self.infer[name], self.data, self.examples[name],
                                   self.settings.test_bs, self.settings.seed, self.processes)
        return {f"{name}_log_p": log_p, f"{name}_acc": accuracy,
                f"{name}_bpd": self.data.bits_per_dim(log_p)}


def print_evaluation(log_joint: FastLogJoint, data: SemiSupervisedData,
                     settings: Settings, processes: Processes) -> None:
    """Print error and likelihood on the test set; with settings.test false, on the validation set.

    Each is the mean over settings.draws samples of the dequantisation noise; the values follow it.
    """
    start = time.perf_counter()
    infer, name, examples = Inference(log_joint), "Test", (data.test_x, data.test_y)
    if not settings.test:
        name, examples = "Validation", (data.val_x, data.val_y)
    log_p, accuracy = np.transpose([
        evaluate(infer, data, examples, settings.test_bs, settings.seed + i, processes)
        for i in range(settings.draws)])

    def mean(values: np.ndarray, digits: int, unit: str = "") -> str:
        each = f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{unit}{each}"
    print(f"{name + ' set':12} {len(examples[0])} examples of {settings.data}, "
          f"{time.perf_counter() - start:.1f} s on {device_name(data.device)}")
    print(f"{name + ' error':12} {mean(100 * (1 - accuracy), 2, '%')}")
    print(f"log p(x)     {mean(log_p, 3, ' nats')}")
    if data.grey_levels:
        print(f"bits/dim     {mean(data.bits_per_dim(log_p), 4)}")
