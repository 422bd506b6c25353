"""The speed of evaluation and sampling, and the share of what the machine can do.

    python benchmarks/evaluate.py --config config.yaml
    python benchmarks/evaluate.py --config config.yaml --modes fp32,bf16 --batches 50
    python benchmarks/evaluate.py --config config.yaml --profile 30

For each mode, log p(x, y) of a test batch as `evaluate` computes it; then samples from p(x | y),
through the inverse, which has no modes. The columns are those of throughput.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import (COLUMNS, Mode, convolutions_in, count_flops, fresh_model, measure_limits,
                     print_profile, random_data, read_arguments, report, row_of, start_mode,
                     time_calls)
from training.evaluation import Inference
from training.speed import WARM_UP_CALLS, Accelerated, Speed
from utils.data import DATASETS
from utils.errors import run_command


def main():
    own, settings, device = read_arguments("Times evaluation and sampling.", "batches", 5,
                                           "timed batches of each mode")
    data = random_data(settings, device)
    precisions = sorted({"fp32", *(mode.precision for mode in own.modes)})
    limits = measure_limits(precisions, settings.test_bs, device)
    n = DATASETS[settings.data].n_test
    n_batches = -(-n // settings.test_bs)
    batch_size = -(-n // n_batches)
    warm_up = WARM_UP_CALLS + 2 if device.type == "cuda" else 1
    x = data.dequantize(data.test_x[:batch_size], torch.Generator(device).manual_seed(0))
    model = fresh_model(settings, data)
    with torch.no_grad():
        flops = count_flops(lambda: model.log_prob(x[:4])) / 4 * batch_size
    rows = []
    for mode in own.modes:
        start_mode(device)
        model = fresh_model(settings, data)
        with convolutions_in(mode.precision), torch.no_grad():
            infer = Inference(Accelerated(model, *mode.speed)).log_joint
            def run(infer=infer):
                infer(x)
            seconds, first = time_calls(run, own.batches, device, warm_up)
            if own.profile:
                print_profile(mode.name, run, device, own.profile)
        rows.append(row_of(mode, seconds, first, batch_size, flops, limits, device))
        print(f"{mode.name}: {rows[-1]['ms']:.2f} ms", file=sys.stderr)
    start_mode(device)
    model = fresh_model(settings, data)
    y = torch.arange(batch_size, device=device) % data.n_classes
    with convolutions_in("fp32"):
        seconds, first = time_calls(lambda: model.sample(y), own.batches, device, warm_up)
    sampling = Mode("sampling", Speed())
    rows.append(row_of(sampling, seconds, first, batch_size, flops, limits, device))
    rows[-1].update(tflops=None, of_convolution=None, of_matmul=None)   # the inverse's are unknown
    for row in rows:
        row["all_s"] = n_batches * row["ms"] / 1e3
    title = (f"A test batch of {batch_size} images of {settings.data}: "
             f"{flops / 1e12:.3f} TFLOP; median of {own.batches}")
    columns = {**COLUMNS, "all_s": (f"{n:,} images, s", ".1f")}
    report(title, device, limits, rows, columns, own.json)


if __name__ == "__main__":
    run_command(main)
