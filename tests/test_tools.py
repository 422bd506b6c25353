"""tools/ship.py: weights and evidence of a finished run."""

import hashlib
import json
import math
import os
import sys

import pytest
import torch
from conftest import PROJECT, execute, options, run_script, runs
from torch.distributed.run import get_args_parser

from tools import ship
from utils.errors import BadInput
from utils.metrics import read_metrics


def test_slurm_starts_one_torchrun_a_machine(tmp_path):
    """With programs of Slurm's names, which print what they are given."""
    for name, line in (("scontrol", "printf 'one\\ntwo\\n'"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    done = execute(PROJECT, ["bash", "tools/slurm.sh", "--config", "a b.yaml"],
                   PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="[one-two]",
                   SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="16")
    option, cpus, program, *argv = done.stdout.splitlines()
    assert (option, cpus) == ("--cpus-per-task", "16")
    args = get_args_parser().parse_args(argv)
    assert program == "torchrun" and args.rdzv_endpoint == "one:29500" and args.nnodes == "2"
    assert args.training_script == "train-flow-ssl.py"
    assert args.training_script_args == ["--config", "a b.yaml"]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The directory of a finished run in tmp_path, the working directory."""
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=2, lr=5e-3)) == 0
    run, = runs(tmp_path)
    return run


@pytest.mark.slow
def test_shipping_a_run(finished, tmp_path):
    """ship.py writes weights, their SHA-256 and evidence.

    The networks are in half precision if that does not change the figures.
    """
    command = [sys.executable, str(PROJECT / "tools" / "ship.py")]
    done = execute(tmp_path, [*command, str(finished), "tiny", "--half", "--to", "home",
                              "--commit", "abc"])
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
    state, own = torch.load(path), torch.load(finished / "model.torch")
    halved = {key for key, value in state.items() if value.dtype == torch.float16}
    assert ("in half precision" in figures["stored"]) == bool(halved)
    assert all(".net" in key for key in halved)
    assert all(torch.equal(value, own[key]) for key, value in state.items() if key not in halved)
    bad = execute(tmp_path, [*command, str(tmp_path), "tiny"])
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert "not the directory of a finished run" in bad.stderr


@pytest.mark.parametrize("rest, damage, message", [
    (["my run"], None, "NAME must consist of"),
    (["x", "--seed", "3"], None, "with its own seed"),
    (["x", "--supervised", "50"], None, "with its own supervised"),
    (["x"], {"log_p_y": torch.full((10,), math.nan)}, "not finite"),
    (["x"], {"log_p_y": torch.zeros(3)}, "another architecture"),
    (["x"], "no rows", "no rows")])
def test_what_cannot_be_shipped(finished, tmp_path, rest, damage, message):
    if damage == "no rows":
        header = (finished / "metrics.csv").read_text().splitlines()[0]
        (finished / "metrics.csv").write_text(header + "\n")
    elif damage:
        path = finished / "model.torch"
        torch.save({**torch.load(path), **damage}, path)
    with pytest.raises(BadInput, match=message):
        ship.main([str(finished), *rest, "--to", "home"])
    assert not (tmp_path / "home").exists()


def test_evidence_is_of_one_run(finished, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("density.png", "log.txt"):                     # of an earlier run of this name
        (home / name).write_text("of another run")
    ship.copy_evidence(finished, home)
    assert not (home / "density.png").exists()
    assert (home / "log.txt").read_bytes() == (finished / "log.txt").read_bytes()


def test_wrong_options_of_tools_are_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        ship.main(["run"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
