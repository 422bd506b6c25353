"""Where and how a run computes: the device, threads, determinism, precision, compilation."""

import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from . import BadInput


def set_up_torch(settings, processes):
    """Threads, determinism and the torch.device that settings.device names. Raises BadInput."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and processes.size > 1:
        if name != "cuda" or processes.local_size > torch.cuda.device_count():
            raise BadInput(f"{processes.local_size} processes on this machine want a GPU each: use device cuda, or cpu, and at "
                           f"most as many processes as the {torch.cuda.device_count()} GPUs that PyTorch sees")
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"device must be auto, cpu, cuda or cuda:N, not {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"no device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not settings.deterministic
        with warnings.catch_warnings(action="ignore"):       # that the option is experimental
            torch.backends.cuda.preferred_linalg_library("cusolver")          # MAGMA's LU waits for the device
    return device


def choose_speed(settings, device, processes):
    """precision, compile, cuda_graph, micro_bs as settings say, with auto decided. Raises BadInput."""
    gpu = device.type == "cuda"
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "tf32" and not gpu:
        raise BadInput("precision tf32 is a GPU's: use fp32 or bf16 on a CPU")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"    # for convolutions: of bf16's networks, the first layer's
    can_compile = _can_compile()
    if settings.compile == "on" and not can_compile:
        raise BadInput("compile on needs a C++ compiler (g++ or clang++) and Python's header files: install them, "
                       "or use compile off")
    if settings.cuda_graph == "on" and not (gpu and processes.size == 1):
        raise BadInput("cuda_graph on needs a GPU and a run of one process: use cuda_graph off")
    worth_it = gpu and not settings.pretrained               # one evaluation alone would take less than compiling it
    compiled = settings.compile == "on" or settings.compile == "auto" and worth_it and can_compile
    if compiled:
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")         # left off on purpose
    if compiled and settings.deterministic:
        import torch._inductor.config as inductor            # slow to import

        inductor.deterministic = True
    return SimpleNamespace(
        precision=precision, compile=compiled,
        cuda_graph=settings.cuda_graph == "on" or settings.cuda_graph == "auto" and worth_it and processes.size == 1,
        micro_bs=settings.micro_bs)


def _can_compile():
    """Whether what torch.compile calls is here."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "gcc", "clang")
    return any(name and shutil.which(name) for name in compilers) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"
