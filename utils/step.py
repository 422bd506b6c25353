"""A step of training, and what makes it fast: one vector of parameters, passes that fit the caches, CUDA graphs."""

import contextlib
import inspect
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.fast import FastLogJoint

PASS_BYTES = 2**24          # of the largest tensor of a CPU's pass: larger ones cost page faults and cache misses
ALIGNMENT = 32              # numbers: GPU kernels want weights to begin at multiples of 16 bytes and more
WARM_UP = 3                 # plain runs before a CUDA graph is captured, as libraries choose their algorithms in them


def arrange(model, speed):
    """The model's log p(x, y) as `speed` (utils/device.py) wants it -> FastLogJoint, rows of a pass."""
    log_joint = FastLogJoint(model, speed.precision, speed.compile)
    if speed.micro_bs:
        return log_joint, speed.micro_bs
    fitting = sys.maxsize if model.log_p_y.is_cuda else max(PASS_BYTES // log_joint.largest, 1)
    return log_joint, 1 << fitting.bit_length() - 1          # a power of two, as batch sizes are


class TrainingStep:
    """step(x, y) moves the parameters of `log_joint` by a step of Adamax; nothing is read back from the device.

    log_joint: a FastLogJoint; pass_size: rows of a forward and backward pass, whose gradients add up
    to the batch's; objective: as in train-flow-ssl.py; settings: lr, weight_decay, clip_gn and what
    `objective` uses; processes: each one takes its share of every batch.
    `lr`, on the device, is the learning rate of the steps to come. With settings.ema the step keeps the
    exponential moving average of the weights (`averaged`), which begins at those before the first step.
    """

    def __init__(self, log_joint, pass_size, objective, settings, processes, cuda_graph=False):
        self.pass_size, self.objective, self.settings, self.processes = pass_size, objective, settings, processes
        self.parameters = list(log_joint.parameters())
        self.vector, self.gaps = _as_one_vector(self.parameters)
        self.vector.grad = torch.zeros_like(self.vector)
        self.lr = torch.tensor(settings.lr, device=self.vector.device)
        self.optimizer = torch.optim.Adamax([self.vector], lr=self.lr, weight_decay=settings.weight_decay,
                                            foreach=True, capturable=self.vector.is_cuda)
        self.average = self.vector.detach().clone() if settings.ema else None
        self._average = get_ema_multi_avg_fn(settings.ema)
        self.log_joint = log_joint
        if processes.size > 1:
            # All processes begin with the main one's parameters; buffers never change. The option's name did, in 2.14.
            takes = inspect.signature(DistributedDataParallel).parameters
            sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in takes else "broadcast_buffers"
            log_joint.side_stream = None                     # its hooks expect gradients on one stream
            torch._dynamo.config.optimize_ddp = False        # else it would cut the compiled parts, small as they are
            self.log_joint = DistributedDataParallel(log_joint, **{sync_buffers: False})
        self.captured = Captured(self._run) if cuda_graph else None

    def __call__(self, x, y, altered=None):
        """A step on the batch x (B, C, H, W), y (B,), -1 where hidden -> this process's share of its terms, (T,).

        altered: the same images, altered (utils/data.py), for `objective`.
        """
        batch = (x, y) if altered is None else (x, y, altered)
        return self.captured(*batch) if self.captured else self._run(*batch)

    def _run(self, x, y, *altered):
        for p in self.parameters:
            p.grad = None
        n = max(self.pass_size // (1 + len(altered)), 1)
        own = [self.processes.share(rows).split(n) for rows in (y, x, *altered)]
        batch_terms = 0
        for i, (part_y, *images) in enumerate(zip(*own)):
            with self._gradients_synchronised(i == len(own[0]) - 1):
                log_joints = self.log_joint(torch.cat(images) if altered else images[0]).chunk(len(images))
                terms = torch.stack(self.objective(log_joints[0], part_y, self.settings, y, *log_joints[1:]))
                (terms[0] * self.processes.size).backward()              # DistributedDataParallel takes the mean
            batch_terms = batch_terms + terms.detach()
        torch.cat([part for p, gap in zip(self.parameters, self.gaps) for part in (_in_memory_order(p.grad), *gap)],
                  out=self.vector.grad)
        if self.settings.clip_gn:
            nn.utils.clip_grad_norm_([self.vector], self.settings.clip_gn)
        self.optimizer.step()
        if self.average is not None:
            self._average([self.average], [self.vector.detach()], None)
        return batch_terms

    def _gradients_synchronised(self, now):
        return contextlib.nullcontext() if now or self.processes.size == 1 else self.log_joint.no_sync()

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self):
        """A context within which the parameters are the moving average of theirs."""
        own = self.vector.clone()
        self.vector.copy_(self.average)
        try:
            yield
        finally:
            self.vector.copy_(own)

    def state_dict(self):
        """Adamax's state (step, exp_avg, exp_inf; nothing before the first step) and the moving average, if there is one."""
        average = {} if self.average is None else {"average": self.average}
        return {**self.optimizer.state[self.vector], **average}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Take over what `state_dict` gave, on whatever device."""
        device = self.vector.device
        places = {"step": device if self.vector.is_cuda else "cpu", "exp_avg": device, "exp_inf": device}
        self.optimizer.state[self.vector] = {key: state[key].to(place, copy=True) for key, place in places.items() if key in state}
        if self.average is not None:
            self.average.copy_(state["average"])


def scorer(log_joint, pass_size, cuda_graph=False):
    """x (B, C, H, W) -> log p(x, y) (B, K) without gradient, in passes of `pass_size` rows."""
    @torch.no_grad()
    def score(x):
        return torch.cat([log_joint(part) for part in x.split(pass_size)])
    return Captured(score) if cuda_graph else score


class Captured:
    """A function of tensors of fixed shapes on a GPU, run as one CUDA graph after WARM_UP plain runs.

    What it returns is overwritten by the next call. Its side effects on the device are part of the
    graph, those on the host happen in the first calls alone.
    """

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None
        self.side_stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        if self.graph is None:
            self.calls += 1
            if self.calls <= WARM_UP:
                return self._warm_up(inputs)
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.function(*self.inputs)
        for own, x in zip(self.inputs, inputs):
            own.copy_(x)
        self.graph.replay()
        return self.output

    def _warm_up(self, inputs):
        """On a stream that is not the default one, as capture wants it."""
        main = torch.cuda.current_stream()
        self.side_stream.wait_stream(main)
        with torch.cuda.stream(self.side_stream):
            output = self.function(*inputs)
        main.wait_stream(self.side_stream)
        return output


def _in_memory_order(p):
    """p flattened as parameters lie in memory: images' weights with the channels last."""
    return (p.permute(0, 2, 3, 1) if p.dim() == 4 else p).reshape(-1)


@torch.no_grad()
def _as_one_vector(parameters):
    """Move `parameters` into one vector, as views of it that begin at multiples of ALIGNMENT.

    -> the vector, a Parameter; for each of `parameters` the zeros behind it, a list of one tensor or none.
    """
    gaps = [[p.new_zeros(n)] if (n := -p.numel() % ALIGNMENT) else [] for p in parameters]
    vector = torch.cat([part for p, gap in zip(parameters, gaps) for part in (_in_memory_order(p), *gap)])
    start = 0
    for p, gap in zip(parameters, gaps):
        part = vector[start:start + p.numel()]
        start += p.numel() + sum(map(len, gap))
        if p.dim() == 4:
            o, i, h, w = p.shape
            p.data = part.view(o, h, w, i).permute(0, 3, 1, 2)
        else:
            p.data = part.view(p.shape)
    return nn.Parameter(vector), gaps
