"""A picture of error and bits/dim against minutes of training, of several recipes or stages.

    python experiments/plot_progress.py --runs LABEL RUN_DIR [RUN_DIR ...] [--runs ...] \
        --save FILE.png

Each --runs is a recipe with its runs, in one colour. A point is an evaluation on validation images,
of the weights that the run would keep then, or on the test images with --test. With --chain the
recipes are stages: each begins when the one before it ends. An epoch counts with the seconds of the
run's fastest one, so that pauses and other programs on the machine do not matter, or with those of
--epoch_seconds S [S ...], one for each --runs: recipes whose runs had different machines can be
compared if an epoch of each is timed on the same one. Dotted lines show the paper's figures, which
are of the test set, with --error E and --bits B.
"""

import itertools
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plot_baselines import MARKERS
from utils.errors import BadInput, OneLineParser, run_command
from utils.figures import COLOURS, save
from utils.metrics import name_of_kept, read_metrics

PANELS = {"error": "error, %", "bits": "bits/dim"}
# Labels of axes; of MINUTES, up to the end of the longest run.
PERCENT, MINUTES = (0.5, 1, 2, 5, 10, 20, 50), (1, 2, 5, 10, 20, 60, 180, 360, 600)


def main(argv=None):
    parser = OneLineParser(description="Plot error and bits/dim against minutes.",
                           allow_abbrev=False)
    parser.add_argument("--runs", nargs="+", action="append", required=True,
                        metavar=("LABEL", "RUN_DIR"))
    parser.add_argument("--epoch_seconds", type=float, nargs="+", metavar="S",
                        help="seconds of an epoch of each --runs; default: of the fastest one")
    parser.add_argument("--test", action="store_true", help="on test, not on validation images")
    parser.add_argument("--chain", action="store_true",
                        help="each --runs is one run, and begins when the one before it ends")
    parser.add_argument("--error", type=float, metavar="E", help="the paper's error, %%")
    parser.add_argument("--bits", type=float, metavar="B", help="the paper's bits/dim")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE.png")
    own = parser.parse_args(argv)
    if any(len(recipe) < 2 for recipe in own.runs) or len(own.runs) > len(COLOURS):
        raise BadInput(f"--runs is a label and one RUN_DIR or more, {len(COLOURS)} times at most")
    seconds = own.epoch_seconds or [None] * len(own.runs)
    if len(seconds) != len(own.runs) or not all(s is None or 0 < s < math.inf for s in seconds):
        raise BadInput(f"--epoch_seconds needs {len(own.runs)} positive numbers, one per --runs")
    if own.chain and any(len(recipe) != 2 for recipe in own.runs):
        raise BadInput("with --chain, --runs is a label and one RUN_DIR")
    which = "test" if own.test else "validation"
    recipes = [(label, [progress(Path(run), which, s) for run in runs])
               for (label, *runs), s in zip(own.runs, seconds)]
    if own.chain:
        chain([run for _, (run,) in recipes])
    save(plot(recipes, {"error": own.error, "bits": own.bits}, which), own.save)


def progress(run, which, epoch_seconds=None):
    """The run's {"minutes", "error", "bits"}: a list each, with a value per logged epoch.

    which: validation or test images; epoch_seconds: of an epoch, by default the run's fastest one.
    """
    rows = read_metrics(run / "metrics.csv")
    if not rows or math.isnan(rows[0]["test_bpd" if which == "test" else "val_bpd"]):
        raise BadInput(f"{run} is not the directory of a run on images that was evaluated on "
                       f"{which} images after each logged epoch")
    epochs = [row["epoch"] for row in rows]
    if epoch_seconds is None:
        epoch_seconds = min(row["seconds"] / (epoch - before)
                            for row, epoch, before in zip(rows, epochs, [0, *epochs]))
    kept = ["test" if which == "test" else name_of_kept(row) for row in rows]
    return {"minutes": [epoch * epoch_seconds / 60 for epoch in epochs],
            "error": [100 * (1 - row[f"{key}_acc"]) for row, key in zip(rows, kept)],
            "bits": [row[f"{key}_bpd"] for row, key in zip(rows, kept)]}


def chain(runs):
    """Let each of `runs`, as from `progress`, begin with the last evaluation of the one before."""
    for before, run in itertools.pairwise(runs):
        run["minutes"] = [before["minutes"][-1] + minutes for minutes in (0, *run["minutes"])]
        for quantity in PANELS:
            run[quantity].insert(0, before[quantity][-1])


def plot(recipes, published, which):
    """recipes: (label, [what `progress` returns]) of each; published: the paper's figures."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (quantity, label) in zip(panels, PANELS.items()):
        for (title, runs), colour, marker in zip(recipes, COLOURS, MARKERS):
            for i, run in enumerate(runs):
                axes.plot(run["minutes"], run[quantity], marker + "-", color=colour, markersize=4,
                          label=None if i else title)
        if published[quantity] is not None:
            axes.axhline(published[quantity], color="0.4", linestyle=":", label="the paper (test)")
        axes.set_xscale("log")
        axes.set_xlabel("minutes of training and evaluation")
        axes.set_ylabel(f"{which} {label}")
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].set_yticks(PERCENT, [f"{percent:g}" for percent in PERCENT])
    longest = max(run["minutes"][-1] for _, runs in recipes for run in runs)
    ticks = [minutes for minutes in MINUTES if minutes <= longest] or MINUTES[:1]
    for axes in panels:
        axes.set_xticks(ticks, [str(minutes) for minutes in ticks])
        axes.minorticks_off()
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    run_command(main)
