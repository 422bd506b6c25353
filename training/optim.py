"""The optimiser and the learning rate of each training step.

The paper has Adamax with the schedule `linear`. Adam, the other schedules, the warm-up and the
moving average of the weights are beyond it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from utils import Settings

# What settings.optimizer names, and the moments of the gradients in its state. Both take a tensor
# as learning rate, and can be captured on a GPU.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, str]]] = {
    "adamax": (partial(torch.optim.Adamax, foreach=True), ("exp_avg", "exp_inf")),
    "adam": (partial(torch.optim.Adam, fused=True), ("exp_avg", "exp_avg_sq"))}


def learning_rate(epoch: int, step: int, steps_per_epoch: int, settings: Settings) -> float:
    """The learning rate of training step `step` of epoch `epoch`, both counted from 1.

    settings: lr, lr_schedule, epochs, and warmup_steps, which multiplies any schedule by a linear
    warm-up. As published, `linear` is set once an epoch and counted from 1: the last epoch trains
    with learning rate zero.
    """
    steps = (epoch - 1) * steps_per_epoch + step  # of the run, with this one
    lr = settings.lr
    if settings.warmup_steps:
        lr = lr * min(1, steps / settings.warmup_steps)
    if settings.lr_schedule == "linear":
        return lr * (1 - epoch / settings.epochs)
    if settings.lr_schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (steps - 1) / (settings.epochs * steps_per_epoch))) / 2
    return lr


class Optimizer:
    """Adamax or Adam on the parameters of a model, with a moving average of them.

    settings: optimizer, lr, weight_decay, ema

    With settings.ema, step t = 1, 2, ... changes the average (`averaged`) by 1 - d times its
    difference from the weights, with the decay d = min(ema, (1 + t) / (10 + t)), so that it soon
    forgets the initial weights. Nothing synchronises with the device.
    """

    def __init__(self, model: nn.Module, settings: Settings):
        self.ema = settings.ema
        self.names, self.parameters = map(list, zip(*model.named_parameters()))
        self.lr = torch.tensor(settings.lr, device=self.parameters[0].device)
        self.last_lr = settings.lr
        build, self.moments = OPTIMIZERS[settings.optimizer]
        self.inner = build(self.parameters, lr=self.lr, weight_decay=settings.weight_decay,
                           capturable=self.parameters[0].is_cuda)
        self.average = [p.detach().clone() for p in self.parameters] if self.ema else []

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        if lr != self.last_lr:
            self.lr.fill_(lr)
            self.last_lr = lr

    def zero_grad(self) -> None:
        """Remove the gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients, and the average by the parameters."""
        self.inner.step()
        if self.average:
            t = self.inner.state[self.parameters[0]]["step"]
            share = (9 / (10 + t)).clamp(min=1 - self.ema).to(self.average[0])
            change = torch._foreach_sub(self.parameters, self.average)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(self.average, change)

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self, when: bool = True) -> Iterator[None]:
        """A context in which, if `when`, the parameters have the values of their moving average."""
        if not when:
            yield
            return
        assert self.average, "there is no average without settings.ema"
        last = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, last)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What continues the training steps, keyed by the model's names of its parameters.

        optimizer: step, (), and for each of the optimiser's two moments a tensor per parameter;
        empty before the first step. average: a tensor per parameter; empty without settings.ema.
        The tensors are not copies.
        """
        states = [self.inner.state[p] for p in self.parameters]
        optimizer = {} if not states[0] else {"step": states[0]["step"], **{
            key: dict(zip(self.names, [state[key] for state in states])) for key in self.moments}}
        return {"optimizer": optimizer, "average": dict(zip(self.names, self.average))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` returned, from any device. Other keys are ignored."""
        optimizer = state["optimizer"]
        for name, p in zip(self.names, self.parameters if optimizer else ()):
            device = p.device if p.is_cuda else "cpu"
            self.inner.state[p] = {
                "step": optimizer["step"].to(device, copy=True),
                **{key: torch.empty_like(p).copy_(optimizer[key][name]) for key in self.moments}}
        for name, average in zip(self.names, self.average):
            average.copy_(state["average"][name])
