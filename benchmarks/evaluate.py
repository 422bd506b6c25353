"""How fast evaluation and sampling are, and how much of what the machine can do.

    python benchmarks/evaluate.py --config config.yaml
    python benchmarks/evaluate.py --config config.yaml --modes plain,bf16+compile+graph --batches 50 --json out.json

For each mode, log p(x, y) of a test batch as `evaluate` computes it; then draws from p(x | y), by
the inverse, which has no modes. The columns are those of throughput.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import (COLUMNS, convolutions_in, flops_per_image, fresh_model, limits,  # noqa: E402
                     random_data, read_arguments, read_mode, report, row_of, start_mode, times)

from utils import as_command  # noqa: E402
from utils.step import WARM_UP, arrange, scorer  # noqa: E402

TEST_IMAGES = {"mnist": 10_000, "digits": 360, "moons": 1000, "circles": 1000}


def main():
    own, settings, device = read_arguments(
        "Times evaluation and sampling.", lambda parser: parser.add_argument("--batches", type=int, default=5, help="timed batches of a mode"))
    data = random_data(settings, device)
    found_limits = limits(sorted({"fp32", *(m.precision for m in own.modes)}), settings.test_bs, device)
    flops, _ = flops_per_image(settings, data)
    n = TEST_IMAGES[settings.data]
    n_batches = -(-n // settings.test_bs)
    batch = -(-n // n_batches)
    warm_up = WARM_UP + 2 if device.type == "cuda" else 1
    x = data.dequantize(data.test_x[:batch], torch.Generator(device).manual_seed(0))
    rows = []
    for mode in own.modes:
        start_mode(device)
        model = fresh_model(settings, data)
        mode.micro_bs = settings.micro_bs
        with convolutions_in(mode.precision), torch.no_grad():
            score = model.log_joint if mode.plain else scorer(*arrange(model, mode), mode.cuda_graph)
            seconds, first = times(lambda: score(x), own.batches, device, warm_up)
        rows.append(row_of(mode, seconds, first, batch, flops, found_limits, device))
        print(f"{mode.name}: {rows[-1]['ms']:.2f} ms", file=sys.stderr)
    start_mode(device)
    model, y = fresh_model(settings, data), torch.arange(batch, device=device) % data.n_classes
    with convolutions_in("fp32"):
        seconds, first = times(lambda: model.sample(y), own.batches, device, warm_up)
    mode = read_mode("fp32", device.type == "cuda")
    mode.name = "sampling"
    rows.append(row_of(mode, seconds, first, batch, flops, found_limits, device))
    rows[-1].update(tflops=None, of_convolution=None, of_matmul=None)        # the inverse's are not counted
    for row in rows:
        row["all_s"] = n_batches * row["ms"] / 1e3
    report(f"A test batch of {batch} images of {settings.data}: {batch * flops / 1e12:.3f} TFLOP; median of {own.batches}",
           device, found_limits, rows, {**COLUMNS, "all_s": (f"{n:,} images, s", ".1f")}, own.json)


if __name__ == "__main__":
    as_command(main)
