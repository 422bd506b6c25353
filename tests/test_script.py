"""The script in a process of its own, as a user runs it: from the settings to samples.png."""

import importlib
import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, SCRIPT, TINY, execute, options, runs
from PIL import Image

from models import build_model
from models.published import published_names
from training.checkpoint import load_weights
from utils.errors import run_command
from utils.metrics import read_metrics

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, str(SCRIPT)]
FILES = {"params.yaml", "log.txt", "metrics.csv", "checkpoint.pt", "model.torch", "samples.png",
         "curves.png", "labelled.txt", "report.html"}
POINTS = {"data": "moons", "model": "toy", "ssl_dim": -1, "ssl_l": 1, "l": 2}


def start(folder, *argv):
    return execute(folder, [*COMMAND, *argv])


def start_in_background(folder, *argv):
    def heed_ctrl_c():      # a shell has its background jobs ignore it, and theirs inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*COMMAND, *argv], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)


def run_of(folder):
    run, = runs(folder)
    return run


@pytest.mark.parametrize("changes, more", [
    ({}, {"mistakes.png"}), (POINTS, {"density.png"})])
def test_from_settings_to_samples(tmp_path, changes, more):
    done = start(tmp_path, *options(epochs=2, **changes))
    assert done.returncode == 0, done.stderr
    run = run_of(tmp_path)
    assert {path.name for path in run.iterdir()} - {"changes.diff"} == FILES | more
    for picture in run.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200 and len(image.convert("L").getcolors(100_000)) > 10
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    words = ("loss", "log-lik", "L_clf", "test log p", "lr")
    assert len(lines) == 2 and all(word in lines[0] for word in words)
    assert set(lines) < set((run / "log.txt").read_text().splitlines())
    assert len((run / "labelled.txt").read_text().split()) == TINY["supervised"]
    again = start(tmp_path, "--config", str(run / "params.yaml"), "--tmp")
    assert again.returncode == 0, again.stderr
    rerun, = (tmp_path / "logs" / "exman-train-flow-ssl.py" / "tmp").iterdir()
    one, two = (torch.load(folder / "model.torch") for folder in (run, rerun))
    assert all(torch.equal(one[key], two[key]) for key in one)

    evaluated = start(tmp_path, *options(**changes), "--pretrained", str(run / "model.torch"))
    assert evaluated.returncode == 0, evaluated.stderr
    last = read_metrics(run / "metrics.csv")[-1]
    log_p = float(re.search(r"log p\(x\) +(\S+) nats", evaluated.stdout)[1])
    error = float(re.search(r"Test error +(\S+)%", evaluated.stdout)[1])
    assert log_p == pytest.approx(last["test_log_p"], abs=2e-3)
    assert error == pytest.approx(100 - 100 * last["test_acc"], abs=0.02)
    assert len(list(run.parent.iterdir())) == 1                 # evaluation creates no run


def test_interrupt(tmp_path):
    process = start_in_background(tmp_path, *options(epochs=10_000))
    for line in process.stdout:
        if line.startswith("epoch    2"):
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    err = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in err and "--resume" in err
    run = run_of(tmp_path)
    checkpoint = torch.load(run / "checkpoint.pt")
    assert checkpoint["epoch"] >= 1
    resumed = start(tmp_path, "--resume", str(run), "--epochs", str(checkpoint["epoch"] + 1))
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "samples.png").exists()


def test_time_limit_and_termination(tmp_path):
    done = start(tmp_path, *options(epochs=10_000), "--time_limit", "0.03")
    assert done.returncode == 0, done.stderr
    assert "by its time limit of 0.03 minutes" in done.stdout and "--resume" in done.stdout
    run = run_of(tmp_path)
    epoch = torch.load(run / "checkpoint.pt")["epoch"]
    process = start_in_background(tmp_path, "--resume", str(run), "--time_limit", "0")
    for line in process.stdout:
        if line.startswith("epoch "):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped by SIGTERM" in out and "--resume" in out, err
    assert torch.load(run / "checkpoint.pt")["epoch"] > epoch
    assert not (run / "traceback.txt").exists()


def torchrun(n, *argv):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), *argv]


DRIVER = """import os, runpy, sys
import torch

sys.path.insert(0, {project!r})
torch.set_default_dtype(torch.{dtype})

from training import progress


class AfterTwoSteps(progress.Limits):         # only the second process has this reason
    steps = 0

    @property
    def reason(self):
        self.steps += 1
        return "by the test" if self.steps >= 2 and os.environ.get("RANK") == "1" else None


if os.environ.get("STOP"):
    progress.Limits = AfterTwoSteps
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-5)])
def test_two_processes_train_as_one(tmp_path, dtype, tolerance):
    """Three steps over gloo give the weights and metrics of one process, in one run directory.

    In float64 another run of two processes is stopped by one of them after two steps, and continued
    by a single process.
    """
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(project=str(PROJECT), script=str(SCRIPT), dtype=dtype))
    line = options(epochs=1, num_examples=192, lr_schedule="no", micro_bs=20, cl_weight=1,
                   cons_weight=1, ema=0.9, validation=100)

    def train(name, n, argv, **environment):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = torchrun(n, str(driver)) if n > 1 else [sys.executable, str(driver)]
        done = execute(folder, [*command, *argv], **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout, run_of(folder)

    _, one = train("one", 1, line)
    out, two = train("two", 2, line)
    assert out.count("Test error") == 1 and "and 1 more" in out
    assert torch.load(one / "checkpoint.pt")["optimizer"]["step"] == 3
    others = [two]
    if dtype == "float64":
        out, stopped = train("stopped", 2, line, STOP="1")
        assert out.count("Stopped by the test after step 2 of 3") == 1
        train("stopped", 1, ["--resume", str(stopped)])
        others.append(stopped)
    for run in others:
        ours, theirs = (torch.load(r / "model.torch") for r in (one, run))
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=tolerance, msg=key)
        ours, theirs = (metrics_of_epoch_1(r) for r in (one, run))
        assert theirs == pytest.approx(ours, rel=1e-4)


def metrics_of_epoch_1(run):
    """The first row of metrics.csv, without the seconds."""
    *values, _ = (run / "metrics.csv").read_text().split()[1].split(",")
    return [float(value) for value in values]


def test_two_processes_print_one_message(tmp_path):
    """A time limit and a bad setting concern both processes, and only one of them prints it."""
    command = torchrun(2, str(SCRIPT))
    stopped = execute(tmp_path, [*command, *options(epochs=10_000), "--time_limit", "0.03"])
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("by its time limit") == 1
    step, epoch = re.search(r" after (?:step (\d+) of 4 in )?epoch (\d+); to continue",
                            stopped.stdout).groups()
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
    done = execute(tmp_path, [*torchrun(2, str(SCRIPT)), "--config", "c.yaml"])
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr, done.stderr


FAULTS = """import os, runpy, sys, time

sys.path.insert(0, {project!r})
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
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_fault_in_one_of_two_processes_is_told_once(tmp_path):
    """Bad input of the other process; and a failed run is moved before torchrun ends the rest."""
    driver = tmp_path / "driver.py"
    driver.write_text(FAULTS.format(project=str(PROJECT), script=str(SCRIPT)))
    command = torchrun(2, str(driver))
    bad = execute(tmp_path, [*command, *options(epochs=1)], FAULT="data")
    assert bad.returncode != 0 and bad.stderr.count("error: no data here") == 1
    assert not runs(tmp_path) and not runs(tmp_path, "index")
    failed = execute(tmp_path, [*command, *options(epochs=2, lr=1e30)], FAULT="disk")
    assert failed.returncode != 0 and failed.stderr.count("is not finite") == 1
    assert not runs(tmp_path) and (runs(tmp_path, "fails")[0] / "traceback.txt").exists()


CONSISTENCY = {"cons_weight": 1, "clf_noise": "train", "target_weights": "averaged", "ema": 0.9,
               "spread_labels": 0.9, "validation": 100}


@pytest.mark.parametrize("benchmark, changes", [
    ("throughput", {}), ("throughput", CONSISTENCY), ("evaluate", {})])
def test_benchmarks(tmp_path, benchmark, changes):
    count, images = {"throughput": ("--steps", 64), "evaluate": ("--batches", 180)}[benchmark]
    command = [sys.executable, str(PROJECT / "benchmarks" / f"{benchmark}.py"),
               *options(**changes), count, "2", "--json", "out.json"]
    done = execute(tmp_path, [*command, "--modes", "fp32,bf16", "--profile", "5"])
    assert done.returncode == 0, done.stderr
    longest = re.findall(r"^ *(\d+\.\d{3}) ms +\d+  aten::", done.stdout, re.MULTILINE)
    assert len(longest) >= 5 and re.search(r"fp32: [\d,]+ operators, \d", done.stdout)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [row["mode"] for row in figures["modes"]][:2] == ["fp32", "bf16"]
    for row in figures["modes"][:2]:
        assert row["ms"] > 0 and row["peak_gib"] > 0
        share = row["tflops"] / figures["limits_tflops"][f"convolution {row['mode']}"]
        assert row["of_convolution"] == pytest.approx(100 * share)
        assert row["images_per_s"] * row["ms"] / 1e3 == pytest.approx(images)
    assert "limit: convolution fp32" in done.stdout and "bf16" in done.stdout


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
                               spread_labels=0)
    data = measure.random_data(settings, "cpu")
    assert len(data.train_x) >= 3000 and len(data.test_x) >= 5000


def test_shipped_weights_of_the_quick_start(tmp_path):
    config = str(PROJECT / "configs" / "digits.yaml")
    done = start(tmp_path, "--config", config, "--pretrained", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    error = float(done.stdout.split("Test error")[1].split("%")[0])
    bits = float(done.stdout.split("bits/dim")[1].split()[0])
    assert error <= 5 and bits <= 2.05


def test_weights_in_the_published_layout(tmp_path):
    """A file as the authors' code writes it.

    It has their names, 1x1 convolutions with four dimensions, masks, and DataParallel's prefixes.
    """
    torch.manual_seed(0)
    settings = {**TINY, "conv": "qr", "ssl_conv": "hh"}
    model = build_model(settings, (1, 8, 8), 10)
    model.initialize(torch.rand(32, 1, 8, 8))
    state, published = model.state_dict(), {}
    for key, name in published_names(model).items():
        value = state[key]
        if name.startswith("flow."):
            name = name.replace("flow.modules_", "flow.module.modules_", 1)
        if name.endswith(".vec"):
            published.update({f"{name}_{i}": v for i, v in enumerate(value)})
        elif name.endswith("requires_init"):
            published[name] = 1 - value.float().view(1)
        else:
            is_linear = ".net" in name and value.dim() == 2
            published[name] = value[:, :, None, None] if is_linear else value
    published["flow.module.modules_.2.mask"] = torch.ones(1, 1, 8, 8)
    published["prior.deep_prior.mean"] = torch.zeros(16)
    torch.save(published, tmp_path / "theirs.torch")
    fresh = build_model(settings, (1, 8, 8), 10)
    load_weights(fresh, tmp_path / "theirs.torch")
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    done = start(tmp_path, *options(conv="qr", ssl_conv="hh"), "--pretrained", "theirs.torch")
    assert done.returncode == 0 and "Test error" in done.stdout, done.stderr


def test_half_precision_weights_and_checkpoints_load(tmp_path):
    model = build_model(TINY, (1, 8, 8), 10)
    half = {key: v.half() if v.is_floating_point() else v for key, v in model.state_dict().items()}
    torch.save({"model": half}, tmp_path / "half.pt")
    fresh = build_model(TINY, (1, 8, 8), 10)
    load_weights(fresh, tmp_path / "half.pt")
    assert all(v.dtype == torch.float32 for v in fresh.parameters())
    own, loaded = (m.f_w.levels[0][2].net.first.weight for m in (model, fresh))
    torch.testing.assert_close(loaded, own, rtol=1e-3, atol=1e-3)


def test_help_lists_the_options(tmp_path):
    done = start(tmp_path, "--help")
    assert done.returncode == 0
    names = ("config", "ssl_dim", "resume", "pretrained", "cl_weight")
    assert all(f"--{name}" in done.stdout for name in names)
    assert "--lr_gamma" not in done.stdout
