"""experiments/table.py: the paper's table, run and collected."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import PROJECT, TINY, execute, runs

from experiments import table
from utils.errors import BadInput
from utils.metrics import read_metrics

SCRIPT = PROJECT / "experiments" / "table.py"


@pytest.fixture
def configs(tmp_path):
    """Two configs, the second of which extends the first."""
    glow, gmm = tmp_path / "glow.yaml", tmp_path / "gmm.yaml"
    glow.write_text(yaml.dump({**TINY, "epochs": 2, "num_examples": 100}))
    gmm.write_text("extends: glow.yaml\nssl_model: cond-shift\nssl_alg: em\ncl_weight: 1\n")
    return [str(glow), str(gmm)]


def mean_and_deviation(values, digits):
    series = pd.Series(values)
    return f"{series.mean():.{digits}f} ± {series.std():.{digits}f}"


@pytest.mark.slow
def test_a_table_is_run_stopped_and_continued(tmp_path, configs):
    folder = tmp_path / "runs of a table"
    line = [sys.executable, str(SCRIPT), *configs, "--seeds", "3", "4"]
    first = execute(tmp_path, [*line, "--to", folder.name, "--jobs", "2", "--time_limit", "0.0001"])
    assert first.returncode == 1 and (
        "table: glow-seed3, glow-seed4, gmm-seed3, gmm-seed4 (stopped after epoch 0 of 2)\n"
        in first.stdout)
    assert "| 0 | glow |" in first.stdout
    done = execute(tmp_path, [*line, "--to", str(folder), "--time_limit=0", "--data_root", "a"])
    assert done.returncode == 0, done.stdout + done.stderr
    found = {run.name.split("-", 7)[-1]: run for run in runs(folder)}
    assert sorted(found) == ["glow-seed3", "glow-seed4", "gmm-seed3", "gmm-seed4"]
    params = yaml.safe_load((found["gmm-seed4"] / "params.yaml").read_text())
    assert (params["seed"], params["data_seed"], params["ssl_alg"]) == (4, 4, "em")
    assert params["data_root"] == str(tmp_path / "a")           # not one in `folder`
    last = {name: read_metrics(run / "metrics.csv")[-1] for name, run in found.items()}
    rows = pd.read_csv(folder / "table.csv")
    assert rows["config"].tolist() == ["glow", "gmm"] and rows["n"].tolist() == [2, 2]
    assert rows["model"].tolist() == ["SCNF-GLOW", "SCNF-GMM"]
    assert rows["data"].tolist() == ["digits, 20 labels"] * 2 and rows["epochs"].tolist() == [2, 2]
    assert rows["error, % (paper)"].tolist() == ["-", "-"]      # which are of MNIST
    for (_, row), name in zip(rows.iterrows(), ("glow", "gmm"), strict=True):
        of_seeds = [last[f"{name}-seed{seed}"] for seed in (3, 4)]
        assert row["error, %"] == mean_and_deviation(
            [100 * (1 - r["test_acc"]) for r in of_seeds], 2)
        assert row["bits/dim"] == mean_and_deviation([r["test_bpd"] for r in of_seeds], 3)
    assert (folder / "table.md").read_text() == done.stdout
    each = pd.read_csv(folder / "runs.csv")
    assert (each["config"] + "-seed" + each["seed"].astype(str)).tolist() == sorted(found)
    assert each["bits/dim"].tolist() == [last[name]["test_bpd"] for name in sorted(found)]
    # Nothing is trained again, and what is broken is named and left out.
    before = {run: (run / "metrics.csv").stat().st_mtime_ns for run in runs(folder)}
    (found["glow-seed3"] / "model.torch").unlink()
    collected = execute(tmp_path, [*line, "--collect", str(folder)])
    assert collected.returncode == 1 and "glow-seed3 (stopped after epoch 2" in collected.stdout
    assert pd.read_csv(folder / "table.csv")["n"].tolist() == [1, 2]
    assert before == {run: (run / "metrics.csv").stat().st_mtime_ns for run in runs(folder)}
    other = execute(tmp_path, [*line, "--to", str(folder), "--lr", "0.5"])
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "has lr " in other.stderr and "0.5 is asked for: use another folder" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]],
                         ids=["Ctrl-C twice", "SIGTERM"])
def test_signals_stop_the_runs_with_checkpoints(tmp_path, configs, numbers):
    """As a terminal sends them, to the whole group of processes."""
    line = [sys.executable, str(SCRIPT), *configs, "--seeds", "0", "--to", "out"]
    process = subprocess.Popen([*line, "--epochs", "9999", "--time_limit", "2"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    for _ in range(600):
        if list(tmp_path.glob("out/logs/*/runs/*-glow-seed0/metrics.csv")):
            break
        time.sleep(0.1)
    for number in numbers:
        os.killpg(process.pid, number)
        time.sleep(0.05)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors == "Stopping: each run ends its current step\n"
    assert "glow-seed0 (stopped after epoch " in out and "gmm-seed0 (not run)" in out
    run, = runs(tmp_path / "out")
    assert "Stopped      by SIGTERM after step" in (run / "log.txt").read_text()
    again = execute(tmp_path, [*line, "--epochs", "9999", "--time_limit", "0.0001"])
    assert "gmm-seed0 (stopped after epoch 0" in again.stdout
    assert (run / "log.txt").read_text().count("Continuing   after step") == 1


@pytest.mark.slow
def test_a_failed_run_is_named(tmp_path, configs):
    done = execute(tmp_path, [sys.executable, str(SCRIPT), *configs, "--seeds", "0", "--to", "out",
                              "--lr", "1e30"])
    assert done.returncode == 1
    assert "glow-seed0 (exit code 1: train-flow-ssl.py: error: " in done.stdout
    assert "not finite" in done.stdout and "gmm-seed0" in done.stdout


def test_paths_are_those_of_the_folder_where_it_is_called(tmp_path, monkeypatch, configs):
    monkeypatch.chdir(tmp_path)
    run = table.wanted(Path(configs[0]), 0, ["--initial_weights", "a.torch"])
    data, weights = str(tmp_path / "data"), str(tmp_path / "a.torch")
    assert run.argv[-4:] == ["--data_root", data, "--initial_weights", weights]
    assert (run.settings.data_root, run.settings.initial_weights) == (data, weights)


def test_missing_data_ends_it_before_the_first_run(tmp_path, monkeypatch, configs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file, so that nothing can be downloaded to it")
    mnist = str(PROJECT / "configs" / "table" / "small-scnf-gmm.yaml")
    with pytest.raises(BadInput, match=f"no MNIST in {tmp_path / 'data'}/MNIST/raw"):
        table.main([*configs, mnist, "--to", "out", "--seeds", "0"])
    assert not runs(tmp_path / "out")


@pytest.mark.parametrize("argv, message", [
    ([], "name a folder for the runs"), (["--to", "a", "--collect", "b"], "name a folder"),
    (["--collect", "nowhere"], "no folder nowhere"), (["--to", "a", "--jobs", "0"], "--jobs must"),
    (["--to", "a", "--seeds", "1", "1"], "is there twice"), (["--to", "a", "--tmp"], "new runs"),
    (["--to", "a", "--seed", "1"], "--seed cannot be given here: --config .* is set already"),
    (["--to", "a", "--lr", "x"], "invalid float value"), (["--to", "a", "--typo", "1"], "typo")])
def test_bad_input(tmp_path, monkeypatch, configs, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        table.main([*configs, *argv])


def test_the_rows_have_the_settings_of_the_paper_s_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [PROJECT / "config.yaml", *sorted((PROJECT / "configs" / "table").glob("mnist-*"))]
    rows = [table.wanted(path, 0, []).settings for path in paths]
    kinds = {(row.ssl_model, row.ssl_alg, row.cl_weight > 0) for row in rows}
    assert kinds == {*table.PUBLISHED, ("cond-gmm", "sgd", False)} and len(rows) == len(kinds)
    kept = {key: value for key, value in vars(rows[0]).items()
            if key not in ("ssl_model", "ssl_alg", "cl_weight", "config_file", "name")}
    assert all(kept.items() <= vars(row).items() for row in rows)
    for name in ("digits-*", "small-*"):
        rows = [table.wanted(path, 0, []).settings
                for path in (PROJECT / "configs" / "table").glob(name)]
        assert {(row.ssl_model, row.ssl_alg, row.cl_weight > 0) for row in rows} == kinds
        assert len(rows) == len(kinds)


@pytest.mark.parametrize("config, options, figures", [
    ("table/mnist-scnf-gmm", (), ("14.2 ± 2.4", "1.143 ± 0.011")),
    ("table/small-scnf-glow-em", (), ("1.9 ± 0.0", "1.146 ± 0.002")),
    ("mnist-small", (), ("-", "-")), ("table/digits-scnf-glow", (), ("-", "-")),
    ("table/mnist-cond-gmm", (), ("-", "-")),
    ("table/mnist-scnf-gmm", ("--supervised", "1000"), ("-", "-")),
    ("table/mnist-scnf-gmm", ("--num_examples", "9000"), ("-", "-"))])
def test_the_paper_s_figures_stand_where_they_belong(tmp_path, monkeypatch, config, options,
                                                     figures):
    monkeypatch.chdir(tmp_path)
    run = table.wanted(PROJECT / "configs" / f"{config}.yaml", 0, options)
    row = dict(zip(table.COLUMNS, table.row_of([run]), strict=True))
    assert (row["error, % (paper)"], row["bits/dim (paper)"]) == figures
    assert row["epochs"] == run.settings.epochs and row["data"].startswith(run.settings.data)


def test_the_published_figures_are_those_of_the_readme():
    lines = (PROJECT / "README.md").read_text().splitlines()
    for (model, algorithm, clf), figures in table.PUBLISHED.items():
        start = (f"| {table.MODELS[model]}, smaller | {table.ALGORITHMS[algorithm]} | "
                 f"{'yes' if clf else 'no'} | {' | '.join(figures)} |")
        assert any(line.startswith(start) for line in lines), start
