"""The log of a run: a line a logged epoch on the terminal, the same figures in metrics.csv."""

import csv
import math
from pathlib import Path

from . import whole_file

COLUMNS = ("epoch", "train_loss", "elbo", "cl_loss", "cons_loss", "sure", "labelled_acc",
           "test_log_p", "test_acc", "test_bpd", "held_out_log_p",
           "ema_test_log_p", "ema_test_acc", "ema_test_bpd", "ema_held_out_log_p", "lr", "seconds")


class MetricsLog:
    """The rows of `path`, a CSV file with the columns of COLUMNS.

    epoch; then means over the epoch's training batches: loss, elbo (the objective, nats), cl_loss
    (L_clf, nats), cons_loss (the consistency term, nats), the share of unlabelled rows that it counts,
    accuracy on labelled rows (0 to 1); then on the test set: log p(x) (nats), accuracy, bits/dim (NaN
    for points), and log p(x) of the held-out training images (NaN without ema); the same four of the
    averaged weights (NaN without ema); the learning rate; seconds of training and evaluation since
    the row before.
    """

    def __init__(self, path, up_to_epoch=0):
        """Open a log; of one that exists keep the rows up to `up_to_epoch`."""
        self.path = Path(path)
        self.rows = [row for row in read_metrics(self.path) if row["epoch"] <= up_to_epoch]
        self._write()

    def append(self, row):
        """Add `row`, a mapping with the keys of COLUMNS (NaN where one is missing), to the file and print its line."""
        row = {key: row.get(key, math.nan) for key in COLUMNS}
        self.rows.append(row)
        self._write()
        print(line(row))

    def _write(self):
        """Replace the file by a whole one: a reader, or a resumed run, never finds half a row."""
        with whole_file(self.path, newline="") as f:
            csv.writer(f).writerow(COLUMNS)
            csv.writer(f).writerows([f"{row[key]:.7g}" for key in COLUMNS] for row in self.rows)


def read_metrics(path):
    """The rows of a metrics.csv, with NaN for columns that it does not have; none if there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        return [{key: float(row.get(key, math.nan)) for key in COLUMNS} for row in csv.DictReader(f)]


def average_is_better(row):
    """Whether the averaged weights are the likelier ones on the held-out images; without ema, when those are NaN, not."""
    return row["ema_held_out_log_p"] > row["held_out_log_p"]


def line(row):
    """The terminal's line for a row of the log."""
    bpd = "" if math.isnan(row["test_bpd"]) else f"  bits/dim {row['test_bpd']:.4f}"
    average = "" if math.isnan(row["ema_test_log_p"]) else (
        f"averaged: log p {row['ema_test_log_p']:9.3f}" +
        (f"  bits/dim {row['ema_test_bpd']:.4f}" if bpd else "") + f"  acc {row['ema_test_acc']:7.2%} | ")
    return (f"epoch {row['epoch']:4.0f}  loss {row['train_loss']:9.3f}  elbo {row['elbo']:9.3f}  "
            f"clf {row['cl_loss']:.4f}  acc {row['labelled_acc']:7.2%} | "
            f"test log p {row['test_log_p']:9.3f}{bpd}  acc {row['test_acc']:7.2%} | {average}"
            f"lr {row['lr']:.2e}  {row['seconds']:.1f} s")
