"""The tools: weights and evidence of a finished run; runs on a machine for a limited time."""

import hashlib
import importlib
import json
import math
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, SCRIPT, execute, options, run_script, runs

from utils.errors import BadInput
from utils.metrics import read_metrics

TOOLS = PROJECT / "tools"


@pytest.mark.slow
def test_shipping_a_run(tmp_path):
    """ship.py writes weights, their SHA-256 and evidence.

    The networks are in half precision if that does not change the figures.
    """
    trained = execute(tmp_path, [sys.executable, str(SCRIPT), *options(epochs=2, lr=5e-3)])
    assert trained.returncode == 0, trained.stderr
    run, = runs(tmp_path)
    ship = [sys.executable, str(TOOLS / "ship.py")]
    done = execute(tmp_path, [*ship, str(run), "tiny", "--half", "--to", "home", "--commit", "abc"])
    assert done.returncode == 0, done.stderr
    home = tmp_path / "home"
    path, evidence = home / "pretrained" / "tiny.torch", home / "results" / "tiny"
    figures = json.loads((evidence / "evaluation.json").read_text())
    assert figures["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert figures["commit"] == "abc"
    sums = (home / "pretrained" / "SHA256SUMS").read_text()
    assert sums == f"{figures['sha256']}  tiny.torch\n"
    row = read_metrics(evidence / "metrics.csv")[-1]
    assert len(figures["error"]) == 3
    assert figures["error"][0] == pytest.approx(100 * (1 - row["test_acc"]), abs=0.3)
    assert figures["bits_per_dim"][0] == pytest.approx(row["test_bpd"], abs=1e-3)
    assert figures["each_20th"]["images"] == 18
    state, own = torch.load(path), torch.load(run / "model.torch")
    halved = {key for key, value in state.items() if value.dtype == torch.float16}
    assert ("in half precision" in figures["stored"]) == bool(halved)
    assert all(".net" in key for key in halved)
    assert all(torch.equal(value, own[key]) for key, value in state.items() if key not in halved)
    bad = execute(tmp_path, [*ship, str(tmp_path), "tiny"])
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert "not the directory of a finished run" in bad.stderr


@pytest.mark.slow
def test_rehearsal_of_a_timed_run(tmp_path):
    command = [sys.executable, str(TOOLS / "timed_run.py"), "--dry-run"]
    done = execute(tmp_path, command, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("Rehearsed: complete")
    assert re.search(r"epoch \d+ of \d+, [\d,]+ images/s, loss .* min left", done.stdout)


@pytest.fixture
def timed_run(monkeypatch):
    """tools/timed_run.py as a module."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("timed_run")


def test_parts_are_joined_and_checked(tmp_path, monkeypatch, timed_run):
    monkeypatch.setattr(timed_run, "PART_BYTES", 1000)
    run, out, home = tmp_path / "000001-run", tmp_path / "out", tmp_path / "home"
    run.mkdir()
    (run / "log.txt").write_text("a line\n")
    (run / "checkpoint.pt").write_text("large")
    weights = np.random.default_rng(0).bytes(2500)                  # which gzip cannot compress
    (run / "model.torch").write_bytes(weights)
    timed_run.pack(run, True, "abc", out)
    assert len(list(out.glob("run.part*"))) == 3
    assert timed_run.join([out], home) == home / run.name
    assert (home / run.name / "model.torch").read_bytes() == weights
    assert (home / run.name / "log.txt").read_text() == "a line\n"
    assert not (home / run.name / "checkpoint.pt").exists()
    with pytest.raises(timed_run.BadInput, match="is there already"):
        timed_run.join([out], home)
    part = out / "run.part01"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(timed_run.BadInput, match="part01 is missing or damaged"):
        timed_run.join([out], tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(timed_run, "PARTS", 2)                      # brought home by two calls
    first, second = tmp_path / "first", tmp_path / "second"
    timed_run.pack(run, True, "abc", out)
    assert timed_run.bring(out, first) and timed_run.bring(out, second, first=2)
    assert sorted(path.name for path in second.iterdir()) == ["manifest.json", "run.part02"]
    with pytest.raises(timed_run.BadInput, match="part02 is missing"):
        timed_run.join([first], tmp_path / "elsewhere")
    joined = timed_run.join([first, second], tmp_path / "elsewhere")
    assert (joined / "model.torch").read_bytes() == weights


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_timed_run_that_is_cut_off_keeps_its_evidence(tmp_path, capsys, timed_run, end):
    folder, work, out, home = (tmp_path / name for name in ("folder", "work", "out", "home"))
    timed_run.prepare(folder, packages=())
    line = [*timed_run.REHEARSAL, "--epochs=100000", "--log_each", "1"]
    timed_run.start(work, folder, 20, line)
    with pytest.raises(timed_run.BadInput, match="has a run already"):
        timed_run.start(work, folder, 20, line)
    capsys.readouterr()
    while not (lines := re.findall(r"epoch \d+ of \d+, .*", capsys.readouterr().out)):
        assert not timed_run.watch(work, 1)
    assert re.fullmatch(
        r"epoch \d+ of \d+, [\d,]+ images/s, loss -?\d+\.\d\d; Test error: \d+\.\d\d%; "
        r"ends in \d+\.\d min, \d+\.\d min left.*", lines[-1])
    if end == "killed":                         # with the shell that would record its exit code
        state = timed_run.read_state(work)
        os.killpg(state["wrapper"], signal.SIGKILL)
        os.waitpid(state["wrapper"], 0)
        assert timed_run.watch(work, 1) and "its processes are gone" in capsys.readouterr().out
    assert not timed_run.finish(work, out)
    how = {"stopped": "0: Stopped by SIGTERM", "killed": "unknown"}[end]
    assert f"not a result: exit code {how}" in capsys.readouterr().out
    run = timed_run.join([out], home)
    assert len((run / "metrics.csv").read_text().splitlines()) > 1
    assert (run / "plan.json").is_file() and (run / "run.log").is_file()
    assert torch.load(run / "partial.torch") and not (run / "model.torch").exists()
    with pytest.raises(timed_run.BadInput, match="no run was started"):
        timed_run.watch(tmp_path, 1)


@pytest.mark.slow
def test_a_run_over_two_loans(tmp_path, capsys, timed_run):
    """Its checkpoint comes home with moments in bfloat16, and the second loan ends the run."""
    folder, work, home = (tmp_path / name for name in ("folder", "work", "home"))
    timed_run.prepare(folder, packages=())
    line = [*timed_run.REHEARSAL, "--epochs=400", "--log_each", "1"]
    timed_run.start(work, folder, 20, line, whole=True)
    assert "All 400 epochs" in capsys.readouterr().out
    while not re.search(r"epoch \d+ of 400", capsys.readouterr().out):
        assert not timed_run.watch(work, 1)
    assert not timed_run.finish(work, tmp_path / "out")
    run = timed_run.join([tmp_path / "out"], home / timed_run.RUNS)
    checkpoint = torch.load(run / "checkpoint.pt")
    moments = {key: next(iter(value.values())).dtype
               for key, value in checkpoint["optimizer"].items() if isinstance(value, dict)}
    assert moments == {"exp_avg": torch.bfloat16, "exp_inf": torch.bfloat16}
    epoch = checkpoint["epoch"]
    timed_run.prepare(folder, packages=(), resume=run)
    other = tmp_path / "again" / timed_run.RUNS / "000000-other"
    other.mkdir(parents=True)
    with pytest.raises(timed_run.BadInput, match="a resumed run keeps its lr"):
        timed_run.start(tmp_path / "again", folder, 20, ["--lr", "1"])
    assert list(other.parent.iterdir()) == [other]              # the failed start left nothing
    timed_run.start(tmp_path / "again", folder, 20, ["--epochs", str(epoch + 2)])
    while not timed_run.watch(tmp_path / "again", 1):
        pass
    assert timed_run.finish(tmp_path / "again", tmp_path / "out2")
    run = timed_run.join([tmp_path / "out2"], tmp_path / "result")
    rows = read_metrics(run / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(1, epoch + 3))
    assert (run / "model.torch").is_file()
    assert timed_run.finish(tmp_path / "again", tmp_path / "out3")          # the same parts
    assert sums(tmp_path / "out2") == sums(tmp_path / "out3")
    with pytest.raises(timed_run.BadInput, match="only 1 parts"):
        timed_run.finish(tmp_path / "again", tmp_path / "out4", first=4)
    timed_run.prepare(folder, packages=())
    assert not (folder / "run").exists()


def sums(out):
    """The checksums of what `finish` brought."""
    return json.loads((out / "manifest.json").read_text())["files"]


def test_what_a_run_spends_its_time_on(timed_run):
    """From three rows: two epochs with compilation (30 s), two without, one; log_each 2. An epoch
    of the run is ten times as long."""
    start, epoch, evaluation = 12.0, 0.6, 1.5
    rows = [30 + 2 * epoch + evaluation, 2 * epoch + evaluation, epoch + evaluation]
    cost = timed_run.Cost.of_probe(rows, start + sum(rows), 10)
    assert (cost.start, cost.epoch, cost.evaluation) == pytest.approx((12, 6, 1.5))
    assert cost.seconds(100, 10) == pytest.approx(12 + 600 + 15)
    assert cost.seconds(101, 10) == pytest.approx(12 + 606 + 16.5)
    noisy = timed_run.Cost.of_probe([2.0, 1.0, 1.1], 5, 1)                  # of short epochs
    assert noisy.epoch > 0 and noisy.evaluation >= 0 and noisy.start >= 0


@pytest.mark.slow
def test_a_failure_of_the_first_epochs_brings_home_its_traceback(tmp_path, capfd, timed_run):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(timed_run.BadInput, match=r"exit code 1: .* is not finite") as raised:
        timed_run.start(tmp_path / "work", folder, 60, [*timed_run.REHEARSAL, "--lr", "1e30"])
    assert str(raised.value).count("\n") == 0
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err and "in train_epoch" in err


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A folder with a finished run."""
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=2)) == 0
    return tmp_path


@pytest.mark.parametrize("rest, message", [
    (["my run"], "NAME must consist of"), (["x", "--seed", "3"], "with its own seed"),
    (["x", "--supervised", "50"], "with its own supervised")])
def test_what_cannot_be_shipped(finished, timed_run, rest, message):
    ship, (run,) = timed_run.importlib.import_module("ship"), runs(finished)
    with pytest.raises(BadInput, match=message):
        ship.main([str(run), *rest, "--to", "home"])
    assert not (finished / "home").exists()


@pytest.mark.parametrize("damage, message", [
    ("weights", "not finite"), ("architecture", "another architecture"), ("metrics", "no rows")])
def test_a_damaged_run_is_not_shipped(finished, timed_run, damage, message):
    ship, (run,) = timed_run.importlib.import_module("ship"), runs(finished)
    state = torch.load(run / "model.torch")
    if damage == "weights":
        torch.save({**state, "log_p_y": state["log_p_y"] * math.nan}, run / "model.torch")
    elif damage == "architecture":
        torch.save({**state, "log_p_y": torch.zeros(3)}, run / "model.torch")
    else:
        header = (run / "metrics.csv").read_text().splitlines()[0]
        (run / "metrics.csv").write_text(header + "\n")
    with pytest.raises(BadInput, match=message):
        ship.main([str(run), "x", "--to", "home"])
    assert not (finished / "home").exists()


def test_evidence_is_of_one_run(finished, timed_run):
    ship, (run,) = timed_run.importlib.import_module("ship"), runs(finished)
    (finished / "home").mkdir()
    for name in ("density.png", "log.txt"):                     # of an earlier run of this name
        (finished / "home" / name).write_text("of another run")
    ship.copy_evidence(run, finished / "home")
    assert not (finished / "home" / "density.png").exists()
    assert (finished / "home" / "log.txt").read_bytes() == (run / "log.txt").read_bytes()


@pytest.mark.parametrize("argv, message", [
    (["start", "w", "--folder", ".", "--minutes", "9"], "put the settings of the run after --"),
    (["start", "w", "--folder", "typo", "--minutes", "9", "--", "--lr", "1"], "no folder typo"),
    (["start", "w", "--folder", ".", "--minutes", "inf", "--", "--lr", "1"], "--minutes must be"),
    (["start", "w", "--folder", ".", "--minutes", "9", "--", "--tmp"], "--tmp run"),
    (["watch", "nowhere"], "no run was started"), (["join", "nowhere"], "has no manifest.json")])
def test_bad_input_of_a_timed_run(tmp_path, monkeypatch, timed_run, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(timed_run.BadInput, match=message):
        timed_run.main(argv)


def test_wrong_options_of_tools_are_one_line(capsys, timed_run):
    with pytest.raises(SystemExit) as end:
        timed_run.main(["watch", "w", "--seconds", "abc"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_timed_run_needs_time(tmp_path, timed_run):
    folder = tmp_path / "folder"
    timed_run.prepare(folder, packages=())
    with pytest.raises(timed_run.BadInput, match="are left for training"):
        timed_run.start(tmp_path / "work", folder, timed_run.MARGIN, timed_run.REHEARSAL)
    with pytest.raises(timed_run.BadInput, match="too little for training"):
        timed_run.start(tmp_path / "whole", folder, timed_run.MARGIN / 2, timed_run.REHEARSAL,
                        whole=True)
    with pytest.raises(timed_run.BadInput, match="MNIST's four files"):
        timed_run.prepare(folder, tmp_path, ())
    with pytest.raises(timed_run.BadInput, match=r"has no checkpoint\.pt"):
        timed_run.prepare(folder, None, (), tmp_path)
