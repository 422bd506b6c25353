"""How far a run is: epochs, training steps, what its epoch has summed up, when it has to stop."""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from utils import Settings
from utils.errors import Failed
from utils.metrics import TERMS
from utils.terminal import bar, duration, say

from .distributed import Processes
from .objective import Terms

SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")     # those that the system has stop a run
SAME_EVENT = 1.0            # seconds: torchrun and shells pass on a signal that came here already
ESTIMATE_SECONDS = 5        # of training steps, after the first ones, that give the run's duration
# How much longer than the fastest one an epoch takes, and how long at least, that is called slow.
SLOW, SLOW_SECONDS = 2, 1


class Limits:
    """A context in which `reason` is None until the run has to stop, and then says why: its time
    limit has passed, or one of SIGNALS has come, from a scheduler or a terminal that was closed.

    A signal ends the process like Ctrl-C, with a KeyboardInterrupt, as long as `can_stop` is False,
    and if it comes SAME_EVENT after the first one.

    time_limit: minutes from the creation of the object; 0: none
    """

    def __init__(self, time_limit: float = 0):
        self.time_limit, self.start, self.can_stop = time_limit, time.monotonic(), False
        self.signal, self.signalled = "", 0.0       # the first one, and when it came

    @property
    def reason(self) -> str | None:
        if self.signal:
            return f"by {self.signal}"
        if self.time_limit and time.monotonic() - self.start >= 60 * self.time_limit:
            return f"by its time limit of {self.time_limit:g} minutes"
        return None

    def __enter__(self) -> "Limits":
        # Handlers can be set in the main thread only. nohup ignores SIGHUP, which stays so.
        in_main = threading.current_thread() is threading.main_thread()
        numbers = [getattr(signal, name) for name in SIGNALS if in_main and hasattr(signal, name)]
        self._previous = {n: signal.signal(n, self._signal) for n in numbers
                          if signal.getsignal(n) != signal.SIG_IGN}
        return self

    def _signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.can_stop or (self.signal and now - self.signalled > SAME_EVENT):
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.signalled = signal.Signals(number).name, now

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Progress:
    """The training steps of a run, and the sums of their terms over an epoch.

    A context, which shows a progress bar of the run. `steps` is for use within it.

    epoch: finished epochs
    steps_done: training steps of the next epoch that are done
    sums: of their terms, on this process
    stopped: why the run had to stop, or None
    """

    def __init__(self, steps_per_epoch: int, settings: Settings, parameters: Sequence[Tensor],
                 processes: Processes, limits: Limits):
        self.steps_per_epoch, self.settings, self.parameters = steps_per_epoch, settings, parameters
        self.processes, self.limits = processes, limits
        self.epoch, self.steps_done = 0, 0
        self.row_started = time.perf_counter()      # the next one of metrics.csv
        self.sums: Terms = {}
        self.n_finite = torch.zeros((), dtype=torch.long, device=parameters[0].device)
        self.timed_from: tuple[int, float] | None = None    # a training step of the run, its time
        self.ended = 0.0                                    # when the last steps were done
        self.estimated, self.fastest, self.was_slow = False, float("inf"), False
        self.stopped: str | None = None

    def __enter__(self) -> "Progress":
        self.limits.can_stop = True
        train_bs = self.settings.train_bs
        self.last_read = time.perf_counter()
        self.bar = bar(None, "training", unit="img", unit_scale=True,
                       total=self.settings.epochs * self.steps_per_epoch * train_bs,
                       initial=self._steps_of_run * train_bs)
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def __str__(self) -> str:
        if not self.steps_done:
            return f"epoch {self.epoch}"
        return f"step {self.steps_done} of {self.steps_per_epoch} in epoch {self.epoch + 1}"

    def steps(self) -> Iterator[int]:
        """The remaining training steps of this epoch, counted from 1, each to end with `add`.

        Fewer if the run has to stop, which `stopped` then tells. During the epoch nothing is read
        from the device, except once a second if the progress bar is shown on a terminal. Raises
        Failed, which names the training step, if a loss or a weight is not finite.
        """
        first = self.steps_done + 1
        self.n_finite.zero_()
        # Of several processes, none may fail alone.
        reads_device = not self.bar.disable and self.processes.size == 1
        started = time.perf_counter()
        if self.timed_from:                 # not of evaluations, between the steps
            self.timed_from = self.timed_from[0], self.timed_from[1] + started - self.ended
        while self.steps_done < self.steps_per_epoch and not self.stopped:
            yield self.steps_done + 1
            if self.processes.any(self.limits.reason is not None):
                self.stopped = self.processes.first(self.limits.reason)
            if time.perf_counter() - self.last_read > 1 and (reads_device or not self.on_gpu):
                if reads_device:
                    self._check_losses(first, self.n_finite)
                    self._show(float(self.sums["loss"]))
                self.last_read = time.perf_counter()
                self._estimate(self.last_read)
        self._check_losses(first, self.processes.sum(self.n_finite, ReduceOp.MIN))
        self.ended = time.perf_counter()
        if first == 1 and not self.stopped:
            self._compare(self.ended - started)
        if not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            raise Failed(f"A weight is not finite after {self}")

    def add(self, terms: Terms) -> None:
        """Count a training step, and its terms."""
        if not self.sums:
            self.sums = {name: torch.zeros_like(term) for name, term in terms.items()}
        for name, term in terms.items():
            self.sums[name] += term
        self.steps_done += 1
        self.n_finite += self.sums["loss"].isfinite()   # once the sum is not, it never is again

    def _check_losses(self, first: int, n_finite: Tensor) -> None:
        """first: the first of the training steps of which `n_finite` had finite losses."""
        if first + int(n_finite) <= self.steps_done:
            raise Failed(f"The loss is not finite at step {first + int(n_finite)} of "
                         f"{self.steps_per_epoch} in epoch {self.epoch + 1}")

    @property
    def on_gpu(self) -> bool:
        """Whether training steps only queue their work."""
        return self.parameters[0].is_cuda

    @property
    def _steps_of_run(self) -> int:
        return self.epoch * self.steps_per_epoch + self.steps_done

    def _show(self, loss: float) -> None:
        """Bring the progress bar up to date. loss: the sum over this epoch's steps."""
        self.bar.set_description(f"epoch {self.epoch + 1}/{self.settings.epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {loss / self.steps_done:.3f}", refresh=False)
        self.bar.update(self._steps_of_run * self.settings.train_bs - self.bar.n)

    def _estimate(self, now: float) -> None:
        """Print, once, how long the run will take. now: when `steps_done` were done."""
        if self.timed_from is None:
            self.timed_from = self._steps_of_run, now
            return
        steps, seconds = self._steps_of_run - self.timed_from[0], now - self.timed_from[1]
        left = self.settings.epochs * self.steps_per_epoch - self._steps_of_run
        if not self.estimated and steps and left and seconds > ESTIMATE_SECONDS:
            say("Duration", f"{duration(left * seconds / steps)} to the end of epoch "
                            f"{self.settings.epochs}, evaluations aside")
            self.estimated = True

    def _compare(self, seconds: float) -> None:
        """Say, once, if an epoch of so many seconds is slow. On a GPU others matter less."""
        self.fastest = min(self.fastest, seconds)
        if (seconds > max(SLOW * self.fastest, SLOW_SECONDS) and not (self.on_gpu or self.was_slow)
                and torch.get_num_threads() > 1):
            say("Slow", f"epoch {self.epoch + 1} took {seconds / self.fastest:.1f} times as long "
                        "as the fastest. Another program may be using the cores: you can stop "
                        "this run and continue it with --resume RUN_DIR --threads 1")
            self.was_slow = True

    def finish_epoch(self) -> dict[str, float]:
        """Move on to the next epoch -> the metrics of this one's batches, those of all processes,
        keyed as in MetricsLog."""
        sums = dict(zip(self.sums, self._stacked_sums().tolist()))      # read from the device once
        self._show(sums["loss"])
        means = {name: sums.get(name, 0.0) / self.steps_per_epoch for name in ("loss", *TERMS)}
        self.epoch, self.steps_done, self.sums = self.epoch + 1, 0, {}
        self._estimate(time.perf_counter())
        return {"epoch": self.epoch, "train_loss": means.pop("loss"), **means,
                "labelled_acc": (sums["correct"] / sums["labelled"] if sums["labelled"]
                                 else math.nan)}

    def lap(self) -> float:
        """The seconds of a row of metrics.csv: since the last call, at first since this object's
        creation, with those before the checkpoint of a resumed run."""
        now = time.perf_counter()
        seconds, self.row_started = now - self.row_started, now
        return seconds

    def _stacked_sums(self) -> Tensor:
        """The sums over all processes, (T,)."""
        return self.processes.sum(torch.stack(list(self.sums.values())))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it. All processes have to call this."""
        sums = dict(zip(self.sums, self._stacked_sums())) if self.sums else {}
        return {"epoch": self.epoch, "step": self.steps_done, "sums": sums,
                "seconds": time.perf_counter() - self.row_started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Other keys are ignored."""
        self.epoch, self.steps_done = state["epoch"], state["step"]
        self.row_started = time.perf_counter() - state["seconds"]
        device = self.parameters[0].device
        self.sums = {name: total.to(device) * self.processes.is_main    # they are summed again
                     for name, total in state["sums"].items()}
