"""A training run on a machine that is lent for a limited time, in commands of limited length.

    python tools/timed_run.py prepare FOLDER --data_root data      at home: what to take along
    python tools/timed_run.py start WORK --folder FOLDER --minutes 27 -- --config config.yaml
    python tools/timed_run.py watch WORK --seconds 540             as often as needed
    python tools/timed_run.py finish WORK --to OUT                 stop and pack the run
    python tools/timed_run.py join OUT                             at home: unpack it
    python tools/timed_run.py --dry-run                            rehearse all of it on the CPU

A run that takes several loans of the machine differs in these commands:

    python tools/timed_run.py start WORK --folder FOLDER --minutes 27 --whole -- --config ...
    python tools/timed_run.py finish WORK --to OUT2 --from 4       the parts that did not fit
    python tools/timed_run.py join OUT OUT2                        to a folder without this run
    python tools/timed_run.py prepare FOLDER --data_root data --resume RUN_DIR
    python tools/timed_run.py start WORK --folder FOLDER --minutes 27

`start` installs the wheels of FOLDER, unpacks its data, and starts a process in the background. It
trains a few short epochs to measure what the run will spend its time on, and then, without
compiling anything twice, the run, with as many epochs as fit (at most those of its settings), so
that the learning rate schedule reaches its end. With --whole it keeps all epochs, and stops in time
with a checkpoint, which travels with the optimiser's moments in bfloat16. WORK holds what the
commands need to know of each other. OUT gets at most 4 parts of 15 MiB and a small file; `join`
checks the SHA-256 of each, and unpacks the run's directory into logs/, for tools/ship.py. To
go on at home: train-flow-ssl.py --resume RUN_DIR --time_limit 0 --data_root data.
"""

import argparse
import contextlib
import gc
import gzip
import importlib
import io
import json
import math
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]

from utils.errors import BadInput, OneLineParser, run_command
from utils.files import PROJECT, atomic_write, sha256

# Modules that need packages are imported inside functions: `start` may have to install these first.

PATH_OPTIONS = ("--config", "--data_root")
PACKAGES = ("exman", "ConfigArgParse", "strconv", "inputimeout", "GitPython", "gitdb", "smmap")
PART_BYTES = 15 * 2**20     # of the largest file in OUT
PARTS = 4                   # in OUT, at most: 60 MiB
SCRIPT = PROJECT / "train-flow-ssl.py"
LOGS = Path("logs", "exman-train-flow-ssl.py")
RUNS = LOGS / "runs"
# The measurement logs epochs 2, 4 and 5: two epochs with compilation, two without, one.
PROBE = ("--tmp", "--epochs", "5", "--log_each", "2", "--time_limit", "0", "--lr_schedule", "no")
PROBE_STEPS = 120           # of each of its epochs, at most
SPARE = 0.03                # share of the training time kept for slow epochs
SHOWN_LINES = 60            # of the output of a command that failed
MARGIN = 1                  # minutes kept for packing; the run may use half of it
GRACE = 120                 # seconds for a run to stop after SIGTERM
REHEARSAL = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--device", "cpu",
             "--epochs", "500", "--log_each", "2", "--num_examples", "400", "--ssl_k", "1",
             "--validation", "0", "--cons_weight", "0", "--spread_labels", "0"]


def prepare(folder, data_root=None, packages=PACKAGES, resume=None):
    """Fill `folder` with the project at its commit, MNIST, gzipped, and wheels of `packages`.

    resume: the directory of a run to continue, or None.
    """
    for name in ("checkpoint.pt", "params.yaml", "metrics.csv") if resume else ():
        if not (resume / name).is_file():
            raise BadInput(f"{resume} has no {name}: a run cannot continue from it")
    taken = folder / "run"
    if taken.exists() and not (taken / "manifest.json").is_file():
        raise BadInput(f"{taken} is not what `prepare` put there: move it away first")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(taken, ignore_errors=True)
    commit = git("rev-parse", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        print("Uncommitted changes stay at home: the project is taken as it was committed")
    (folder / "commit.txt").write_text(commit + "\n")
    git("archive", "-o", str(folder.resolve() / "project.tar.gz"), "HEAD", ".",
        ":(exclude)pretrained/*.torch")
    if data_root:
        raw = data_root / "MNIST" / "raw"
        files = sorted(raw.glob("*-ubyte"))
        if len(files) != 4:
            raise BadInput(f"MNIST's four files are not in {raw}")
        (folder / "data").mkdir(exist_ok=True)
        for path in files:
            target = folder / "data" / f"{path.name}.gz"
            with open(path, "rb") as source, gzip.open(target, "wb") as zipped:
                shutil.copyfileobj(source, zipped)
    if resume:
        pack(resume, False, commit, taken, with_checkpoint=True)
    if packages:
        command([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w",
                 str(folder / "wheels"), *packages], "pip wheel")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB, commit {commit}")


def git(*words):
    return command(["git", "-C", str(PROJECT), *words], f"git {words[0]}").strip()


def start(work, folder, minutes, settings, whole=False):
    """Install and unpack `folder`, and start `train` in the background; wait for its measurement.

    settings: the command line of the run; of one to continue, which `folder` may have, what it
    changes. whole: keep all epochs of the settings, as a run to continue does.
    """
    deadline = time.time() + 60 * minutes
    if (work / "state.json").exists():
        raise BadInput(f"{work} has a run already: watch or finish it, or use another folder")
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: `prepare` makes it")
    resumed = folder / "run"
    if not settings and not resumed.is_dir():
        raise BadInput("put the settings of the run after --, such as -- --config config.yaml")
    work.mkdir(parents=True, exist_ok=True)
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    if wheels:
        command([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels],
                "installing the wheels")
        importlib.invalidate_caches()
    from utils.settings import read_settings

    raw = work.resolve() / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in (folder / "data").glob("*.gz"):
        with gzip.open(path) as source, open(raw / path.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    if resumed.is_dir():
        whole, run = True, join([resumed], work.resolve() / RUNS)
        settings = ["--resume", str(run), *settings]
    settings = with_absolute_paths(settings)                 # the run's working directory is `work`
    if any(raw.iterdir()):
        settings = [*settings, "--data_root", str(raw.parent.parent)]
    try:
        with contextlib.chdir(work):                         # where the parser makes its folders
            wanted = read_settings(settings)[1]
    except BadInput:
        if resumed.is_dir():
            shutil.rmtree(run)                               # for the next try
        raise
    if wanted.tmp:
        raise BadInput("a timed run cannot be a --tmp run")
    commit = folder / "commit.txt"
    state = {"deadline": deadline, "settings": settings, "whole": whole,
             "commit": commit.read_text().strip() if commit.is_file() else None}
    # The shell waits for the run and records its exit code, whichever processes are gone by then.
    shell = ('"$@" > run.log 2>&1 & echo $! > pid; wait $!; '
             'echo $? > code.partial; mv code.partial exit_code')
    line = [sys.executable, str(Path(__file__).resolve()), "train", "."]
    wrapper = subprocess.Popen(["sh", "-c", shell, "sh", *line], cwd=work, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    write_state(work, {**state, "wrapper": wrapper.pid})
    while not (work / "plan.json").exists():
        if how := how_it_ended(work, read_state(work)):
            show_failure(work)
            raise BadInput(f"the run has not started, {how}")
        time.sleep(0.2)
    print(read_plan(work)["words"])


def train(work):
    """Measure a few epochs, then train as many as fit. `start` runs it in the background."""
    from utils.data import load_data
    from utils.metrics import read_metrics
    from utils.settings import read_settings

    while not (work / "state.json").exists():
        time.sleep(0.05)
    state, probe_start = read_state(work), time.time()
    settings = state["settings"]
    wanted = read_settings(settings)[1]
    examples = measured = len(load_data(wanted).train_x)
    if state["whole"]:
        left = state["deadline"] - time.time() - 60 * MARGIN
        if left < 0:
            raise BadInput(f"{60 * MARGIN + left:.0f} s are left, too little for training")
        write_plan(work, wanted.epochs, examples,
                   f"All {wanted.epochs} epochs: stops after {left / 60:.1f} minutes")
        run_script([*settings, "--time_limit", f"{left / 60:.2f}"])
        return
    if not wanted.spread_labels:                    # whose time is that of all examples
        measured = min(examples, PROBE_STEPS * wanted.train_bs)
    run_script([*settings, *PROBE, "--num_examples", str(measured)])
    rows = read_metrics(newest(work, "tmp") / "metrics.csv")
    def steps(n):
        return -(-n // wanted.train_bs)
    cost = Cost.of_probe([row["seconds"] for row in rows], time.time() - probe_start,
                         steps(examples) / steps(measured))
    left = state["deadline"] - time.time() - 60 * MARGIN
    epochs = wanted.epochs
    while epochs and cost.seconds(epochs, wanted.log_each) > left * (1 - SPARE):
        epochs -= 1
    if epochs < min(2, wanted.epochs):  # the last epoch of most schedules has learning rate zero
        raise BadInput(f"an epoch takes {cost.epoch:.0f} s, the start {cost.start:.0f} s, and "
                       f"{max(left, 0):.0f} s are left for training")
    if wanted.lr_schedule == "hat" and wanted.lr_warmup >= epochs:
        raise BadInput(f"lr_warmup {wanted.lr_warmup} does not fit into the {epochs} epochs for "
                       "which there is time")
    words = (f"An epoch takes {cost.epoch:.2f} s, its evaluation {cost.evaluation:.2f} s, the "
             f"start {cost.start:.0f} s: {epochs} of {wanted.epochs} epochs, "
             f"{cost.seconds(epochs, wanted.log_each) / 60:.1f} of {left / 60:.1f} minutes")
    write_plan(work, epochs, examples, words)
    gc.collect()                                    # what the measurement left on the GPU
    limit = (left + 60 * MARGIN / 2) / 60
    run_script([*settings, "--epochs", str(epochs), "--time_limit", f"{limit:.2f}"])


def run_script(argv):
    """Run train-flow-ssl.py in this process. Raises SystemExit unless it succeeds."""
    own, sys.argv = sys.argv, [str(SCRIPT), *argv]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = own


@dataclass
class Cost:
    """What a run spends its time on, in seconds.

    start: once, before the first epoch and after the last; epoch: of training; evaluation: of a
    logged epoch, with its checkpoint.
    """

    start: float
    epoch: float
    evaluation: float

    @classmethod
    def of_probe(cls, rows, total, ratio):
        """The cost of what `PROBE` trained.

        rows: the seconds of its rows; total: of all; ratio: of an epoch to one of the probe.
        """
        _, two_epochs, one_epoch = rows
        # Of a short epoch, noise may leave nothing.
        epoch = max(two_epochs - one_epoch, one_epoch / 10)
        return cls(start=total - sum(rows), epoch=ratio * epoch,
                   evaluation=max(one_epoch - epoch, 0))

    def seconds(self, epochs, log_each):
        """The seconds of a run that evaluates every `log_each` epochs and at the end."""
        return self.start + epochs * self.epoch + -(-epochs // log_each) * self.evaluation


def with_absolute_paths(settings):
    """The command line `settings` with the values of --config and --data_root made absolute."""
    words = [part for word in settings
             for part in (word.split("=", 1) if word.startswith(PATH_OPTIONS) else [word])]
    return [str(Path(word).resolve()) if before in PATH_OPTIONS else word
            for before, word in zip(["", *words], words)]


def command(line, what):
    """Run a command -> its output. If it fails, print the end of that and raise BadInput."""
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        show_end_of(done.stdout + done.stderr)
        raise BadInput(f"{what} failed with exit code {done.returncode}: "
                       f"{last_line(done.stderr or done.stdout)}")
    return done.stdout


def last_line(text):
    return (text.strip().splitlines() or ["no output"])[-1]


def show_end_of(text):
    """Print the last lines of what a command printed, to stderr."""
    print(*text.strip().splitlines()[-SHOWN_LINES:], sep="\n", file=sys.stderr)


def show_failure(work):
    """Print the end of what the background process printed, and the traceback, if any, to stderr.
    """
    show_end_of((work / "run.log").read_text())
    failed = newest(work, "fails")
    if failed and (failed / "traceback.txt").is_file():
        show_end_of((failed / "traceback.txt").read_text())


def how_it_ended(work, state):
    """None while the run goes on, else a description. If its processes are gone, it has ended."""
    path = work / "exit_code"
    if not path.exists() and (alive(state["wrapper"]) or alive(trainer(work))):
        return None
    code = path.read_text().strip() if path.exists() else "unknown: its processes are gone"
    return f"exit code {code}: {last_line((work / 'run.log').read_text())}"


def trainer(work):
    """The process that trains, a child of the shell that waits for it; None before it starts."""
    path = work / "pid"
    return int(path.read_text() or 0) or None if path.exists() else None


def alive(pid):
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return "Z" not in stat.rsplit(")", 1)[1].split()[0]      # not a zombie


def watch(work, seconds, interval=30.0):
    """Print the progress of the run until it ends, or for `seconds`. -> whether it has ended."""
    state, until = read_state(work), time.time() + seconds
    while True:
        print(progress(work, state), flush=True)
        if how := how_it_ended(work, state):
            print(f"The run has ended, {how}")
            if not how.startswith("exit code 0"):
                show_failure(work)
            return True
        if time.time() >= until:
            return False
        next_line = min(time.time() + interval, until)
        while time.time() < next_line and not how_it_ended(work, state):
            time.sleep(min(1, max(next_line - time.time(), 0)))


def progress(work, state):
    """One line: epoch, pace, how long the run will still take, how much time is left."""
    from utils.metrics import read_metrics, result

    left, plan = state["deadline"] - time.time(), read_plan(work)
    run = newest(work, "runs")
    path = run / "metrics.csv" if run else None
    rows = read_metrics(path) if run else []
    if not rows:
        return f"no epoch logged yet, {left / 60:.1f} min left"
    last, epochs = rows[-1], plan["epochs"]
    epoch = last["epoch"]
    pace = last["seconds"] / (epoch - (rows[-2]["epoch"] if len(rows) > 1 else 0))
    to_go = 0
    if epoch < epochs:
        to_go = max((epochs - epoch) * pace - (time.time() - path.stat().st_mtime), 0)
    too_little = ""
    if to_go > left - 60 * MARGIN / 2:
        too_little = ", stops before with a checkpoint" if state["whole"] else ", TOO LITTLE"
    return (f"epoch {epoch:.0f} of {epochs}, {plan['examples'] / pace:,.0f} images/s, "
            f"loss {last['train_loss']:.2f}; {result(last)}; "
            f"ends in {to_go / 60:.1f} min, {left / 60:.1f} min left{too_little}")


def finish(work, out, first=0):
    """Stop the run if it still trains, pack its directory, and put its parts from the `first` on
    into `out`, at most PARTS. -> whether it is complete
    """
    packed = work / "packed"
    if first or (packed / "manifest.json").is_file():
        return bring(packed, out, first)
    state = read_state(work)
    patience, signalled = time.time() + GRACE, False
    while not how_it_ended(work, state):
        if not signalled:                           # a second SIGTERM could kill it as it stops
            # There is no process, or no pid yet, just before its end and just after its start.
            with contextlib.suppress(ProcessLookupError):
                if pid := trainer(work):
                    os.kill(pid, signal.SIGTERM)
                    signalled = True
        if time.time() > patience:
            raise BadInput(f"the run in {work} has not stopped within {GRACE} s of SIGTERM")
        time.sleep(0.2)
    run = newest(work, "runs") or newest(work, "fails")
    if not run:
        raise BadInput(f"there is no run in {work}: {how_it_ended(work, state)}")
    complete = (run / "model.torch").exists()
    if not complete:                                # no result, but what there is comes home
        print(f"Not complete, so not a result: {how_it_ended(work, state)}")
        if (run / "checkpoint.pt").exists() and not state["whole"]:
            from training.checkpoint import load_file, save_atomically
            save_atomically(load_file(run / "checkpoint.pt")["model"], run / "partial.torch")
    for name in ("run.log", "state.json", "plan.json"):
        if (work / name).exists():
            shutil.copy(work / name, run)
    pack(run, complete, state["commit"], packed, with_checkpoint=state["whole"] and not complete)
    return bring(packed, out)


def pack(run, complete, commit, out, with_checkpoint=False):
    """Write to `out` the directory `run` in parts, and a manifest; of its checkpoint the compact
    form, or nothing."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as tar:
        tar.add(run, run.name,
                filter=lambda member: None if member.name.endswith("checkpoint.pt") else member)
        if with_checkpoint and (run / "checkpoint.pt").is_file():
            from training.checkpoint import compact, load_file, save_atomically
            save_atomically(compact(load_file(run / "checkpoint.pt")), out / "checkpoint.pt")
            tar.add(out / "checkpoint.pt", f"{run.name}/checkpoint.pt")
            (out / "checkpoint.pt").unlink()
    content, sums = content.getvalue(), {}
    for i in range(0, len(content), PART_BYTES):
        path = out / f"run.part{i // PART_BYTES:02d}"
        path.write_bytes(content[i:i + PART_BYTES])
        sums[path.name] = sha256(path)
    manifest = {"run": run.name, "complete": complete, "commit": commit, "files": sums}
    with atomic_write(out / "manifest.json") as f:
        json.dump(manifest, f, indent=1)
    print(f"{out}: parts: {len(sums)}, {len(content) / 2**20:.1f} MiB")


def bring(packed, out, first=0):
    """Copy parts `first` to `first` + PARTS - 1 and the manifest to `out`. -> whether the run is
    complete"""
    manifest, files = read_manifest(packed)
    if first >= len(files):
        raise BadInput(f"there are only {len(files)} parts")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", *files[first:first + PARTS]):
        shutil.copy(packed / name, out)
    if len(files) > first + PARTS:
        print(f"Parts left: {len(files) - first - PARTS}; finish --from {first + PARTS}")
    return manifest["complete"]


def read_manifest(folder):
    """-> the manifest in `folder`, and the names of the parts."""
    if not (folder / "manifest.json").is_file():
        raise BadInput(f"{folder} has no manifest.json, which `finish` writes")
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, sorted(manifest["files"])


def join(outs, to):
    """Unpack what `finish` brought into `outs` into the folder `to`. Nothing is overwritten.
    -> the directory of the run"""
    manifest, files = read_manifest(outs[0])
    parts = {}
    for name in files:
        found = [out / name for out in outs if (out / name).is_file()
                 and sha256(out / name) == manifest["files"][name]]
        if not found:
            raise BadInput(f"{outs[0] / name} is missing or damaged")
        parts[name] = found[0]
    run = to / manifest["run"]
    if run.exists():
        raise BadInput(f"{run} is there already: move it away first")
    to.mkdir(parents=True, exist_ok=True)
    content = b"".join(path.read_bytes() for path in parts.values())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(to, filter="data")
    print(run)
    if manifest["complete"]:
        commit = f" --commit {manifest['commit']}" if manifest["commit"] else ""
        print(f"To ship its weights: python tools/ship.py {shlex.quote(str(run))} NAME --data_root "
              f"data{commit}")
    return run


def rehearse():
    """Every command, on the CPU with a small flow on digits. The project stays as it is."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        prepare(here / "folder", packages=())
        start(here / "work", here / "folder", MARGIN + 0.75, REHEARSAL)
        while not watch(here / "work", 10, interval=5):
            pass
        complete = finish(here / "work", here / "out")
        join([here / "out"], here / "home")
        print("Rehearsed: " + ("complete" if complete else "the run was not complete"))


def read_state(work):
    if not (work / "state.json").is_file():
        raise BadInput(f"no run was started in {work}")
    return json.loads((work / "state.json").read_text())


def write_state(work, state):
    with atomic_write(work / "state.json") as f:
        json.dump(state, f, indent=1)


def write_plan(work, epochs, examples, words):
    with atomic_write(work / "plan.json") as f:
        json.dump({"epochs": epochs, "examples": examples, "words": words}, f, indent=1)


def read_plan(work):
    """What `train` measured and decided, or nothing yet."""
    path = work / "plan.json"
    return json.loads(path.read_text()) if path.exists() else {}


def newest(work, kind):
    """The last run's directory in the runs, tmp or fails of `work`, or None."""
    return max((work / LOGS / kind).glob("*"), default=None)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = []
    if "--" in argv:
        argv, settings = argv[:argv.index("--")], argv[argv.index("--") + 1:]
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true",
                        help="rehearse every command on the CPU, with a small flow on digits")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("prepare")
    one.add_argument("folder", type=Path)
    one.add_argument("--data_root", type=Path, help="folder of MNIST/raw, to take MNIST along")
    one.add_argument("--resume", type=Path, metavar="RUN_DIR", help="take along a run to continue")
    one.add_argument("--packages", nargs="*", default=PACKAGES,
                     help=f"packages to take along as wheels ({' '.join(PACKAGES)})")
    one = commands.add_parser("start", epilog="After --: the settings of the run.")
    one.add_argument("work", type=Path)
    one.add_argument("--folder", type=Path, required=True, help="what `prepare` filled")
    one.add_argument("--minutes", type=float, required=True,
                     help="until the machine is gone")
    one.add_argument("--whole", action="store_true",
                     help="keep all epochs of the settings, and stop in time with a checkpoint")
    one = commands.add_parser("watch")
    one.add_argument("work", type=Path)
    one.add_argument("--seconds", type=float, default=540)
    one = commands.add_parser("finish")
    one.add_argument("work", type=Path)
    one.add_argument("--to", type=Path, required=True, metavar="OUT")
    one.add_argument("--from", type=int, default=0, dest="first", metavar="K",
                     help="the first part to bring, after those that an earlier call brought")
    one = commands.add_parser("join")
    one.add_argument("outs", type=Path, nargs="+", metavar="OUT")
    one.add_argument("--to", type=Path, default=PROJECT / RUNS, metavar="FOLDER",
                     help="default: where the project keeps its runs")
    commands.add_parser("train").add_argument("work", type=Path)     # what `start` starts
    own = parser.parse_args(argv)
    if own.dry_run:
        rehearse()
    elif own.command == "prepare":
        prepare(own.folder, own.data_root, own.packages, own.resume)
    elif own.command == "start":
        if not 0 < own.minutes < math.inf:
            raise BadInput(f"--minutes must be a positive number, not {own.minutes}")
        start(own.work, own.folder, own.minutes, settings, own.whole)
    elif own.command == "train":
        train(own.work)
    elif own.command == "watch":
        watch(own.work, own.seconds)
    elif own.command == "finish":
        if own.first < 0:
            raise BadInput(f"--from must be at least 0, not {own.first}")
        finish(own.work, own.to, own.first)
    elif own.command == "join":
        join(own.outs, own.to)
    else:
        raise BadInput("name a command: prepare, start, watch, finish, join, or --dry-run")


if __name__ == "__main__":
    run_command(main)
