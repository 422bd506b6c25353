"""From a finished run to weights that ship, with the evidence behind them.

    python experiments/ship.py RUN_DIR NAME [--half] [--to FOLDER]

Evaluates the run's model.torch over three draws of the dequantisation noise, and on every 20th test
image; then writes pretrained/NAME.torch with its line in pretrained/SHA256SUMS, and results/NAME:
params.yaml, metrics.csv, log.txt, labelled.txt, the pictures, and evaluation.json with all that the card
in pretrained/README.md says. --half stores the networks inside the couplings in half precision if error
and bits/dim agree with float32's to 0.02 points and 0.001, and says so if they do not. --to: a folder
for both, instead of the project's.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
import yaml

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from models import build_model  # noqa: E402
from models.networks import ResNet  # noqa: E402
from utils import BadInput, as_command, load_script, sha256, whole_file  # noqa: E402
from utils.checkpoint import load_file, save_whole  # noqa: E402
from utils.data import load_data  # noqa: E402
from utils.device import choose_speed, device_name, set_up_torch  # noqa: E402
from utils.metrics import average_is_better, read_metrics  # noqa: E402
from utils.processes import Processes  # noqa: E402
from utils.settings import read_settings  # noqa: E402
from utils.step import arrange, scorer  # noqa: E402

EVIDENCE = ("params.yaml", "metrics.csv", "log.txt", "labelled.txt", "curves.png", "samples.png", "density.png", "traceback.txt")
DRAWS = 3
EACH = 20               # of the test images, the fixed ones of a quick check
AGREES = {"error": 0.02, "bits_per_dim": 0.001, "log_p": 0.002}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Ship the weights of a finished run.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--half", action="store_true", help="the couplings' networks in half precision, if that changes nothing")
    parser.add_argument("--to", type=Path, default=PROJECT, metavar="FOLDER", help="where pretrained/ and results/ are")
    parser.add_argument("--commit", help="of the run, where its params.yaml does not tell")
    own, rest = parser.parse_known_args(argv)
    missing = [name for name in ("params.yaml", "model.torch", "metrics.csv", "log.txt") if not (own.run / name).is_file()]
    if missing:
        raise BadInput(f"{own.run} is not the directory of a finished run: it has no {', '.join(missing)}")
    _, settings = read_settings(["--config", str(own.run / "params.yaml"), *rest])
    device = set_up_torch(settings, Processes())
    data = load_data(settings, device)
    rows = read_metrics(own.run / "metrics.csv")
    weights = load_file(own.run / "model.torch")
    model = build_model(settings, data.shape, data.n_classes, data.class_probs).to(device)
    figures = evaluate_weights(model, weights, data, settings)
    print(f"stored in float32: {describe(figures)}")
    stored = "float32"
    if own.half:
        halved = halve(weights, model)
        of_halved = evaluate_weights(model, halved, data, settings)
        print(f"in half precision: {describe(of_halved)}")
        if all(abs(mean(of_halved[key]) - mean(figures[key])) <= bound for key, bound in AGREES.items() if key in figures):
            weights, figures, stored = halved, of_halved, "float32, the couplings' networks in half precision"
        else:
            print("They do not agree: stored in float32")

    pretrained, results = own.to / "pretrained", own.to / "results" / own.name
    pretrained.mkdir(parents=True, exist_ok=True)
    path = pretrained / f"{own.name}.torch"
    save_whole(weights, path)
    digest = sha256(path)
    list_sum(pretrained / "SHA256SUMS", path.name, digest)
    copy_evidence(own.run, results)
    params = yaml.safe_load((own.run / "params.yaml").read_text())
    seconds = sum(row["seconds"] for row in rows)
    evaluation = {"file": path.name, "sha256": digest, "bytes": path.stat().st_size, "stored": stored,
                  "weights": "averaged" if average_is_better(rows[-1]) else "last",
                  "parameters": sum(p.numel() for p in model.parameters()),
                  "commit": own.commit or params.get("commit"), "changed": params.get("dirty"),
                  "training_seconds": round(seconds), "evaluated_on": device_name(device), "torch": torch.__version__,
                  **figures}
    with whole_file(results / "evaluation.json") as f:
        f.write(json.dumps(evaluation, indent=1) + "\n")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, SHA-256 {digest}\nEvidence in {results}")


def copy_evidence(run, folder):
    """Copy what there is of EVIDENCE from the directory of a run to `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in EVIDENCE:
        if (run / name).is_file():
            shutil.copy(run / name, folder / name)


def evaluate_weights(model, weights, data, settings):
    """error (%) and bits_per_dim (log_p, nats, of points) for each draw of the noise, computed as the run was; the same of
    every 20th test image."""
    model.load_state_dict(weights)                           # in the model's types, whatever they are stored in
    score = scorer(*arrange(model, choose_speed(settings, data.device, Processes())))
    evaluate = load_script().evaluate

    def of(examples):
        draws = [evaluate(score, data, examples, settings.test_bs, settings.seed + draw, Processes()) for draw in range(DRAWS)]
        likelihood = {"bits_per_dim": [round(data.bits_per_dim(log_p), 6) for log_p, _ in draws]} if data.levels else {
            "log_p": [round(log_p, 4) for log_p, _ in draws]}
        return {"error": [round(100 * (1 - accuracy), 4) for _, accuracy in draws], **likelihood, "images": len(examples[0])}
    return {**of((data.test_x, data.test_y)), "each_20th": of((data.test_x[::EACH], data.test_y[::EACH]))}


def halve(weights, model):
    """`weights` with those of the networks inside the couplings in half precision."""
    inside = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, ResNet))
    return {key: value.half() if key.startswith(inside) and value.is_floating_point() else value for key, value in weights.items()}


def list_sum(path, name, digest):
    """Put the file's line into SHA256SUMS, as sha256sum writes it."""
    lines = path.read_text().splitlines() if path.is_file() else []
    lines = sorted([line for line in lines if line.split()[1] != name] + [f"{digest}  {name}"], key=lambda line: line.split()[1])
    with whole_file(path) as f:
        f.write("\n".join(lines) + "\n")


def mean(values):
    return sum(values) / len(values)


def describe(figures):
    return "; ".join(f"{key} {mean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})"
                     for key, values in figures.items() if isinstance(values, list))


if __name__ == "__main__":
    as_command(main)
