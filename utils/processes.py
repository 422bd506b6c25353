"""The processes of one run, as torchrun starts them; any other start is a run of one process."""

import os

import torch
import torch.distributed as dist

from . import BadInput


class Processes:
    """rank, size, and what the processes do together. Leave by `close`."""

    def __init__(self):
        """From the environment that torchrun sets. Raises BadInput if it makes no sense."""
        try:
            self.rank, self.size, self.local_rank = (
                int(os.environ.get(key, value)) for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        except ValueError:
            raise BadInput("RANK, WORLD_SIZE and LOCAL_RANK are not numbers: start with torchrun, or unset them") from None
        self.connected = False

    @property
    def main(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def connect(self, device):
        """Find each other: over NCCL for tensors on GPUs, over gloo for the CPU's."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
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

    def broadcast(self, value):
        """The main process's value, a picklable object, in each of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def close(self):
        if self.connected:
            dist.destroy_process_group()
            self.connected = False
