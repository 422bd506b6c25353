"""A training step: gradients of micro-batches, the optimiser, the moving average of the weights.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import Settings

from .objective import Terms, objective
from .processes import Processes
from .speed import Accelerated, Captured
from .vat import virtual_adversarial_loss

# The optimisers that settings.optimizer names, and the moments of the gradients in their state.
# Both take a tensor as learning rate, and can be captured on a GPU.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, str]]] = {
    "adamax": (partial(torch.optim.Adamax, foreach=True), ("exp_avg", "exp_inf")),
    "adam": (partial(torch.optim.Adam, fused=True), ("exp_avg", "exp_avg_sq"))}


def build_optimizer(parameters: list[nn.Parameter], settings: Settings,
                    lr: float | Tensor) -> torch.optim.Optimizer:
    """The optimiser of `parameters` with the settings optimizer and weight_decay."""
    optimizer, _ = OPTIMIZERS[settings.optimizer]
    return optimizer(parameters, lr=lr, weight_decay=settings.weight_decay,
                     capturable=parameters[0].is_cuda)


class TrainingStep:
    """step(x, y) changes the parameters of a model by one step of the optimiser.

    It never synchronises with the device. settings: optimizer, lr, weight_decay, clip_gn, ema, and
    those of `objective`; processes: each computes its shard of every batch. `lr`, on the device, is
    the learning rate of the next steps. With settings.ema the step maintains a moving average of
    the weights (`averaged`): of its step t = 1, 2, ... it takes the share 1 - d, with the decay
    d = min(ema, (1 + t) / (10 + t)), so that it soon forgets the initial weights.
    """

    def __init__(self, accelerated: Accelerated, settings: Settings, processes: Processes):
        self.accelerated, self.settings, self.processes = accelerated, settings, processes
        self.names, self.parameters = map(list, zip(*accelerated.model.named_parameters()))
        self.lr = torch.tensor(settings.lr, device=self.parameters[0].device)
        self.optimizer = build_optimizer(self.parameters, settings, self.lr)
        self.moments = OPTIMIZERS[settings.optimizer][1]
        self.log_joint: nn.Module = accelerated
        if processes.size > 1:
            # All processes start with the main one's parameters; buffers never change. The option
            # that says so has another name since PyTorch 2.14.
            options = inspect.signature(DistributedDataParallel).parameters
            sync_buffers = ("forward_sync_buffers" if "forward_sync_buffers" in options
                            else "broadcast_buffers")
            # Dynamo's optimisation for it would split the compiled parts, which are small.
            torch._dynamo.config.optimize_ddp = False
            no_sync: dict[str, Any] = {sync_buffers: False}
            self.log_joint = DistributedDataParallel(accelerated, **no_sync)
        # After DistributedDataParallel, which may have changed the parameters.
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema else []
        self.captured = Captured(self._run) if accelerated.cuda_graph else None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Train on a batch of `sample_batch` -> its Terms, stacked: (T,).

        batch: x (B, C, H, W); y (B,), -1 where the label is hidden; for the consistency term, the
        augmented copies of x; x without noise, if clf_noise is "train"; and log r(y) / p(y), (B,
        K), if images have priors. Of several processes, each gets its shard's contribution to the
        terms.
        """
        return self.captured(*batch) if self.captured else self._run(*batch)

    def _run(self, x: Tensor, y: Tensor, *of_copies: Tensor) -> Tensor:
        for p in self.parameters:
            p.grad = None
        n_images = max(self.accelerated.micro_batch_size // (2 if of_copies else 1), 1)
        xs, ys, *more = [self.processes.shard(rows).split(n_images) for rows in (x, y, *of_copies)]
        copies = more.pop(0) if more else None
        clean = more.pop(0) if copies and self.settings.clf_noise == "train" else None
        averaged = copies and self.settings.target_weights == "averaged"
        targets = self._targets(clean or xs) if clean or averaged else None
        batch_terms = torch.zeros(len(Terms._fields), device=x.device, dtype=x.dtype)
        for i in range(len(xs)):
            with self._gradient_sync(i == len(xs) - 1):
                log_joint, augmented = (self.log_joint(xs[i], copies[i]) if copies
                                        else (self.log_joint(xs[i]), None))
                target = log_joint if targets is None else targets[i]
                target = target + more[0][i] if more else target
                divergence = self._divergence(xs[i])
                terms = objective(log_joint, ys[i], self.settings, y, augmented, target,
                                  divergence)
                (terms.loss * self.processes.size).backward()  # DistributedDataParallel averages
            batch_terms = batch_terms + torch.stack(terms).detach()
        self._update()
        return batch_terms

    @torch.no_grad()
    def _targets(self, micro_batches: Sequence[Tensor]) -> list[Tensor]:
        """For each of micro_batches, x (B, C, H, W), log p(y | x) up to a term that does not depend
        on y, (B, K), with the weights that the settings want."""
        with self.averaged(self.settings.target_weights == "averaged"):
            return [self.accelerated.call("logits", x) for x in micro_batches]

    def _divergence(self, x: Tensor) -> Tensor | None:
        """The virtual adversarial loss of x (B, C, H, W), (B,), if the settings have it."""
        if not self.settings.vat_weight:
            return None
        with torch.no_grad():
            last = self.accelerated.call("last_group", x)
        return virtual_adversarial_loss(
            lambda seen: self.accelerated.call("logits_seeing", seen, last), x,
            self.settings.vat_eps)

    @torch.no_grad()
    def _update(self) -> None:
        """The optimiser and the moving average, with the gradients of the parameters."""
        if self.settings.clip_gn:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_gn)
        self.optimizer.step()
        if self.average:
            t = self.optimizer.state[self.parameters[0]]["step"]
            share = (9 / (10 + t)).clamp(min=1 - self.settings.ema).to(self.average[0])
            change = torch._foreach_sub(self.parameters, self.average)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(self.average, change)

    @property
    def is_finite(self) -> Tensor:
        """Whether all parameters are finite, ()."""
        return torch.stack([p.isfinite().all() for p in self.parameters]).all()

    def _gradient_sync(self, now: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once, with the last micro-batch."""
        if now or not isinstance(self.log_joint, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.log_joint.no_sync()

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self, when: bool = True) -> Iterator[None]:
        """A context in which, if `when`, the parameters have the values of their moving average."""
        if not when:
            yield
            return
        assert self.average, "there is no average without settings.ema"
        own = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, own)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What continues the training steps, keyed by the model's names of its parameters.

        optimizer: step, (), and for each of the optimiser's two moments a tensor per parameter;
        empty before the first step. average: a tensor per parameter; empty without settings.ema.
        The tensors are not copies.
        """
        states = [self.optimizer.state[p] for p in self.parameters]
        optimizer = {} if not states[0] else {"step": states[0]["step"], **{
            key: dict(zip(self.names, [state[key] for state in states])) for key in self.moments}}
        return {"optimizer": optimizer, "average": dict(zip(self.names, self.average))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` returned, from any device. Other keys are ignored."""
        optimizer = state["optimizer"]
        for name, p in zip(self.names, self.parameters if optimizer else ()):
            device = p.device if p.is_cuda else "cpu"
            self.optimizer.state[p] = {
                "step": optimizer["step"].to(device, copy=True),
                **{key: torch.empty_like(p).copy_(optimizer[key][name]) for key in self.moments}}
        for name, average in zip(self.names, self.average):
            average.copy_(state["average"][name])
