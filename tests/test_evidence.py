"""Published numbers: documents agree with results/, and shipped weights with their cards."""

import ast
import csv
import hashlib
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from statistics import stdev

import pandas as pd
import pytest
import torch
import yaml
from conftest import PROJECT, run_script, words

from benchmarks import marginal
from experiments import pictures, samples
from models import build_model
from training import checkpoint
from training.distributed import Processes
from training.evaluation import Inference, evaluate
from training.device import choose_speed
from training.speed import Accelerated
from utils.datasets import load_data
from utils.errors import BadInput
from utils.files import sha256
from utils.metrics import average_is_better, read_metrics
from utils.settings import read_settings

SHIPPED = sorted(path.name for path in checkpoint.PRETRAINED.glob("*.torch"))
RESULTS = PROJECT / "results"


def table(path, first, which=0):
    """The rows, {heading: cell}, of a table in a Markdown file: of those whose first heading is
    `first`, number `which`."""
    lines = (PROJECT / path).read_text().split(f"\n| {first} |")[1 + which].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" `") for cell in line.strip("|").split("|")])
    headings = [first, *[cell.strip() for cell in lines[0].strip("|").split("|")]]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def card(name):
    """The lines of a file's card in pretrained/README.md, {what: text}."""
    text = (PROJECT / "pretrained" / "README.md").read_text()
    section = text.split(f"## {name}\n", 1)[1].split("\n## ")[0]
    return dict(words(line).split(": ", 1) for line in section.split("\n- ")[1:])


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


def assert_says(path, *texts):
    """The document says each of the texts, line breaks aside."""
    document = " ".join((PROJECT / path).read_text().split())
    for text in texts:
        assert text in document, text


def seconds_of(folder):
    """Of a run with shipped weights: of its epochs, or, where it shared its cores or paused, of
    as many as the fastest."""
    rows, taken = read_metrics(folder / "metrics.csv"), evaluation_in(folder)["training_seconds"]
    at_best = round(len(rows) * min(row["seconds"] for row in rows))
    return taken if taken < 1.1 * at_best or len(rows) < rows[-1]["epoch"] else at_best


def runs_of(row):
    """The folders of the runs in a row of the table of runs, their errors in %, and their bits/dim
    or, of points, log p(x)."""
    folder = RESULTS / row["folder"]
    if (folder / "evaluation.json").is_file():
        figures = evaluation_in(folder)
        assert len(figures["error"]) == len(figures["bits_per_dim"]) == 3
        return [folder], [mean(figures["error"])], [mean(figures["bits_per_dim"])]
    folders = [folder / f"seed{seed:.0f}" for seed in numbers(row["S"])]
    assert len(folders) >= 3
    key = "test_log_p" if row["folder"] in ("moons", "circles") else "test_bpd"
    return folders, errors_of(folders), [last_row(run)[key] for run in folders]


def test_the_table_of_runs_agrees_with_their_logs():
    for row in table("results/README.md", "folder"):
        folders, errors, likelihood = runs_of(row)
        assert row["test error, %"] == each(errors, 2)
        assert row["bits/dim or log p(x), nats"] == each(likelihood, 3)
        for key in ("seed", "data_seed"):
            assert [params_of(run)[key] for run in folders] == numbers(row["S"])
        if len(folders) == 1:
            assert numbers(row["seconds"]) == [seconds_of(*folders)]
            assert evaluation_in(*folders)["commit"].startswith(row["commit"])
        assert len(row["seconds"].split(", ")) == len(folders)


def test_the_readme_s_table_of_configs_agrees_with_the_table_of_runs():
    runs = {row["folder"]: row for row in table("results/README.md", "folder")}
    rows = table("README.md", "config")
    assert len(rows) == len(runs)
    for row in rows:
        name, *labels = row["config"].replace("`", "").removesuffix(" labels").split(", ")
        run = runs[name]
        folders, errors, likelihood = runs_of(run)
        assert (PROJECT / "configs" / f"{name}.yaml").is_file()
        for params in map(params_of, folders):
            assert params["supervised"] == int(*labels or [100])
            assert ("SCNF-GMM" in row["changes to the paper's model and loss"]) == (
                params["ssl_model"] == "cond-shift")
        assert row["test error, %"] == spread(errors, 2)
        assert row["bits/dim"] == ("-" if labels else spread(likelihood, 3))
        assert int(row["n"]) == len(folders)
        quiet = [numbers(s)[0] for s in run["seconds"].split(", ") if s != "-"]
        assert int(row["minutes a run"]) == round(mean(quiet) / 60)
        assert row["hardware"] == run["hardware"]


def test_the_accuracies_on_samples():
    reports = {path.stem: json.loads(path.read_text())
               for path in (RESULTS / "samples").glob("*.json")}
    for row in table("pretrained/README.md", "file"):
        report = reports[Path(row["file"]).stem]
        assert report["samples"] == 1000
        assert row["recognised, %: T = 1; 0.7"] == "; ".join(
            f"{100 * report['sample_accuracy'][t]:.0f}" for t in ("1", "0.7"))
        errors = report["inversion_error"]
        assert row["inversion error: test; T = 1; 0.7"] == "; ".join(
            f"{errors[x]:.1e}".replace("e-0", "e-") for x in ("test", "1", "0.7"))
    error = {name: f"{100 * (1 - r['test_accuracy']):.2f}" for name, r in reports.items()}
    assert len({error[name] for name in error if name.startswith("mnist-")}) == 1
    assert_says("results/README.md", f"({error['mnist-best']} % test error on MNIST; "
                                     f"`model.torch`: {error['model']})")


def test_the_baselines_agree_with_their_reports():
    """The other methods use the labelled and the validation images of our runs."""
    ours, *others = sorted(table("results/README.md", "method"),
                           key=lambda row: row["method"][0] != "*")
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
        for folder, seed in zip(folders, report["seeds"], strict=True):
            params = params_of(folder)
            assert params["seed"] == params["data_seed"] == seed
            assert params["validation"] == report["validation"]
    seconds = [sum(row["seconds"] for row in read_metrics(folder / "metrics.csv"))
               for folder in digits]
    assert ours["digits: error, %"] == f"{mean(errors_of(digits)):.2f}"
    assert ours["digits: seconds"] == f"{mean(seconds):.1f}"
    glow = RESULTS / "mnist-glow"
    assert ours["MNIST: error, %"] == f"{mean(evaluation_in(glow)['error']):.2f}"
    assert numbers(ours["MNIST: seconds"]) == [seconds_of(glow)]


def test_label_spreading_on_the_labels_of_mnist_small():
    report = json.loads((RESULTS / "baselines" / "mnist-small.json").read_text())
    assert report["seeds"] == [10, 11, 12] and report["validation"] == 5000
    errors = [run["test_error"] for run in report["methods"]["spreading-edges"]["runs"]]
    assert_says("results/README.md", f"reaches {mean(errors):.2f} % with the labels of "
                                     f"`mnist-small` ({each(errors, 2)})")
    of_marginal = json.loads((RESULTS / "baselines" / "mnist.json").read_text())
    assert (RESULTS / "mnist-marginal" / "labelled.txt").read_bytes() == (
        RESULTS / "mnist-glow" / "labelled.txt").read_bytes()
    (run,) = of_marginal["methods"]["spreading-edges"]["runs"]
    assert_says("README.md", f"alone reaches {mean(errors):.2f} % with the labels of "
                             f"`mnist-small`, {run['test_error']:.2f} % with `mnist-marginal`'s")


def test_the_paper_s_table_shows_the_figures_of_runs():
    """Each row of README.md: of the paper's run, or of the smaller flow."""
    with open(RESULTS / "table" / "small" / "table.csv", newline="") as f:
        small = {row["config"]: row for row in csv.DictReader(f)}
    first, *others = table("README.md", "model")
    figures, params = evaluation_in(RESULTS / "paper-run"), params_of(RESULTS / "paper-run")
    epochs = f"{figures['epochs']:.0f} of {params['epochs']}"
    error, bits = f"{figures['error'][0]:.2f}", f"{figures['bits_per_dim'][0]:.3f}"
    assert (first["error, % (here)"], first["bits/dim (here)"], first["n"], first["epochs"]) == (
        f"{error}, in progress", bits, "1", epochs)
    assert_says("README.md", f"{error} % test error and {bits} bits/dim after {epochs} epochs")
    last = last_row(RESULTS / "paper-run")["epoch"]
    assert last <= figures["epochs"] < last + params["log_each"]
    _, settings = read_settings(["--config", str(PROJECT / first["config"])])
    assert {key for key, value in vars(settings).items() if params.get(key) != value} == {
        "compile", "config_file", "image_size", "labelled", "log_each", "precision", "time_limit"}
    published = {(run["model"], run["objective"], run["L_clf"]): run for run in small.values()}
    for row in (first, *others):
        run = published[row["model"].removesuffix(", smaller"), row["objective"], row["L_clf"]]
        assert all(row[key] == run[key] for key in ("error, % (paper)", "bits/dim (paper)"))
    assert [Path(row["config"]).stem for row in others] == [*small]
    for row in others:
        run = small[Path(row["config"]).stem]
        assert row["model"] == f"{run['model']}, smaller"
        _, settings = read_settings(["--config", str(PROJECT / row["config"])])
        assert int(row["epochs"]) == settings.epochs
        assert (row["objective"], row["L_clf"]) == (run["objective"], run["L_clf"])
        assert (row["error, % (here)"], row["bits/dim (here)"], row["n"]) == (
            run["error, %"], run["bits/dim"], run["n"])
    clf = figures_of_table("small")[0]["scnf-gmm-em-clf"]
    assert_says("README.md", f"rises to {min(clf):.0f}-{max(clf):.0f} % (paper: 16.9 %)")


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


@pytest.mark.parametrize("name", ["digits", "small"])
def test_the_tables_are_of_their_runs(name):
    errors, bits = figures_of_table(name)
    with open(RESULTS / "table" / name / "table.csv", newline="") as f:
        for row in csv.DictReader(f):
            config = row["config"].removeprefix(f"{name}-")
            assert row["error, %"] == spread(errors[config], 2)
            assert row["bits/dim"] == spread(bits[config], 3)
            assert int(row["n"]) == len(errors[config])


def test_what_results_say_of_the_table_on_digits():
    errors, bits = figures_of_table("digits")
    assert {len(values) for values in errors.values()} == {5}
    said = {config: spread(values, 1) for config, values in errors.items()}
    assert_says(
        "results/README.md",
        f"{said['scnf-glow']} against {said['scnf-gmm']} %",
        f"to {said['scnf-glow-em-clf']} and {said['scnf-gmm-em-clf']} %",
        f"({mean(bits['scnf-gmm']):.2f} against {mean(bits['scnf-glow']):.2f} bits/dim)")


def test_the_stages_of_the_paper_s_network():
    error = mean(evaluation_in(RESULTS / "model")["error"])
    assert_says("README.md", f"`model.torch` is the paper's network ({error:.2f} %)")
    for row in table("results/README.md", "folder", 2):
        last, figures = last_row(RESULTS / row["folder"]), RESULTS / row["folder"]
        if (figures / "evaluation.json").is_file():
            figures = evaluation_in(figures)
            error, bits = mean(figures["error"]), mean(figures["bits_per_dim"])
        else:
            error, bits = 100 * (1 - last["test_acc"]), last["test_bpd"]
        assert (row["test error, %"], row["bits/dim"]) == (f"{error:.2f}", f"{bits:.3f}")
        seconds = sum(r["seconds"] for r in read_metrics(RESULTS / row["folder"] / "metrics.csv"))
        assert numbers(row["seconds"]) == [round(seconds)]


def test_the_readme_s_training_steps_agree_with_the_benchmarks():
    rows = table("README.md", "hardware")
    step = (RESULTS / "speed" / "h100-step.txt").read_text()
    (line,) = re.findall(r"^bf16\+compile\+graph +(\d.*)$", step, re.MULTILINE)
    ms, _, _, _, _, of_convolution, *_ = numbers(line)
    measured = {("H100", "bf16"): (ms, of_convolution)}
    for mode in json.loads((RESULTS / "speed" / "cpu-training.json").read_text())["modes"]:
        measured["2", mode["mode"]] = mode["ms"], mode["of_convolution"]
    for row in rows:
        ms, share = measured[re.split(r"[ ,]", row["hardware"])[0], row["precision"]]
        assert numbers(row["ms"]) == [round(ms, 1 if ms < 100 else None)]
        assert row["% of a convolution's TFLOP/s"] == f"{share:.0f}"


def test_the_cost_of_log_p_x_agrees_with_the_benchmark():
    measured = pd.DataFrame(
        json.loads((RESULTS / "speed" / "marginal.json").read_text())["rows"])
    of = measured.set_index(["side", "model", "classes", "what"])
    for row in table("README.md", "K"):
        k = int(row.pop("K").replace(",", ""))
        for model, cell in row.items():
            assert cell == "/".join(f"{of.loc[28, model, k, what]['ms']:,.0f}"
                                    for what in ("value", "gradient"))
    crossings = marginal.crossings(measured)
    overtaking = [numbers(line)[-1] for line in crossings if "faster than zuko" in line]
    others = {re.search(r": (.*) from", line)[1] for line in crossings if "zuko" not in line}
    assert len(overtaking) == 12 and all({*re.findall(r"\S+GMM", line)} == {"FlowGMM", "SCNF-GMM"}
                                         for line in others)
    assert_says("README.md", f"fewer than {min(overtaking):.0f} to {max(overtaking):.0f} classes")
    few, many = (of.loc[28, "SCNF-GLOW", k, "gradient"]["mib"] / 1024 for k in (100, 1000))
    seconds = measured.query("side == 28 and what == 'samples'").groupby("model")["ms"].max() / 1e3
    assert_says("results/README.md", f"up to K = {min(overtaking)} to {max(overtaking)}",
                f"gradient takes {many:.1f} GiB for 1,000 classes, {few:.1f} for 100",
                f"{seconds.pop('zuko'):.0f} s for 100 samples of 28x28, others at most "
                f"{seconds.max():.1f}")


def test_the_faults_that_cost_nothing():
    report = json.loads((RESULTS / "soak.json").read_text())
    assert not any(part.get("lost") for part in report.values())
    text = words((RESULTS / "README.md").read_text().split("\n## Faults\n")[1].split("\n## ")[0])
    long, damages = report["long"], report["damages"]
    failed, = {report[part]["failed"] for part in ("large_files", "open_files", "full_disk")}
    damaged, = {sum(damages[name].values()) for name in ("model.torch", "checkpoint.pt")}
    for said in (f"{report['kills']['signals']} SIGKILLs, {report['kills']['half_written']} of",
                 f"{report['signals']['signals']} other signals; {failed} each failed",
                 f"{damaged:,} damaged copies each", f"{report['seeds']['runs']} runs with",
                 f"{long['epochs']:,} epochs had {long['MiB at epoch 10']:.0f} MiB at epoch 10",
                 f"and {long['MiB at the end']:.0f} at the end",
                 f"took {long['CPU seconds of an epoch, at the end']:.3f} CPU seconds",
                 f"{long['CPU seconds of an epoch, in a new run']:.3f} in a new run"):
        assert said in text


def test_the_accuracies_on_latents():
    rows = table("results/README.md", "weights")
    reports = {name: json.loads((RESULTS / "obfuscation" / f"{name}.json").read_text())
               for name in ("digits", "mnist-small")}
    assert len(rows) == sum(len(report["parts"]) for report in reports.values())
    digits, mnist = (f"{100 * report['chance']:.1f}" for report in reports.values())
    assert_says("results/README.md", f"by chance {digits} on digits, {mnist} on MNIST")
    for row in rows:
        report = reports[row["weights"].split("`")[0]]
        part = report["parts"][row["latent"]]
        assert row["classifier"] == f"{100 * part['classifier']:.1f}"
        assert row["logistic regression"] == f"{100 * part['linear']:.1f}"


def test_the_readme_s_python_does_what_its_comments_say(monkeypatch):
    monkeypatch.chdir(PROJECT)
    section = (PROJECT / "README.md").read_text().split("## Use it from Python\n")[1]
    code = textwrap.dedent(section.split("\n\n")[0])
    scope = {}
    exec(code, scope)
    assert {*scope["x"].shape} == {8, 1, 28} and 0 <= scope["x"].min() < scope["x"].max() <= 1
    for line in code.splitlines()[-5:]:
        expression, comment = line.split(" = ")[-1].split("#")
        results = eval(expression, scope)
        shapes = [tuple(result.shape) for result in (
            results if isinstance(results, tuple) else (results,))]
        said = [ast.literal_eval(shape) for shape in re.findall(r"\(8[^)]*\)", comment)]
        assert shapes == (said or [(8, 1, 28, 28)]), line


@pytest.mark.parametrize("document", ["README.md", "docs/runs.md", "results/README.md",
                                      "pretrained/README.md"])
def test_documented_commands_use_options_that_exist(document, monkeypatch):
    monkeypatch.chdir(PROJECT)
    text = (PROJECT / document).read_text().replace("\\\n", "")
    commands = re.findall(r"python train-flow-ssl.py (.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        command = command.split("`")[0]
        if "RUN_DIR" not in command:
            command = re.sub(r"\bS\b", "0", command.replace("NAME.yaml", "digits.yaml"))
            read_settings(shlex.split(command, comments=True))


@pytest.mark.parametrize("name", SHIPPED)
def test_cards_agree_with_files_and_runs(name):
    rows = card(name)
    evidence = evidence_of(rows)
    figures = evaluation_in(evidence)
    digest = hashlib.sha256((checkpoint.PRETRAINED / name).read_bytes()).hexdigest()
    assert digest == figures["sha256"]
    error, bits = figures["error"], figures["bits_per_dim"]
    assert len(error) == len(bits) == 3
    if len(set(error)) > 1:                 # classified with dequantisation noise
        assert rows["test error"].startswith(f"{mean(error):.2f} % ({each(error, 2)})")
    assert rows["bits/dim"] == f"{mean(bits):.4f} ({each(bits, 4)})"
    (listed,) = (row for row in table("pretrained/README.md", "file") if row["file"] == name)
    assert (listed["test error, %"], listed["bits/dim"]) == (
        f"{mean(error):.2f}", f"{mean(bits):.4f}")
    assert listed["MB"] == f"{figures['bytes'] / 1e6:.1f}"
    assert_says("results/README.md", figures["commit"][:7])
    assert f"{figures['parameters']:,} parameters" in rows["model"]
    assert (evidence / "log.txt").is_file() and (evidence / "params.yaml").is_file()
    row = last_row(evidence)
    kept = "averaged" if average_is_better(row) else "last"
    assert figures["weights"] == kept
    assert rows["model"].endswith(f"the {kept} weights")
    halved = "half precision" in figures["stored"]
    assert halved == (name not in ("mnist-glow.torch", "digits.torch"))
    # Of 10,000 images, rounding may change the class of one, in half precision of two.
    tolerance = 0.021 if halved else 0.011
    assert error[0] == pytest.approx(100 * (1 - row["test_acc"]), abs=tolerance)
    assert bits[0] == pytest.approx(row["test_bpd"], abs=1e-3)


def options_of(name, request):
    """The command line of the config of shipped weights."""
    config = "config.yaml" if name == "model.torch" else f"configs/{Path(name).stem}.yaml"
    data = [] if name == "digits.torch" else [
        "--data_root", str(request.getfixturevalue("mnist_root"))]
    return ["--config", str(PROJECT / config), "--device", "cpu", "--precision", "fp32", *data]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_give_the_numbers_of_their_card(name, tmp_path, monkeypatch, request):
    """On every 20th test image of MNIST, or all of digits, within the tolerance of the card."""
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(options_of(name, request))
    of_mnist, data = settings.data == "mnist", load_data(settings)
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
    error_tolerance, bits_tolerance = numbers(rows["tolerances"])
    figures = evaluation_in(evidence_of(rows))
    assert error_tolerance < 4 and bits_tolerance < 0.05
    assert abs(error - mean(figures["error"])) <= error_tolerance
    assert abs(bits - mean(figures["bits_per_dim"])) <= bits_tolerance
    if of_mnist:                            # on the same images, with other noise samples
        recorded = figures["each_20th"]
        assert len(recorded["error"]) == len(recorded["bits_per_dim"]) == 3
        assert error == pytest.approx(mean(recorded["error"]), abs=1.2)
        assert bits == pytest.approx(mean(recorded["bits_per_dim"]), abs=0.006)


@pytest.mark.parametrize("name", SHIPPED)
@torch.no_grad()
def test_inversion_errors_of_shipped_weights(name, request):
    """On every 25th of the images and samples: at most as large as stated, but for rounding."""
    model, data, _ = pictures.load([*options_of(name, request), "--pretrained"])
    report = json.loads((RESULTS / "samples" / f"{Path(name).stem}.json").read_text())
    stated, n = report["inversion_error"], report["samples"]
    noise = torch.Generator().manual_seed(report["seed"])
    x = {"test": data.dequantize(data.test_x[:n], noise)[::25]}
    noise = torch.randn(n, model.dim, generator=torch.Generator().manual_seed(report["seed"]))[::25]
    y = torch.arange(10).repeat(n // 10)[::25]
    x.update({key: model.sample(y, float(key) * noise) for key in ("1", "0.7")})
    assert x.keys() == stated.keys()
    for key, images in x.items():
        assert 0 < samples.inversion_error(model, images, 20) <= 2 * stated[key], key


@torch.no_grad()
def test_what_decode_says_of_mnist_best(request):
    """The worst of 1,000 test images is inverted to 0.3, others to 0.003, in float64 to 1e-7."""
    model, data, _ = pictures.load([*options_of("mnist-best.torch", request), "--pretrained"])
    x = data.dequantize(data.test_x[:1000], torch.Generator().manual_seed(0))
    worst, others = x[531:532], x[::20]
    assert 0.03 < samples.inversion_error(model, worst, 1) < 0.6
    assert samples.inversion_error(model, others, 50) < 3e-3
    assert samples.inversion_error(model, torch.rand(20, 1, 28, 28), 20) > 0.3
    both = torch.cat((worst, others)).double()
    assert samples.inversion_error(model.double(), both, 60) < 1e-7


@torch.no_grad()
def test_log_p_of_inverted_images_is_the_same_in_float32_and_float64(request):
    """Also where pixels lie on edges of grey levels, such as white ones whose noise is rounded."""
    model, data, _ = pictures.load([*options_of("mnist-small.torch", request), "--pretrained"])
    x = data.dequantize(255 - data.test_x[:20], torch.Generator().manual_seed(0))
    edges = (x * 256).round() / 256
    x = x.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > 0.01, edges)
    assert (x == 1).any()
    log_p = model.log_prob(x).double()
    torch.testing.assert_close(log_p, model.double().log_prob(x.double()), atol=0.05, rtol=0)


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
    sums = "three words here\n\n" + "".join(
        f"{sha256(tmp_path / name)}  {name}\n" for name in names)
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
    assert run_script([*line, "--pretrained", str(path)]) == 2  # by the checksums inside the file
    assert "is no checkpoint that torch.load can read" in capsys.readouterr().err
