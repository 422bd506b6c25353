"""What else learns from the same labelled images: the comparison of the flow with other methods.

    python experiments/baselines.py --config configs/digits.yaml [--seeds 0 1 2]
        [--methods NAME ...] [--save FILE.json] [options of train-flow-ssl.py]

Each method gets the labelled examples that the config's run has with this data_seed, and the
unlabelled ones if it can use them. Settings of scikit-learn's methods are chosen, from the grids in
METHODS, by the error on the validation examples; those of the other methods are fixed
(m1_m2.py, fixmatch.py, utils/label_spreading.py). The test examples are classified once, by the
method chosen. Of a config without validation examples the first setting of each grid is used.

Prints a table, and with --save writes a JSON file with all of it: errors in %, seconds of fitting
and of classifying the test examples (without the search), the chosen settings.
"""

import itertools
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.semi_supervised import LabelPropagation, LabelSpreading, SelfTrainingClassifier
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.fixmatch import fit_fixmatch
from experiments.m1_m2 import fit_m1_m2
from training.distributed import Processes
from training.device import set_up_torch
from utils.datasets import check_test_images, load_data
from utils.errors import BadInput, OneLineParser, check_output, run_command
from utils.files import write_json
from utils.label_spreading import NEIGHBOURS, orientation_histograms, spread_labels
from utils.settings import read_settings
from utils.terminal import bar

# Unlabelled examples of methods whose memory or time grows as the square of the examples. RBF label
# spreading has a matrix of all pairs; self-training fits the SVM up to sixty times.
MAX_UNLABELLED_RBF, MAX_UNLABELLED_SVM = 10_000, 3_000
CALIBRATION_FOLDS = 5
SPREADING_ITERATIONS = 100


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Either `fit_images` trains on the images themselves and returns a function from images to
    classes, or `build` returns one of scikit-learn's classifiers for the settings of a point of
    `grid`. There gamma is a multiple of 1 / (D v), where D is the number of dimensions of x and v
    the variance of all values in it. max_unlabelled: unlabelled examples that it gets, at random;
    None: all.
    """

    title: str
    build: Callable[..., Any] | None = None
    grid: dict[str, tuple[float, ...]] | None = None
    max_unlabelled: int | None = 0
    fit_images: Callable[..., Any] | None = None


def self_training(threshold, **settings):
    """Self-training of a support vector machine, whose probabilities are calibrated."""
    svm = CalibratedClassifierCV(SVC(**settings), ensemble=False, cv=CALIBRATION_FOLDS)
    return SelfTrainingClassifier(svm, threshold=threshold)


def spread_along_edges(data, seed):
    """Label spreading along the graph of a run with `spread_labels`.

    A new image has the mean distribution of its nearest training images.
    """
    histograms = orientation_histograms(data.train_x)
    s = spread_labels(histograms, data.train_y)
    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(s))).fit(histograms.numpy())

    def classify_images(images):
        nearest = neighbours.kneighbors(orientation_histograms(images).numpy(),
                                        return_distance=False)
        return s[torch.from_numpy(nearest)].mean(1).argmax(1)
    return classify_images


# The first value of each setting is used where there are no validation examples.
METHODS = {
    "knn1": Method("1-nearest neighbour", KNeighborsClassifier, {"n_neighbors": (1,)}),
    "knn5": Method("5-nearest neighbours", KNeighborsClassifier, {"n_neighbors": (5,)}),
    "svm-linear": Method("SVM, linear", lambda **settings: SVC(kernel="linear", **settings),
                         {"C": (10, 0.1, 1, 100)}),
    "svm": Method("SVM, RBF", SVC, {"C": (10, 1, 100), "gamma": (1, 0.3, 3)}),
    "self-training": Method("self-training, SVM, RBF", self_training,
                            {"threshold": (0.6, 0.4, 0.8), "C": (10,), "gamma": (1, 0.5)},
                            MAX_UNLABELLED_SVM),
    "propagation": Method(
        "label propagation, k-NN", lambda **settings: LabelPropagation(kernel="knn", **settings),
        {"n_neighbors": (7, 5, 10, 20)}, None),
    "spreading-knn": Method(
        "label spreading, k-NN",
        lambda **settings: LabelSpreading(kernel="knn", max_iter=SPREADING_ITERATIONS, **settings),
        {"n_neighbors": (7, 5, 10, 20), "alpha": (0.2, 0.8)}, None),
    "spreading-rbf": Method(
        "label spreading, RBF",
        lambda **settings: LabelSpreading(kernel="rbf", max_iter=SPREADING_ITERATIONS, **settings),
        {"gamma": (30, 3, 10, 100, 300), "alpha": (0.2, 0.8, 0.95)},
        MAX_UNLABELLED_RBF),
    "spreading-edges": Method("label spreading, edges", max_unlabelled=None,
                              fit_images=spread_along_edges),
    "m1m2": Method("M1+M2 VAE", fit_images=fit_m1_m2, max_unlabelled=None),
    "fixmatch": Method("FixMatch, CNN", fit_images=fit_fixmatch, max_unlabelled=None),
}


def main(argv=None):
    parser = OneLineParser(description="Compare other methods on the same labelled examples.",
                           allow_abbrev=False, epilog="All other options: train-flow-ssl.py --help")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
                        help="each is the seed and the data_seed of a run (default: 0 1 2)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS,
                        metavar="NAME", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="write the results here")
    args, rest = parser.parse_known_args(argv)
    check_output(args.save)
    runs = [read_settings(rest, [f"--seed={seed}", f"--data_seed={seed}"])[1]
            for seed in args.seeds]
    device = set_up_torch(runs[0], Processes())
    results = {name: {"title": METHODS[name].title, "runs": []} for name in args.methods}
    for seed, settings in zip(args.seeds, runs):
        data = load_data(settings, device)
        check_test_images(data)
        methods = bar(list(results), f"seed {seed}", unit="method")
        for name in methods:
            if reason := why_not(METHODS[name], data):
                methods.write(f"{name} is left out: {reason}", file=sys.stderr)
                del results[name]
                continue
            results[name]["runs"].append(run := evaluate(METHODS[name], data, seed))
            methods.write(f"seed {seed}: {describe(name, run)}", file=sys.stderr)
    if not results:
        raise BadInput(f"none of the methods works on these examples of {settings.data}")
    report = {
        "data": settings.data, "seeds": args.seeds, "labelled": len(data.labelled),
        "unlabelled": len(data.unlabelled), "validation": len(data.val_x),
        "test": len(data.test_x), "device": str(device), "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__, "scikit-learn": sklearn.__version__,
        "methods": {name: summary(METHODS[name], result, len(data.unlabelled))
                    for name, result in results.items()}}
    print(table(report))
    if args.save:
        write_json(args.save, report)


def why_not(method, data):
    """Why `method` cannot be used on these examples, or None if it can."""
    per_class = torch.bincount(data.train_y[data.labelled], minlength=data.n_classes)
    if not len(data.labelled):
        return "it needs labelled examples"
    if method.fit_images and data.grey_levels is None:
        return "it is for images"
    if method.build is self_training:
        if not len(data.unlabelled):
            return "it needs unlabelled examples"
        if per_class.min() < CALIBRATION_FOLDS:
            return f"it needs {CALIBRATION_FOLDS} labelled examples of each class"
    if method.build is KNeighborsClassifier:
        (n_neighbors,) = method.grid["n_neighbors"]
        if n_neighbors > len(data.labelled):
            return f"it needs {n_neighbors} labelled examples"
    return None


def evaluate(method, data, seed):
    """Fit `method`, and classify the validation and test examples -> a run, as in the JSON file."""
    start = time.perf_counter()
    if method.fit_images:
        classify = method.fit_images(data, seed)
        seconds = time.perf_counter() - start
        run = {"settings": {}, "settings_tried": 0,
               "validation_error": validation_error(classify, data)}
    else:
        classify, seconds, run = search(method, data, seed)
    start = time.perf_counter()
    test_error = error(classify(data.test_x), data.test_y)
    seconds += time.perf_counter() - start
    return {"seed": seed, "test_error": test_error, "seconds": round(seconds, 2), **run}


def search(method, data, seed):
    """Fit `method` with each setting of its grid.

    Returns a function from examples to classes of the classifier with the smallest validation
    error, the first of them if there are several; the seconds in which it was fitted; the settings
    and that error.
    """
    n_labelled, n_unlabelled = len(data.labelled), len(data.unlabelled)
    x = rows(data.train_x[torch.cat((data.labelled, data.unlabelled))], data)
    y = np.full(len(x), -1)
    y[:n_labelled] = data.train_y[data.labelled].cpu()
    grid = settings_of(method, x) if len(data.val_x) else settings_of(method, x)[:1]
    if method.max_unlabelled is not None and n_unlabelled > method.max_unlabelled:
        chosen = np.random.default_rng(seed).permutation(n_unlabelled)[:method.max_unlabelled]
        kept = np.r_[:n_labelled, n_labelled + np.sort(chosen)]
        x, y = x[kept], y[kept]
    start, best = time.perf_counter(), None
    for settings in grid:
        classifier, fit_start = method.build(**settings), time.perf_counter()
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            # Label spreading stops by the sum of all changes, which is strict for many examples.
            classifier.fit(x, y)
        seconds = time.perf_counter() - fit_start

        def classify(examples, classifier=classifier):
            with np.errstate(invalid="ignore"):
                # Label spreading divides by the sum of an example's RBF weights. Where that is
                # zero, as all training examples are far away, it decides for the first class.
                return torch.from_numpy(classifier.predict(rows(examples, data)))
        run = {"settings": settings, "validation_error": validation_error(classify, data)}
        if best is None or run["validation_error"] < best[2]["validation_error"]:
            best = classify, seconds, run
    classify, seconds, run = best
    return classify, seconds, {**run, "settings_tried": len(grid),
                               "search_seconds": round(time.perf_counter() - start, 2)}


def rows(x, data):
    """Examples x of `data` as scikit-learn wants them, (N, D): images from 0 to 1, or points."""
    x = x.flatten(1).float().cpu().numpy()
    return x if data.grey_levels is None else x / (data.grey_levels - 1)


def settings_of(method, train_x):
    """The settings of all points of a method's grid; gamma is as in scikit-learn."""
    unit = 1 / (train_x.shape[1] * float(train_x.var()))
    grid = {key: [float(f"{v * unit:.4g}") for v in values] if key == "gamma" else values
            for key, values in method.grid.items()}
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def validation_error(classify, data):
    """The error on the validation examples, %, or None if there are none."""
    return error(classify(data.val_x), data.val_y) if len(data.val_x) else None


def error(predicted, y):
    """The share of `predicted` classes that differ from `y`, %."""
    return round(100 * (predicted.cpu() != y.cpu()).double().mean().item(), 4)


def summary(method, result, n_unlabelled):
    """A method's entry of the JSON file: `result`, means over the runs, what the method is."""
    def mean(key):
        values = [run[key] for run in result["runs"]]
        return None if None in values else round(sum(values) / len(values), 4)
    used = n_unlabelled if method.max_unlabelled is None else min(method.max_unlabelled,
                                                                  n_unlabelled)
    return {**result, "unlabelled_used": used, "grid": method.grid,
            "mean_test_error": mean("test_error"),
            "mean_validation_error": mean("validation_error"), "mean_seconds": mean("seconds")}


def describe(name, run):
    """The line that says what a run has given."""
    validation = run["validation_error"]
    on_validation = "" if validation is None else f"validation error {validation:.2f} %, "
    settings = "".join(f", {key} {value:g}" for key, value in run["settings"].items())
    tried = f" (of {run['settings_tried']} settings)" if run["settings_tried"] > 1 else ""
    return (f"{name}: {on_validation}test error {run['test_error']:.2f} %, "
            f"{run['seconds']:.1f} s{settings}{tried}")


def table(report):
    """The text that `main` prints."""
    headings = ["method", *(f"seed {seed}" for seed in report["seeds"]), "mean", "validation",
                "unlabelled", "seconds", "settings"]
    rows = [headings]
    for method in report["methods"].values():
        runs, validation = method["runs"], method["mean_validation_error"]
        rows.append([
            method["title"], *(f"{run['test_error']:.2f}" for run in runs),
            f"{method['mean_test_error']:.2f}",
            "-" if validation is None else f"{validation:.2f}",
            f"{method['unlabelled_used']:,}", f"{method['mean_seconds']:.1f}",
            str(runs[0]["settings_tried"] or "fixed")])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]),
                        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
             for row in rows]
    labelled, unlabelled = report["labelled"], report["unlabelled"]
    heading = (
        f"Test error, %, on {report['test']:,} examples of {report['data']}, and its mean; "
        f"{labelled:,} of {labelled + unlabelled:,} training examples are labelled.\n"
        f"validation: mean error, %, on {report['validation']:,} validation examples; settings: "
        "how many were tried, to choose by it;\n"
        "unlabelled: how many unlabelled examples the method gets; seconds: to fit and to classify "
        f"the test examples; threads: {report['torch_threads']}\n")
    return "\n".join([heading, *lines])


if __name__ == "__main__":
    run_command(main)
