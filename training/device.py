"""What a run computes with: device, threads, precision, compilation, chosen or measured."""

import contextlib
import math
import os
import platform
import shutil
import statistics
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError
from torch.nn.modules.module import register_module_forward_hook

from models import SemiConditionalFlow
from utils import Settings
from utils.datasets import DATASETS
from utils.errors import BadInput, Failed
from utils.terminal import say

from .distributed import Processes
from .speed import Accelerated, Speed

# For so long, and at least in so many turns, two ways of computing are compared; numbers of threads
# in passes of at most about so many seconds.
MEASURE_SECONDS, MEASURE_ROUNDS, PASS_SECONDS = 0.4, 3, 0.3
# What bfloat16 may take of the time in float32, and one thread of the time of all, to be chosen:
# times scatter, rounding costs likelihood, and what is not measured, such as the optimiser, gains
# by threads.
BF16_TIME, ONE_THREAD_TIME = 0.9, 0.8


@contextlib.contextmanager
def torch_errors_as_failed() -> Iterator[None]:
    """Turn an error of the block into Failed if memory was too small, or if another process of the
    run has ended or cannot be reached."""
    try:
        yield
    except Failed:          # a RuntimeError too, which quotes PyTorch's
        raise
    except (MemoryError, RuntimeError) as error:
        if (isinstance(error, MemoryError | torch.OutOfMemoryError)
                or "DefaultCPUAllocator" in str(error) or "bad_alloc" in str(error)):
            raise Failed("The memory is too small for these settings", of_all=False) from error
        if isinstance(error, DistError) or "by peer" in str(error):     # of NCCL, of gloo
            reason, *_ = str(error).splitlines()
            raise Failed(f"Another process of the run has ended or cannot be reached: {reason}",
                         of_all=False) from error
        raise


def set_up_torch(settings: Settings, processes: Processes) -> torch.device:
    """Set the number of threads -> the device that settings.device names. Raises BadInput."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    n_gpus = torch.cuda.device_count()
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and processes.size > 1:
        if name != "cuda" or processes.local_size > n_gpus:
            raise BadInput(f"{processes.local_size} processes on this machine need a GPU each, and "
                           f"PyTorch sees {n_gpus}: start at most so many, with device cuda, or "
                           "use device cpu")
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise BadInput(f"device must be auto, cpu, cuda or cuda:N, not {name}")
    if device.type == "cuda":
        if (device.index or 0) >= n_gpus:
            raise BadInput(f"no device {name}: PyTorch {torch.__version__} sees {n_gpus} GPUs")
        torch.cuda.set_device(device.index or 0)    # it refuses a device without an index
        torch.backends.cudnn.benchmark = True
        # MAGMA's LU waits for the device. The option is experimental, and warns of that.
        with warnings.catch_warnings(action="ignore"):
            torch.backends.cuda.preferred_linalg_library("cusolver")
    return device


def choose_speed(settings: Settings, device: torch.device, processes: Processes) -> Speed:
    """The precision, compile, cuda_graph and micro_bs of `settings`, with `auto` decided.

    On a CPU auto is fp32, unless `measure_cpu` has replaced it. Also sets whether cuDNN uses TF32.
    Raises BadInput if one of them is impossible on this machine.
    """
    gpu = device.type == "cuda"
    precision = settings.precision
    images = DATASETS[settings.data].grey_levels is not None
    if precision == "auto":
        supported = gpu and images and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if supported else "fp32"
    if precision == "bf16" and not images:
        raise BadInput(f"precision bf16 is for images, and {settings.data} has points: use fp32")
    if precision == "tf32" and not gpu:
        raise BadInput("precision tf32 needs a GPU: use fp32 or bf16 on a CPU")
    if precision == "bf16" and not gpu and _emulates_bf16():
        say("Slow", "this CPU has no instructions for bf16: --precision fp32 is faster")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    can_compile = _can_compile()
    needs = "a C++ compiler (g++ or clang++) and Python's header files"
    if settings.compile == "on" and not can_compile:
        raise BadInput(f"compile on needs {needs}: install them, or use compile off")
    if settings.cuda_graph == "on" and not (gpu and processes.size == 1):
        raise BadInput("cuda_graph on needs a GPU and a run of one process: use cuda_graph off")
    pays_off = gpu and not settings.pretrained  # a single evaluation is faster than compiling
    compiled = settings.compile == "on" or (
        settings.compile == "auto" and pays_off and can_compile)
    if settings.compile == "auto" and pays_off and not can_compile:
        say("Slow", f"not compiled: torch.compile needs {needs}")
    if compiled:
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # off on purpose
    cuda_graph = settings.cuda_graph == "on" or (
        settings.cuda_graph == "auto" and pays_off and processes.size == 1)
    return Speed(precision, compiled, cuda_graph, settings.micro_bs)


def measure_cpu(settings: Settings, model: SemiConditionalFlow) -> None:
    """For training on a CPU: replace precision auto and threads 0 in `settings` by what is fastest.

    Compares forward and backward passes: one thread, which is faster where another program uses the
    same cores, with PyTorch's number of threads; then float32 with bfloat16, which a model of
    images in float32 can use on a CPU that has it. Prints the times.
    """
    if settings.threads and settings.precision != "auto":
        return
    n_threads, plain = torch.get_num_threads(), Accelerated(model, micro_bs=settings.micro_bs)
    n = min(plain.micro_batch_size, settings.train_bs)
    if not settings.threads:
        settings.threads = n_threads
        if n_threads > 1:
            few = max(min(n, int(n * PASS_SECONDS / _seconds(plain, n, 1))), 1)
            one, several = _compare((plain, 1), (plain, n_threads), few)
            settings.threads = 1 if one < ONE_THREAD_TIME * several else n_threads
            _say_choice("Threads", settings.threads, {1: one, n_threads: several})
    if settings.precision == "auto":
        settings.precision = "fp32"
        if model.image and model.log_p_y.dtype == torch.float32 and not _emulates_bf16():
            low = Accelerated(model, "bf16", micro_bs=settings.micro_bs)
            of_plain, of_low = _compare((plain, settings.threads), (low, settings.threads), n)
            settings.precision = "bf16" if of_low < BF16_TIME * of_plain else "fp32"
            _say_choice("Precision", settings.precision, {"fp32": of_plain, "bf16": of_low})
    torch.set_num_threads(settings.threads)


def _say_choice(label: str, chosen: Any, times: dict[Any, float]) -> None:
    rest, = times.keys() - {chosen}
    other = f"{times[rest]:.3g} ms" if times[rest] < math.inf else "far more"
    hardly = ", hardly less" if times[rest] < times[chosen] else ""
    say(label, f"{chosen}: {times[chosen]:.3g} ms an image, measured ({rest}: {other}{hardly})")


def _compare(first: tuple[Accelerated, int], second: tuple[Accelerated, int],
             n: int) -> tuple[float, float]:
    """The median times of a pass of n images in two ways, in turns, ms an image.

    A way is a model and a number of threads. The second one's time is inf where it is far longer.
    """
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < MEASURE_ROUNDS or time.perf_counter() - start < MEASURE_SECONDS:
        of_first = _seconds(first[0], n, first[1])
        times.append((of_first, _seconds(second[0], n, second[1], 2 * of_first)))
    of_first, of_second = map(statistics.median, zip(*times[1:]))     # the first passes are slower
    return 1e3 * of_first / n, 1e3 * of_second / n


def _seconds(accelerated: Accelerated, n: int, n_threads: int, limit: float = math.inf) -> float:
    """How long a forward and backward pass of n images takes; inf if the forward pass alone takes
    longer than `limit`, which ends it: threads that wait for each other can take 100 times as long.
    """
    torch.set_num_threads(n_threads)
    model = accelerated.model
    x = torch.linspace(0.01, 0.99, n * model.dim, dtype=model.log_p_y.dtype)
    start = time.perf_counter()

    def check(*_: Any) -> None:
        if time.perf_counter() - start > limit:
            raise TimeoutError
    hook = register_module_forward_hook(check)
    try:
        log_p = accelerated.log_joint(x.view(n, *model.data_shape)).logsumexp(1)
    except TimeoutError:
        return math.inf
    finally:
        hook.remove()
    torch.autograd.grad(log_p.sum(), list(model.parameters()), allow_unused=True)
    return time.perf_counter() - start


def _emulates_bf16() -> bool:
    """Whether this is not a CPU of which PyTorch knows arithmetic in bfloat16."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _can_compile() -> bool:
    """Whether the tools that torch.compile calls are installed."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "gcc", "clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return any(name and shutil.which(name) for name in compilers) and headers.is_file()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' * (threads > 1)}"
