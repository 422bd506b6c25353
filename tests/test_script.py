"""The script in a process of its own, as a user runs it: from the settings to samples.png."""

import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import POINTS, PROJECT, SCRIPT, TINY, execute, options, randomize, runs, words
from PIL import Image

from models import build_model
from models.checks import check_bijection
from training.checkpoint import load_weights
from training.progress import SAME_EVENT
from utils.errors import run_command
from utils.metrics import read_metrics

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, str(SCRIPT)]
FILES = {"params.yaml", "log.txt", "metrics.csv", "checkpoint.pt", "model.torch", "samples.png",
         "curves.png", "labelled.txt", "report.html"}
HEADER = ("epoch       loss test err bits/dim seconds",
          "epoch       loss test err log p(x) seconds")


def succeed(folder, command, **environment):
    """Run a command in `folder` -> its stdout and stderr."""
    done = execute(folder, command, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def start(folder, *argv):
    """Run the script in `folder` -> what it prints."""
    return succeed(folder, [*COMMAND, *argv])[0]


def start_and_signal(folder, beginning, number, *argv):
    """Start the script, and send it a signal after a line with this beginning -> the process."""
    def heed_signals():     # a shell's background jobs ignore Ctrl-C, nohup's SIGHUP: inherited
        for heeded in (signal.SIGINT, signal.SIGHUP):
            signal.signal(heeded, signal.SIG_DFL)
    process = subprocess.Popen([*COMMAND, *argv], cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)
    next(line for line in process.stdout if line.startswith(beginning))
    process.send_signal(number)
    return process


def run_of(folder):
    run, = runs(folder)
    return run


@pytest.mark.parametrize("changes, more", [
    ({}, {"mistakes.png", "samples-0.7.png"}), (POINTS, {"density.png"})])
def test_from_settings_to_samples(tmp_path, changes, more):
    out = start(tmp_path, *options(epochs=2, **changes))
    run = run_of(tmp_path)
    assert {path.name for path in run.iterdir()} - {"changes.diff"} == FILES | more
    for picture in run.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200 and len(image.convert("L").getcolors(100_000)) > 10
    header, *lines = out.splitlines()[out.splitlines().index(HEADER[bool(changes)]):][:3]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert {header, *lines} < set((run / "log.txt").read_text().splitlines())
    assert len((run / "labelled.txt").read_text().split()) == TINY["supervised"]
    start(tmp_path, "--config", str(run / "params.yaml"), "--tmp")
    rerun, = runs(tmp_path, "tmp")
    weights, again = (torch.load(folder / "model.torch") for folder in (run, rerun))
    assert all(torch.equal(weights[key], again[key]) for key in weights)

    evaluated = start(tmp_path, "--pretrained", str(run))
    last = read_metrics(run / "metrics.csv")[-1]
    log_p = float(re.search(r"log p\(x\) +(\S+) nats", evaluated)[1])
    error = float(re.search(r"Test error +(\S+)%", evaluated)[1])
    assert log_p == pytest.approx(last["test_log_p"], abs=2e-3)
    assert error == pytest.approx(100 - 100 * last["test_acc"], abs=0.02)
    assert len(runs(tmp_path)) == 1                 # evaluation creates no run


def test_interrupt(tmp_path):
    process = start_and_signal(tmp_path, "    2 ", signal.SIGINT, *options(epochs=10_000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "--resume" in err
    run = run_of(tmp_path)
    checkpoint = torch.load(run / "checkpoint.pt")
    assert checkpoint["epoch"] >= 1
    start(tmp_path, "--resume", str(run), "--epochs", str(checkpoint["epoch"] + 1))
    assert (run / "samples.png").exists()


def test_time_limit_and_termination(tmp_path):
    out = start(tmp_path, *options(epochs=10_000), "--time_limit", "0.03")
    assert "by its time limit of 0.03 minutes" in out and "--resume" in out
    run = run_of(tmp_path)

    def steps_done():
        checkpoint = torch.load(run / "checkpoint.pt")
        return checkpoint["epoch"], checkpoint["step"]
    done = steps_done()
    command = shlex.split(out.splitlines()[-1])[2:]             # it has no time limit any more
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        process = start_and_signal(tmp_path, "epoch ", getattr(signal, name), *command)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and f"Stopped      by {name}" in out and not err, err
        before, done = done, steps_done()
        assert done > before
    assert not (run / "traceback.txt").exists()


def test_a_second_signal_ends_a_run_within_a_training_step(tmp_path):
    """A step of seconds: the first signal would stop the run after it."""
    large = options(epochs=1, ssl_hd=512, ssl_k=4, num_examples=400, train_bs=400)
    process = start_and_signal(tmp_path, "epoch ", signal.SIGTERM, *large)
    time.sleep(1.5 * SAME_EVENT)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Stopped" not in out
    assert "Interrupted; to continue:\n" in err and "Traceback" not in err
    run = run_of(tmp_path)
    assert torch.load(run / "checkpoint.pt")["step"] == 0 and not list(run.glob("*.partial"))


def torchrun(program):
    """The command that runs a Python program in two processes; arguments can follow."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(program)]


def script_with(folder, changes):
    """A program in `folder` that runs the script after `changes`, source code -> its path."""
    (folder / "driver.py").write_text(f"""import os, runpy, sys
sys.path.insert(0, {str(PROJECT)!r})
{changes}
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    return folder / "driver.py"


STOP = """
from training import progress


class AfterTwoSteps(progress.Limits):         # only the second process has this reason
    steps = 0

    @property
    def reason(self):
        self.steps += 1
        return "by the test" if self.steps >= 2 and os.environ.get("RANK") == "1" else None


if os.environ.get("STOP"):
    progress.Limits = AfterTwoSteps
"""


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-5)])
def test_two_processes_train_as_one(tmp_path, dtype, tolerance):
    """Three steps over gloo give the weights and metrics of one process, in one run directory.

    In float64 another run of two processes is stopped by one of them after two steps, and continued
    by a single process.
    """
    driver = script_with(tmp_path, f"import torch; torch.set_default_dtype(torch.{dtype})\n{STOP}")
    alone, both = [sys.executable, str(driver)], torchrun(driver)
    line = options(epochs=1, num_examples=192, lr_schedule="no", micro_bs=20, cl_weight=1,
                   cons_weight=1, ema=0.9, validation=100)

    def train(name, command, argv, **environment):
        (tmp_path / name).mkdir(exist_ok=True)
        out, _ = succeed(tmp_path / name, [*command, *argv], **environment)
        return out, run_of(tmp_path / name)

    def figures_of(run):
        row, = read_metrics(run / "metrics.csv")
        return {key: value for key, value in row.items() if key != "seconds"}

    _, reference = train("alone", alone, line)
    out, run = train("both", both, line)
    assert out.count("Test error") == 1 and "and 1 more" in out
    assert torch.load(reference / "checkpoint.pt")["optimizer"]["step"] == 3
    others = [run]
    if dtype == "float64":
        out, stopped = train("stopped", both, line, STOP="1")
        assert out.count("by the test after step 2 of 3") == 1
        train("stopped", alone, ["--resume", str(stopped)])
        others.append(stopped)
    weights = torch.load(reference / "model.torch")
    for run in others:
        for key, value in torch.load(run / "model.torch").items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=tolerance, msg=key)
        assert figures_of(run) == pytest.approx(figures_of(reference), rel=1e-4)


KILLED = """
import signal
from training import progress


class InTheSecondEpoch(progress.Limits):
    steps = 0

    @property
    def reason(self):
        self.steps += 1
        if self.steps == 5 and os.environ.get("RANK") == "3" and os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reason


progress.Limits = InTheSecondEpoch
"""


def on_two_machines(folder, program, argv, **environment):
    """Run a program in four processes, two of each of two torchruns -> exit codes, their stderr."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [*torchrun(program), *argv]
    command[3:3] = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
                    f"localhost:{port}"]
    agents = [subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
              for _ in range(2)]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    return [agent.returncode for agent in agents], "".join(errors)


def test_two_machines_train_as_one_process(tmp_path):
    """Four processes give the weights of one. Of another run one of the four is killed, and two
    processes go on."""
    double = "import torch; torch.set_default_dtype(torch.float64)"
    driver = script_with(tmp_path, f"{double}\n{KILLED}")
    line = options(epochs=2, num_examples=192, lr_schedule="no")
    (tmp_path / "alone").mkdir()
    succeed(tmp_path / "alone", [sys.executable, str(driver), *line])
    codes, err = on_two_machines(tmp_path / "four", driver, line)
    assert codes == [0, 0], err
    codes, err = on_two_machines(tmp_path / "killed", driver, line, KILL="1")
    assert 0 not in codes
    ended = "Another process of the run has ended or cannot be reached: .* The last good"
    assert len(re.findall(ended, err)) == 1, err
    failed, = runs(tmp_path / "killed", "fails")
    assert torch.load(failed / "checkpoint.pt")["epoch"] == 1
    succeed(tmp_path / "killed", [*torchrun(driver), "--resume", str(failed)])
    weights, *others = (torch.load(run_of(tmp_path / name) / "model.torch")
                        for name in ("alone", "four", "killed"))
    for other in others:
        for key, value in other.items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-9, msg=key)


def test_two_processes_print_one_message(tmp_path):
    """A time limit and a bad setting concern both processes, and only one of them prints it."""
    command = torchrun(SCRIPT)
    out, _ = succeed(tmp_path, [*command, *options(epochs=10_000), "--time_limit", "0.03"])
    assert out.count("by its time limit") == 1
    step, epoch = re.search(r" after (?:step (\d+) of 4 in )?epoch (\d+); to continue:",
                            words(out)).groups()
    checkpoint = torch.load(run_of(tmp_path) / "checkpoint.pt")
    assert checkpoint["step"] == int(step or 0)
    assert checkpoint["epoch"] == int(epoch) - (step is not None)
    for wrong, message in (({"supervised": 9}, "supervised must"), ({"lr": -1}, "argument --lr")):
        bad = execute(tmp_path, [*command, *options(**wrong)])
        assert bad.returncode != 0
        assert bad.stderr.count(f"train-flow-ssl.py: error: {message}") == 1


def test_two_processes_train_points_without_warnings(tmp_path):
    """DistributedDataParallel warns if a gradient has other strides than its parameter."""
    # In a file, because torchrun takes --l for an abbreviation of its own options.
    settings = {**TINY, **POINTS, "epochs": 1, "ssl_k": 1, "supervised": 4, "num_examples": 128}
    (tmp_path / "c.yaml").write_text("".join(f"{key}: {v}\n" for key, v in settings.items()))
    _, err = succeed(tmp_path, [*torchrun(SCRIPT), "--config", "c.yaml"])
    assert "strides" not in err, err


FAULTS = """
import time
from utils import datasets
from utils.errors import BadInput
from utils.runs import Run

load_data, move = datasets.load_data, Run._move_to_fails


def failing(settings, device):                  # in the second process only
    if os.environ["RANK"] == "1":
        raise BadInput("no data here")
    return load_data(settings, device)


def slow(self, trace):                          # as on a slow disk
    time.sleep(5)
    move(self, trace)


if os.environ["FAULT"] == "data":
    datasets.load_data = failing
else:
    Run._move_to_fails = slow
"""


def test_a_fault_in_one_of_two_processes_is_told_once(tmp_path):
    """Bad input of the other process; and a failed run is moved before torchrun ends the rest."""
    command = torchrun(script_with(tmp_path, FAULTS))
    bad = execute(tmp_path, [*command, *options(epochs=1)], FAULT="data")
    assert bad.returncode != 0 and bad.stderr.count("error: no data here") == 1
    assert not runs(tmp_path) and not runs(tmp_path, "index")
    failed = execute(tmp_path, [*command, *options(epochs=2, lr=1e30)], FAULT="disk")
    assert failed.returncode != 0 and failed.stderr.count("is not finite") == 1
    assert not runs(tmp_path) and (runs(tmp_path, "fails")[0] / "traceback.txt").exists()


CONSISTENCY = {"cons_weight": 1, "clf_noise": "train", "target_weights": "averaged", "ema": 0.9,
               "spread_labels": 0.9, "validation": 100}


@pytest.mark.parametrize("changes", [{}, CONSISTENCY])
def test_benchmarks(tmp_path, changes):
    command = [sys.executable, str(PROJECT / "benchmarks" / "throughput.py"), *options(**changes),
               "--steps", "2", "--json", "out.json"]
    out, _ = succeed(tmp_path, [*command, "--modes", "fp32,bf16", "--profile", "5"])
    longest = re.findall(r"^ *(\d+\.\d{3}) ms +\d+  aten::", out, re.MULTILINE)
    assert len(longest) >= 5 and re.search(r"fp32: [\d,]+ operators, \d", out)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [row["mode"] for row in figures["modes"]][:2] == ["fp32", "bf16"]
    for row in figures["modes"][:2]:
        assert row["ms"] > 0 and row["peak_gib"] > 0
        share = row["tflops"] / figures["limits_tflops"][f"convolution {row['mode']}"]
        assert row["of_convolution"] == pytest.approx(100 * share)
        assert row["images_per_s"] * row["ms"] / 1e3 == pytest.approx(TINY["train_bs"])
    assert "limit: convolution fp32" in out and "bf16" in out


@pytest.fixture
def marginal(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module("marginal")


def test_benchmark_of_classes(tmp_path):
    command = [sys.executable, str(PROJECT / "benchmarks" / "marginal.py"), "--sides", "8"]
    succeed(tmp_path, [*command, "--classes", "3", "2", "--rounds", "2", "--threads", "1", "--json",
                       "out.json", "--picture", "out.png"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 2 * 6 * 3 and all(row["calls"] == 2 for row in rows)
    assert all(0 < row["ms_low"] <= row["ms"] <= row["ms_high"] for row in rows)
    with Image.open(tmp_path / "out.png") as image:
        assert min(image.size) > 200
    for wrong in (["--classes", "0"], ["--sides", "10"], ["--json", "nowhere/x"]):
        done = execute(tmp_path, [*command, *wrong])
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("side", [8, 28])
@torch.no_grad()
def test_the_models_of_the_benchmark(marginal, side):
    """Their sizes, densities that depend on the label, samples."""
    shape, x = (1, side, side), torch.rand(2, 1, side, side)
    models = marginal.make_models(shape, 10)
    wanted = marginal.size(models["SCNF-GLOW"])
    for name, share in (("conditional flow", 0.1), ("normflows", 0.2), ("zuko", 0.2)):
        assert marginal.size(models[name]) == pytest.approx(wanted, rel=share)
    for name, model in marginal.make_models(shape, 3).items():
        if hasattr(model, "initialize"):
            model.initialize(torch.rand(64, *shape))
        for key, parameter in model.named_parameters():
            if "last" in key or "loc" in key:                   # zero at the start
                parameter.normal_(std=0.01)
        log_joint = model.log_joint(x)
        assert log_joint.isfinite().all() and len(log_joint[0].unique()) == 3, name
        if side == 8:
            assert model.sample(torch.tensor([2, 0])).numel() == x.numel()


def test_where_the_benchmark_s_models_cross(marginal):
    def rows(name, *ms):
        return [{"side": 8, "classes": k, "model": name, "what": "value", "ms": t,
                 "ms_low": 0.9 * t, "ms_high": 1.1 * t} for k, t in zip((1, 100), ms)]
    table = pd.DataFrame([*rows("A", 10, 10), *rows("B", 1, 100), *rows("C", 11, 9.5)])
    assert marginal.crossings(table) == ["8x8, value: A is faster than B from K = 10.0",
                                         "8x8, value: C is faster than B from K = 10.2"]


def test_the_conditional_flow_of_the_benchmark(float64, marginal, monkeypatch):
    """Its log-determinant and inverse, given labels; its gradient by one pass after another."""
    flow = randomize(marginal.ConditionalFlow((1, 8, 8), 3, 8))
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([2, 0, 1])

    class Given:
        def __call__(self, x, y):
            flow.context = flow.embedding(y)
            return flow.f(x)

        def inverse(self, z, y):
            flow.context = flow.embedding(y)
            return flow.f.inverse(z)
    check_bijection(Given(), x, y)
    assert not torch.allclose(*flow.log_joint(x)[:, :2].T)      # the label matters
    gradients = []
    for graphs in (10, 1):
        monkeypatch.setattr(marginal, "GRAPHS", graphs)
        flow.zero_grad()
        flow.backward(x)
        gradients.append([p.grad for p in flow.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wrong, message", [
    (["--steps", "0"], "steps must be at least 1"), (["--json", "nowhere/x"], "no folder nowhere"),
    (["--data", "moons", "--cons_weight", "1"], "cons_weight needs images"),
    (["--data", "moons", "--modes", "bf16"], "moons has points"),
    (["--profile", "-1"], "--profile must"), (["--modes", "fp8"], "no mode fp8"),
    (["--steps", "x"], "invalid int value")])
def test_wrong_arguments_of_benchmarks(tmp_path, monkeypatch, capsys, wrong, message):
    """They are told in one line, before anything is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["throughput.py", *wrong])
    with pytest.raises(SystemExit) as end:
        run_command(importlib.import_module("throughput").main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and message in err


def test_benchmarks_fill_large_batches(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    measure = importlib.import_module("measure")
    settings = SimpleNamespace(data="digits", train_bs=3000, test_bs=5000, clf_noise="true",
                               cons_weight=0, spread_labels=0)
    data = measure.random_data(settings, "cpu")
    assert len(data.train_x) >= 3000 and len(data.test_x) >= 5000


def test_half_precision_weights_and_checkpoints_load(tmp_path):
    model = build_model(TINY, (1, 8, 8), 10)
    half = {key: v.half() if v.is_floating_point() else v for key, v in model.state_dict().items()}
    torch.save({"model": half}, tmp_path / "half.pt")
    fresh = build_model(TINY, (1, 8, 8), 10)
    load_weights(fresh, tmp_path / "half.pt")
    assert all(v.dtype == torch.float32 for v in fresh.parameters())
    weight, loaded = (m.f_w.levels[0][2].net.first.weight for m in (model, fresh))
    torch.testing.assert_close(loaded, weight, rtol=1e-3, atol=1e-3)


def test_help_lists_the_options(tmp_path):
    out = start(tmp_path, "--help")
    for name in ("config", "ssl_dim", "resume", "pretrained", "cl_weight"):
        assert f"--{name}" in out
    assert "--lr_gamma" not in out
