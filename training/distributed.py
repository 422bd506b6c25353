"""The processes of one run, as torchrun starts them. Started otherwise, a run has one process."""

import contextlib
import gc
import inspect
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.data import Batch
from utils.errors import BadInput


MAIN_SECONDS = 20       # how long the other processes wait for the main one's message


class Processes:
    """rank, size (on this machine: local_rank, local_size), and collective operations.

    End with `close`.
    """

    def __init__(self) -> None:
        """Read torchrun's environment variables. Raises BadInput if they make no sense."""
        try:
            self.rank, self.size, self.local_rank, self.local_size = (
                int(os.environ.get(key, value)) for key, value in
                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        except ValueError:
            raise BadInput("RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are not numbers: "
                           "start with torchrun, or unset them") from None
        complete = self.size == 1 or {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if not (complete and 0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size):
            raise BadInput("RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE do not fit together: "
                           "start with torchrun, or unset them")
        self.connected = False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Initialise the process group: NCCL for tensors on GPUs, gloo for those on the CPU."""
        if self.size == 1:
            return
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.connected = True

    def parallel(self, network: nn.Module) -> nn.Module:
        """`network`, whose gradients are then averaged over the processes.

        All of them start with the main one's parameters. The network's buffers never change, and
        are not synchronised.
        """
        if self.size == 1:
            return network
        # The option for buffers has another name since PyTorch 2.14.
        options = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = ("forward_sync_buffers" if "forward_sync_buffers" in options
                        else "broadcast_buffers")
        # Dynamo's optimisation for it would split the compiled parts, which are small.
        torch._dynamo.config.optimize_ddp = False
        no_sync: dict[str, Any] = {sync_buffers: False}
        return DistributedDataParallel(network, **no_sync)

    def gradient_sync(self, network: nn.Module,
                      now: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for a backward pass of what `parallel` returned: if `now`, gradients are
        averaged over the processes; otherwise they accumulate on each until a pass with `now`."""
        if now or not isinstance(network, DistributedDataParallel):
            return contextlib.nullcontext()
        return network.no_sync()

    def shard(self, batch: Batch) -> Batch:
        """This process's rows of a Batch, whose number is a multiple of `size`."""
        return batch.rows(slice(self.rank, None, self.size))

    def sum(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The sum of `tensor` over the processes, or what else `op` makes of it."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in some process. It does not wait for a GPU."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def first(self, value: Any) -> Any:
        """The first `value` in the order of the ranks that is not None."""
        if self.size == 1:
            return value
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return next((v for v in values if v is not None), None)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any(False)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the main process executes before the others."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block whose BadInput in some process is raised in all, so that the main process
        reports it."""
        error = None
        try:
            yield
        except BadInput as raised:
            error = str(raised)
        error = self.first(error)
        if error is not None:
            raise BadInput(error)

    def report(self, message: str, of_all: bool) -> None:
        """Print an error on stderr, from the main process if it has it too.

        torchrun ends all processes as soon as one ends, so the others have to wait for the main
        one. of_all: whether all processes are here, and can meet; otherwise the others wait for
        MAIN_SECONDS, which the end of the main one cuts short.
        """
        if not self.is_main and not of_all:
            time.sleep(MAIN_SECONDS)
        if self.is_main or not of_all:
            print(message, file=sys.stderr, flush=True)
        if of_all:
            self.barrier()

    def close(self) -> None:
        """Destroy the process group, after everything that still refers to it."""
        if self.connected:
            gc.collect()
            dist.destroy_process_group()
            self.connected = False
