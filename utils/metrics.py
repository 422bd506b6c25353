"""The metrics of a run: for each logged epoch, a row of metrics.csv."""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import BadInput
from .files import atomic_write

Row = dict[str, float]

# The terms of a batch's loss whose means over an epoch are columns.
TERMS = ("log_likelihood", "cl_loss", "cons_loss", "vat_loss", "confident")
COLUMNS = ("epoch", "train_loss", *TERMS, "labelled_acc", "val_log_p", "val_acc", "val_bpd",
           "ema_val_log_p", "ema_val_acc", "ema_val_bpd", "test_log_p", "test_acc", "test_bpd",
           "lr", "seconds")


class MetricsLog:
    """The rows of the CSV file `path`, with the columns of COLUMNS:

    epoch; the means over the epoch's batches of the loss, the log-likelihood term (nats), L_clf
    (nats; 0 in a batch without labelled rows), the consistency term and the virtual
    adversarial loss (nats), and the share of unlabelled rows that consistency counts as confident;
    the accuracy on labelled rows (0 to 1); log p(x) (nats), accuracy and bits/dim of the validation
    set; the same three of the averaged weights; the same three of the test set, with the weights
    that the run would keep; the learning rate; the seconds since the previous row, of training,
    evaluation, checkpoints and pictures. What does not apply (bits/dim of points, averages without
    ema, accuracies without labels) is NaN.
    """

    def __init__(self, path: str | Path, up_to_epoch: int = 0):
        """Open the log. Of an existing file, the rows up to `up_to_epoch` are kept."""
        self.path = Path(path)
        self.rows: list[Row] = []
        self.text = ",".join(COLUMNS) + "\n"        # of the file
        self._add([row for row in read_metrics(self.path) if row["epoch"] <= up_to_epoch])

    def append(self, row: Mapping[str, float]) -> None:
        """Add `row`, keyed by COLUMNS (missing values become NaN), to the file."""
        self._add([{key: row.get(key, math.nan) for key in COLUMNS}])

    def _add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self.text += "".join(
            ",".join(f"{row[key]:.7g}" for key in COLUMNS) + "\n" for row in rows)
        with atomic_write(self.path, newline="\n") as f:
            f.write(self.text)


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a metrics.csv, NaN in the columns that it lacks; none if there is no file.

    Accuracy and bits/dim are NaN where log p(x) is not finite: they mean nothing there. Raises
    BadInput if a value is no number, or if epochs do not increase.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:    # as spreadsheets save it
            rows = [{key: float(row.get(key, math.nan)) for key in COLUMNS}
                    for row in csv.DictReader(f)]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, csv.Error):
        rows = [{"epoch": math.nan}]
    epochs = [row["epoch"] for row in rows]
    if not all(0 < epoch < 2**31 for epoch in epochs) or any(
            b <= a for a, b in itertools.pairwise(epochs)):
        raise BadInput(f"{path} is damaged: it is not the metrics.csv of a run")
    for row, name in itertools.product(rows, ("val", "ema_val", "test")):
        if not math.isfinite(row[f"{name}_log_p"]):
            row.update({f"{name}_{key}": math.nan for key in ("log_p", "acc", "bpd")})
    return rows


def average_is_better(row: Mapping[str, float]) -> bool:
    """Whether the averaged weights have the higher validation likelihood, or the only finite one;
    False without ema."""
    averaged, last = row.get("ema_val_log_p", math.nan), row.get("val_log_p", math.nan)
    return math.isfinite(averaged) and not (math.isfinite(last) and last >= averaged)


def names_of_kept(rows: Sequence[Row]) -> list[str]:
    """The prefixes of the metrics by which a run is judged after each epoch: val, ema_val, or, of a
    run without validation examples, test."""
    if all(math.isnan(row["val_log_p"]) and math.isnan(row["ema_val_log_p"]) for row in rows):
        return ["test"] * len(rows)
    return ["ema_val" if average_is_better(row) else "val" for row in rows]
