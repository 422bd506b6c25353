"""The tools: weights and evidence of a finished run; runs on a machine for a limited time."""

import hashlib
import importlib
import json
import os
import re
import signal
import sys

import pytest
import torch
from conftest import PROJECT, SCRIPT, execute, options

from utils.metrics import read_metrics

TOOLS = PROJECT / "tools"


def test_shipping_a_run(tmp_path):
    """ship.py writes weights, their SHA-256 and evidence.

    The networks are in half precision if that does not change the figures.
    """
    trained = execute(tmp_path, [sys.executable, str(SCRIPT), *options(epochs=2, lr=5e-3)])
    assert trained.returncode == 0, trained.stderr
    run, = (tmp_path / "logs" / "exman-train-flow-ssl.py" / "runs").iterdir()
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
    packed, out, home = tmp_path / "packed", tmp_path / "out", tmp_path / "home"
    evidence = packed / "results" / "mnist"
    evidence.mkdir(parents=True)
    (evidence / "log.txt").write_text("a line\n")
    weights = tmp_path / "model.torch"
    weights.write_bytes(bytes(range(256)) * 10)
    timed_run.pack(packed, "mnist", weights, True, out)
    assert len(list(out.glob("model.torch.part*"))) == 3
    timed_run.join(out, home)
    assert (home / "pretrained" / "model.torch").read_bytes() == weights.read_bytes()
    assert (home / "results" / "mnist" / "log.txt").read_text() == "a line\n"
    assert "model.torch" in (home / "pretrained" / "SHA256SUMS").read_text()
    with pytest.raises(timed_run.BadInput, match="is there already"):
        timed_run.join(out, home)
    part = out / "model.torch.part01"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(timed_run.BadInput, match="part01 is missing or damaged"):
        timed_run.join(out, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


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
        r"epoch \d+ of \d+, [\d,]+ images/s, loss -?\d+\.\d\d, test error \d+\.\d\d %; "
        r"ends in \d+\.\d min, \d+\.\d min left.*", lines[-1])
    if end == "killed":                         # with the shell that would record its exit code
        state = timed_run.read_state(work)
        os.killpg(state["wrapper"], signal.SIGKILL)
        os.waitpid(state["wrapper"], 0)
        assert timed_run.watch(work, 1) and "its processes are gone" in capsys.readouterr().out
    assert not timed_run.finish(work, "cut", out)
    how = {"stopped": "0: Stopped by SIGTERM", "killed": "unknown"}[end]
    assert f"not a result: exit code {how}" in capsys.readouterr().out
    timed_run.join(out, home)
    evidence = home / "results" / "cut"
    assert len((evidence / "metrics.csv").read_text().splitlines()) > 1
    assert (evidence / "state.json").is_file()
    assert torch.load(evidence / "cut.partial.torch") and not (home / "pretrained").exists()
    with pytest.raises(timed_run.BadInput, match="no run was started"):
        timed_run.watch(tmp_path, 1)


def test_a_timed_run_needs_time(tmp_path, timed_run):
    folder = tmp_path / "folder"
    timed_run.prepare(folder, packages=())
    with pytest.raises(timed_run.BadInput, match="are left for training"):
        timed_run.start(tmp_path / "work", folder, timed_run.MARGIN, timed_run.REHEARSAL)
    with pytest.raises(timed_run.BadInput, match="MNIST's four files"):
        timed_run.prepare(folder, tmp_path, ())
