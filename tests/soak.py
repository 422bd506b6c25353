"""A soak test: faults at random instants, and what they cost. pytest leaves it out: it takes hours.

    python tests/soak.py --json results/soak.json               # all parts
    python tests/soak.py kills --n 20 --json FILE.json          # one of them

Each part provokes a fault n times in runs of the script on digits, resumes these, and compares what
they leave with a run that nothing disturbed: weights and checkpoint bit by bit, metrics.csv, the
names of the files. A part ends early after --minutes, and reports how far it came.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from conftest import POINTS, new_model, options, outcomes, run_script, runs, weights_in

import training.report
from training.checkpoint import load_checkpoint
from utils.errors import OneLineParser, check_output, run_command
from utils.metrics import read_metrics
from utils.settings import read_settings

LINE = options(epochs=12, ema=0.9, validation=100, cl_weight=1)
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def start(argv, folder, limit=None):
    """Start the script in `folder`, in a forked process, which has imported everything -> its
    number. limit: called in that process. Its output goes to files beside the folder.
    """
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.chdir(folder)
        sys.stdout, sys.stderr = (file.open("w") for file in outputs(folder))
        if limit:
            limit()
        code = run_script(argv)
    finally:
        os._exit(code)


def outputs(folder):
    """The files of what the last process that ran in `folder` has printed."""
    return [folder.with_suffix(suffix) for suffix in (".out", ".err")]


def errors(folder):
    return outputs(folder)[1].read_text()


def end(process, number=None, seconds=0.0):
    """Wait for a process, to which a signal is sent after some seconds -> its exit code."""
    stop = time.monotonic() + seconds
    while number and time.monotonic() < stop:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.001)
    if number:
        os.kill(process, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left_by(run):
    """What a finished run leaves: names of files, metrics, and all tensors and values by name."""
    def flat(content, name=""):
        if isinstance(content, dict):
            for key, value in content.items():
                yield from flat(value, f"{name}.{key}")
        elif name not in (".seconds", ".settings.resume", ".rng.python"):  # unseeded, and unused
            yield name, content
    rows = [{k: f"{v:.7g}" for k, v in row.items() if k != "seconds"}
            for row in read_metrics(run / "metrics.csv")]
    checkpoint = dict(flat(torch.load(run / "checkpoint.pt")))
    return {path.name for path in run.iterdir()}, rows, {
        **checkpoint, **torch.load(run / "model.torch")}


def lost(run, whole):
    """What a run lacks or has otherwise than `whole`, what an undisturbed run leaves: names."""
    if not (run / "model.torch").exists():
        return ["model.torch"]
    names, rows, values = left_by(run)
    wrong = [*(names ^ whole[0]), *["metrics.csv"] * (rows != whole[1])]
    return wrong + [key for key, value in whole[2].items() if key not in values or not (
        torch.equal(value, values[key]) if isinstance(value, torch.Tensor)
        else value == values[key])]


class Undisturbed:
    """A run that nothing disturbs: what it leaves, and how long it takes."""

    def __init__(self, folder, line=LINE):
        folder.mkdir()
        started = time.monotonic()
        assert end(start(line, folder)) == 0, errors(folder)
        self.seconds = time.monotonic() - started
        self.run, = runs(folder)
        self.left = left_by(self.run)


def the_run(folder):
    """The run in `folder`, wherever it lies, or None."""
    found = [run for kind in ("runs", "fails") for run in runs(folder, kind)
             if (run / "params.yaml").exists()]
    assert len(found) <= 1, found
    return found[0] if found else None


def interrupt(numbers, folder, whole, rng):
    """Start a run in `folder` and send it signals, of these numbers, at random instants, resuming
    it, until it has ended.

    -> counts of what was provoked; "lost", the names of what differs from the run `whole`.
    """
    counts = {"runs": 1, "signals": 0, "half_written": 0, "before_params": 0,
              "before_checkpoint": 0}
    folder.mkdir()
    seen = set()
    while True:
        run = the_run(folder)
        argv = ["--resume", str(run)] if run else LINE
        number = rng.choice(numbers)
        code = end(start(argv, folder), number, rng.uniform(0, whole.seconds))
        run = the_run(folder)
        if code == 0 and run and (run / "model.torch").exists() and (run / "report.html").exists():
            break
        counts["signals"] += 1
        expected = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGINT: (130,)}.get(
            number, (0, 130, -number))          # -number: before the settings were read
        if code not in expected:
            return {**counts, "lost": [f"exit code {code}: {errors(folder)[-300:]}"]}
        counts["before_params"] += run is None
        counts["before_checkpoint"] += bool(run) and not (run / "checkpoint.pt").exists()
        halves = {(p, p.stat().st_mtime_ns) for p in run.glob("*.partial")} if run else set()
        counts["half_written"] += not halves <= seen
        seen |= halves
    return {**counts, "lost": lost(run, whole.left)}


def add(totals, counts):
    """Add `counts`, numbers and lists, to `totals`."""
    for key, value in counts.items():
        totals[key] = totals.get(key, type(value)()) + value


def repeated(fault, provoke):
    """-> the part that calls `provoke` until it has counted n times the `fault`.

    provoke: of a folder that it creates, the run that nothing disturbed and the random numbers ->
        counts and, in "lost", what is wrong; the part then ends
    """
    def part(n, folder, rng, in_time):
        whole, totals = Undisturbed(folder / "whole"), {fault: 0, "lost": []}
        while totals[fault] < n and in_time():
            place = folder / "disturbed"
            add(totals, provoke(place, whole, rng))
            if totals["lost"]:
                break
            shutil.rmtree(place)
        return totals
    return part


def failed(process, place, message):
    """Wait for a run that has too little of something -> counts, with what is wrong in "lost"."""
    code, err, run = end(process), errors(place), the_run(place)
    wrong = []
    if code and (code not in (1, 2) or err.count("\n") != 1 or message not in err):
        wrong.append(f"exit code {code}: {err[-300:]}")
    if run and list(run.glob("*.partial")):
        wrong.append("a .partial is left")
    return {"failed": int(code != 0), "enough": int(code == 0), "lost": wrong}


def resumed(place, whole):
    """Resume the run in `place`, or start it again if there is none -> what is lost."""
    run = the_run(place)
    code = end(start(["--resume", str(run)] if run else LINE, place))
    return lost(the_run(place), whole.left) if code == 0 else [f"resumed: {errors(place)[-300:]}"]


def limited(start_one):
    """-> the part in which runs have too little of something, and are then resumed with enough.

    start_one: of what `provoke` takes in `repeated` -> what `failed` returns of a run that it
        starts; the folder then contains what that run has left
    """
    def provoke(place, whole, rng):
        counts = start_one(place, whole, rng)
        return {**counts, "lost": counts["lost"] + resumed(place, whole)}
    return repeated("failed", provoke)


def large_files(place, whole, rng):
    """A limit on the size of a file, as of a quota, below the size of the largest one."""
    size = int(rng.random() * max(path.stat().st_size for path in whole.run.iterdir()))
    place.mkdir()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return failed(start(LINE, place, limit), place, "File too large")


def open_files(place, whole, rng):
    """A limit on the number of open files, from what the process has at its start."""
    more = rng.randint(0, 8)
    place.mkdir()

    def limit():
        most = len(os.listdir("/proc/self/fd")) + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return failed(start(LINE, place, limit), place, "Too many open files")


def full_disk(place, whole, rng):
    """A disk that fills up: a small file system in memory, which only root can mount."""
    size = sum(path.stat().st_size for path in whole.run.iterdir())
    small = place.with_name("small")
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size * rng.random()) + 4096}"]
    subprocess.run([*mount, "tmpfs", str(small)], check=True)
    try:
        counts = failed(start(LINE, small), small, "No space left on device")
        shutil.copytree(small, place, symlinks=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    small.rmdir()
    return counts


def damages(n, folder, rng, in_time):
    """Random bits of weights and of a checkpoint flipped, or their ends cut off.

    The error is one line, or the numbers are those of the file as it was: others are "lost".
    """
    whole = Undisturbed(folder / "whole", options(epochs=1, ema=0.5, validation=100))
    _, resumed = read_settings(["--resume", str(whole.run), "--epochs", "3"])
    model, totals = new_model(), {"lost": []}

    def checkpoint(path):
        return load_checkpoint(path, model, resumed)
    for name, load in (("model.torch", weights_in), ("checkpoint.pt", checkpoint)):
        totals[name] = outcomes(whole.run / name, load, n, rng.random())
        totals["lost"] += [name] * totals[name]["different"]
    return totals


def seeds(n, folder, rng, in_time):
    """Short runs of images and of points with the seeds 0 to n - 1: what is not finite."""
    totals = {"runs": 0, "lost": []}
    for seed in range(n):
        for data, changes in {"digits": {}, "moons": POINTS}.items():
            place = folder / f"{data}{seed}"
            if not in_time():
                return totals
            place.mkdir()
            code = end(start(options(epochs=2, seed=seed, data_seed=seed, **changes), place))
            totals["runs"] += 1
            if code or not the_run(place):
                totals["lost"].append(f"{place.name}: exit code {code}: {errors(place)[-300:]}")
                continue
            run = the_run(place)
            kept = torch.load(run / "model.torch")
            figures = [row[key] for row in read_metrics(run / "metrics.csv")
                       for key in ("train_loss", "labelled_acc", "test_log_p", "test_acc")]
            totals["lost"] += [f"{place.name}: {name}" for name, t in kept.items()
                               if not t.isfinite().all()]
            if not all(map(math.isfinite, figures)) or not (run / "report.html").exists():
                totals["lost"].append(f"{place.name}: figures or pictures")
            shutil.rmtree(place)
    return totals


class Watched:
    """A run of n epochs that draws its pictures after every 10th, and what its process has used.

    seen: at the last look before each row of metrics.csv but the first: MiB of memory, open files,
        threads, and seconds of the CPU, which depend less than others on what else runs
    """

    def __init__(self, n, folder):
        folder.mkdir()
        self.process, self.folder = start(options(epochs=n, log_each=10), folder, self.draw), folder
        self.rows, self.n_rows, self.seen = 0, n // 10, {}

    @staticmethod
    def draw():
        training.report.SECONDS_BETWEEN_PLOTS = 0

    def look(self):
        """-> whether it runs."""
        if os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        run, proc = the_run(self.folder), Path("/proc", str(self.process))
        self.rows = len(read_metrics(run / "metrics.csv")) if run else 0
        if 0 < self.rows < self.n_rows:         # later its files close
            status = dict(re.findall(r"(\w+):\s+(\d+)", (proc / "status").read_text()))
            cpu = sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:13]))
            self.seen[self.rows] = (int(status["VmRSS"]) / 1024, len(os.listdir(proc / "fd")),
                                    int(status["Threads"]), cpu / os.sysconf("SC_CLK_TCK"))
        return True

    def seconds_of_an_epoch(self):
        """Of the CPU, in the last 80 epochs that were seen."""
        first, *_, last = sorted(self.seen)[-9:]
        return (self.seen[last][3] - self.seen[first][3]) / (last - first) / 10


def long(n, folder, rng, in_time):
    """A run of n epochs: memory, open files and threads; the time of an epoch at its end, beside
    that of a run that has just begun.
    """
    old, young = Watched(n, folder / "old"), None
    while old.look():
        if not in_time():
            os.kill(old.process, signal.SIGTERM)
        if not young and old.rows >= n // 10 - 11:
            young = Watched(100, folder / "young")
        if young:
            young.look()
        time.sleep(0.2)
    memory, files, threads, _ = zip(*old.seen.values())
    report = {"epochs": 10 * old.rows, "exit_code": end(old.process), "MiB at epoch 10": memory[0],
              "MiB at the end": memory[-1], "MiB at most": max(memory),
              "open files": [min(files), max(files)], "threads": [min(threads), max(threads)]}
    if young:
        end(young.process)
        report.update({"CPU seconds of an epoch, in a new run": young.seconds_of_an_epoch(),
                       "CPU seconds of an epoch, at the end": old.seconds_of_an_epoch()})
    return report


PARTS = {       # name: function, n
    "kills": (repeated("signals", partial(interrupt, [signal.SIGKILL])), 200),
    "signals": (repeated("signals", partial(interrupt, SIGNALS)), 100),
    "large_files": (limited(large_files), 30),
    "open_files": (limited(open_files), 30),
    "full_disk": (limited(full_disk), 30),
    "damages": (damages, 1000),
    "seeds": (seeds, 50),
    "long": (long, 2000),
}


def main():
    parser = OneLineParser(description="Provoke faults at random.", allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--n", type=int, help="faults of each part; by default those of PARTS")
    parser.add_argument("--minutes", type=float, default=30, help="of each part, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    check_output(args.json)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(unknown)}")
    report = {}
    for name in args.parts or PARTS:
        (part, n), started = PARTS[name], time.monotonic()
        stop = started + 60 * args.minutes
        with tempfile.TemporaryDirectory() as folder:
            counts = part(args.n or n, Path(folder), random.Random(args.seed),
                          lambda stop=stop: time.monotonic() < stop)
        report[name] = {**counts, "seconds": round(time.monotonic() - started)}
        print(name, json.dumps(report[name]), flush=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(part.get("lost") for part in report.values()))


if __name__ == "__main__":
    run_command(main)
