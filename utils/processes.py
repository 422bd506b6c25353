"""The processes of one run, as torchrun starts them; any other start is a run of one process."""

import contextlib
import gc
import os

import torch
import torch.distributed as dist

from . import BadInput


class Processes:
    """rank, size (on this machine: local_rank, local_size), and what the processes do together. Leave by `close`."""

    def __init__(self):
        """From the environment that torchrun sets. Raises BadInput if it makes no sense."""
        try:
            self.rank, self.size, self.local_rank, self.local_size = (
                int(os.environ.get(key, value)) for key, value in
                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        except ValueError:
            raise BadInput("RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are not numbers: start with torchrun, "
                           "or unset them") from None
        self.connected = False

    @property
    def main(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def connect(self, device):
        """Find each other: over NCCL for tensors on GPUs, over gloo for the CPU's."""
        if self.size == 1:
            return
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.connected = True

    def share(self, batch):
        """This process's rows of `batch`, whose length `size` divides."""
        return batch[self.rank::self.size]

    def add(self, tensor):
        """The sum of `tensor` over the processes."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def smallest(self, tensor):
        """The smallest value of `tensor` among the processes."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def _reduced(self, tensor, op):
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op)
        return tensor

    def any(self, flag):
        """Whether `flag` holds in some process; decided on the hosts, a GPU goes on meanwhile."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def first(self, value):
        """The `value` of the first process where it is not None, a picklable object."""
        if self.size == 1:
            return value
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return next((v for v in values if v is not None), None)

    def wait(self):
        """Until all are here."""
        self.any(False)

    @contextlib.contextmanager
    def main_first(self):
        """A block that the other processes begin when the main one has left it."""
        if not self.main:
            self.wait()
        try:
            yield
        finally:
            if self.main:
                self.wait()

    def close(self):
        """Let go of the others; what still refers to them goes first."""
        if self.connected:
            gc.collect()
            dist.destroy_process_group()
            self.connected = False
