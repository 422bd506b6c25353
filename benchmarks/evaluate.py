"""The speed of evaluation and sampling, and the share of what the machine can do.

    python benchmarks/evaluate.py --config config.yaml
    python benchmarks/evaluate.py --config config.yaml --modes fp32,bf16 --batches 50
    python benchmarks/evaluate.py --config config.yaml --profile 30

For each mode, log p(x, y) of a test batch as `evaluate` computes it; then samples from p(x | y),
through the inverse, which has no modes. The columns are those of throughput.py.
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import (COLUMNS, count_flops, fresh_model, measure_limits, random_data,
                                read_arguments, report, time_modes)
from training.evaluation import Inference
from training.speed import Accelerated, Speed
from utils.datasets import DATASETS
from utils.errors import run_command


def main():
    args, settings, device = read_arguments("Times evaluation and sampling.", "batches", 5,
                                           "timed batches of each mode")
    data = random_data(settings, device)
    precisions = {"fp32", *(speed.precision for _, speed in args.modes)}
    limits = measure_limits(precisions, settings.test_bs, device)
    n = DATASETS[settings.data].n_test
    n_batches = -(-n // settings.test_bs)
    batch_size = -(-n // n_batches)
    x = data.dequantize(data.test_x[:batch_size], torch.Generator(device).manual_seed(0))
    y = torch.arange(batch_size, device=device) % data.n_classes

    def evaluation(speed):
        infer = Inference(Accelerated(fresh_model(settings, data), *speed)).log_joint
        return lambda: infer(x)

    def sampling(_):
        model = fresh_model(settings, data)
        return lambda: model.sample(y)
    with torch.no_grad():
        flops = count_flops(partial(fresh_model(settings, data).log_prob, x[:4])) / 4 * batch_size
        rows = time_modes(args.modes, evaluation, args.batches, batch_size, flops, limits, device,
                          args.profile)
        rows += time_modes([("sampling", Speed())], sampling, args.batches, batch_size, flops,
                           limits, device)
    rows[-1].update(tflops=None, of_convolution=None, of_matmul=None)   # the inverse's are unknown
    for row in rows:
        row["all_s"] = n_batches * row["ms"] / 1e3
    title = (f"A test batch of {batch_size} images of {settings.data}: "
             f"{flops / 1e12:.3f} TFLOP; median of {args.batches}")
    columns = {**COLUMNS, "all_s": (f"{n:,} images, s", ".1f")}
    report(title, device, limits, rows, columns, args.json)


if __name__ == "__main__":
    run_command(main)
