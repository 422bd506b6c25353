"""From a finished run to weights that ship, with the evidence behind them.

    python tools/ship.py RUN_DIR NAME [--half] [--to FOLDER]

Evaluates the run's model.torch over three samples of the dequantisation noise, on all test images
and on every 20th. Then writes

- pretrained/NAME.torch, and its line in pretrained/SHA256SUMS;
- results/NAME: params.yaml, metrics.csv, log.txt, labelled.txt, the pictures, and evaluation.json,
  which contains the numbers for the card in pretrained/README.md.

--half stores the residual networks in half precision, if error and bits/dim then agree
with float32's to 0.02 points and 0.001; it says so if they do not.
"""

import math
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build_model
from models.networks import ResNet
from training.checkpoint import copy_to_cpu, load_weights, save_atomically
from training.evaluation import Inference, evaluate
from training.device import choose_speed, device_name, set_up_torch
from training.distributed import Processes
from training.speed import Accelerated
from utils.datasets import check_test_images, load_data
from utils.errors import BadInput, OneLineParser, run_command, value_errors_as_bad_input
from utils.files import PROJECT, atomic_write, sha256, write_json
from utils.metrics import average_is_better, read_metrics
from utils.runs import read_params
from utils.settings import read_settings

EVIDENCE = ("params.yaml", "metrics.csv", "log.txt", "labelled.txt", "curves.png", "samples.png",
            "samples-0.7.png", "density.png", "traceback.txt", "changes.diff")
# Settings on which the figures do not depend, apart from rounding.
MAY_CHANGE = ("device", "threads", "data_root", "test_bs", "precision", "compile", "cuda_graph",
              "micro_bs", "config_file", "test")
NOISE_SAMPLES = 3
EVERY = 20              # every 20th test image, for quick checks
TOLERANCES = {"error": 0.02, "bits_per_dim": 0.001, "log_p": 0.002}      # of half precision


def main(argv=None):
    parser = OneLineParser(description="Ship the weights of a finished run.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("name", metavar="NAME", help="of the weights and of the folder of evidence")
    parser.add_argument("--half", action="store_true",
                        help="store the residual networks in half precision, if figures agree")
    parser.add_argument("--to", type=Path, default=PROJECT, metavar="FOLDER",
                        help="the folder of pretrained/ and results/; default: the project")
    parser.add_argument("--commit", help="of the run, if its params.yaml does not have it")
    args, rest = parser.parse_known_args(argv)
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise BadInput(f"NAME must consist of letters, digits, '.', '_' and '-', not {args.name!r}")
    missing = [name for name in ("params.yaml", "model.torch", "metrics.csv", "log.txt")
               if not (args.run / name).is_file()]
    if missing:
        raise BadInput(f"{args.run} is not the directory of a finished run: it has no "
                       f"{', '.join(missing)}")
    config = ["--config", str(args.run / "params.yaml")]
    _, trained_with = read_settings(config)
    _, settings = read_settings([*config, *rest])
    changed = [key for key, value in vars(settings).items()
               if key not in MAY_CHANGE and value != vars(trained_with)[key]]
    if changed:
        raise BadInput(f"a run is evaluated with its own {changed[0]}")
    if not settings.supervised:
        raise BadInput("the evidence of shipped weights has a test error: a run without labels "
                       "has none")
    device = set_up_torch(settings, Processes())
    data = load_data(settings, device)
    check_test_images(data)
    rows = read_metrics(args.run / "metrics.csv")
    if not rows or not math.isfinite(seconds := sum(row["seconds"] for row in rows)):
        raise BadInput(f"{args.run / 'metrics.csv'} has no rows, or none with seconds")
    with value_errors_as_bad_input():
        model = build_model(settings, data.shape, data.n_classes, data.class_probs,
                            data.grey_levels).to(device)
    load_weights(model, args.run / "model.torch")       # refuses what is not finite, does not fit
    weights = copy_to_cpu(model.state_dict())
    results, stored = evaluate_weights(model, weights, data, settings), "float32"
    print(f"stored in float32: {describe(results)}")
    halved = to_half(weights, model)
    if args.half and not any(value.dtype == torch.float16 for value in halved.values()):
        print("The model has no networks to store in half precision: stored in float32")
    elif args.half:
        halved_results = evaluate_weights(model, halved, data, settings)
        print(f"in half precision: {describe(halved_results)}")
        if all(abs(fmean(halved_results[key]) - fmean(results[key])) <= tolerance
               for key, tolerance in TOLERANCES.items() if key in results):
            weights, results = halved, halved_results
            stored = "float32, the residual networks in half precision"
        else:
            print("They do not agree: stored in float32")

    pretrained, evidence = args.to / "pretrained", args.to / "results" / args.name
    pretrained.mkdir(parents=True, exist_ok=True)
    path = pretrained / f"{args.name}.torch"
    save_atomically(weights, path)
    digest = sha256(path)
    copy_evidence(args.run, evidence)
    params = read_params(args.run / "params.yaml")
    evaluation = {
        "file": path.name, "sha256": digest, "bytes": path.stat().st_size, "stored": stored,
        "weights": "averaged" if average_is_better(rows[-1]) else "last",
        "parameters": sum(p.numel() for p in model.parameters()),
        "commit": args.commit or params.get("commit"), "changed": params.get("dirty"),
        "training_seconds": round(seconds),
        "evaluated_on": device_name(device), "torch": torch.__version__, **results}
    write_json(evidence / "evaluation.json", evaluation)
    list_sum(pretrained / "SHA256SUMS", path.name, digest)      # last: now the weights ship
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, SHA-256 {digest}")
    print(f"Evidence in {evidence}")


def copy_evidence(run, folder):
    """Copy the files of EVIDENCE that the directory of a run has to `folder`.

    What the folder has of another run goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in EVIDENCE:
        (folder / name).unlink(missing_ok=True)
        if (run / name).is_file():
            shutil.copy(run / name, folder / name)


def evaluate_weights(model, weights, data, settings):
    """error (%) and bits_per_dim (log_p, nats, for points) per noise sample, as in the run.

    each_20th: the same for every 20th test image.
    """
    model.load_state_dict(weights)                  # cast to the types of the model
    speed = choose_speed(settings, data.device, Processes())
    infer = Inference(Accelerated(model, *speed))

    def evaluate_examples(examples):
        values = [evaluate(infer, data, examples, settings.test_bs, settings.seed + i, Processes())
                  for i in range(NOISE_SAMPLES)]
        error = [round(100 * (1 - accuracy), 4) for _, accuracy in values]
        if data.grey_levels:
            key, likelihood = "bits_per_dim", [round(data.bits_per_dim(p), 6) for p, _ in values]
        else:
            key, likelihood = "log_p", [round(log_p, 4) for log_p, _ in values]
        return {"error": error, key: likelihood, "images": len(examples[0])}
    return {**evaluate_examples((data.test_x, data.test_y)),
            "each_20th": evaluate_examples((data.test_x[::EVERY], data.test_y[::EVERY]))}


def to_half(weights, model):
    """`weights`, of which the residual networks' are in half precision."""
    networks = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, ResNet))
    return {key: value.half() if key.startswith(networks) and value.is_floating_point() else value
            for key, value in weights.items()}


def list_sum(path, name, digest):
    """Put the line of file `name` into SHA256SUMS, in the format of sha256sum."""
    lines = list(filter(None, path.read_text().splitlines())) if path.is_file() else []
    lines = [line for line in lines if line.split()[1] != name] + [f"{digest}  {name}"]
    with atomic_write(path) as f:
        f.write("\n".join(sorted(lines, key=lambda line: line.split()[1])) + "\n")


def describe(results):
    """The line that says what the results are."""
    return "; ".join(f"{key} {fmean(values):.4f} ({', '.join(f'{v:.4f}' for v in values)})"
                     for key, values in results.items() if isinstance(values, list))


if __name__ == "__main__":
    run_command(main)
