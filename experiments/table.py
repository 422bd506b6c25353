"""A row per config, over several seeds: the paper's table, run here and set beside the paper's.

    python experiments/table.py configs/digits.yaml --seeds 0 1 2 --to FOLDER
    python experiments/table.py CONFIG [CONFIG ...] [--seeds 0 1 2 3 4] --to FOLDER [--jobs N] \
        [options of train-flow-ssl.py, for all runs]
    python experiments/table.py CONFIG [CONFIG ...] [--seeds ...] --collect FOLDER

Trains each config with --seed S --data_seed S for each seed S, in FOLDER, N runs at a time. Ctrl-C,
SIGTERM and a closed terminal stop them after the current training step, and the same command
continues there: runs that are finished are skipped and those that were stopped are resumed.
--collect trains nothing. Both print the table and write it to FOLDER/table.md and FOLDER/table.csv:
error and bits/dim on the test images, as mean ± standard deviation over the seeds, and the paper's
figures in the rows of MNIST with 100 labels and the paper's loss. The figures of each run are in
FOLDER/runs.csv. A run that is not finished is named below the table and takes no part in it; the
exit code is then 1.
"""

import contextlib
import math
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exman

from utils.datasets import load_data
from utils.errors import BadInput, OneLineParser, run_command
from utils.files import PROJECT, atomic_write
from utils.metrics import read_metrics
from utils.settings import RESUMABLE, read_settings

SCRIPT = PROJECT / "train-flow-ssl.py"
# The paper's figures: of ssl_model, ssl_alg, and whether there is L_clf.
PUBLISHED = {("cond-flow", "sgd", False): ("1.9 ± 0.3", "1.145 ± 0.004"),
             ("cond-flow", "em", True): ("2.0 ± 0.1", "1.151 ± 0.010"),
             ("cond-flow", "em", False): ("1.9 ± 0.0", "1.146 ± 0.002"),
             ("cond-shift", "sgd", False): ("14.2 ± 2.4", "1.143 ± 0.011"),
             ("cond-shift", "em", True): ("16.9 ± 5.3", "1.141 ± 0.006"),
             ("cond-shift", "em", False): ("13.4 ± 2.8", "1.145 ± 0.005")}
STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
MODELS = {"cond-flow": "SCNF-GLOW", "cond-shift": "SCNF-GMM",
          "cond-gmm": "SCNF-GMM, trained covariances"}
ALGORITHMS = {"sgd": "SGD", "em": "EM-SGD"}
COLUMNS = ["model", "objective", "L_clf", "data", "epochs", "error, % (paper)",
           "bits/dim (paper)", "error, %", "bits/dim", "n", "config"]
# What may differ between the settings of a run and those that are asked for.
MAY_DIFFER = {*RESUMABLE, "name", "tmp"} - {"epochs", "test"}


@dataclass
class Run:
    """A run of the table: what is wanted, and what `look_up` has found of it."""

    config: Path
    seed: int
    settings: object
    argv: list                      # the command line that gives these settings
    directory: Path | None = None
    rows: Sequence = ()             # of metrics.csv
    lacks: str = "not run"          # why it is not finished; empty if it is
    commit: str = "-"               # that started it, with + if the code was changed

    @property
    def name(self):
        return f"{self.config.stem}-seed{self.seed}"

    @property
    def test_error(self):
        """%"""
        return 100 * (1 - self.rows[-1]["test_acc"])


def main(argv=None):
    parser = OneLineParser(description="Run and collect the paper's table.", allow_abbrev=False,
                           epilog="All other options are those of train-flow-ssl.py, for all runs.")
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), metavar="S",
                        help="each is the seed and the data_seed of a run (default: 0 1 2 3 4)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="train what is missing in FOLDER")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="runs at a time (default: 1)")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="train nothing")
    args, options = parser.parse_known_args(argv)
    if (args.to is None) == (args.collect is None):
        raise BadInput("name a folder for the runs: --to FOLDER, or --collect FOLDER to train none")
    if args.jobs < 1:
        raise BadInput(f"--jobs must be at least 1, not {args.jobs}")
    folder = args.to or args.collect
    if args.collect and not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    runs = [wanted(config, seed, options) for config in args.configs for seed in args.seeds]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"{twice[0]} is there twice: each config has a name of its own, and each "
                       "seed is listed once")
    look_up(runs, folder)
    if args.to:
        unfinished = [run for run in runs if run.lacks]
        for run in unfinished:
            load_data(run.settings)         # raises BadInput before any of them is trained
        failures = train(unfinished, folder, args.jobs)
        look_up(runs, folder)
        for run in unfinished:
            run.lacks = run.lacks and (failures[run.name] or run.lacks)
    report([row_of([run for run in runs if run.config == config]) for config in args.configs],
           runs, folder)
    return 1 if any(run.lacks for run in runs) else 0


def wanted(config, seed, options):
    """The Run of a config, not looked up yet. Raises BadInput if its settings are wrong."""
    fixed = ["--config", str(config.resolve()), "--seed", str(seed), "--data_seed", str(seed),
             "--name", f"{config.stem}-seed{seed}"]
    _, settings = read_settings(options, fixed)
    argv = [*fixed, *options]
    if settings.resume or settings.pretrained or settings.tmp or not settings.test:
        raise BadInput("a table is of new runs, kept and tested: no --resume, --pretrained, --tmp "
                       "or --test false")
    for key in "data_root", "initial_weights", "labelled":      # seen from here, not from the runs
        if path := getattr(settings, key):
            setattr(settings, key, str(Path(path).resolve()))
            argv = [*without(argv, f"--{key}"), f"--{key}", getattr(settings, key)]
    return Run(config, seed, settings, argv)


def without(argv, option):
    """A command line without an option and its value."""
    kept, words = [], iter(argv)
    for word in words:
        if word == option:
            next(words)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def look_up(runs, folder):
    """Find out what there is of each Run: the last of its name in exman's index of `folder`.

    Raises BadInput if the settings of one are not those that are wanted.
    """
    index = folder / "logs" / "exman-train-flow-ssl.py"
    entries = sorted((index / "index").glob("*.yaml"))
    if broken := [entry for entry in entries if not entry.exists()]:
        raise BadInput(f"the run of {broken[0]} has gone: remove that link too")
    last = {}
    if entries:
        last = {str(entry["name"]): entry for _, entry in exman.Index(index).info().iterrows()}
    for run in runs:
        if run.name in last:
            look_up_one(run, last[run.name], folder)


def look_up_one(run, entry, folder):
    """Find out what there is of a Run with this row of exman's index."""
    run.directory = Path(entry["root"])
    with contextlib.chdir(folder):
        _, recorded = read_settings(["--config", str(run.directory / "params.yaml")])
    for key, value in vars(recorded).items():
        if key not in MAY_DIFFER and value != getattr(run.settings, key):
            raise BadInput(f"{run.directory} has {key} {value}, and {getattr(run.settings, key)} "
                           "is asked for: use another folder")
    run.rows = read_metrics(run.directory / "metrics.csv")
    epoch = int(run.rows[-1]["epoch"]) if run.rows else 0
    if epoch != recorded.epochs or not (run.directory / "model.torch").is_file():
        run.lacks = f"stopped after epoch {epoch} of {recorded.epochs}"
    else:
        run.lacks = "" if math.isfinite(run.rows[-1]["test_log_p"]) else "without test figures"
    if "commit" in entry:
        run.commit = str(entry["commit"])[:7] + "+" * bool(entry["dirty"])


def train(runs, folder, jobs):
    """Train `runs` in `folder`, `jobs` at a time -> {name: why it failed, or None}."""
    stop = threading.Event()

    def ask_to_stop(*_):        # it does not raise: the runs need time to write their checkpoints
        if not stop.is_set():
            print("Stopping: each run ends its current step", file=sys.stderr)
        stop.set()
    before = {number: signal.signal(number, ask_to_stop) for number in STOPPING}
    try:
        with tqdm(total=sum(run.settings.epochs for run in runs), unit="epoch",
                  disable=None) as bar, ThreadPoolExecutor(jobs) as pool:
            return dict(pool.map(lambda run: (run.name, train_one(run, folder, bar, stop)), runs))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_one(run, folder, bar, stop):
    """Train a run to its end -> why it failed, or None. `stop`: the event that stops it."""
    if stop.is_set():
        return None
    argv = run.argv
    if run.directory:
        argv = ["--resume", str(run.directory), *argv]
    shown, pattern = 0, f"logs/exman-train-flow-ssl.py/runs/*-{run.name}/metrics.csv"

    def show():
        nonlocal shown
        rows = [row for path in folder.glob(pattern) for row in read_metrics(path)]
        epoch = int(max((row["epoch"] for row in rows), default=0))
        bar.update(epoch - shown)
        shown = epoch
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen([sys.executable, str(SCRIPT), *argv], cwd=folder,
                                   stdout=subprocess.DEVNULL, stderr=errors,
                                   start_new_session=True)      # Ctrl-C is for this program alone
        try:
            while process.poll() is None and not stop.wait(0.2):
                bar.set_postfix_str(run.name, refresh=False)
                show()
        finally:
            if process.poll() is None:
                process.terminate()         # once: a second one could end it while it stops
            process.wait()
        show()
        errors.seek(0)
        last = ["no message", *filter(None, map(str.strip, errors))][-1]
    failed = process.returncode and not stop.is_set()
    return f"exit code {process.returncode}: {last}" if failed else None


def row_of(runs):
    """The row of a config, in the order of COLUMNS, from its finished runs."""
    settings, done = runs[0].settings, [run for run in runs if not run.lacks]
    kind = settings.ssl_model, settings.ssl_alg, settings.cl_weight > 0
    as_in_the_paper = (settings.data, settings.supervised, settings.num_examples) == (
        "mnist", 100, -1) and not (settings.cons_weight or settings.vat_weight or settings.labelled)
    labels = ("listed" if settings.labelled else
              "all" if settings.supervised == -1 else settings.supervised)
    return (MODELS[settings.ssl_model], ALGORITHMS[settings.ssl_alg],
            "yes" if settings.cl_weight else "no", f"{settings.data}, {labels} labels",
            settings.epochs, *PUBLISHED.get(kind if as_in_the_paper else None, ("-", "-")),
            spread([run.test_error for run in done], 2),
            spread([run.rows[-1]["test_bpd"] for run in done], 3), len(done), runs[0].config.stem)


def spread(values, digits):
    """Mean ± standard deviation; of a single value without the latter, of none a dash."""
    if not values or not all(map(math.isfinite, values)):
        return "-"
    mean = f"{sum(values) / len(values):.{digits}f}"
    return f"{mean} ± {pd.Series(values).std():.{digits}f}" if len(values) > 1 else mean


def report(rows, runs, folder):
    """Print the table and which `runs` are missing, and write them and the runs' figures."""
    cells = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    text = "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells) + "\n"
    missing = {}                # {why: names}, as one reason often stops all
    for run in runs:
        if run.lacks:
            missing.setdefault(run.lacks, []).append(run.name)
    if missing:
        parts = [f"{', '.join(names)} ({why})" for why, names in missing.items()]
        text += f"\nNot finished, and not in the table: {'; '.join(parts)}\n"
    print(text, end="")
    with atomic_write(folder / "table.md") as f:
        f.write(text)
    numbers = [{"config": run.config.stem, "seed": run.seed,
                "test error, %": round(run.test_error, 4), "bits/dim": run.rows[-1]["test_bpd"],
                "epochs": run.settings.epochs,
                "seconds": round(sum(row["seconds"] for row in run.rows), 1), "commit": run.commit}
               for run in runs if not run.lacks]
    for name, frame in (("table.csv", pd.DataFrame(rows, columns=COLUMNS)),
                        ("runs.csv", pd.DataFrame(numbers))):
        with atomic_write(folder / name, newline="") as f:
            frame.to_csv(f, index=False)


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
