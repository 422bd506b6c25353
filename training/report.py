"""What a run leaves: metrics, weights, pictures, and report.html, which needs no other file."""

import base64
import gc
import html
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from models import SemiConditionalFlow
from utils import Settings
from utils.data import SemiSupervisedData
from utils.datasets import DATA_FILE, DATASETS, describe
from utils.figures import TEMPERATURE, dispensable, plot_curves, plot_run, save
from utils.files import atomic_write, from_here
from utils.metrics import MetricsLog, Row, average_is_better
from utils.runs import read_params
from utils.settings import differences
from utils.terminal import epoch_line, result, say, show

from .assessment import Assessment, assess, assessed_examples
from .checkpoint import copy_to_cpu, save_atomically
from .device import device_name
from .distributed import Processes
from .evaluation import Inference, RunEvaluation, predict
from .speed import Speed

SECONDS_BETWEEN_PLOTS = 300     # during training
# {heading: files}; the curves are drawn anew, for wide pages and for those of up to 700 pixels.
PICTURES = {"Samples": ("samples.png", f"samples-{TEMPERATURE}.png"), "Density": ("density.png",),
            "Mistakes": ("mistakes.png",)}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70em; margin: 2em auto;
       padding: 0 1em; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: 0.2em 0.7em; text-align: right; }
th { font-weight: 600; } td:first-child, th:first-child { text-align: left; }
tr { border-bottom: 1px solid #ddd; }
img { max-width: 100%; vertical-align: top; margin-bottom: 1em; }
.scores td:last-child { white-space: nowrap; } details { margin-top: 2em; }
.wide { overflow-x: auto; white-space: nowrap; overflow-wrap: normal; }
.wide td { min-width: 2.2em; }
@media (max-width: 700px) {
  .wide { font-size: 10px; } .wide td, .wide th { padding: 0.3em; min-width: 0; }
}
"""


def announce(model: SemiConditionalFlow, data: SemiSupervisedData, settings: Settings, speed: Speed,
             processes: Processes, run_dir: Path | None) -> None:
    """Print what a run is going to do. run_dir: None where nothing is printed."""
    if run_dir is None:
        return
    say("Run", from_here(run_dir))
    changed = differences(settings)
    say("Settings", f"{changed}; the others as in config.yaml" if changed else "as in config.yaml")
    counts = {"labelled": data.labelled, "unlabelled": data.unlabelled, "validation": data.val_x,
              "test": data.test_x}
    say("Data", ", ".join(f"{len(x):,} {name}" for name, x in counts.items() if len(x)))
    say("Model", f"{sum(p.numel() for p in model.parameters()):,} parameters")
    others = f" and {processes.size - 1} more" if processes.size > 1 else ""
    say("PyTorch", f"{torch.__version__} on {device_name(data.device)}{others}, {speed.precision}"
                   f"{', compiled' * speed.compile}")
    say("Training", f"{settings.epochs} epochs of {-(-len(data.train_x) // settings.train_bs)} "
                    f"steps{', after label spreading' * bool(data.spread_labels)}")


class RunFiles:
    """What a run leaves beside its checkpoint: metrics.csv, labelled.txt, pictures, model.torch,
    report.html.

    run_dir: of the run; None on the processes that write nothing: of several, all but the main one
    epoch: finished epochs; weights of fewer epochs are kept under the name model-epochN.torch
    """

    def __init__(self, run_dir: Path | None, model: SemiConditionalFlow, data: SemiSupervisedData,
                 settings: Settings, epoch: int):
        self.run_dir, self.model, self.data, self.settings = run_dir, model, data, settings
        self.plotted = time.perf_counter()
        if run_dir is None:
            return
        self.metrics = MetricsLog(run_dir / "metrics.csv", epoch)
        self.weights = run_dir / "model.torch"
        if epoch < settings.epochs and self.weights.exists():
            self.weights.rename(run_dir / f"model-epoch{epoch}.torch")
        if DATASETS[settings.data].shape is None and not (run_dir / DATA_FILE).exists():
            with atomic_write(run_dir / DATA_FILE, encoding="utf-8") as f:
                yaml.safe_dump(describe(data), f, allow_unicode=True)
        if not (run_dir / "labelled.txt").exists():
            with atomic_write(run_dir / "labelled.txt") as f:
                np.savetxt(f, data.labelled_ids, "%d")
        validated = ("val", "ema_val")[:bool(settings.validation) * (1 + bool(settings.ema))]
        self.shown = ((*validated, *("test",) * settings.test),
                      "log_p" if data.grey_levels is None else "bpd", len(data.labelled) > 0)
        show(epoch_line(None, *self.shown))

    def log(self, row: Row) -> None:
        """Add a row to metrics.csv, and print it."""
        if self.run_dir is not None:
            self.metrics.append(row)
            show(epoch_line(self.metrics.rows[-1], *self.shown))

    def draw(self) -> None:
        """Draw the pictures again if some minutes have passed."""
        if self.run_dir is None:
            return
        if time.perf_counter() - self.plotted > SECONDS_BETWEEN_PLOTS:
            plot_run(self.model, self.data, self.metrics.rows, self.run_dir, self.settings.seed)
            gc.collect()        # figures are cycles, which by itself Python collects late
            self.plotted = time.perf_counter()

    @property
    def keeps_average(self) -> bool:
        """Whether the run keeps the averaged weights, and not the last ones."""
        return self.run_dir is not None and average_is_better(self.metrics.rows[-1])

    def finish(self, evaluation: RunEvaluation) -> None:
        """Write the weights that the run keeps, which the model has now, and all the rest."""
        if self.run_dir is None:
            return
        rows = self.metrics.rows
        save_atomically(copy_to_cpu(self.model.state_dict()), self.weights)
        plot_run(self.model, self.data, rows, self.run_dir, self.settings.seed)
        report_run(evaluation, rows, self.run_dir)
        say("Files", f"report.html, model.torch and more in {from_here(self.run_dir)}")
        say(*result(rows[-1]))


def report_run(evaluation: RunEvaluation, rows: list[Row], run_dir: Path) -> None:
    """Assess the trained model of a run, print that, and write mistakes.png and report.html.

    evaluation: of the model, which has the weights that the run keeps. It has test predictions of
        these, unless the run had already finished when it was resumed; its validation predictions
        may be of other weights

    A failure does not end the run, as described at `dispensable`. Raises Failed if predictions are
    not finite.
    """
    data, settings = evaluation.data, evaluation.settings
    name, examples = assessed_examples(data, settings)
    infer = evaluation.infer["test" if settings.test else "val"]
    predictions = (infer.predictions if settings.test else None) or predict(
        infer, data, examples[0], settings.test_bs, settings.seed)
    with dispensable("Report", run_dir):
        assessment = assess(infer, Inference(evaluation.accelerated, compiled=False), data,
                            examples, name, settings, predictions)
        assessment.show()
        picture = run_dir / "mistakes.png"
        if data.grey_levels is not None and len(assessment.mistakes):
            save(assessment.plot_mistakes(examples), picture)
        else:
            picture.unlink(missing_ok=True)         # of an earlier end of this run
        write_report(run_dir, settings, rows, assessment, data)


def write_report(run_dir: Path, settings: Settings, rows: list[Row], assessment: Assessment,
                 data: SemiSupervisedData) -> None:
    """Write report.html to the directory of a run, with the pictures that are there."""
    title = f"{run_dir.name}: {settings.data}, {settings.model}, {settings.ssl_model}"
    pictures = ""
    for heading, names in PICTURES.items():
        paths = [run_dir / name for name in names if (run_dir / name).is_file()]
        if paths:
            images = "\n".join(_image(path.read_bytes(), path.stem) for path in paths)
            pictures += f"<h2>{heading}</h2>\n{images}\n"
    wide, narrow = (_png(plot_curves(rows, columns)) for columns in (3, 1))
    curves = (f'<picture><source media="(max-width: 700px)" srcset="{_uri(narrow)}">'
              f'{_image(wide, "curves")}</picture>')
    seconds = sum(row["seconds"] for row in rows)
    params = read_params(run_dir / "params.yaml")
    commit = params.get("commit")
    commit = f"started at commit {str(commit)[:7]}" if commit else "no commit"
    changed = ", with changes" if params.get("dirty") else ""
    done = (f"{rows[-1]['epoch']:.0f} epochs, {seconds:,.0f} s of training and evaluation; "
            f"{commit}{changed}, ended on {html.escape(device_name(data.device))}. "
            f"{len(data.labelled):,} training examples were labelled, {len(data.unlabelled):,} "
            f"unlabelled. The figures below are of the {len(assessment.predicted):,} "
            f"{assessment.name} examples.")
    options = _table([(key, str(value)) for key, value in sorted(vars(settings).items())])
    auroc = f"<p>{assessment.meaning_of_auroc}</p>" if assessment.auroc else ""
    confusion = ("<h2>Confusion</h2>\n<p>Row: the true class; column: the predicted one.</p>\n"
                 + _confusion(assessment.confusion.tolist(), assessment.classes)
                 if assessment.has_labels else "")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{done}</p>
<div class="scores">{_table(_scores(assessment))}</div>
{auroc}
{confusion}
<h2>Training</h2>
{curves}
{pictures}
<details><summary>Settings</summary>{options}</details>
</body>
</html>
"""
    with atomic_write(run_dir / "report.html", encoding="utf-8") as f:
        f.write(page)


def _scores(assessment: Assessment) -> list[tuple[str, str]]:
    scores = [("log p(x)", f"{assessment.log_p:.3f} nats")]
    if math.isfinite(assessment.bits_per_dim):
        scores.append(("bits/dim", f"{assessment.bits_per_dim:.4f}"))
    if assessment.has_labels:
        scores = [("error", f"{assessment.error:.2%}"), *scores,
                  ("-log p(y | x)", f"{assessment.nll:.4f} nats"),
                  ("expected calibration error", f"{assessment.calibration_error:.2%}")]
    return scores + [(f"AUROC of log p(x), against {kind}", shown)
                     for kind, shown in assessment.shown_auroc(4).items()]


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


def _confusion(counts: list[list[int]], classes: Sequence[str]) -> str:
    """The confusion matrix as a table, with the error of each class; wrong cells are shaded."""
    names = [html.escape(name) for name in classes]
    head = "".join(f"<th>{name}</th>" for name in names)
    body = ""
    for i, row in enumerate(counts):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td style="background: rgba(213, 94, 0, {min(20 * n / total, 1) * (i != j):.2f})">'
            f"{n or ''}</td>" for j, n in enumerate(row))
        error = f"{(total - row[i]) / total:.2%}" if any(row) else "-"
        body += f"<tr><th>{names[i]}</th>{cells}<td>{error}</td></tr>\n"
    return (f'<div class="wide"><table><tr><th></th>{head}<th>error</th></tr>\n{body}</table>'
            "</div>")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return buffer.getvalue()


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _image(png: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="{_uri(png)}">'
