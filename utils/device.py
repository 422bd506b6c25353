"""Where and how a run computes: the device, threads, determinism, precision, compilation."""

import os
import shutil
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
    if name == "cuda" and processes.size > 1:
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"device must be auto, cpu, cuda or cuda:N, not {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"no device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    if settings.train_bs % processes.size:
        raise BadInput(f"train_bs {settings.train_bs} cannot be shared by {processes.size} processes: make it a multiple")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not settings.deterministic
        torch.backends.cuda.preferred_linalg_library("cusolver")     # MAGMA's LU waits for the device
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
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++", "gcc", "clang") if name and shutil.which(name)]
    if settings.compile == "on" and not compilers:
        raise BadInput("compile on needs a C++ compiler (g++ or clang++): install one, or use compile off")
    if settings.cuda_graph == "on" and not (gpu and processes.size == 1):
        raise BadInput("cuda_graph on needs a GPU and a run of one process: use cuda_graph off")
    worth_it = gpu and not settings.pretrained               # one evaluation alone would take less than compiling it
    return SimpleNamespace(
        precision=precision, compile=settings.compile == "on" or settings.compile == "auto" and worth_it and bool(compilers),
        cuda_graph=settings.cuda_graph == "on" or settings.cuda_graph == "auto" and worth_it and processes.size == 1,
        micro_bs=settings.micro_bs)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"
