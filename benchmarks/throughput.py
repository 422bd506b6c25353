"""How fast training is, and how much of what the machine can do.

    python benchmarks/throughput.py --config config.yaml
    python benchmarks/throughput.py --config config.yaml --modes plain,bf16+compile+graph --steps 50 --json out.json

For each mode: milliseconds a training step (data, forward, backward, Adamax), images a second,
TFLOP/s counted from the model, their share of what a 64-channel 3x3 convolution and a large matrix
product reach on the same machine in the same run, seconds an epoch, peak memory, and the first
call's seconds, compilation included. `plain`: model.log_joint and one Adamax as a reader sees them.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import (COLUMNS, convolutions_in, flops_per_image, fresh_model, limits,  # noqa: E402
                     random_data, read_arguments, report, row_of, start_mode, times)

from utils import as_command, load_script  # noqa: E402
from utils.processes import Processes  # noqa: E402
from utils.step import WARM_UP, TrainingStep, arrange  # noqa: E402

TRAINING_IMAGES = {"mnist": 60_000, "digits": 1437, "moons": 1000, "circles": 1000}


def plain_step(model, objective, settings):
    """A training step without any of what makes it fast."""
    optimizer = torch.optim.Adamax(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, foreach=True)

    def step(x, y, *altered):
        log_joints = model.log_joint(torch.cat((x, *altered))).chunk(1 + len(altered))
        loss = objective(log_joints[0], y, settings, y, *log_joints[1:])[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def main():
    own, settings, device = read_arguments(
        "Times training steps.", lambda parser: parser.add_argument("--steps", type=int, default=10, help="timed steps of a mode"))
    settings.lr = 1e-6                                       # random images: the weights should stay where they are
    data = random_data(settings, device)
    found_limits = limits(sorted({m.precision for m in own.modes}), settings.train_bs, device)
    objective = load_script().objective
    _, flops = flops_per_image(settings, data)
    flops *= 2 if settings.cons_weight else 1                # an image and the altered one
    steps = -(-TRAINING_IMAGES[settings.data] // settings.train_bs)
    rows = []
    for mode in own.modes:
        start_mode(device)
        model, generator = fresh_model(settings, data), torch.Generator(device).manual_seed(0)
        mode.micro_bs = settings.micro_bs
        with convolutions_in(mode.precision):
            if mode.plain:
                step = plain_step(model, objective, settings)
            else:
                step = TrainingStep(*arrange(model, mode), objective, settings, Processes(), mode.cuda_graph)
            seconds, first = times(lambda: step(*data.draw(settings.train_bs, 1 / 3, generator, settings.cons_weight > 0)), own.steps, device,
                                   WARM_UP + 2 if device.type == "cuda" else 1)
        row = row_of(mode, seconds, first, settings.train_bs, flops, found_limits, device)
        rows.append({**row, "epoch_s": steps * row["ms"] / 1e3})
        print(f"{mode.name}: {row['ms']:.2f} ms", file=sys.stderr)
        del model, step
    report(f"A training step of {settings.train_bs} images of {settings.data}: {settings.train_bs * flops / 1e12:.3f} TFLOP; "
           f"median of {own.steps}", device, found_limits, rows,
           {**COLUMNS, "epoch_s": (f"{steps} steps, s", ".1f")}, own.json)


if __name__ == "__main__":
    as_command(main)
