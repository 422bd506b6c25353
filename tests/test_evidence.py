"""Published numbers: README.md agrees with results/, and shipped weights with their cards."""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path
from statistics import stdev

import pytest
import yaml
from conftest import PROJECT, run_script

from models import build_model
from training import checkpoint
from training.distributed import Processes
from training.evaluation import Inference, evaluate
from training.speed import Accelerated, choose_speed
from utils.datasets import load_data
from utils.errors import BadInput
from utils.files import sha256
from utils.metrics import average_is_better, read_metrics
from utils.settings import read_settings

SHIPPED = sorted(path.name for path in checkpoint.PRETRAINED.glob("*.torch"))
RESULTS = PROJECT / "results"


def table(path, first):
    """The rows, {heading: cell}, of the table in a Markdown file whose first heading is `first`."""
    lines = (PROJECT / path).read_text().split(f"\n| {first} |", 1)[1].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" `") for cell in line.strip("|").split("|")])
    headings = [first, *[cell.strip() for cell in lines[0].strip("|").split("|")]]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def card(name):
    """The rows of a file's card in pretrained/README.md, {what: text}."""
    text = (PROJECT / "pretrained" / "README.md").read_text()
    section = text.split(f"## {name}\n", 1)[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return {what.strip(): value.strip() for what, value in rows}


def evidence_of(rows):
    return PROJECT / re.search(r"`\.\./(results/[^`]+)`", rows["run"])[1]


def evaluation_in(folder):
    return json.loads((folder / "evaluation.json").read_text())


def numbers(text):
    return [float(v.replace(",", "")) for v in re.findall(r"-?\d[\d,]*\.?\d*", text)]


def mean(values):
    return sum(values) / len(values)


def spread(values, digits):
    """Mean ± standard deviation, as text; of one value that value."""
    average = f"{mean(values):.{digits}f}"
    return average if len(values) == 1 else f"{average} ± {stdev(values):.{digits}f}"


def last_row(folder):
    return read_metrics(folder / "metrics.csv")[-1]


def params_of(folder):
    return yaml.safe_load((folder / "params.yaml").read_text())


def errors_of(folders):
    """The test error of each run, in %."""
    return [100 * (1 - last_row(folder)["test_acc"]) for folder in folders]


def each(errors, digits):
    return ", ".join(f"{error:.{digits}f}" for error in errors)


def assert_readme_says(*texts):
    readme = " ".join((PROJECT / "README.md").read_text().split())
    for text in texts:
        assert text in readme, text


MODELS = {"cond-flow": "SCNF-GLOW", "cond-shift": "SCNF-GMM"}


def test_the_readme_s_table_of_cpu_runs_agrees_with_results():
    for row in table("README.md", "data"):
        name = Path(row["config"]).stem
        error, bits, seconds = row["test error, %"], row["bits/dim"], row["seconds"]
        folder = RESULTS / name
        logs = list(folder.glob("**/log.txt"))
        assert logs and all(f"; {row['parameters']} parameters;" in log.read_text() for log in logs)
        assert {row["model"]} == {MODELS[params_of(log.parent)["ssl_model"]] for log in logs}
        if (folder / "evaluation.json").is_file():
            figures = evaluation_in(folder)
            assert len(figures["error"]) == len(figures["bits_per_dim"]) == 3
            assert error == f"{mean(figures['error']):.2f}"
            assert bits == f"{mean(figures['bits_per_dim']):.3f}"
            # The seconds of an epoch count pauses and other programs too. With those, the seconds
            # are of all epochs at the pace of the fastest.
            rows = read_metrics(folder / "metrics.csv")
            assert len(rows) == rows[-1]["epoch"]
            at_best = round(len(rows) * min(row["seconds"] for row in rows))
            taken = figures["training_seconds"]
            assert numbers(seconds) == [taken if taken < 1.1 * at_best else at_best]
            assert params_of(folder)["supervised"] == numbers(row["labelled"])[0]
            continue
        evidence = next(r for r in table("results/README.md", "folder") if r["folder"] == name)
        folders = [folder / f"seed{seed:.0f}" for seed in numbers(evidence["S"])]
        assert len(folders) >= 3
        errors, all_bits = errors_of(folders), [last_row(run)["test_bpd"] for run in folders]
        if row["data"] == "MNIST":      # 10,000 test images: 0.01 points are one of them
            assert error == f"{spread(errors, 2)} ({each(errors, 2)})"
            assert bits == spread(all_bits, 3)
        else:
            assert error == f"{mean(errors):.1f} ({each(errors, 1)})"
            assert bits in ("-", f"{mean(all_bits):.2f}")
        seconds_of_runs = evidence["seconds"].split(", ")       # -: with other programs beside it
        assert len(seconds_of_runs) == len(folders)
        quiet = [numbers(s)[0] for s in seconds_of_runs if s != "-"]
        assert numbers(seconds) == [round(mean(quiet))]
        assert evidence["test error, %"].split(" (")[0] == each(errors, 2)


def test_the_readme_s_baselines_agree_with_results():
    """The other methods have the labelled and the validation images of our runs."""
    ours, *others = sorted(table("README.md", "method"), key=lambda row: row["method"][0] != "*")
    digits = [RESULTS / "digits" / f"seed{seed}" for seed in range(10, 15)]
    for data, folders in (("digits", digits), ("MNIST", [RESULTS / "mnist-glow"])):
        report = json.loads((RESULTS / "baselines" / f"{data.lower()}.json").read_text())
        for row, method in zip(others, report["methods"].values(), strict=True):
            assert row["method"] == method["title"]
            errors = [run["test_error"] for run in method["runs"]]
            assert method["mean_test_error"] == pytest.approx(mean(errors), abs=1e-3)
            assert row[f"{data}: error, %"] == f"{mean(errors):.2f}"
            assert numbers(row[f"{data}: seconds"]) == [
                round(mean([run["seconds"] for run in method["runs"]]), 1)]
            assert (row["p(x)"], row["samples"]) == (method["density"], method["samples"])
        for folder, seed in zip(folders, report["seeds"], strict=True):
            params = params_of(folder)
            assert params["seed"] == params["data_seed"] == seed
            assert params["validation"] == report["validation"]
    seconds = [sum(row["seconds"] for row in read_metrics(folder / "metrics.csv"))
               for folder in digits]
    assert ours["digits: error, %"] == f"{mean(errors_of(digits)):.2f}"
    assert ours["digits: seconds"] == f"{mean(seconds):.1f}"
    (mnist,) = (row for row in table("README.md", "data") if "mnist-glow" in row["config"])
    assert ours["MNIST: error, %"] == mnist["test error, %"]
    assert ours["MNIST: seconds"] == mnist["seconds"]


def test_label_spreading_on_the_labels_of_mnist_small():
    report = json.loads((RESULTS / "baselines" / "mnist-small.json").read_text())
    assert report["seeds"] == [10, 11, 12] and report["validation"] == 5000
    errors = [run["test_error"] for run in report["methods"]["spreading-edges"]["runs"]]
    assert_readme_says(
        f"has {mean(errors):.2f} % on its own with the same labels ({each(errors, 2)})")


def test_the_table_of_the_paper_has_no_number_without_a_run():
    for row in table("README.md", "model"):
        here, config = (row["error, % (here)"], row["bits/dim (here)"]), row["config"]
        if config.startswith("pretrained/"):        # not an experiment of the paper's
            figures = evaluation_in(RESULTS / Path(config).stem)
            assert here == (f"{mean(figures['error']):.2f}", f"{mean(figures['bits_per_dim']):.3f}")
            continue
        evidence = RESULTS / "table" / "mnist" / "table.csv"
        rows = []
        if evidence.is_file():
            with open(evidence, newline="") as f:
                rows = [r for r in csv.DictReader(f) if r["config"] == Path(config).stem]
        expected = [(r["error, %"], r["bits/dim"]) for r in rows] or [
            ("not yet run", "not yet run") if config != "-" else ("-", "-")]
        assert [here] == expected
        assert config == "-" or (PROJECT / config).is_file()


def figures_of_table(name):
    """Of results/table/NAME, {config, without NAME: errors in % of its runs}, {...: bits/dim}."""
    errors, bits = {}, {}
    with open(RESULTS / "table" / name / "runs.csv", newline="") as f:
        for row in csv.DictReader(f):
            assert row["commit"][-1] != "+"
            config = row["config"].removeprefix(f"{name}-")
            errors.setdefault(config, []).append(float(row["test error, %"]))
            bits.setdefault(config, []).append(float(row["bits/dim"]))
    return errors, bits


def test_what_the_readme_says_of_the_table_on_digits():
    errors, bits = figures_of_table("digits")
    assert {len(values) for values in errors.values()} == {5}
    said = {config: spread(values, 1) for config, values in errors.items()}
    assert_readme_says(
        f"{said['scnf-glow']} against {said['scnf-gmm']} %",
        f"{said['scnf-glow-em']} and {said['scnf-gmm-em']} %",
        f"{said['scnf-glow-em-clf']} and {said['scnf-gmm-em-clf']} %",
        f"{mean(bits['scnf-gmm']):.2f} against {mean(bits['scnf-glow']):.2f} bits/dim",
        f"`ssl_model: cond-gmm`, has {said['cond-gmm']} %")


def test_what_the_readme_says_of_the_table_on_mnist_with_a_smaller_flow():
    errors, bits = figures_of_table("small")
    assert {config: len(values) for config, values in errors.items()} == {
        "scnf-glow": 3, "scnf-gmm": 3, "scnf-glow-em": 1, "scnf-gmm-em": 1, "scnf-glow-em-clf": 1,
        "scnf-gmm-em-clf": 2}
    said = {config: spread(values, 1) for config, values in errors.items()}
    sgd = [f"{errors[config][0]:.1f}" for config in ("scnf-glow", "scnf-gmm")]
    memorised = " and ".join(f"{error:.0f}" for error in errors["scnf-gmm-em-clf"])
    assert_readme_says(
        f"{said['scnf-glow']} against {said['scnf-gmm']} % with three seeds",
        f"{spread(bits['scnf-glow'], 3)} and {spread(bits['scnf-gmm'], 3)} bits/dim",
        f"EM-SGD has {said['scnf-glow-em']} and {said['scnf-gmm-em']} % with seed 0, "
        f"and SGD {' and '.join(sgd)} %",
        f"SCNF-GLOW has {said['scnf-glow-em-clf']} % with seed 0",
        f"{memorised} % of the test images wrong with two seeds")


def test_what_the_readme_says_of_the_latents():
    rows = table("README.md", "weights")
    reports = {name: json.loads((RESULTS / "obfuscation" / f"{name}.json").read_text())
               for name in ("digits", "mnist-small")}
    assert len(rows) == sum(len(report["parts"]) for report in reports.values())
    for row in rows:
        report = reports[row["weights"].split("`")[0]]
        part = report["parts"][row["latent"]]
        assert row["classifier"] == f"{100 * part['classifier']:.1f}"
        assert row["logistic regression"] == f"{100 * part['linear']:.1f}"
        assert row["chance"] == f"{100 * report['chance']:.1f}"


@pytest.mark.parametrize("name", SHIPPED)
def test_cards_agree_with_files_and_runs(name):
    rows = card(name)
    evidence = evidence_of(rows)
    figures = evaluation_in(evidence)
    digest = hashlib.sha256((checkpoint.PRETRAINED / name).read_bytes()).hexdigest()
    assert rows["SHA-256"].strip("`") == digest == figures["sha256"]
    error, bits = figures["error"], figures["bits_per_dim"]
    assert len(error) == len(bits) == 3
    assert f"{mean(error):.2f} %" in rows["test error"]
    assert rows["bits/dim"] == f"{mean(bits):.4f} ({each(bits, 4)})"
    assert rows["commit, hardware"].startswith(figures["commit"][:7])
    assert f"{figures['training_seconds']:,} s" in rows["commit, hardware"]
    assert f"{figures['parameters']:,} parameters" in rows["model"]
    assert (evidence / "log.txt").is_file() and (evidence / "params.yaml").is_file()
    row = last_row(evidence)
    kept = "averaged" if average_is_better(row) else "last"
    assert figures["weights"] == kept
    assert f"the {kept} weights, in {figures['stored']}" in rows["model"]
    # Of 10,000 images, rounding may change the class of one, in half precision of two.
    tolerance = 0.021 if "half" in figures["stored"] else 0.011
    assert error[0] == pytest.approx(100 * (1 - row["test_acc"]), abs=tolerance)
    assert bits[0] == pytest.approx(row["test_bpd"], abs=1e-3)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_give_the_numbers_of_their_card(name, tmp_path, monkeypatch, request):
    """On every 20th test image of MNIST, or all of digits, within the tolerance of the card."""
    monkeypatch.chdir(tmp_path)
    config = PROJECT / "configs" / name.replace(".torch", ".yaml")
    config = PROJECT / "config.yaml" if name == "model.torch" else config
    _, settings = read_settings(["--config", str(config), "--device", "cpu", "--precision", "fp32"])
    of_mnist = settings.data == "mnist"
    if of_mnist:
        settings.data_root = request.getfixturevalue("mnist_root")
    data = load_data(settings)
    images, y = (t[::20] if of_mnist else t for t in (data.test_x, data.test_y))
    assert len(images) == (500 if of_mnist else 360)
    model = build_model(settings, data.shape, data.n_classes, grey_levels=data.grey_levels)
    checkpoint.load_weights(model, checkpoint.shipped_weights(settings.config_file))
    accelerated = Accelerated(model, *choose_speed(settings, data.device, Processes()))
    inference = Inference(accelerated)
    draws = [evaluate(inference, data, (images, y), 256, seed, Processes()) for seed in (7, 8, 9)]
    error = mean([100 * (1 - accuracy) for _, accuracy in draws])
    bits = mean([data.bits_per_dim(log_p) for log_p, _ in draws])
    rows = card(name)
    error_tolerance = float(rows["tolerance of error"].removesuffix(" points"))
    bits_tolerance = float(rows["tolerance of bits/dim"])
    figures = evaluation_in(evidence_of(rows))
    assert error_tolerance < 4 and bits_tolerance < 0.05
    assert abs(error - mean(figures["error"])) <= error_tolerance
    assert abs(bits - mean(figures["bits_per_dim"])) <= bits_tolerance
    if of_mnist:                            # on the same images, with other noise samples
        recorded = figures["each_20th"]
        assert len(recorded["error"]) == len(recorded["bits_per_dim"]) == 3
        assert error == pytest.approx(mean(recorded["error"]), abs=1.2)
        assert bits == pytest.approx(mean(recorded["bits_per_dim"]), abs=0.006)


def test_sums_are_of_the_files_that_ship():
    files = [checkpoint.PRETRAINED / name for name in SHIPPED]
    assert (checkpoint.PRETRAINED / "SHA256SUMS").read_text().splitlines() == [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]


@pytest.mark.parametrize("config, weights", [
    (None, "model.torch"), ("config.yaml", "model.torch"), ("/a/config.yaml", "model.torch"),
    ("configs/digits.yaml", "digits.torch"), ("configs/mnist-small.yaml", "mnist-small.torch")])
def test_shipped_weights_have_the_name_of_their_config(tmp_path, monkeypatch, config, weights):
    names = ("model.torch", "digits.torch", "mnist-small.torch")
    for name in names:
        (tmp_path / name).write_text(name)
    sums = "".join(f"{sha256(tmp_path / name)}  {name}\n" for name in names)
    (tmp_path / "SHA256SUMS").write_text(sums)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path)
    assert checkpoint.shipped_weights(config) == tmp_path / weights
    (tmp_path / weights).unlink()
    with pytest.raises(BadInput, match=rf"there is no pretrained/{weights}\)"):
        checkpoint.shipped_weights(config)


def test_a_damaged_shipped_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint.PRETRAINED, tmp_path / "pretrained")
    path = tmp_path / "pretrained" / "digits.torch"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1                             # one bit of a weight
    path.write_bytes(content)
    monkeypatch.setattr(checkpoint, "PRETRAINED", tmp_path / "pretrained")
    line = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--device", "cpu"]
    assert run_script([*line, "--pretrained"]) == 2
    err = capsys.readouterr().err
    assert "SHA-256" in err and "digits.torch is damaged" in err and err.count("\n") == 1
    assert run_script([*line, "--pretrained", str(path)]) == 0  # only shipped files are compared
