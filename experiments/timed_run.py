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
import csv
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import ship  # noqa: E402

from utils import BadInput, whole_file  # noqa: E402
from utils.checkpoint import SHIPPED_WEIGHTS, load_file  # noqa: E402
from utils.settings import read_settings  # noqa: E402

PACKAGES = ("exman", "ConfigArgParse", "strconv", "inputimeout", "GitPython", "gitdb", "smmap")      # what PyTorch images lack
PART = 15 * 2**20       # bytes of the largest file in OUT
PROBE_EPOCHS = 2        # the first of them pays for the compiler
MARGIN = 3              # minutes kept for the end: evaluation and packing
GRACE = 120             # seconds for a run to stop in good order
REHEARSAL = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--device", "cpu", "--epochs", "500", "--log_each", "2",
             "--num_examples", "400", "--ssl_k", "1"]


def prepare(folder, data_root=None, packages=PACKAGES):
    """Fill `folder` with the project at its commit, MNIST's files gzipped, and wheels of `packages`."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = git("rev-parse", "HEAD") + ("" if not git("status", "--porcelain") else ", changed")
    (folder / "commit.txt").write_text(commit + "\n")
    subprocess.run(["git", "-C", str(PROJECT), "archive", "-o", str(folder.resolve() / "project.tar.gz"), "HEAD"], check=True)
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
        done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "wheels"), *packages],
                              capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"pip wheel failed: {done.stderr.strip().splitlines()[-1]}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB, commit {commit}")


def git(*command):
    done = subprocess.run(["git", "-C", str(PROJECT), *command], capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"git {' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def start(work, folder, minutes, settings):
    """Set the machine up from `folder`, fit the number of epochs to `minutes`, start the run in `work`, and return."""
    deadline = time.time() + 60 * minutes
    if (work / "state.json").exists():
        raise BadInput(f"{work} has a run already: watch or finish it, or take another folder")
    work.mkdir(parents=True, exist_ok=True)
    wheels = sorted(map(str, (folder / "wheels").glob("*.whl")))
    if wheels:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], check=True)
    raw = work.resolve() / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in (folder / "data").glob("*.gz"):
        with gzip.open(path) as source, open(raw / path.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    if any(raw.iterdir()):
        settings = [*settings, "--data_root", str(raw.parent.parent)]

    script = [sys.executable, str(PROJECT / "train-flow-ssl.py"), *settings]
    probe = subprocess.run([*script, "--tmp", "--epochs", str(PROBE_EPOCHS), "--log_each", "1"], cwd=work, capture_output=True, text=True)
    if probe.returncode:
        raise BadInput(f"the first {PROBE_EPOCHS} epochs failed: {(probe.stderr or probe.stdout).strip().splitlines()[-1]}")
    seconds = float(rows_of(newest(work, "tmp"))[-1]["seconds"])
    left = deadline - time.time() - 60 * MARGIN
    wanted = read_settings(settings)[1].epochs
    epochs = min(wanted, int(left / seconds))
    if epochs < 1:
        raise BadInput(f"an epoch takes {seconds:.0f} s, and {max(left, 0):.0f} s are left for training")
    command = [*script, "--epochs", str(epochs), "--time_limit", f"{left / 60:.2f}"]
    # The shell waits for the run, so that its end is known whoever else has gone by then.
    wrapper = subprocess.Popen(["sh", "-c", '"$@" > run.log 2>&1 & echo $! > pid; wait $!; echo $? > exit_code', "sh", *command],
                               cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    commit = folder / "commit.txt"
    state = {"deadline": deadline, "started": time.time(), "epochs": epochs, "wrapper": wrapper.pid, "command": command,
             "commit": commit.read_text().strip() if commit.is_file() else None}
    with whole_file(work / "state.json") as f:
        json.dump(state, f, indent=1)
    print(f"An epoch takes {seconds:.2f} s: {epochs} of {wanted} epochs, {epochs * seconds / 60:.1f} of {left / 60:.1f} minutes")


def watch(work, seconds, each=30.0):
    """Print how far the run is, until it ends or for `seconds`. -> whether it has ended."""
    state, until = read_state(work), time.time() + seconds
    while True:
        ended = (work / "exit_code").exists()
        print(progress(work, state), flush=True)
        if ended:
            code = (work / "exit_code").read_text().strip()
            print(f"The run has ended, exit code {code}: " + ((work / "run.log").read_text().strip().splitlines() or ["no output"])[-1])
            return True
        if time.time() >= until:
            return False
        next_line = min(time.time() + each, until)
        while time.time() < next_line and not (work / "exit_code").exists():
            time.sleep(min(1, max(next_line - time.time(), 0)))


def progress(work, state):
    """One line: epoch, pace, what the run would still take, what is left."""
    left = f"{(state['deadline'] - time.time()) / 60:.1f} min left"
    run = newest(work, "runs")
    rows = rows_of(run) if run else []
    if not rows:
        return f"no epoch logged yet, {left}"
    spent, epoch = sum(float(row["seconds"]) for row in rows), float(rows[-1]["epoch"])
    pace = float(rows[-1]["seconds"]) / (epoch - (float(rows[-2]["epoch"]) if len(rows) > 1 else 0))
    to_go = (state["epochs"] - epoch) * pace - (time.time() - state["started"] - spent if len(rows) < 2 else 0)
    return (f"epoch {epoch:.0f} of {state['epochs']}, {pace:.2f} s each, loss {float(rows[-1]['train_loss']):.2f}, "
            f"test error {100 * (1 - float(rows[-1]['test_acc'])):.2f} %; ends in {max(to_go, 0) / 60:.1f} min, {left}")


def finish(work, name, out):
    """Stop the run if it still trains, evaluate it, and pack evidence and weights into `out`. -> whether it was complete."""
    state = read_state(work)
    if not (work / "exit_code").exists():
        os.kill(int((work / "pid").read_text()), signal.SIGTERM)
        patience = time.time() + GRACE
        while not (work / "exit_code").exists():
            if time.time() > patience:
                raise BadInput(f"the run in {work} has not stopped within {GRACE} s of SIGTERM")
            time.sleep(0.2)
    run = newest(work, "runs")
    if not run:
        raise BadInput(f"the run in {work} failed: {(work / 'run.log').read_text().strip().splitlines()[-1]}")
    packed, complete = work / "packed", (run / "model.torch").exists()
    if complete:
        ship.main([str(run), name, "--half", "--to", str(packed), *(["--commit", state["commit"]] if state["commit"] else [])])
        weights = packed / "pretrained" / f"{name}.torch"
    else:                                                    # no result, but what there is comes home
        evidence = packed / "results" / name
        evidence.mkdir(parents=True, exist_ok=True)
        for path in run.iterdir():
            if path.name in ship.EVIDENCE:
                shutil.copy(path, evidence)
        weights = packed / f"{name}.partial.torch"
        torch.save({key: value.half() if value.is_floating_point() else value
                    for key, value in load_file(run / "checkpoint.pt")["model"].items()}, weights)
        print(f"Stopped after epoch {rows_of(run)[-1]['epoch'] if rows_of(run) else 0} of {state['epochs']}: not a result")
    shutil.copy(work / "run.log", packed / "results" / name / "run.log")
    pack(packed, name, weights, out)
    return complete


def pack(packed, name, weights, out):
    """Evidence first, then the weights in parts, then a list of all with their SHA-256."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.evidence.tar.gz"]
    with tarfile.open(paths[0], "w:gz") as tar:
        tar.add(packed / "results" / name, name)
    content = weights.read_bytes()
    for i in range(0, len(content), PART):
        paths.append(out / f"{weights.name}.part{i // PART:02d}")
        paths[-1].write_bytes(content[i:i + PART])
    manifest = {"name": name, "weights": weights.name, "sha256": hashlib.sha256(content).hexdigest(),
                "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}}
    with whole_file(out / "manifest.json") as f:
        json.dump(manifest, f, indent=1)
    print(f"{out}: {len(paths) + 1} files, the largest {max(path.stat().st_size for path in paths) / 2**20:.1f} MiB")


def join(out, to=PROJECT):
    """Put what `finish` packed in its place: `to`/results/NAME, `to`/pretrained/NAME.torch with its SHA-256."""
    if not (out / "manifest.json").is_file():
        raise BadInput(f"{out} has no manifest.json: it is not what `finish` wrote")
    manifest = json.loads((out / "manifest.json").read_text())
    name, weights = manifest["name"], to / "pretrained" / manifest["weights"]
    for path, digest in manifest["files"].items():
        if not (out / path).is_file() or hashlib.sha256((out / path).read_bytes()).hexdigest() != digest:
            raise BadInput(f"{out / path} is missing or damaged")
    for path in (to / "results" / name, weights):
        if path.exists():
            raise BadInput(f"{path} is there already: move it away first")
    content = b"".join((out / path).read_bytes() for path in sorted(manifest["files"]) if ".part" in path)
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise BadInput(f"the parts of {manifest['weights']} do not make the whole")
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(content)
    with tarfile.open(out / f"{name}.evidence.tar.gz") as tar:
        tar.extractall(to / "results", filter="data")
    if weights.name in SHIPPED_WEIGHTS.values():
        ship.list_sum(weights.parent / "SHA256SUMS", weights.name, manifest["sha256"])
    print(f"{weights} and {to / 'results' / name}")


def rehearse():
    """Every command, on the CPU with a small flow on digits; the project stays as it is."""
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        prepare(here / "folder", packages=())
        start(here / "work", here / "folder", MARGIN + 0.5, REHEARSAL)
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


def rows_of(run):
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


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
        parser.error("say which command: prepare, start, watch, finish, join, or --dry-run")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"timed_run.py: error: {error}", file=sys.stderr)
        sys.exit(2)
