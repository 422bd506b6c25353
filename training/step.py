"""A training step: gradients of micro-batches, the optimiser, the moving average of the weights.

The parameters are views of one vector, so that the optimiser and the average are a few operations
on one tensor, and the step can be captured as one CUDA graph.
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

from .cuda_graph import Captured
from .fast import FastLogJoint
from .objective import Terms, objective
from .processes import Processes
from .vat import virtual_adversarial_loss

# The optimisers that settings.optimizer names, and the moments of the gradients in their state.
# Both take a tensor as learning rate, and can be captured on a GPU.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, str]]] = {
    "adamax": (partial(torch.optim.Adamax, foreach=True), ("exp_avg", "exp_inf")),
    "adam": (partial(torch.optim.Adam, fused=True), ("exp_avg", "exp_avg_sq"))}
# Elements: GPU kernels want weights to begin at multiples of 16 bytes and more.
ALIGNMENT = 32


def build_optimizer(parameters: list[nn.Parameter], settings: Settings,
                    lr: float | Tensor) -> torch.optim.Optimizer:
    """The optimiser of `parameters` with the settings optimizer and weight_decay."""
    optimizer, _ = OPTIMIZERS[settings.optimizer]
    return optimizer(parameters, lr=lr, weight_decay=settings.weight_decay,
                     capturable=parameters[0].is_cuda)


class TrainingStep:
    """step(x, y) changes the parameters of `log_joint` by one step of the optimiser.

    It never synchronises with the device. settings: optimizer, lr, weight_decay, clip_gn, ema, and
    those of `objective`; processes: each computes its shard of every batch. `lr`, on the device, is
    the learning rate of the next steps. With settings.ema the step maintains a moving average of
    the weights (`averaged`): of its step t = 1, 2, ... it takes the share 1 - d, with the decay
    d = min(ema, (1 + t) / (10 + t)), so that it soon forgets the initial weights.
    """

    def __init__(self, log_joint: FastLogJoint, settings: Settings,
                 processes: Processes):
        self.micro_batch_size = log_joint.micro_batch_size
        self.settings, self.processes = settings, processes
        self.names, self.parameters = map(list, zip(*log_joint.named_model_parameters))
        self.vector, self.padding = _as_one_vector(self.parameters)
        self.vector.grad = torch.zeros_like(self.vector)
        self.lr = torch.tensor(settings.lr, device=self.vector.device)
        self.optimizer = build_optimizer([self.vector], settings, self.lr)
        self.moments = OPTIMIZERS[settings.optimizer][1]
        self.log_joint: nn.Module = log_joint
        self.logits, self.logits_given = log_joint.logits, log_joint.logits_given
        if processes.size > 1:
            # All processes start with the main one's parameters; buffers never change. The option
            # that says so has another name since PyTorch 2.14.
            options = inspect.signature(DistributedDataParallel).parameters
            sync_buffers = ("forward_sync_buffers" if "forward_sync_buffers" in options
                            else "broadcast_buffers")
            # The hooks of DistributedDataParallel expect gradients on one stream.
            log_joint.side_stream = None
            # Dynamo's optimisation for it would split the compiled parts, which are small.
            torch._dynamo.config.optimize_ddp = False
            no_sync: dict[str, Any] = {sync_buffers: False}
            self.log_joint = DistributedDataParallel(log_joint, **no_sync)
        # After DistributedDataParallel, which may have changed the parameters.
        self.average = self.vector.detach().clone() if settings.ema else None
        self.captured = Captured(self._run) if log_joint.cuda_graph else None

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
        n_images = max(self.micro_batch_size // (2 if of_copies else 1), 1)
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
            return [self.logits(x) for x in micro_batches]

    def _divergence(self, x: Tensor) -> Tensor | None:
        """The virtual adversarial loss of x (B, C, H, W), (B,), if the settings have it."""
        if not self.settings.vat_weight:
            return None
        return virtual_adversarial_loss(self.logits_given(x), x, self.settings.vat_eps)

    def _update(self) -> None:
        """The optimiser and the moving average, with the gradients of the parameters."""
        gradients: list[Any] = [p.grad for p in self.parameters]
        torch.cat([part for grad, padding in zip(gradients, self.padding)
                   for part in (_in_memory_order(grad), *padding)], out=self.vector.grad)
        if self.settings.clip_gn:
            nn.utils.clip_grad_norm_([self.vector], self.settings.clip_gn)
        self.optimizer.step()
        if self.average is not None:
            t = self.optimizer.state[self.vector]["step"]
            share = (9 / (10 + t)).clamp(min=1 - self.settings.ema).to(self.average)
            self.average.lerp_(self.vector.detach(), share)

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
        assert self.average is not None, "there is no average without settings.ema"
        own = self.vector.clone()
        self.vector.copy_(self.average)
        try:
            yield
        finally:
            self.vector.copy_(own)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What continues the training steps, keyed by the model's names of its parameters.

        optimizer: step, (), and for each of the optimiser's two moments a tensor per parameter;
        empty before the first step. average: a tensor per parameter; empty without settings.ema.
        The tensors are views.
        """
        state = self.optimizer.state[self.vector]
        moments = {key: self._by_name(state[key]) for key in self.moments if state}
        step = {"step": state["step"]} if state else {}
        return {"optimizer": {**step, **moments},
                "average": {} if self.average is None else self._by_name(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what `state_dict` returned, from any device. Other keys are ignored."""
        def fill(vector: Tensor, tensors: dict[str, Tensor]) -> Tensor:
            for name, view in self._by_name(vector).items():
                view.copy_(tensors[name])
            return vector
        optimizer = state["optimizer"]
        if optimizer:
            step = optimizer["step"].to(self.vector.device if self.vector.is_cuda else "cpu",
                                        copy=True)
            self.optimizer.state[self.vector] = {
                "step": step, **{key: fill(torch.zeros_like(self.vector), optimizer[key])
                                 for key in self.moments}}
        if self.average is not None:
            fill(self.average, state["average"])

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of `vector`, which is as long as the one of the parameters, by name."""
        parts = _parts_of(vector, self.parameters, self.padding)
        return dict(zip(self.names, parts))


def _in_memory_order(p: Tensor) -> Tensor:
    """p flattened in the order of its memory: convolution weights are channels-last."""
    return (p.permute(0, 2, 3, 1) if p.dim() == 4 else p).reshape(-1)


@torch.no_grad()
def _as_one_vector(parameters: list[nn.Parameter]) -> tuple[nn.Parameter, list[list[Tensor]]]:
    """Make `parameters` views of one vector that begin at multiples of ALIGNMENT.

    -> the vector, a Parameter; and for each of `parameters` the zeros after it: a list of one
    tensor, or of none.
    """
    padding = [[p.new_zeros(n)] if (n := -p.numel() % ALIGNMENT) else [] for p in parameters]
    vector = torch.cat([part for p, zeros in zip(parameters, padding)
                        for part in (_in_memory_order(p), *zeros)])
    for p, part in zip(parameters, _parts_of(vector, parameters, padding)):
        p.data = part
    return nn.Parameter(vector), padding


def _parts_of(vector: Tensor, parameters: list[nn.Parameter],
              padding: list[list[Tensor]]) -> Iterator[Tensor]:
    """The views of `vector` with the shapes of `parameters`, in the order of their memory."""
    start = 0
    for p, zeros in zip(parameters, padding):
        part = vector.detach()[start:start + p.numel()]
        start += p.numel() + sum(map(len, zeros))
        # A 1x1 kernel has the same order in both formats. Its gradient comes with the strides of
        # the contiguous one, and DistributedDataParallel expects those of the parameter.
        if p.dim() == 4 and p[0, 0].numel() > 1:
            o, i, h, w = p.shape
            yield part.view(o, h, w, i).permute(0, 3, 1, 2)
        else:
            yield part.view(p.shape)
