"""A picture of test error against minutes: the methods of a comparison, and runs of the flow.

    python experiments/plot_baselines.py REPORT.json RUN_DIR [RUN_DIR ...] --save FILE.png

REPORT.json is what `baselines.py --save` wrote. The runs are of the same data, with the same
data_seeds. A point is the mean over the seeds, its bar goes from the smallest error to the largest.
A run's seconds are those of training and evaluation, without the start of the program.
"""

import json
import math
import sys
from pathlib import Path

import yaml
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import BadInput, OneLineParser, run_command
from utils.figures import COLOURS, save
from utils.metrics import read_metrics

MARKERS = "osD^vP"      # as many as COLOURS; further methods have the same ones, hollow
SHORTEST = 0.1 / 60     # minutes: what takes less is drawn here
TICKS = {"0.1 s": 0.1 / 60, "1 s": 1 / 60, "10 s": 1 / 6, "1 min": 1, "10 min": 10, "1 h": 60}


def main(argv=None):
    parser = OneLineParser(description="Plot test error against minutes.", allow_abbrev=False)
    parser.add_argument("report", type=Path, metavar="REPORT.json")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE.png")
    own = parser.parse_args(argv)
    try:
        report = json.loads(own.report.read_text())
        points = [(m["title"], [run["test_error"] for run in m["runs"]],
                   [run["seconds"] for run in m["runs"]]) for m in report["methods"].values()]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{own.report} is no report of baselines.py --save") from None
    points.append(("SCNF, this project", *zip(*map(figures_of, own.runs))))
    seeds = sorted(yaml.safe_load((run / "params.yaml").read_text())["data_seed"]
                   for run in own.runs)
    if seeds != sorted(report["seeds"]):
        raise BadInput(f"the runs have data_seed {seeds}, and the report {report['seeds']}")
    save(plot(points, report), own.save)


def figures_of(run):
    """The test error, %, and the seconds of the finished run in a directory."""
    rows = read_metrics(run / "metrics.csv")
    if not rows or math.isnan(rows[-1]["test_acc"]) or not (run / "params.yaml").is_file():
        raise BadInput(f"{run} is not the directory of a finished run")
    return 100 * (1 - rows[-1]["test_acc"]), sum(row["seconds"] for row in rows)


def plot(points, report):
    """points: (title, errors in %, seconds) of each method, with a value per seed each."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    def mean(values):
        return sum(values) / len(values)
    n = len(COLOURS)
    styles = [(MARKERS[i % n], COLOURS[i % n], COLOURS[i % n] if i < n else "white", 8)
              for i in range(len(points) - 1)]
    styles.append(("*", "black", "black", 14))
    by_error = sorted(zip(points, styles), key=lambda pair: mean(pair[0][1]))
    for (title, errors, seconds), (marker, colour, fill, size) in by_error:
        error, minutes = mean(errors), max(mean(seconds) / 60, SHORTEST)
        axes.errorbar(minutes, error, [[error - min(errors)], [max(errors) - error]], fmt=marker,
                      color=colour, markerfacecolor=fill, markersize=size, capsize=3, elinewidth=1,
                      label=f"{title}: {error:.2f} %")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xticks(list(TICKS.values()), list(TICKS))
    axes.minorticks_off()
    axes.set_xlabel("time to fit and to classify the test images, on two CPU cores")
    axes.set_ylabel("test error, %")
    axes.set_title(f"{report['data']}, {report['labelled']} of "
                   f"{report['labelled'] + report['unlabelled']:,} training images labelled")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="mean error")
    return figure


if __name__ == "__main__":
    run_command(main)
