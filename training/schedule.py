"""The learning rate of each training step."""

import math

from utils import Settings


def learning_rate(epoch: int, step: int, steps_per_epoch: int,
                  settings: Settings) -> float:
    """The learning rate of training step `step` of epoch `epoch`, both counted from 1.

    settings: lr, lr_schedule, lr_warmup, epochs, and warmup_steps, which multiplies any schedule by
    a linear warm-up. As published, `linear` is set once an epoch and counted from 1, as is `hat`:
    the last epoch trains with learning rate zero.
    """
    steps = (epoch - 1) * steps_per_epoch + step  # of the run, with this one
    lr = settings.lr
    if settings.warmup_steps:
        lr = lr * min(1, steps / settings.warmup_steps)
    if settings.lr_schedule == "linear":
        return lr * (1 - epoch / settings.epochs)
    if settings.lr_schedule == "hat":
        if epoch <= settings.lr_warmup:
            return lr * epoch / settings.lr_warmup
        return lr * (settings.epochs - epoch) / (settings.epochs - settings.lr_warmup)
    if settings.lr_schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (steps - 1) / (settings.epochs * steps_per_epoch))) / 2
    return lr
