"""The paper's table: a row per config, over several seeds, run here and set beside the paper's.

    python experiments/table.py CONFIG [CONFIG ...] [--seeds 0 1 2 3 4] --to FOLDER [--jobs N] \
        [options of train-flow-ssl.py, for all runs]
    python experiments/table.py CONFIG [CONFIG ...] [--seeds ...] --collect FOLDER

Trains each config with --seed S --data_seed S for each seed S, in FOLDER, N runs at a time. Ctrl-C,
SIGTERM and a closed terminal stop them after the current training step, and the same command
continues there: runs that are finished are skipped and those that were stopped are resumed.
--collect trains nothing. Both print the table and write it to FOLDER/table.md and FOLDER/table.csv:
error and bits/dim on the test images, as mean ± standard deviation over the seeds, and the paper's
figures, which are of MNIST with 100 labels. The figures of each run are in FOLDER/runs.csv. A run
that is not finished is named below the table and takes no part in it; the exit code is then 1.
"""

import contextlib
import math
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exman

from utils.data import load_data
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
COLUMNS = ["model", "optimisation", "L_clf", "error, % (paper)", "bits/dim (paper)", "error, %",
           "bits/dim", "n", "config"]
# What may differ between the settings of a run and those that are asked for.
MAY_DIFFER = {*RESUMABLE, "name", "tmp"} - {"epochs", "test"}


@dataclass
class Wanted:
    """A run of the table.

    config: the file; seed; settings: all of them; line: the command line that gives them.
    """

    config: Path
    seed: int
    settings: object
    line: list

    @property
    def name(self):
        return f"{self.config.stem}-seed{self.seed}"


def main(argv=None):
    parser = OneLineParser(description="Run and collect the paper's table.", allow_abbrev=False,
                           epilog="All other options are those of train-flow-ssl.py, for all runs.")
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), metavar="S")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="train what is missing in FOLDER")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="train nothing")
    own, options = parser.parse_known_args(argv)
    if (own.to is None) == (own.collect is None):
        raise BadInput("name a folder for the runs: --to FOLDER, or --collect FOLDER to train none")
    if own.jobs < 1:
        raise BadInput(f"--jobs must be at least 1, not {own.jobs}")
    folder = own.to or own.collect
    if own.collect and not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    runs = [wanted(config, seed, options, folder)
            for config in own.configs for seed in own.seeds]
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"{twice[0]} is there twice: each config has a name of its own, and each "
                       "seed is listed once")
    states, failures = states_of(runs, folder), {}
    if own.to:
        unfinished = [run for run in runs if not states[run.name].finished]
        for run in unfinished:
            load_data(run.settings)         # raises BadInput before any of them is trained
        failures = train(unfinished, states, folder, own.jobs)
        states = states_of(runs, folder)
    rows = [row_of([run for run in runs if run.config == config], states)
            for config in own.configs]
    table = pd.DataFrame(rows, columns=COLUMNS)
    figures = pd.DataFrame([figures_of(run, states[run.name]) for run in runs
                            if states[run.name].finished])
    missing = {}                # {why: names}, as one reason often stops all
    for run in runs:
        if not states[run.name].finished:
            why = failures.get(run.name) or states[run.name].what
            missing.setdefault(why, []).append(run.name)
    report(table, figures, missing, folder)
    return 1 if missing else 0


def wanted(config, seed, options, folder):
    """The Wanted run of a config. Raises BadInput if its settings are wrong."""
    line = ["--config", str(config.resolve()), *options, "--seed", str(seed), "--data_seed",
            str(seed), "--name", f"{config.stem}-seed{seed}"]
    with contextlib.chdir(folder):              # where the parser makes its folders
        _, settings = read_settings(line)
    if settings.resume or settings.pretrained or settings.tmp or not settings.test:
        raise BadInput("a table is of new runs, kept and tested: no --resume, --pretrained, --tmp "
                       "or --test false")
    for key in "data_root", "initial_weights":      # paths, from here and not from `folder`
        if path := getattr(settings, key):
            setattr(settings, key, str(Path(path).resolve()))
            line += [f"--{key}", getattr(settings, key)]
    return Wanted(config, seed, settings, line)


@dataclass
class State:
    """What there is of a run: its directory, or None; its rows of metrics; what it lacks; the
    commit that started it, with + if the code was changed."""

    directory: Path | None
    rows: list
    what: str
    commit: str = "-"

    @property
    def finished(self):
        return not self.what


def states_of(runs, folder):
    """{name: State} of `runs`, each the last of that name in exman's index of `folder`.

    Raises BadInput if the settings of one are not those that are wanted.
    """
    index = folder / "logs" / "exman-train-flow-ssl.py"
    entries = sorted((index / "index").glob("*.yaml"))
    if broken := [entry for entry in entries if not entry.exists()]:
        raise BadInput(f"the run of {broken[0]} has gone: remove that link too")
    last = {}
    if entries:
        last = {str(entry["name"]): entry for _, entry in exman.Index(index).info().iterrows()}
    return {run.name: state_of(run, last.get(run.name), folder) for run in runs}


def state_of(run, entry, folder):
    """The State of a run with this row of exman's index, or None."""
    if entry is None:
        return State(None, [], "not run")
    directory = Path(entry["root"])
    with contextlib.chdir(folder):
        _, own = read_settings(["--config", str(directory / "params.yaml")])
    for key, value in vars(own).items():
        if key not in MAY_DIFFER and value != getattr(run.settings, key):
            raise BadInput(f"{directory} has {key} {value}, and {getattr(run.settings, key)} is "
                           "asked for: use another folder")
    rows = read_metrics(directory / "metrics.csv")
    epoch = int(rows[-1]["epoch"]) if rows else 0
    done = (directory / "model.torch").is_file() and epoch == own.epochs
    what = "" if done else f"stopped after epoch {epoch} of {own.epochs}"
    if done and not math.isfinite(rows[-1]["test_acc"]):
        what = "without test error"
    commit = str(entry["commit"])[:7] + "+" * bool(entry["dirty"]) if "commit" in entry else "-"
    return State(directory, rows, what, commit)


def train(runs, states, folder, jobs):
    """Train `runs`, whose `states` are given, in `folder`, `jobs` at a time -> {name: why} of those
    that failed."""
    failures, stop = {}, threading.Event()

    def ask_to_stop(*_):        # it does not raise: the runs need time to write their checkpoints
        if not stop.is_set():
            print("Stopping: each run ends its current step", file=sys.stderr)
        stop.set()
    before = {number: signal.signal(number, ask_to_stop) for number in STOPPING}
    try:
        with tqdm(total=sum(run.settings.epochs for run in runs), unit="epoch",
                  disable=None) as bar, ThreadPoolExecutor(jobs) as pool:
            def one(run):
                if not stop.is_set() and (why := train_one(run, states[run.name], folder, bar,
                                                           stop)):
                    failures[run.name] = why
            list(pool.map(one, runs))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return failures


def train_one(run, state, folder, bar, stop):
    """Train a run to its end -> why it failed, or None. `stop`: the event that stops it."""
    line = run.line
    if state.directory and (state.directory / "checkpoint.pt").is_file():
        line = ["--resume", str(state.directory), *line]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *line], cwd=folder, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               start_new_session=True)      # Ctrl-C is for this program alone
    shown, pattern = 0, f"logs/exman-train-flow-ssl.py/runs/*-{run.name}/metrics.csv"

    def show():
        nonlocal shown
        rows = [row for path in folder.glob(pattern) for row in read_metrics(path)]
        epoch = int(max((row["epoch"] for row in rows), default=0))
        bar.update(epoch - shown)
        shown = epoch
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))   # a pipe that fills up
    reader.start()                                                           # would block the run
    try:
        while process.poll() is None and not stop.wait(0.2):
            bar.set_postfix_str(run.name, refresh=False)
            show()
    finally:
        if process.poll() is None:
            process.terminate()         # once: a second one could end it while it stops
        process.wait()
        reader.join()
    show()
    if process.returncode and not stop.is_set():
        last = ([line.strip() for line in lines if line.strip()] or ["no message"])[-1]
        return f"exit code {process.returncode}: {last}"
    return None


def row_of(runs, states):
    """The row of a config, keyed by COLUMNS, from its finished runs."""
    settings = runs[0].settings
    kind = settings.ssl_model, settings.ssl_alg, settings.cl_weight > 0
    last = [states[run.name].rows[-1] for run in runs if states[run.name].finished]
    published = PUBLISHED.get(kind, ("-", "-"))
    return dict(zip(COLUMNS, (
        MODELS[settings.ssl_model], ALGORITHMS[settings.ssl_alg],
        "yes" if settings.cl_weight else "no", *published,
        spread([100 * (1 - row["test_acc"]) for row in last], 2),
        spread([row["test_bpd"] for row in last], 3), len(last), runs[0].config.stem)))


def figures_of(run, state):
    """The row of a finished run in runs.csv."""
    last = state.rows[-1]
    return {"config": run.config.stem, "seed": run.seed,
            "test error, %": round(100 * (1 - last["test_acc"]), 4), "bits/dim": last["test_bpd"],
            "epochs": run.settings.epochs,
            "seconds": round(sum(row["seconds"] for row in state.rows), 1), "commit": state.commit}


def spread(values, digits):
    """Mean ± standard deviation; of a single value without the latter, of none a dash."""
    if not values or not all(map(math.isfinite, values)):
        return "-"
    mean = f"{sum(values) / len(values):.{digits}f}"
    return f"{mean} ± {pd.Series(values).std():.{digits}f}" if len(values) > 1 else mean


def report(table, figures, missing, folder):
    """Print the table and what is missing, {why: names}, and write them and the runs' figures to
    `folder`."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    if missing:
        parts = [f"{', '.join(names)} ({why})" for why, names in missing.items()]
        text += f"\nNot finished, and not in the table: {'; '.join(parts)}\n"
    print(text, end="")
    with atomic_write(folder / "table.md") as f:
        f.write(text)
    for name, frame in (("table.csv", table), ("runs.csv", figures)):
        with atomic_write(folder / name, newline="") as f:
            frame.to_csv(f, index=False)


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
