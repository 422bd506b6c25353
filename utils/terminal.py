"""What the terminal shows, in 80 columns: labelled lines, progress bars, the table of epochs."""

import contextlib
import errno
import io
import math
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from tqdm import tqdm

from .metrics import Row, average_is_better

WIDTH, LABEL = 79, 13       # characters of a line, and of the label at its beginning
NO_BREAK = "\xa0"           # a space at which `say` does not break a line
HEADERS = {"val": "val", "ema_val": "avg", "test": "test"}      # of the table's columns
QUANTITIES = {"bpd": ("bits/dim", 4), "log_p": ("log p(x)", 3)}     # header, digits
UNITS = (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1))


class Output:
    """A text stream like stdout, which no character and no reader makes fail.

    stream: to a terminal, a file or a pipe. Characters that its encoding lacks are replaced; once
        its reader has closed it, nothing is written. Other errors, as of a full disk, are raised
        if there is no log
    log: a file that gets all of it, too. Its errors are raised
    """

    def __init__(self, stream: Any, log: IO[str] | None = None):
        self.stream, self.log = stream, log
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        if self.log:
            try:
                self.log.write(text)
                self.log.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.log.name) from None
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())      # it is flushed again when Python ends
            os.close(nowhere)
            if not self.log and error.errno not in (errno.EPIPE, errno.EIO):
                raise
        return len(text)

    def flush(self) -> None:
        """Nothing: `write` does it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def sturdy_output() -> Iterator[None]:
    """A context in which stdout and stderr are each an Output, to nowhere if there is none."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(Output(sys.stdout or nowhere)):
            with contextlib.redirect_stderr(Output(sys.stderr or nowhere)):
                yield


def say(label: str, text: str) -> None:
    """Print `text`, wrapped, beside `label`."""
    show(textwrap.fill(text, WIDTH, initial_indent=f"{label:{LABEL - 1}} ",
                       subsequent_indent=" " * LABEL, break_long_words=False,
                       break_on_hyphens=False).replace(NO_BREAK, " "))


def show(text: str, stream: IO[str] | None = None) -> None:
    """Print `text` to `stream` or stdout, above the progress bars. Of several processes only the
    main one, which has a stdout, does."""
    if sys.stdout:
        tqdm.write(text, stream or sys.stdout)


def bar(items: Iterable[Any] | None, what: str, **options: Any) -> "tqdm[Any]":
    """A progress bar over `items`, on a terminal only, which disappears at the end."""
    return tqdm(items, what, **{"leave": False, "dynamic_ncols": True,
                                "disable": None if sys.stdout else True, **options})


def working(what: str) -> "tqdm[Any]":
    """A context in which a terminal shows what is being done."""
    return bar(None, what, bar_format="{desc}")


def duration(seconds: float) -> str:
    """A time in words, to two digits: "about 3 hours"."""
    name, unit = next(((name, unit) for name, unit in UNITS if seconds >= 1.5 * unit), UNITS[-1])
    number = max(float(f"{seconds / unit:.2g}"), 1)
    return f"about {number:g} {name}{'s' * (number > 1)}"


def epoch_line(row: Row | None, sets: Sequence[str], quantity: str, errors: bool = True) -> str:
    """The terminal's line for a row of metrics.csv; for None, the header of such lines.

    sets: the examples that the run evaluates, of HEADERS; errors are in %
    quantity: the likelihood that is shown, of QUANTITIES
    errors: whether there are errors, or the header is one of likelihoods alone
    """
    name, digits = QUANTITIES[quantity]
    if row is None:
        headers = [f"{f'{HEADERS[s]} err':>9}{name:>9}" if errors else
                   f"{f'{HEADERS[s]} {name}':>18}" for s in sets]
        return f"epoch{'loss':>11}{''.join(headers)}{'seconds':>8}"

    def cell(value: float, form: str) -> str:
        return " " * 9 if math.isnan(value) else f"{value:{form}}"
    return (f"{row['epoch']:5.0f}{row['train_loss']:11.3f}" + "".join(
        cell(1 - row[f"{s}_acc"], "9.2%") + cell(row[f"{s}_{quantity}"], f"9.{digits}f")
        for s in sets) + f"{row['seconds']:8.1f}")


def result(row: Row) -> tuple[str, str]:
    """The error of the weights that a run keeps or, without labels, their likelihood, from its last
    row: a label and words."""
    averaged, which = average_is_better(row), ""
    if not math.isnan(row["ema_val_log_p"]):
        which = (f", of the {'averaged' if averaged else 'last'} weights, which have the "
                 f"{'only finite' if math.isnan(row['val_log_p']) else 'higher'} validation "
                 "likelihood")
    title, name = "Test", "test"
    if math.isnan(row["test_log_p"]):
        title, name = "Validation", "ema_val" if averaged else "val"
    if not math.isnan(row[f"{name}_acc"]):
        return f"{title} error", f"{1 - row[f'{name}_acc']:.2%}{which}"
    quantity = "log_p" if math.isnan(row[f"{name}_bpd"]) else "bpd"
    (header, digits), value = QUANTITIES[quantity], row[f"{name}_{quantity}"]
    return f"{title} {header}", f"{value:.{digits}f}{' nats' * (quantity == 'log_p')}{which}"
