"""A picture of error and bits/dim against minutes, of runs while they train.

    python experiments/progress.py --runs LABEL RUN_DIR [RUN_DIR ...] [--runs ...] --save FILE.png

Shows validation images and the weights that the run would keep, or with --test the test images.
Each --runs is a recipe with its runs, in one colour. An epoch counts with the seconds of the run's
fastest one, so that pauses and other programs do not matter, or with --epoch_seconds: recipes whose
runs had different machines can be compared if an epoch of each is timed on the same one. Dotted
lines show the paper's figures, which are of the test set.
"""

import itertools
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import BadInput, OneLineParser, check_output, run_command
from utils.figures import COLOURS, FORMATS, save
from utils.metrics import names_of_kept, read_metrics

MARKERS = "osD^vP"      # as many as COLOURS
PANELS = {"error": "error, %", "bits": "bits/dim"}
# Labels of axes; of MINUTES, up to the end of the longest run.
PERCENT, MINUTES = (0.5, 1, 2, 5, 10, 20, 50), (1, 2, 5, 10, 20, 60, 180, 360, 600)


def main(argv=None):
    parser = OneLineParser(description="Plot error against minutes.", allow_abbrev=False)
    option = parser.add_argument
    option("--save", type=Path, required=True, metavar="FILE.png")
    option("--runs", nargs="+", action="append", required=True, metavar=("LABEL", "RUN_DIR"))
    option("--epoch_seconds", type=float, nargs="+", metavar="S",
           help="seconds of an epoch of each --runs; default: of the fastest one")
    option("--test", action="store_true", help="on test, not on validation images")
    option("--chain", action="store_true",
           help="each --runs is one run, and begins when the one before it ends")
    option("--paper", type=float, nargs=2, metavar=("ERROR", "BITS"),
           help="the paper's error, %%, and bits/dim")
    args = parser.parse_args(argv)
    check_output(args.save, FORMATS)
    save(plot_recipes(args), args.save)
    print(f"Saved {args.save}")


def plot_recipes(args):
    """The Figure of a command line. Raises BadInput."""
    lengths, most = [len(recipe) for recipe in args.runs], 2 if args.chain else math.inf
    if len(lengths) > len(COLOURS) or not all(2 <= length <= most for length in lengths):
        raise BadInput(f"--runs is a label and one RUN_DIR{'' if args.chain else ' or more'}, "
                       f"{len(COLOURS)} times at most")
    seconds = args.epoch_seconds or [None] * len(args.runs)
    if len(seconds) != len(args.runs) or not all(s is None or 0 < s < math.inf for s in seconds):
        raise BadInput(f"--epoch_seconds needs {len(args.runs)} positive numbers, one per --runs")
    which = "test" if args.test else "validation"
    recipes = [(label, [progress(Path(run), which, s) for run in runs])
               for (label, *runs), s in zip(args.runs, seconds)]
    if args.chain:
        chain([run for _, (run,) in recipes])
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity, published in zip(panels, PANELS, args.paper or [None, None]):
        for (label, runs), colour, marker in zip(recipes, COLOURS, MARKERS):
            for i, run in enumerate(runs):
                axes.plot(run["minutes"], run[quantity], marker + "-", color=colour, markersize=4,
                          label=None if i else label)
        if published is not None:
            axes.axhline(published, color="0.4", linestyle=":", label="the paper (test)")
        axes.set(xscale="log", xlabel="minutes of training and evaluation",
                 ylabel=f"{which} {PANELS[quantity]}")
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


def progress(run, which, epoch_seconds=None):
    """The run's {"minutes", "error", "bits"}: a list each, with a value per logged epoch.

    which: validation or test images.
    epoch_seconds: of an epoch, by default the run's fastest one.
    """
    rows = read_metrics(run / "metrics.csv")
    kept = ["test"] * len(rows) if which == "test" else names_of_kept(rows)
    missing = [math.isnan(row[f"{key}_bpd"] + row[f"{key}_acc"]) for row, key in zip(rows, kept)]
    if ("test" in kept) != (which == "test") or all(missing) or (which == "test" and missing[0]):
        raise BadInput(f"{run} is not the directory of a run on images with labels that was "
                       f"evaluated on {which} images after each logged epoch")
    epochs = [row["epoch"] for row in rows]
    if epoch_seconds is None:
        epoch_seconds = min(row["seconds"] / (epoch - before)
                            for row, epoch, before in zip(rows, epochs, [0, *epochs]))
    return {"minutes": [epoch * epoch_seconds / 60 for epoch in epochs],
            "error": [100 * (1 - row[f"{key}_acc"]) for row, key in zip(rows, kept)],
            "bits": [row[f"{key}_bpd"] for row, key in zip(rows, kept)]}


def chain(runs):
    """Let each of `runs`, as from `progress`, begin with the last evaluation of the one before."""
    for before, run in itertools.pairwise(runs):
        run["minutes"] = [before["minutes"][-1] + minutes for minutes in (0, *run["minutes"])]
        for quantity in PANELS:
            run[quantity].insert(0, before[quantity][-1])


if __name__ == "__main__":
    run_command(main)
