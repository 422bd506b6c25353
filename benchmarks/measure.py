"""What the benchmarks share: modes, random data, times, the machine's own limits, the table."""

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from models import build_model  # noqa: E402
from utils import BadInput  # noqa: E402
from utils.data import SemiSupervisedData  # noqa: E402
from utils.device import device_name, set_up_torch  # noqa: E402
from utils.processes import Processes  # noqa: E402
from utils.settings import read_settings  # noqa: E402

DATA = {"mnist": ((1, 28, 28), 10, 256), "digits": ((1, 8, 8), 10, 17),       # shape, classes, grey levels
        "moons": ((2, 1, 1), 2, None), "circles": ((2, 1, 1), 2, None)}
CONV_PASSES = (16, 32, 64)      # rows at which a CPU's convolution may be at its best, besides the batch
TYPES = {"bf16": torch.bfloat16}


def read_arguments(description, add_own):
    """-> own arguments, settings, device. Everything that is not an argument of the benchmark is a setting."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     epilog="All other options are train-flow-ssl.py's.")
    parser.add_argument("--modes", help="comma-separated: plain, or a precision (fp32, tf32, bf16), then +compile, +graph")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    add_own(parser)
    own, rest = parser.parse_known_args()
    _, settings = read_settings(rest)
    device = set_up_torch(settings, Processes())
    gpu = device.type == "cuda"
    default = "plain,fp32,fp32+compile+graph,tf32+compile+graph,bf16,bf16+compile,bf16+compile+graph" if gpu else "plain,fp32,bf16"
    own.modes = [read_mode(text, gpu) for text in (own.modes or default).split(",")]
    return own, settings, device


def read_mode(text, gpu):
    """'bf16+compile+graph' -> the namespace that `arrange` (utils/step.py) takes, with the name. Raises BadInput."""
    precision, *more = text.strip().split("+")
    if precision not in ("plain", "fp32", "tf32", "bf16") or set(more) - {"compile", "graph"} or (precision == "plain" and more):
        raise BadInput(f"no mode {text}: plain, or fp32, tf32 or bf16 with +compile, +graph")
    if not gpu and (precision == "tf32" or "graph" in more):
        raise BadInput(f"mode {text} needs a GPU")
    plain = precision == "plain"
    return SimpleNamespace(name=text.strip(), plain=plain, precision="fp32" if plain else precision, compile="compile" in more, cuda_graph="graph" in more)


def random_data(settings, device, n=2048):
    """SemiSupervisedData of the shapes of settings.data with random contents: no step's time depends on them."""
    shape, k, levels = DATA[settings.data]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, *shape, generator=generator)
    if levels:
        x = torch.randint(levels, x.shape, dtype=torch.uint8, generator=generator)
    y = torch.arange(2 * n) % k
    return SemiSupervisedData(x[:n], y[:n], x[n:], y[n:], torch.arange(100), levels, device)


def fresh_model(settings, data):
    """The model as a run has it after some training: initialised, with last layers that are not zero."""
    torch.manual_seed(settings.seed)
    model = build_model(settings, data.shape, data.n_classes).to(data.device)
    model.initialize(data.dequantize(data.train_x[:256], torch.Generator(data.device).manual_seed(0)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("last.weight"):
                p.normal_(0, 0.01)
    return model


def flops_per_image(settings, data):
    """FLOPs of convolutions and matrix products, of one image: (forward, forward and backward)."""
    model, n = fresh_model(settings, data), 4
    x = data.dequantize(data.train_x[:n], torch.Generator(data.device).manual_seed(0))
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            log_p = model.log_prob(x)
            if backward:
                log_p.sum().backward()
        counts.append(counter.get_total_flops() / n)
    return counts


def times(run, n, device, warm_up):
    """Seconds of each of `n` calls after `warm_up` ones, and of the first call of all (with its compilation)."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
    wait()
    began = time.perf_counter()
    run()
    wait()
    first = time.perf_counter() - began
    for _ in range(warm_up - 1):
        run()
    if device.type == "cuda":                                # the calls follow each other as they do in training
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        wait()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])], first
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds, first


def limits(precisions, batch, device):
    """The machine's own TFLOP/s -> {name: TFLOP/s}: for each precision a 64-channel 3x3 convolution, forward and
    backward, at 28 x 28, channels last, at the best of some batch sizes; on a GPU a large bf16 matrix product."""
    found = {}
    for precision in precisions:
        best = 0.0
        for n in (*CONV_PASSES, batch) if device.type == "cpu" else (batch, 4 * batch):
            dtype = TYPES.get(precision, torch.float32)
            x = torch.randn(n, 64, 30, 30, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
            w = torch.randn(64, 64, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
            ones = torch.ones(n, 64, 28, 28, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

            def run():
                x.grad = w.grad = None
                F.conv2d(x, w).backward(ones)
            with convolutions_in(precision):
                seconds, _ = times(run, 10, device, 3)
            best = max(best, 3 * 2 * n * 28 * 28 * 64 * 64 * 9 / statistics.median(seconds) / 1e12)
        found[f"convolution {precision}"] = best
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        seconds, _ = times(lambda: a @ a, 20, device, 5)
        found["matrix product bf16"] = 2 * 8192**3 / statistics.median(seconds) / 1e12
    return found


@contextlib.contextmanager
def convolutions_in(precision):
    """cuDNN's TF32 as the precision has it (utils/device.py)."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, precision in ("tf32", "bf16")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def start_mode(device):
    """Forget what the modes before left: memory, and what was compiled, but for the compiler's cache on disk."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)                 # glibc: gives back what earlier modes left
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")    # Linux: the peak starts again from what is used now


def peak_gib(device):
    """GiB at most since `start_mode`: of the GPU's memory reserved, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(title, device, found_limits, rows, columns, path):
    """Print the table of `rows`, by `columns` {key: (heading, format)}, and write everything to `path`."""
    print(f"\n{title}\nPyTorch {torch.__version__} on {device_name(device)}, {platform.processor() or platform.machine()}")
    for name, tflops in found_limits.items():
        print(f"limit: {name}, {tflops:.3f} TFLOP/s")
    table = [[heading for heading, _ in columns.values()]]
    table += [["" if row[key] is None else format(row[key], fmt) for key, (_, fmt) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))
    if path:
        path.write_text(json.dumps({"title": title, "torch": torch.__version__, "device": device_name(device),
                                    "limits_tflops": found_limits, "modes": rows}, indent=1) + "\n")


def spread(seconds):
    """Median, and the lower and upper quartile, in milliseconds."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return [1e3 * v for v in (median, low, high)]


def row_of(mode, seconds, first, images, flops, found_limits, device):
    """The columns that both benchmarks have."""
    median, low, high = spread(seconds)
    tflops = images * flops / median / 1e9
    conv = found_limits[f"convolution {mode.precision}"]
    return {"mode": mode.name, "ms": median, "ms_low": low, "ms_high": high, "images_per_s": 1e3 * images / median,
            "tflops": tflops, "of_convolution": 100 * tflops / conv,
            "of_matmul": 100 * tflops / found_limits["matrix product bf16"] if device.type == "cuda" else None,
            "peak_gib": peak_gib(device), "first_s": first}


COLUMNS = {"mode": ("mode", ""), "ms": ("ms", ".2f"), "ms_low": ("25 %", ".2f"), "ms_high": ("75 %", ".2f"),
           "images_per_s": ("images/s", ",.0f"), "tflops": ("TFLOP/s", ".3f"), "of_convolution": ("% of conv.", ".0f"),
           "of_matmul": ("% of matmul", ".0f"), "peak_gib": ("peak GiB", ".1f"), "first_s": ("first call, s", ".1f")}
