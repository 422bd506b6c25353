"""Hostile places: no symbolic links, no locks, nothing to write to, closed or narrow outputs, ~."""

import errno
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import SCRIPT, options, run_script, runs, words

from experiments import pictures

fcntl, resource = map(pytest.importorskip, ("fcntl", "resource"))     # not on Windows

COMMAND = [sys.executable, str(SCRIPT)]


def finished(run):
    return (run / "model.torch").exists() and (run / "report.html").exists()


def refuse(number):
    """A function that fails as a system call does, with the error `number`."""
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    return call


def test_no_symbolic_links(tmp_path, monkeypatch):
    """As on exFAT or Google Drive. Later, on another file system, the index has the run."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("os.symlink", refuse(errno.EOPNOTSUPP))
        assert run_script(options(epochs=1)) == 0
        run, = runs(tmp_path)
        assert finished(run) and not runs(tmp_path, "index")
    assert run_script(["--resume", str(run)]) == 0
    assert [link.resolve().parent for link in runs(tmp_path, "index")] == [run]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_no_locks(tmp_path, monkeypatch, capsys, number):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    assert run_script(options(epochs=1)) == 0
    assert "Lock none, on this file system" in words(capsys.readouterr().out)
    run, = runs(tmp_path)
    assert finished(run) and not (run / ".lock").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc, where nobody can write")
def test_nothing_is_written_where_nothing_has_to_be(monkeypatch, capsys):
    monkeypatch.chdir("/proc")
    assert run_script(["--help"]) == 0
    assert run_script(["--config", str(SCRIPT.parent / "configs" / "digits.yaml"), "--pretrained",
                       "--device", "cpu"]) == 0
    assert "Test error" in capsys.readouterr().out
    assert run_script(options(epochs=1)) == 2
    err = capsys.readouterr().err
    assert "error: cannot create the folders of runs in /proc/logs/" in err and "\n" not in err[:-1]


def test_home_folder_in_paths(tmp_path, monkeypatch, capsys):
    """A shell expands ~ at the beginning of a word only: not in --option=~, nor in a file."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    assert run_script(options(epochs=1)) == 0
    run, = runs(home)
    short = f"~/{run.relative_to(home)}"
    (home / "base.yaml").write_text("data_root: ~/data\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"extends: ~/base.yaml\ninitial_weights: {short}\n")
    assert run_script(["--config=mine.yaml", *options(epochs=1)]) == 0
    new, = runs(tmp_path)
    assert f"data_root: {home}/data" in (new / "params.yaml").read_text()
    assert run_script([f"--pretrained={short}"]) == 0
    assert run_script([f"--resume={short}", "--epochs=2"]) == 0
    assert run_script([f"--pretrained={short}/nothing"]) == 2
    assert f"no file {run}/nothing" in capsys.readouterr().err
    pictures.main(["curves", short, "--save=~/curves.png"])
    assert (home / "curves.png").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_characters_that_the_output_lacks(tmp_path):
    """As where Windows sends output to a file: cp1252 has no Chinese."""
    folder = tmp_path / "用户"
    folder.mkdir()
    done = subprocess.run([*COMMAND, *options(epochs=1, data_root="数据")], cwd=folder,
                          capture_output=True, timeout=300,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"data_root ??" in done.stdout
    run, = runs(folder)
    assert finished(run) and "data_root 数据" in (run / "log.txt").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("redirected", [
    "| head -1", ">&-", "> /dev/full", "2>&-", "2>&1 | head -1"])
def test_an_output_that_is_closed_or_full(tmp_path, redirected):
    """The run goes on, and its log has all."""
    line = " ".join([*COMMAND, *options(epochs=1, name="'a b'")])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} {redirected}"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    run, = runs(tmp_path)
    assert finished(run) and "Test error" in (run / "log.txt").read_text()


def test_an_interrupt_while_a_run_is_created_leaves_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupt(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr("exman.parser.yaml.dump", interrupt)
    assert run_script(options(epochs=1)) == 130
    assert not runs(tmp_path) and not runs(tmp_path, "fails")


def test_a_resumed_run_finds_its_initial_weights_from_another_folder(tmp_path, monkeypatch):
    """Also if it ended before it had a checkpoint."""
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=1)) == 0
    run, = runs(tmp_path)
    line = options(epochs=1, initial_weights=run.relative_to(tmp_path), lr=0.01)
    assert run_script(line) == 0
    stopped = runs(tmp_path)[1]
    weights = torch.load(stopped / "model.torch")
    for name in ("model.torch", "checkpoint.pt", "metrics.csv"):
        (stopped / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_script(["--resume", str(stopped)]) == 0
    again = torch.load(stopped / "model.torch")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_bad_input_without_stderr(tmp_path):
    line = " ".join([*COMMAND, "--data_root", "nowhere", "--device", "cpu"])
    done = subprocess.run(["bash", "-c", f"{line} 2>&-"], cwd=tmp_path, timeout=300)
    assert done.returncode == 2 and not (tmp_path / "nowhere").exists()


def test_a_result_that_cannot_be_written(tmp_path):
    line = " ".join([*COMMAND, "--config", f"{SCRIPT.parent}/configs/digits.yaml", "--pretrained"])
    done = subprocess.run(["bash", "-c", f"{line} > /dev/full"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "train-flow-ssl.py: error: No space left on device\n"


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tmp_path, monkeypatch):
    """Like a quota or a full disk, at the first file of a run, and at its checkpoint."""
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=2)) == 0
    good, = runs(tmp_path)
    for victim in ("params.yaml", "checkpoint.pt"):
        # a tenth less: a checkpoint's size varies by some bytes from run to run
        limit = (good / victim).stat().st_size * 9 // 10
        done = subprocess.run(
            [*COMMAND, *options(epochs=2)], capture_output=True, text=True, timeout=300,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "error: File too large: " in done.stderr and victim in done.stderr
        assert runs(tmp_path) == [good]
        if victim == "params.yaml":
            assert not runs(tmp_path, "fails")
    failed, = runs(tmp_path, "fails")
    assert not list(failed.glob("*.partial"))
    assert run_script(["--resume", str(failed)]) == 0
    weights = [torch.load(run / "model.torch") for run in runs(tmp_path)]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
