"""The speed of training, and the share of what the machine can do.

    python benchmarks/throughput.py --config config.yaml
    python benchmarks/throughput.py --config config.yaml --modes fp32,bf16 --json out.json
    python benchmarks/throughput.py --config config.yaml --profile 30

For each mode: milliseconds per training step (batch, forward, backward, optimiser), images per
second, TFLOP/s counted from the model, their share of what a 64-channel 3x3 convolution and a large
matrix product reach on the same machine in the same run, seconds per epoch, peak memory, and the
seconds of the first call, which include compilation.
"""

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import (COLUMNS, count_flops, fresh_model, measure_limits, random_data,
                                read_arguments, report, time_modes)
from training.distributed import Processes
from training.speed import Accelerated, Speed
from utils.datasets import DATASETS
from utils.errors import run_command
from utils.files import PROJECT


def main():
    args, settings, device = read_arguments("Times training steps.", "steps", 10,
                                           "timed training steps of each mode")
    settings.lr = 1e-6                              # on random images the weights should stay put
    data, batch_size = random_data(settings, device), settings.train_bs

    # The script is no module that could be imported: its name has hyphens.
    make_training_step = runpy.run_path(str(PROJECT / "train-flow-ssl.py"))["make_training_step"]

    def training_step(speed):
        accelerated = Accelerated(fresh_model(settings, data), *speed)
        return make_training_step(accelerated, settings, Processes())[0]

    def batches():
        generator = torch.Generator(device).manual_seed(0)
        while True:
            yield data.sample_batch(batch_size, generator)

    def timed(speed):
        step, batch = training_step(speed), batches()
        return lambda: step(*next(batch))

    def counted():
        step, batch = training_step(Speed()), next(batches())
        return lambda: step(*batch)
    limits = measure_limits({speed.precision for _, speed in args.modes}, batch_size, device)
    flops = count_flops(counted())
    rows = time_modes(args.modes, timed, args.steps, batch_size, flops, limits, device,
                      args.profile)
    steps_per_epoch = -(-DATASETS[settings.data].n_train // batch_size)
    for row in rows:
        row["epoch_s"] = steps_per_epoch * row["ms"] / 1e3
    title = (f"A training step of {batch_size} images of {settings.data}: "
             f"{flops / 1e12:.3f} TFLOP; median of {args.steps}")
    columns = {**COLUMNS, "epoch_s": (f"{steps_per_epoch} steps, s", ".1f")}
    report(title, device, limits, rows, columns, args.json)


if __name__ == "__main__":
    run_command(main)
