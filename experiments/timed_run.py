"""A training run on a machine that is there for a limited time, in commands of limited length.

    python experiments/timed_run.py prepare FOLDER --data_root data           at home: what to take along
    python experiments/timed_run.py start WORK --folder FOLDER --minutes 27 -- --config config.yaml
    python experiments/timed_run.py watch WORK --seconds 540                  as often as needed
    python experiments/timed_run.py finish WORK NAME --to OUT                 ends, evaluates and packs the run
    python experiments/timed_run.py join OUT                                  at home: results/NAME and pretrained/NAME.torch
    python experiments/timed_run.py --dry-run                                 all of it on the CPU with digits, in a minute

`start` installs the wheels of FOLDER, unpacks its data, trains two epochs to learn how long one takes,
and starts the run, detached, with as many epochs as fit (at most the settings' own), so that the
schedule reaches its end. What the commands know of each other is in WORK. Every file in OUT is smaller
than 16 MiB; `join` checks each one's SHA-256.
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "experiments")]

from utils import BadInput, as_command, sha256, whole_file  # noqa: E402

# What needs packages is imported by the functions: `start` may have to install them.

PACKAGES = ("exman", "ConfigArgParse", "strconv", "inputimeout", "GitPython", "gitdb", "smmap")      # what PyTorch images lack
PART = 15 * 2**20       # bytes of the largest file in OUT
PROBE_EPOCHS = 2        # the first of them pays for the compiler
SPARE = 0.03            # of the training time: what an epoch takes more now and then, figures and checkpoints
MARGIN = 3              # minutes kept for the end: evaluation and packing; of them the run may use one
GRACE = 120             # seconds for a run to stop in good order
REHEARSAL = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--device", "cpu", "--epochs", "500", "--log_each", "2",
             "--num_examples", "400", "--ssl_k", "1"]


def prepare(folder, data_root=None, packages=PACKAGES):
    """Fill `folder` with the project at its commit, MNIST's files gzipped, and wheels of `packages`."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = git("rev-parse", "HEAD") + ("" if not git("status", "--porcelain") else ", changed")
    (folder / "commit.txt").write_text(commit + "\n")
    git("archive", "-o", str(folder.resolve() / "project.tar.gz"), "HEAD")
    if data_root:
        raw = data_root / "MNIST" / "raw"
        files = sorted(raw.glob("*-ubyte"))
        if len(files) != 4:
            raise BadInput(f"MNIST's four files are not in {raw}")
        (folder / "data").mkdir(exist_ok=True)
        for path in files:
            with open(path, "rb") as source, gzip.open(folder / "data" / f"{path.name}.gz", "wb") as target:
                shutil.copyfileobj(source, target)
    if packages:
        command([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "wheels"), *packages], "pip wheel")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB, commit {commit}")


def git(*words):
    return command(["git", "-C", str(PROJECT), *words], f"git {words[0]}").strip()


def start(work, folder, minutes, settings):
    """Set the machine up from `folder`, fit the number of epochs to `minutes`, start the run in `work`, and return."""
    deadline = time.time() + 60 * minutes
    if (work / "state.json").exists():
        raise BadInput(f"{work} has a run already: watch or finish it, or take another folder")
    work.mkdir(parents=True, exist_ok=True)
    settings = [part for word in settings for part in (word.split("=", 1) if word.startswith("--") else [word])]
    settings = [str(Path(word).resolve()) if before in ("--config", "--data_root") else word       # as the run's own folder is work
                for before, word in zip(["", *settings], settings)]
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    if wheels:
        command([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], "installing the wheels")
        importlib.invalidate_caches()
    from utils.metrics import read_metrics
    from utils.settings import read_settings

    raw = work.resolve() / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in (folder / "data").glob("*.gz"):
        with gzip.open(path) as source, open(raw / path.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    if any(raw.iterdir()):
        settings = [*settings, "--data_root", str(raw.parent.parent)]

    script = [sys.executable, str(PROJECT / "train-flow-ssl.py"), *settings]
    began = time.time()
    output = command([*script, "--tmp", "--epochs", str(PROBE_EPOCHS), "--log_each", "1", "--lr_schedule", "no"],
                     f"training {PROBE_EPOCHS} epochs", cwd=work, timeout=max(deadline - began, 1))
    rows = read_metrics(newest(work, "tmp") / "metrics.csv")
    seconds, overhead = rows[-1]["seconds"], time.time() - began - sum(row["seconds"] for row in rows)
    left = deadline - time.time() - 60 * MARGIN
    with contextlib.chdir(work):                             # where the parser makes its folders
        wanted = read_settings(settings)[1].epochs
    epochs = min(wanted, int((left * (1 - SPARE) - overhead) / seconds))
    if epochs < 1:
        raise BadInput(f"an epoch takes {seconds:.0f} s, and {max(left, 0):.0f} s are left for training")
    line = [*script, "--epochs", str(epochs), "--time_limit", f"{left / 60 + 1:.2f}"]
    # The shell waits for the run, so that its end is known whoever else has gone by then.
    wrapper = subprocess.Popen(["sh", "-c", '"$@" > run.log 2>&1 & echo $! > pid; wait $!; '
                                'echo $? > code.partial; mv code.partial exit_code', "sh", *line],
                               cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    commit = folder / "commit.txt"
    state = {"deadline": deadline, "epochs": epochs, "wrapper": wrapper.pid, "command": line,
             "examples": int(re.search(r"labelled of (\d+) examples", output)[1]),
             "commit": commit.read_text().strip() if commit.is_file() else None}
    with whole_file(work / "state.json") as f:
        json.dump(state, f, indent=1)
    print(f"An epoch takes {seconds:.2f} s: {epochs} of {wanted} epochs, {epochs * seconds / 60:.1f} of {left / 60:.1f} minutes")


def command(line, what, **options):
    """Run a command -> its output. Raises BadInput with the last line of its errors."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"{what} took more than the {error.timeout:.0f} s that there were") from None
    if done.returncode:
        raise BadInput(f"{what} failed, exit code {done.returncode}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def last_line(text):
    return (text.strip().splitlines() or ["no output"])[-1]


def ended(work, state):
    """None while the run goes on, else how it ended, in words. A run whose every process is gone has ended too."""
    path = work / "exit_code"
    if not path.exists() and alive(state["wrapper"]):
        return None
    code = path.read_text().strip() if path.exists() else "unknown: its processes are gone"
    return f"exit code {code}: {last_line((work / 'run.log').read_text())}"


def alive(pid):
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def watch(work, seconds, each=30.0):
    """Print how far the run is, until it ends or for `seconds`. -> whether it has ended."""
    state, until = read_state(work), time.time() + seconds
    while True:
        print(progress(work, state), flush=True)
        if how := ended(work, state):
            print(f"The run has ended, {how}")
            return True
        if time.time() >= until:
            return False
        next_line = min(time.time() + each, until)
        while time.time() < next_line and not ended(work, state):
            time.sleep(min(1, max(next_line - time.time(), 0)))


def progress(work, state):
    """One line: epoch, pace, what the run will still take, what is left."""
    from utils.metrics import read_metrics

    left = state["deadline"] - time.time()
    run = newest(work, "runs")
    path = run / "metrics.csv" if run else None
    rows = read_metrics(path) if run else []
    if not rows:
        return f"no epoch logged yet, {left / 60:.1f} min left"
    epoch = rows[-1]["epoch"]
    pace = rows[-1]["seconds"] / (epoch - (rows[-2]["epoch"] if len(rows) > 1 else 0))
    to_go = max((state["epochs"] - epoch) * pace - (time.time() - path.stat().st_mtime), 0) if epoch < state["epochs"] else 0
    return (f"epoch {epoch:.0f} of {state['epochs']}, {state['examples'] / pace:,.0f} images/s, loss {rows[-1]['train_loss']:.2f}, "
            f"test error {100 * (1 - rows[-1]['test_acc']):.2f} %; ends in {to_go / 60:.1f} min, {left / 60:.1f} min left"
            + (", TOO LITTLE" if to_go > left - 60 * (MARGIN - 1) else ""))


def finish(work, name, out):
    """Stop the run if it still trains, evaluate it, and pack evidence and weights into `out`. -> whether it was complete."""
    import ship

    from utils.checkpoint import load_file, save_whole

    state = read_state(work)
    patience, told = time.time() + GRACE, False
    while not ended(work, state):
        if not told:                                         # once: it would not survive a second signal as it leaves
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):     # between its start and its end
                os.kill(int((work / "pid").read_text()), signal.SIGTERM)
                told = True
        if time.time() > patience:
            raise BadInput(f"the run in {work} has not stopped within {GRACE} s of SIGTERM")
        time.sleep(0.2)
    run = newest(work, "runs") or newest(work, "fails")
    packed, evidence = work / "packed", work / "packed" / "results" / name
    evidence.mkdir(parents=True, exist_ok=True)
    complete, weights = bool(run) and (run / "model.torch").exists(), None
    if complete:
        ship.main([str(run), name, "--half", "--to", str(packed), *(["--commit", state["commit"]] if state["commit"] else [])])
        weights = packed / "pretrained" / f"{name}.torch"
    else:                                                    # no result, but what there is comes home
        print(f"Not complete, so not a result: {ended(work, state)}")
        if run:
            ship.copy_evidence(run, evidence)
        if run and (run / "checkpoint.pt").exists():
            weights = packed / f"{name}.partial.torch"
            save_whole({key: value.half() if value.is_floating_point() else value
                        for key, value in load_file(run / "checkpoint.pt")["model"].items()}, weights)
    for path in (work / "run.log", work / "state.json"):
        shutil.copy(path, evidence)
    pack(packed, name, weights, complete, out)
    return complete


def pack(packed, name, weights, complete, out):
    """Evidence first, then the weights, if there are any, in parts, then a list of all with their SHA-256."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.evidence.tar.gz"]
    with tarfile.open(paths[0], "w:gz") as tar:
        tar.add(packed / "results" / name, name)
    content = weights.read_bytes() if weights else b""
    for i in range(0, len(content), PART):
        paths.append(out / f"{weights.name}.part{i // PART:02d}")
        paths[-1].write_bytes(content[i:i + PART])
    manifest = {"name": name, "complete": complete, "weights": weights and weights.name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "files": {path.name: sha256(path) for path in paths}}
    with whole_file(out / "manifest.json") as f:
        json.dump(manifest, f, indent=1)
    print(f"{out}: {len(paths) + 1} files, the largest {max(path.stat().st_size for path in paths) / 2**20:.1f} MiB")


def join(out, to=PROJECT):
    """Put what `finish` packed in its place: `to`/results/NAME, `to`/pretrained/NAME.torch with its SHA-256.

    The weights of a run that was not complete go beside its evidence. Nothing is overwritten.
    """
    import ship

    if not (out / "manifest.json").is_file():
        raise BadInput(f"{out} has no manifest.json: it is not what `finish` wrote")
    manifest = json.loads((out / "manifest.json").read_text())
    results = to / "results" / manifest["name"]
    weights = (to / "pretrained" if manifest["complete"] else results) / (manifest["weights"] or "none")
    for path, digest in manifest["files"].items():
        if not (out / path).is_file() or sha256(out / path) != digest:
            raise BadInput(f"{out / path} is missing or damaged")
    for path in (results, weights):
        if path.exists():
            raise BadInput(f"{path} is there already: move it away first")
    content = b"".join((out / path).read_bytes() for path in sorted(manifest["files"]) if ".part" in path)
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise BadInput(f"the parts of {manifest['weights']} do not make the whole")
    results.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / f"{manifest['name']}.evidence.tar.gz") as tar:
        tar.extractall(results.parent, filter="data")
    if content:
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(content)
        print(weights)
    if manifest["complete"]:
        ship.list_sum(weights.parent / "SHA256SUMS", weights.name, manifest["sha256"])
    print(results)


def rehearse():
    """Every command, on the CPU with a small flow on digits; the project stays as it is."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        prepare(here / "folder", packages=())
        start(here / "work", here / "folder", MARGIN + 1, REHEARSAL)
        while not watch(here / "work", 10, each=5):
            pass
        complete = finish(here / "work", "digits", here / "out")
        join(here / "out", here / "home")
        print("Rehearsed: " + ("complete" if complete else "the run was not complete"))


def read_state(work):
    if not (work / "state.json").is_file():
        raise BadInput(f"no run was started in {work}")
    return json.loads((work / "state.json").read_text())


def newest(work, kind):
    """The last run's directory under work, or None."""
    return max((work / "logs" / "exman-train-flow-ssl.py" / kind).glob("*"), default=None)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, settings = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="every command, on the CPU with a small flow on digits")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("prepare")
    one.add_argument("folder", type=Path)
    one.add_argument("--data_root", type=Path, help="folder that holds MNIST/raw, to take it along")
    one.add_argument("--packages", nargs="*", default=PACKAGES, help=f"packages to take along as wheels ({' '.join(PACKAGES)})")
    one = commands.add_parser("start", epilog="After --: the settings of the run, as train-flow-ssl.py takes them.")
    one.add_argument("work", type=Path)
    one.add_argument("--folder", type=Path, required=True, help="what `prepare` filled")
    one.add_argument("--minutes", type=float, required=True, help="until the machine is gone")
    one = commands.add_parser("watch")
    one.add_argument("work", type=Path)
    one.add_argument("--seconds", type=float, default=540)
    one = commands.add_parser("finish")
    one.add_argument("work", type=Path)
    one.add_argument("name", metavar="NAME", help="of the weights and the folder of evidence")
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
        start(own.work, own.folder, own.minutes, settings)
    elif own.command == "watch":
        watch(own.work, own.seconds)
    elif own.command == "finish":
        finish(own.work, own.name, own.to)
    elif own.command == "join":
        join(own.out, own.to)
    else:
        raise BadInput("say which command: prepare, start, watch, finish, join, or --dry-run")


if __name__ == "__main__":
    as_command(main)
