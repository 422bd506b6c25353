"""Where and how a run computes: device, threads, determinism, precision, compilation."""

import os
import platform
import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from utils import Settings
from utils.data import DATASETS
from utils.errors import BadInput

from .processes import Processes


class Speed(NamedTuple):
    """How a run computes: the options of FastLogJoint.

    precision: of the couplings' networks, fp32, tf32 or bf16; compile: whether by torch.compile;
    cuda_graph: whether as CUDA graphs; micro_bs: micro-batch size, 0 to choose it.
    """

    precision: str = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    micro_bs: int = 0


def set_up_torch(settings: Settings, processes: Processes) -> torch.device:
    """Set threads and determinism -> the device that settings.device names. Raises BadInput."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
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
        torch.backends.cudnn.benchmark = not settings.deterministic
        # MAGMA's LU waits for the device. The option is experimental, and warns of that.
        with warnings.catch_warnings(action="ignore"):
            torch.backends.cuda.preferred_linalg_library("cusolver")
    return device


def choose_speed(settings: Settings, device: torch.device, processes: Processes) -> Speed:
    """The precision, compile, cuda_graph and micro_bs of `settings`, with `auto` decided.

    Also sets PyTorch's global options that go with them: TF32 in cuDNN, and Inductor's determinism.
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
        print("This CPU has no instructions for bf16, which is slow here: --precision fp32 is "
              "faster")
    # With bf16, TF32 is for the networks' first layers.
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
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
        print(f"Not compiled, and therefore slower: torch.compile needs {needs}")
    if compiled:
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # off on purpose
    if compiled and settings.deterministic:
        import torch._inductor.config as inductor  # slow to import

        inductor.deterministic = True
    cuda_graph = settings.cuda_graph == "on" or (
        settings.cuda_graph == "auto" and pays_off and processes.size == 1)
    return Speed(precision, compiled, cuda_graph, settings.micro_bs)


def _emulates_bf16() -> bool:
    """Whether this is an x86 CPU without arithmetic in bfloat16."""
    has_it = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return platform.machine().lower() in ("x86_64", "amd64") and not has_it()


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
