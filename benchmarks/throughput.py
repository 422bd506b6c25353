"""The speed of training, and the share of what the machine can do.

    python benchmarks/throughput.py --config config.yaml
    python benchmarks/throughput.py --config config.yaml --modes fp32,bf16 --json out.json
    python benchmarks/throughput.py --config config.yaml --profile 30

For each mode: milliseconds per training step (batch, forward, backward, optimiser), images per
second, TFLOP/s counted from the model, their share of what a 64-channel 3x3 convolution and a large
matrix product reach on the same machine in the same run, seconds per epoch, peak memory, and the
seconds of the first call, which include compilation.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import (COLUMNS, convolutions_in, count_flops, fresh_model, measure_limits,
                     print_profile, random_data, read_arguments, report, row_of, start_mode,
                     time_calls)
from training.processes import Processes
from training.speed import WARM_UP_CALLS, Accelerated
from training.step import TrainingStep
from utils.data import DATASETS
from utils.errors import run_command


def random_batch(data, settings, generator):
    return data.sample_batch(settings.train_bs, 1 / 3, generator, settings.cons_weight > 0)


def count_flops_of_step(settings, data):
    """The FLOPs of a training step."""
    step = TrainingStep(Accelerated(fresh_model(settings, data)), settings, Processes())
    batch = random_batch(data, settings, torch.Generator(data.device).manual_seed(0))
    return count_flops(lambda: step(*batch))


def main():
    own, settings, device = read_arguments("Times training steps.", "steps", 10,
                                           "timed training steps of each mode")
    settings.lr = 1e-6                              # on random images the weights should stay put
    data, batch_size = random_data(settings, device), settings.train_bs
    limits = measure_limits(sorted({mode.precision for mode in own.modes}), batch_size, device)
    flops = count_flops_of_step(settings, data)
    steps_per_epoch = -(-DATASETS[settings.data].n_train // batch_size)
    rows = []
    for mode in own.modes:
        start_mode(device)
        model = fresh_model(settings, data)
        generator = torch.Generator(device).manual_seed(0)
        with convolutions_in(mode.precision):
            step = TrainingStep(Accelerated(model, *mode.speed), settings, Processes())

            def run(step=step, generator=generator):
                step(*random_batch(data, settings, generator))
            warm_up = WARM_UP_CALLS + 2 if device.type == "cuda" else 1
            seconds, first = time_calls(run, own.steps, device, warm_up)
        row = row_of(mode, seconds, first, batch_size, flops, limits, device)
        if own.profile:
            with convolutions_in(mode.precision):
                print_profile(mode.name, run, device, own.profile)
        rows.append({**row, "epoch_s": steps_per_epoch * row["ms"] / 1e3})
        print(f"{mode.name}: {row['ms']:.2f} ms", file=sys.stderr)
        del model, step, run
    title = (f"A training step of {batch_size} images of {settings.data}: "
             f"{flops / 1e12:.3f} TFLOP; median of {own.steps}")
    columns = {**COLUMNS, "epoch_s": (f"{steps_per_epoch} steps, s", ".1f")}
    report(title, device, limits, rows, columns, own.json)


if __name__ == "__main__":
    run_command(main)
