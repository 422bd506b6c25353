"""A training run on a machine that is lent for a limited time, in commands of limited length.

    python tools/timed_run.py prepare FOLDER --data_root data      at home: what to take along
    python tools/timed_run.py start WORK --folder FOLDER --minutes 27 -- --config config.yaml
    python tools/timed_run.py watch WORK --seconds 540             as often as needed
    python tools/timed_run.py finish WORK NAME --to OUT            stop, evaluate and pack the run
    python tools/timed_run.py join OUT                             at home: unpack into the project
    python tools/timed_run.py --dry-run                            rehearse all of it on the CPU

`start` installs the wheels of FOLDER, unpacks its data, trains a few epochs to measure what the run
will spend its time on, and starts it in the background with as many epochs as fit (at most those of
its settings), so that the learning rate schedule reaches its end. WORK holds what the commands need
to know of each other. Every file in OUT is smaller than 16 MiB; `join` checks the SHA-256 of each,
and writes results/NAME and pretrained/NAME.torch.
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib
import json
import math
import os
import re
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
# The measurement logs epochs 2, 4 and 5: two epochs with compilation, two without, one.
PROBE = ("--epochs", "5", "--log_each", "2", "--time_limit", "0")
SPARE = 0.03                # share of the training time kept for slow epochs
SHOWN_LINES = 60            # of the output of a command that failed
MARGIN = 3                  # minutes kept for evaluation and packing; the run may use one of them
GRACE = 120                 # seconds for a run to stop after SIGTERM
REHEARSAL = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--device", "cpu",
             "--epochs", "500", "--log_each", "2", "--num_examples", "400", "--ssl_k", "1",
             "--validation", "0", "--cons_weight", "0", "--spread_labels", "0"]


def prepare(folder, data_root=None, packages=PACKAGES):
    """Fill `folder` with the project at its commit, MNIST, gzipped, and wheels of `packages`."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = git("rev-parse", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        print("Uncommitted changes stay at home: the project is taken as it was committed")
    (folder / "commit.txt").write_text(commit + "\n")
    git("archive", "-o", str(folder.resolve() / "project.tar.gz"), "HEAD")
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
    if packages:
        command([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w",
                 str(folder / "wheels"), *packages], "pip wheel")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB, commit {commit}")


def git(*words):
    return command(["git", "-C", str(PROJECT), *words], f"git {words[0]}").strip()


def start(work, folder, minutes, settings):
    """Install and unpack `folder`, fit the epochs to `minutes`, and start the run in `work`."""
    deadline = time.time() + 60 * minutes
    if (work / "state.json").exists():
        raise BadInput(f"{work} has a run already: watch or finish it, or use another folder")
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: `prepare` makes it")
    work.mkdir(parents=True, exist_ok=True)
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    if wheels:
        command([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels],
                "installing the wheels")
        importlib.invalidate_caches()
    from utils.metrics import read_metrics
    from utils.settings import read_settings

    raw = work.resolve() / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in (folder / "data").glob("*.gz"):
        with gzip.open(path) as source, open(raw / path.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    settings = with_absolute_paths(settings)                 # the run's working directory is `work`
    if any(raw.iterdir()):
        settings = [*settings, "--data_root", str(raw.parent.parent)]

    with contextlib.chdir(work):                             # where the parser makes its folders
        wanted = read_settings(settings)[1]
    if wanted.tmp:
        raise BadInput("a timed run cannot be a --tmp run")
    script = [sys.executable, str(PROJECT / "train-flow-ssl.py"), *settings]
    probe_start = time.time()
    output = command([*script, "--tmp", *PROBE, "--lr_schedule", "no"], "training a few epochs",
                     cwd=work, timeout=max(deadline - probe_start, 1))
    cost = Cost.of_probe([row["seconds"] for row in
                          read_metrics(newest(work, "tmp") / "metrics.csv")],
                         time.time() - probe_start)
    left = deadline - time.time() - 60 * MARGIN
    epochs = wanted.epochs
    while epochs and cost.seconds(epochs, wanted.log_each) > left * (1 - SPARE):
        epochs -= 1
    if epochs < min(2, wanted.epochs):  # the last epoch of most schedules has learning rate zero
        raise BadInput(f"an epoch takes {cost.epoch:.0f} s, the start {cost.start:.0f} s, and "
                       f"{max(left, 0):.0f} s are left for training")
    if wanted.lr_schedule == "hat" and wanted.lr_warmup >= epochs:
        raise BadInput(f"lr_warmup {wanted.lr_warmup} does not fit into the {epochs} epochs for "
                       "which there is time")
    line = [*script, "--epochs", str(epochs), "--time_limit", f"{left / 60 + 1:.2f}"]
    # The shell waits for the run and records its exit code, whichever processes are gone by then.
    shell = ('"$@" > run.log 2>&1 & echo $! > pid; wait $!; '
             'echo $? > code.partial; mv code.partial exit_code')
    wrapper = subprocess.Popen(["sh", "-c", shell, "sh", *line], cwd=work, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    commit = folder / "commit.txt"
    state = {"deadline": deadline, "epochs": epochs, "wrapper": wrapper.pid, "command": line,
             "examples": int(re.search(r"labelled of (\d+) examples", output)[1]),
             "commit": commit.read_text().strip() if commit.is_file() else None}
    with atomic_write(work / "state.json") as f:
        json.dump(state, f, indent=1)
    print(f"An epoch takes {cost.epoch:.2f} s, its evaluation {cost.evaluation:.2f} s, the start "
          f"{cost.start:.0f} s: {epochs} of {wanted.epochs} epochs, "
          f"{cost.seconds(epochs, wanted.log_each) / 60:.1f} of {left / 60:.1f} minutes")


@dataclass
class Cost:
    """What a run spends its time on, in seconds.

    start: once, before the first epoch and in it, including compilation; epoch: of training;
    evaluation: of a logged epoch, with its checkpoint.
    """

    start: float
    epoch: float
    evaluation: float

    @classmethod
    def of_probe(cls, rows, total):
        """The cost of what `PROBE` trained. rows: the seconds of its rows; total: of the command.

        With compile, `start` is an upper bound: the run finds compiled code on the disk.
        """
        compiling, two_epochs, one_epoch = rows
        # Of a short epoch, noise may leave nothing.
        epoch = max(two_epochs - one_epoch, one_epoch / 2)
        return cls(start=total - sum(rows) + max(compiling - two_epochs, 0), epoch=epoch,
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


def command(line, what, **options):
    """Run a command -> its output. If it fails, print the end of that and raise BadInput."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"{what} took more than the {error.timeout:.0f} s that were left") from None
    if done.returncode:
        show_end_of(done.stdout + done.stderr)
        if "cwd" in options:                # a run's error is one line, its directory has the rest
            show_traceback(options["cwd"])
        raise BadInput(f"{what} failed with exit code {done.returncode}: "
                       f"{last_line(done.stderr or done.stdout)}")
    return done.stdout


def last_line(text):
    return (text.strip().splitlines() or ["no output"])[-1]


def show_end_of(text):
    """Print the last lines of what a command printed, to stderr."""
    print(*text.strip().splitlines()[-SHOWN_LINES:], sep="\n", file=sys.stderr)


def show_traceback(work):
    """Print the traceback, if any, of the last run in `work` that failed, to stderr."""
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
                show_end_of((work / "run.log").read_text())
                show_traceback(work)
            return True
        if time.time() >= until:
            return False
        next_line = min(time.time() + interval, until)
        while time.time() < next_line and not how_it_ended(work, state):
            time.sleep(min(1, max(next_line - time.time(), 0)))


def progress(work, state):
    """One line: epoch, pace, how long the run will still take, how much time is left."""
    from utils.metrics import read_metrics, result

    left = state["deadline"] - time.time()
    run = newest(work, "runs")
    path = run / "metrics.csv" if run else None
    rows = read_metrics(path) if run else []
    if not rows:
        return f"no epoch logged yet, {left / 60:.1f} min left"
    last, epochs = rows[-1], state["epochs"]
    epoch = last["epoch"]
    pace = last["seconds"] / (epoch - (rows[-2]["epoch"] if len(rows) > 1 else 0))
    to_go = 0
    if epoch < epochs:
        to_go = max((epochs - epoch) * pace - (time.time() - path.stat().st_mtime), 0)
    too_little = ", TOO LITTLE" if to_go > left - 60 * (MARGIN - 1) else ""
    return (f"epoch {epoch:.0f} of {epochs}, {state['examples'] / pace:,.0f} images/s, "
            f"loss {last['train_loss']:.2f}; {result(last)}; "
            f"ends in {to_go / 60:.1f} min, {left / 60:.1f} min left{too_little}")


def finish(work, name, out):
    """Stop the run if it still trains; evaluate it; pack evidence and weights into `out`.

    -> whether the run was complete.
    """
    import ship

    from training.checkpoint import load_file, save_atomically

    ship.check_name(name)
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
    packed, evidence = work / "packed", work / "packed" / "results" / name
    evidence.mkdir(parents=True, exist_ok=True)
    complete, weights = bool(run) and (run / "model.torch").exists(), None
    if complete:
        commit = ["--commit", state["commit"]] if state["commit"] else []
        # Compiling for one evaluation takes longer than the evaluation.
        eager = ("--compile", "off", "--cuda_graph", "off")
        ship.main([str(run), name, "--half", "--to", str(packed), *commit, *eager])
        weights = packed / "pretrained" / f"{name}.torch"
    else:                                           # no result, but what there is comes home
        print(f"Not complete, so not a result: {how_it_ended(work, state)}")
        if run:
            ship.copy_evidence(run, evidence)
        if run and (run / "checkpoint.pt").exists():
            weights = packed / f"{name}.partial.torch"
            state_dict = load_file(run / "checkpoint.pt")["model"]
            save_atomically({key: value.half() if value.is_floating_point() else value
                             for key, value in state_dict.items()}, weights)
    for path in (work / "run.log", work / "state.json"):
        shutil.copy(path, evidence)
    pack(packed, name, weights, complete, out)
    return complete


def pack(packed, name, weights, complete, out):
    """Write to `out` the evidence, the weights, if any, in parts, and a manifest with SHA-256s."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.evidence.tar.gz"]
    with tarfile.open(paths[0], "w:gz") as tar:
        tar.add(packed / "results" / name, name)
    content = weights.read_bytes() if weights else b""
    for i in range(0, len(content), PART_BYTES):
        paths.append(out / f"{weights.name}.part{i // PART_BYTES:02d}")
        paths[-1].write_bytes(content[i:i + PART_BYTES])
    manifest = {"name": name, "complete": complete, "weights": weights and weights.name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "files": {path.name: sha256(path) for path in paths}}
    with atomic_write(out / "manifest.json") as f:
        json.dump(manifest, f, indent=1)
    largest = max(path.stat().st_size for path in paths) / 2**20
    print(f"{out}: {len(paths) + 1} files, the largest {largest:.1f} MiB")


def join(out, to=PROJECT):
    """Unpack what `finish` packed: `to`/results/NAME, `to`/pretrained/NAME.torch and its SHA-256.

    The weights of an incomplete run go beside its evidence. Nothing is overwritten.
    """
    import ship

    if not (out / "manifest.json").is_file():
        raise BadInput(f"{out} has no manifest.json: `finish` did not write it")
    manifest = json.loads((out / "manifest.json").read_text())
    ship.check_name(manifest["name"])
    results = to / "results" / manifest["name"]
    folder = to / "pretrained" if manifest["complete"] else results
    weights = folder / (manifest["weights"] or "none")
    for path, digest in manifest["files"].items():
        if not (out / path).is_file() or sha256(out / path) != digest:
            raise BadInput(f"{out / path} is missing or damaged")
    for path in (results, weights):
        if path.exists():
            raise BadInput(f"{path} is there already: move it away first")
    parts = sorted(path for path in manifest["files"] if ".part" in path)
    content = b"".join((out / path).read_bytes() for path in parts)
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise BadInput(f"the parts of {manifest['weights']} do not add up to the whole")
    results.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / f"{manifest['name']}.evidence.tar.gz") as tar:
        tar.extractall(results.parent, filter="data")
    if content:
        weights.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(weights, "wb") as f:
            f.write(content)
        print(weights)
    if manifest["complete"]:
        ship.list_sum(weights.parent / "SHA256SUMS", weights.name, manifest["sha256"])
    print(results)


def rehearse():
    """Every command, on the CPU with a small flow on digits. The project stays as it is."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        prepare(here / "folder", packages=())
        start(here / "work", here / "folder", MARGIN + 0.75, REHEARSAL)
        while not watch(here / "work", 10, interval=5):
            pass
        complete = finish(here / "work", "digits", here / "out")
        join(here / "out", here / "home")
        print("Rehearsed: " + ("complete" if complete else "the run was not complete"))


def read_state(work):
    if not (work / "state.json").is_file():
        raise BadInput(f"no run was started in {work}")
    return json.loads((work / "state.json").read_text())


def newest(work, kind):
    """The last run's directory in the runs, tmp or fails of `work`, or None."""
    return max((work / "logs" / "exman-train-flow-ssl.py" / kind).glob("*"), default=None)


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
    one.add_argument("--packages", nargs="*", default=PACKAGES,
                     help=f"packages to take along as wheels ({' '.join(PACKAGES)})")
    one = commands.add_parser("start", epilog="After --: the settings of the run.")
    one.add_argument("work", type=Path)
    one.add_argument("--folder", type=Path, required=True, help="what `prepare` filled")
    one.add_argument("--minutes", type=float, required=True,
                     help="until the machine is gone")
    one = commands.add_parser("watch")
    one.add_argument("work", type=Path)
    one.add_argument("--seconds", type=float, default=540)
    one = commands.add_parser("finish")
    one.add_argument("work", type=Path)
    one.add_argument("name", metavar="NAME", help="of the weights and of the folder of evidence")
    one.add_argument("--to", type=Path, required=True, metavar="OUT")
    one = commands.add_parser("join")
    one.add_argument("out", type=Path, metavar="OUT")
    one.add_argument("--to", type=Path, default=PROJECT, metavar="FOLDER")
    own = parser.parse_args(argv)
    if own.dry_run:
        rehearse()
    elif own.command == "prepare":
        prepare(own.folder, own.data_root, own.packages)
    elif own.command == "start":
        if not 0 < own.minutes < math.inf:
            raise BadInput(f"--minutes must be a positive number, not {own.minutes}")
        if not settings:
            raise BadInput("put the settings of the run after --, such as -- --config config.yaml")
        start(own.work, own.folder, own.minutes, settings)
    elif own.command == "watch":
        watch(own.work, own.seconds)
    elif own.command == "finish":
        finish(own.work, own.name, own.to)
    elif own.command == "join":
        join(own.out, own.to)
    else:
        raise BadInput("name a command: prepare, start, watch, finish, join, or --dry-run")


if __name__ == "__main__":
    run_command(main)
