"""What is claimed: the README's figures stand in results/, shipped weights are what their cards say; and the tools that see to it."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import PROJECT, options

from models import build_model
from utils import checkpoint, load_script
from utils.data import load_data
from utils.metrics import average_is_better, read_metrics
from utils.processes import Processes
from utils.settings import read_settings
from utils.step import arrange, scorer

script = load_script()
CONFIGS = {name: checkpoint.RUNS[key] for key, name in checkpoint.SHIPPED_WEIGHTS.items()}
SHIPPED = sorted(path.name for path in checkpoint.PRETRAINED.glob("*.torch"))


def table(path, first):
    """The rows, as {heading: cell}, of the table in a Markdown file whose first heading is `first`."""
    lines = (PROJECT / path).read_text().split(f"| {first} |", 1)[1].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" `") for cell in line.strip("|").split("|")])
    headings = [first, *[cell.strip() for cell in lines[0].strip("|").split("|")]]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def card(name):
    """The rows of a file's card in pretrained/README.md, {what: text}."""
    section = (PROJECT / "pretrained" / "README.md").read_text().split(f"## {name}\n", 1)[1].split("\n## ")[0]
    return dict([cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| "))


def evidence_of(rows):
    return PROJECT / re.search(r"`\.\./(results/[^`]+)`", rows["run"])[1]


def numbers(text):
    return [float(v.replace(",", "")) for v in re.findall(r"-?\d[\d,]*\.?\d*", text)]


def last_row(folder):
    return read_metrics(folder / "metrics.csv")[-1]


def test_the_readme_s_table_of_cpu_runs_stands_in_results():
    for row in table("README.md", "data"):
        name = row["config"].split("/")[1].removesuffix(".yaml")
        error, bits, seconds = row["test error, %"], row["bits/dim"], row["seconds"]
        evaluation = PROJECT / "results" / name / "evaluation.json"
        if evaluation.is_file():
            figures = json.loads(evaluation.read_text())
            assert error == f"{sum(figures['error']) / 3:.2f}" and bits == f"{sum(figures['bits_per_dim']) / 3:.3f}"
            assert numbers(seconds) == [figures["training_seconds"]]
            params = yaml.safe_load((evaluation.parent / "params.yaml").read_text())
            assert params["supervised"] == numbers(row["labelled"])[0]
            continue
        runs = [last_row(PROJECT / "results" / name / f"seed{seed}") for seed in range(3)]
        errors = [100 * (1 - run["test_acc"]) for run in runs]
        assert error == f"{sum(errors) / 3:.1f} ({', '.join(f'{e:.1f}' for e in errors)})"
        assert bits == "-" or bits == f"{sum(run['test_bpd'] for run in runs) / 3:.2f}"
        evidence = next(r for r in table("results/README.md", "folder") if r["folder"] == name)
        assert numbers(seconds) == [round(sum(numbers(evidence["seconds"])) / 3)]
        assert [f"{e:.2f}" for e in errors] == re.findall(r"\d+\.\d\d", evidence["test error, %: S = 0, 1, 2"])[:3]


def test_the_readme_s_baselines_stand_in_results():
    """Of MNIST those of the run's own labelled images, data_seed 0; of digits the means."""
    def errors(name, column):
        lines = (PROJECT / "results" / "baselines" / f"{name}.txt").read_text().splitlines()
        return [f"{numbers(line.split('  ', 1)[1])[column]:.1f}" for line in lines if line.startswith(("SVM, RBF", "1-nearest"))]
    paragraph = (PROJECT / "README.md").read_text().split("Supervised classifiers", 1)[1].split("\n\n")[0]
    (nearest, svm), (nearest_digits, svm_digits) = errors("mnist-small", 0), errors("digits", 3)
    assert re.findall(r"\d+\.\d", paragraph) == [svm, nearest, svm_digits, nearest_digits]


def test_no_figure_of_the_paper_s_table_without_a_run():
    for row in table("README.md", "model"):
        here = row["error, % (here)"], row["bits/dim (here)"]
        folder = "model" if row["settings"] == "config.yaml" else re.sub(r"\W+", "-", row["settings"]).strip("-")
        evaluation = PROJECT / "results" / folder / "evaluation.json"
        if row["settings"] != "-" and evaluation.is_file():
            figures = json.loads(evaluation.read_text())
            assert here == (f"{sum(figures['error']) / 3:.2f}", f"{sum(figures['bits_per_dim']) / 3:.3f}")
        else:
            assert set(here) <= {"not yet run", "-"}


@pytest.mark.parametrize("name", SHIPPED)
def test_cards_are_of_the_files_and_runs(name):
    rows = card(name)
    evidence = evidence_of(rows)
    assert rows["SHA-256"].strip("`") == hashlib.sha256((checkpoint.PRETRAINED / name).read_bytes()).hexdigest()
    figures = json.loads((evidence / "evaluation.json").read_text())
    assert figures["sha256"] == rows["SHA-256"].strip("`")
    assert numbers(rows["test error"])[0] == round(sum(figures["error"]) / 3, 2)
    assert numbers(rows["bits/dim"])[:4] == [round(v, 4) for v in (sum(figures["bits_per_dim"]) / 3, *figures["bits_per_dim"])]
    assert rows["commit, hardware"].startswith(figures["commit"][:7]) and f"{figures['training_seconds']:,} s" in rows["commit, hardware"]
    assert f"{figures['parameters']:,} parameters" in rows["model"]
    assert (evidence / "log.txt").is_file() and (evidence / "params.yaml").is_file()
    assert f"the {figures['weights']} weights, in {figures['stored']}" in rows["model"]
    tolerance = 0.021 if "half" in figures["stored"] else 0.011              # where figures are of 10,000 images, one or two of them
    assert figures["error"][0] == pytest.approx(100 * (1 - shipped_row(evidence)["test_acc"]), abs=tolerance)
    assert figures["bits_per_dim"][0] == pytest.approx(shipped_row(evidence)["test_bpd"], abs=1e-3)


def shipped_row(evidence):
    """What metrics.csv says of the weights that the run kept."""
    row = last_row(evidence)
    return {key: row[f"ema_{key}"] for key in ("test_acc", "test_bpd")} if average_is_better(row) else row


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_give_the_card_s_figures_on_fixed_test_images(name, tmp_path, monkeypatch, request):
    """Every 20th test image of MNIST, the whole test set of digits: within the tolerance that the card states."""
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(PROJECT / CONFIGS[name]), "--device", "cpu", "--precision", "fp32"]
    if "mnist" in CONFIGS[name] or name == "model.torch":
        config += ["--data_root", str(request.getfixturevalue("mnist_root"))]
    _, settings = read_settings(config)
    data = load_data(settings)
    images, y = (data.test_x[::20], data.test_y[::20]) if settings.data == "mnist" else (data.test_x, data.test_y)
    assert len(images) == (500 if settings.data == "mnist" else 360)
    model = build_model(settings, data.shape, data.n_classes)
    checkpoint.load_weights(model, checkpoint.shipped_weights(settings))
    score = scorer(*arrange(model, script.choose_speed(settings, data.device, Processes())))
    log_p, accuracy = script.evaluate(score, data, (images, y), 256, 7, Processes())
    rows = card(name)
    error_tolerance, bits_tolerance = numbers(rows["tolerance"])[:2]
    assert error_tolerance < 4 and bits_tolerance < 0.05
    assert abs(100 * (1 - accuracy) - numbers(rows["test error"])[0]) <= error_tolerance
    assert abs(data.bits_per_dim(log_p) - numbers(rows["bits/dim"])[0]) <= bits_tolerance
    if settings.data == "mnist":                                              # on the very images: another draw of the noise
        before = json.loads((evidence_of(rows) / "evaluation.json").read_text())["each_20th"]
        assert 100 * (1 - accuracy) == pytest.approx(sum(before["error"]) / 3, abs=1.2)
        assert data.bits_per_dim(log_p) == pytest.approx(sum(before["bits_per_dim"]) / 3, abs=0.006)


def test_sums_are_of_the_files_that_ship():
    lines = [line.split() for line in (checkpoint.PRETRAINED / "SHA256SUMS").read_text().splitlines()]
    assert [name for _, name in lines] == SHIPPED
    for digest, name in lines:
        assert hashlib.sha256((checkpoint.PRETRAINED / name).read_bytes()).hexdigest() == digest


def test_a_damaged_shipped_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint.PRETRAINED, tmp_path / "pretrained")
    path = tmp_path / "pretrained" / "digits.torch"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1                                           # one bit of a weight
    path.write_bytes(content)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
    line = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--device", "cpu"]
    assert script.cli([*line, "--pretrained"]) == 2
    err = capsys.readouterr().err
    assert "SHA-256" in err and "digits.torch is damaged" in err and err.count("\n") == 1
    assert script.cli([*line, "--pretrained", str(path)]) == 0                # one's own file is not compared


def test_shipping_a_run(tmp_path):
    """ship.py on a run of a minute's fraction: weights, sums and evidence; half precision where it changes nothing."""
    line = [sys.executable, str(PROJECT / "train-flow-ssl.py"), *options(epochs=2, lr=5e-3)]
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    run, = (tmp_path / "logs" / "exman-train-flow-ssl.py" / "runs").iterdir()
    ship = [sys.executable, str(PROJECT / "experiments" / "ship.py")]
    done = subprocess.run([*ship, str(run), "tiny", "--half", "--to", "home", "--commit", "abc"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, evidence = tmp_path / "home" / "pretrained" / "tiny.torch", tmp_path / "home" / "results" / "tiny"
    figures = json.loads((evidence / "evaluation.json").read_text())
    assert figures["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and figures["commit"] == "abc"
    assert (tmp_path / "home" / "pretrained" / "SHA256SUMS").read_text() == f"{figures['sha256']}  tiny.torch\n"
    row = last_row(evidence)
    assert figures["error"][0] == pytest.approx(100 * (1 - row["test_acc"]), abs=0.3) and len(figures["error"]) == 3
    assert figures["bits_per_dim"][0] == pytest.approx(row["test_bpd"], abs=1e-3) and figures["each_20th"]["images"] == 18
    state, own = torch.load(path), torch.load(run / "model.torch")
    halved = {key for key, value in state.items() if value.dtype == torch.float16}
    assert ("in half precision" in figures["stored"]) == bool(halved) and all(".net" in key for key in halved)
    assert all(torch.equal(value, own[key]) for key, value in state.items() if key not in halved)
    bad = subprocess.run([*ship, str(tmp_path), "tiny"], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 2 and "not the directory of a finished run" in bad.stderr and bad.stderr.count("\n") == 1


def test_rehearsal_of_a_timed_run(tmp_path):
    done = subprocess.run([sys.executable, str(PROJECT / "experiments" / "timed_run.py"), "--dry-run"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("Rehearsed: complete")
    assert re.search(r"epoch \d+ of \d+, [\d,]+ images/s, loss .* min left", done.stdout)


def timed_run():
    sys.path.insert(0, str(PROJECT / "experiments"))
    import timed_run
    return timed_run


def test_parts_are_joined_and_checked(tmp_path, monkeypatch):
    tool = timed_run()
    monkeypatch.setattr(tool, "PART", 1000)
    evidence = tmp_path / "packed" / "results" / "mnist"
    evidence.mkdir(parents=True)
    (evidence / "log.txt").write_text("a line\n")
    weights = tmp_path / "model.torch"
    weights.write_bytes(bytes(range(256)) * 10)
    tool.pack(tmp_path / "packed", "mnist", weights, True, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model.torch.part*"))) == 3
    tool.join(tmp_path / "out", tmp_path / "home")
    assert (tmp_path / "home" / "pretrained" / "model.torch").read_bytes() == weights.read_bytes()
    assert (tmp_path / "home" / "results" / "mnist" / "log.txt").read_text() == "a line\n"
    assert "model.torch" in (tmp_path / "home" / "pretrained" / "SHA256SUMS").read_text()
    with pytest.raises(tool.BadInput, match="is there already"):
        tool.join(tmp_path / "out", tmp_path / "home")
    part = tmp_path / "out" / "model.torch.part01"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(tool.BadInput, match="part01 is missing or damaged"):
        tool.join(tmp_path / "out", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_timed_run_that_is_cut_off_brings_home_what_there_is(tmp_path, capsys, end):
    tool = timed_run()
    tool.prepare(tmp_path / "folder", packages=())
    line = [*tool.REHEARSAL, "--epochs=100000", "--log_each", "1"]
    tool.start(tmp_path / "work", tmp_path / "folder", 20, line)
    with pytest.raises(tool.BadInput, match="has a run already"):
        tool.start(tmp_path / "work", tmp_path / "folder", 20, line)
    capsys.readouterr()
    while not (lines := re.findall(r"epoch \d+ of \d+, .*", capsys.readouterr().out)):
        assert not tool.watch(tmp_path / "work", 1)
    assert re.fullmatch(r"epoch \d+ of \d+, [\d,]+ images/s, loss -?\d+\.\d\d, test error \d+\.\d\d %; "
                        r"ends in \d+\.\d min, \d+\.\d min left.*", lines[-1])
    if end == "killed":                                                       # with all that could tell of it
        state = tool.read_state(tmp_path / "work")
        os.killpg(state["wrapper"], signal.SIGKILL)
        os.waitpid(state["wrapper"], 0)
        assert tool.watch(tmp_path / "work", 1) and "its processes are gone" in capsys.readouterr().out
    assert not tool.finish(tmp_path / "work", "cut", tmp_path / "out")
    assert "not a result: exit code " + {"stopped": "0: Stopped by SIGTERM", "killed": "unknown"}[end] in capsys.readouterr().out
    tool.join(tmp_path / "out", tmp_path / "home")
    evidence = tmp_path / "home" / "results" / "cut"
    assert len((evidence / "metrics.csv").read_text().splitlines()) > 1 and (evidence / "state.json").is_file()
    assert torch.load(evidence / "cut.partial.torch") and not (tmp_path / "home" / "pretrained").exists()
    with pytest.raises(tool.BadInput, match="no run was started"):
        tool.watch(tmp_path, 1)


def test_a_timed_run_needs_time(tmp_path):
    tool = timed_run()
    tool.prepare(tmp_path / "folder", packages=())
    with pytest.raises(tool.BadInput, match="are left for training"):
        tool.start(tmp_path / "work", tmp_path / "folder", tool.MARGIN, tool.REHEARSAL)
    with pytest.raises(tool.BadInput, match="MNIST's four files"):
        tool.prepare(tmp_path / "folder", tmp_path, ())
