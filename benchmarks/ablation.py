"""What each part of the fast path gains on a CPU: training steps with it, and without it.

    python benchmarks/ablation.py --config config.yaml
    python benchmarks/ablation.py --config configs/digits.yaml --rounds 50 --json out.json

The variants take turns, one training step each in every round, so that the speed of the machine,
which varies, is the same for all. A gain of 10 % means that a step takes 10 % longer without the
part. Parts that the model or the precision does not use are left out.
"""

import contextlib
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import (StepOfTensors, fresh_model, measure_limits, random_data, read_arguments,
                     report)
from training import fast
from training.device import choose_speed
from training.processes import Processes
from training.step import TrainingStep
from utils.errors import BadInput, run_command

# Each part of training/fast.py: the class that it consists of, and what takes its place.
PARTS = {"dense product for a tiny image": ("_TinyConv3x3", lambda conv, shape: conv),
         "linear layer for a pixel": ("_PixelConv", lambda conv: conv),
         "fused norm": ("_FusedNorm", lambda norm: norm)}
MICRO_BATCHES, ONE_VECTOR = "micro-batches", "parameters as one vector"


def build_steps(settings, data, speed):
    """{name: TrainingStep} with every part, and without each of those that it uses."""
    def build(speed=speed, patch=contextlib.nullcontext):
        with patch():
            return fast.FastLogJoint(fresh_model(settings, data), *speed)
    all_parts = build()
    log_joints = {"all parts": all_parts}
    for name, (class_name, substitute) in PARTS.items():
        if any(type(part).__name__ == class_name for part in all_parts.modules()):
            log_joints[name] = build(
                patch=lambda c=class_name, s=substitute: mock.patch.object(fast, c, s))
    rows = settings.train_bs * (2 if settings.cons_weight else 1)
    if all_parts.micro_batch_size < rows:
        log_joints[MICRO_BATCHES] = build(speed=speed._replace(micro_bs=rows))
    steps = {name: TrainingStep(log_joint, settings, Processes())
             for name, log_joint in log_joints.items()}
    return {**steps, ONE_VECTOR: StepOfTensors(build(), settings)}


def main():
    own, settings, device = read_arguments("Times parts of the fast path on a CPU.", "rounds", 10,
                                           "timed training steps of each variant", modes=False)
    if device.type != "cpu":
        raise BadInput("this benchmark is for a CPU: use --device cpu")
    settings.lr = 1e-6                              # on random images the weights should stay put
    speed = choose_speed(settings, device, Processes())
    data = random_data(settings, device)
    limits = measure_limits([speed.precision], settings.train_bs, device)
    steps = build_steps(settings, data, speed)
    generators = {name: torch.Generator().manual_seed(0) for name in steps}
    seconds = {name: [] for name in steps}
    for i in range(own.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(*data.sample_batch(settings.train_bs, 1 / 3, generators[name],
                                    settings.cons_weight > 0))
            if i:                                   # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    with_all = seconds["all parts"]
    rows = [{"without": "-", "ms": 1e3 * statistics.median(with_all), "gain": None, "low": None,
             "high": None}]
    for name, values in list(seconds.items())[1:]:
        gains = [100 * (without / each - 1) for without, each in zip(values, with_all)]
        low, median, high = statistics.quantiles(gains, n=4) if len(gains) > 1 else gains * 3
        rows.append({"without": name, "ms": 1e3 * statistics.median(values), "gain": median,
                     "low": low, "high": high})
    title = (f"A training step of {settings.train_bs} images of {settings.data}, "
             f"{speed.precision}, micro-batches of {steps['all parts'].micro_batch_size}; "
             f"medians and quartiles over {own.rounds} rounds")
    columns = {"without": ("without", ""), "ms": ("ms", ".2f"), "gain": ("gain, %", ".1f"),
               "low": ("25 %", ".1f"), "high": ("75 %", ".1f")}
    report(title, device, limits, rows, columns, own.json)


if __name__ == "__main__":
    run_command(main)
