"""The state of a run in training, and the loop over the training steps of an epoch."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models import SemiConditionalFlow
from utils import Settings
from utils.data import SemiSupervisedData

from .checkpoint import get_rng_state, set_rng_state
from .objective import Terms
from .processes import Processes
from .schedule import learning_rate
from .speed import Accelerated
from .step import TrainingStep
from .stopping import Stopping


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message is one line.

    of_all: whether all processes raise it at the same time.
    """

    def __init__(self, message: str, of_all: bool = True):
        super().__init__(message)
        self.of_all = of_all


@dataclass
class TrainingState:
    """Everything that changes while a run trains: a checkpoint holds all of it.

    training_step: the parameters, the optimiser and the moving average; generator: of the batches;
    epoch: finished epochs; step_in_epoch: training steps of the next one that are done, out of
    steps_per_epoch; sums: of their Terms, (T,), on this process; seconds: of training since the
    last evaluation.
    """

    model: SemiConditionalFlow
    training_step: TrainingStep
    generator: torch.Generator
    steps_per_epoch: int
    sums: Tensor
    epoch: int = 0
    step_in_epoch: int = 0
    seconds: float = 0.0

    @classmethod
    def create(cls, accelerated: Accelerated, data: SemiSupervisedData,
               generator: torch.Generator, settings: Settings,
               processes: Processes) -> "TrainingState":
        """The state before the first training step.

        An epoch has as many rows as there are training examples, rounded up to full batches.
        """
        return cls(accelerated.model, TrainingStep(accelerated, settings, processes), generator,
                   steps_per_epoch=-(-len(data.train_x) // settings.train_bs),
                   sums=torch.zeros(len(Terms._fields), device=data.device))

    def __str__(self) -> str:
        if not self.step_in_epoch:
            return f"epoch {self.epoch}"
        return f"step {self.step_in_epoch} of {self.steps_per_epoch} in epoch {self.epoch + 1}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, besides the settings."""
        return {"model": self.model.state_dict(), **self.training_step.state_dict(),
                "epoch": self.epoch, "step": self.step_in_epoch,
                "sums": dict(zip(Terms._fields, self.sums)), "seconds": self.seconds,
                "generator": self.generator.get_state(), "rng": get_rng_state()}

    def load_state_dict(self, checkpoint: dict[str, Any], processes: Processes) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(checkpoint["model"])
        self.training_step.load_state_dict(checkpoint)
        self.epoch, self.step_in_epoch = checkpoint["epoch"], checkpoint["step"]
        self.seconds = checkpoint["seconds"]
        self.sums.copy_(torch.stack([checkpoint["sums"][name] for name in Terms._fields]))
        self.sums *= processes.is_main  # they are of all processes, and are summed again
        set_rng_state(checkpoint["rng"])
        try:
            self.generator.set_state(checkpoint["generator"])
        except RuntimeError:  # it is of another kind of device
            self.generator.manual_seed(self.generator.initial_seed() + checkpoint["epoch"])
            print("The checkpoint is from another kind of device: the batches differ from those of "
                  "an uninterrupted run")

    def finish_epoch(self, processes: Processes) -> dict[str, float]:
        """Move on to the next epoch -> the metrics of this one's batches.

        They are keyed as in MetricsLog, and are those of all processes.
        """
        sums = dict(zip(Terms._fields, processes.sum(self.sums).tolist()))
        means = {key: sums[key] / self.steps_per_epoch
                 for key in ("loss", "log_likelihood", "cl_loss", "cons_loss", "vat_loss",
                             "confident")}
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.sums.zero_()
        return {"train_loss": means.pop("loss"), **means,
                "labelled_acc": sums["correct"] / max(sums["labelled"], 1)}


def train_epoch(state: TrainingState, data: SemiSupervisedData,
                settings: Settings, processes: Processes,
                stopping: Stopping) -> str | None:
    """Train to the end of the epoch, from where `state` is in it -> None, or why it stopped before.

    During the epoch nothing is read from the device, except once a second if the progress bar is
    shown on a terminal. Raises TrainingFailed, which names the training step, if a loss or a weight
    is not finite.
    """
    steps, first = state.steps_per_epoch, state.step_in_epoch + 1
    labelled_prob = data.labelled_prob(settings.sup_sample_weight)
    n_finite = torch.zeros((), dtype=torch.long, device=data.device)  # steps with a finite loss
    where = f"of {steps} in epoch {state.epoch + 1}"

    def check(n_finite: Tensor) -> None:
        if first + int(n_finite) <= state.step_in_epoch:
            raise TrainingFailed(f"The loss is not finite at step {first + int(n_finite)} {where}")

    bar = tqdm(total=steps * settings.train_bs, initial=state.step_in_epoch * settings.train_bs,
               unit="img", unit_scale=True, desc=f"epoch {state.epoch + 1}/{settings.epochs}",
               leave=False, disable=None if processes.is_main else True)
    # Of several processes, none may fail alone.
    reads_device = not bar.disable and processes.size == 1
    stopped: str | None = None
    lr: float | None = None
    start = last_read = time.perf_counter()
    with bar:
        while state.step_in_epoch < steps and not stopped:
            previous = lr
            lr = learning_rate(state.epoch + 1, state.step_in_epoch + 1, steps, settings)
            if lr != previous:
                state.training_step.lr.fill_(lr)
            batch = data.sample_batch(settings.train_bs, labelled_prob, state.generator,
                                      augmented=settings.cons_weight > 0)
            state.sums += state.training_step(*batch)
            state.step_in_epoch += 1
            n_finite += state.sums[0].isfinite()  # once the sum is not finite, it never is again
            if processes.any(stopping.reason is not None):
                stopped = processes.first(stopping.reason)
            if reads_device and time.perf_counter() - last_read > 1:
                last_read = time.perf_counter()
                check(n_finite)
                bar.update(state.step_in_epoch * settings.train_bs - bar.n)
                mean_loss = float(state.sums[0]) / state.step_in_epoch
                bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
    check(processes.min(n_finite))
    if not state.training_step.is_finite:
        raise TrainingFailed(f"A weight is not finite after step {state.step_in_epoch} {where}")
    state.seconds += time.perf_counter() - start
    return stopped
