"""What the benchmarks share: modes, random data, timing, the limits of the machine, the table."""

import contextlib
import ctypes
import gc
import itertools
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from training.distributed import Processes
from training.device import device_name, set_up_torch
from training.speed import WARM_UP_CALLS, Speed
from utils.data import SemiSupervisedData
from utils.datasets import DATASETS
from utils.errors import BadInput, OneLineParser, check_output, value_errors_as_bad_input
from utils.files import write_json
from utils.settings import read_settings

NAME_LENGTH = 100               # of a kernel, in the profile
CPU_BATCHES = (16, 32, 64)      # batch sizes at which a CPU's convolution may be fastest
GPU_MODES = "bf16+compile+graph,bf16+graph,bf16,fp32"        # one of them compiles, for a minute
CPU_MODES = "fp32,bf16"
# Of the table: {key: (heading, format)}.
COLUMNS = {"mode": ("mode", ""), "ms": ("ms", ".2f"), "ms_low": ("25 %", ".2f"),
           "ms_high": ("75 %", ".2f"), "images_per_s": ("images/s", ",.0f"),
           "tflops": ("TFLOP/s", ".3f"), "of_convolution": ("% of conv.", ".0f"),
           "of_matmul": ("% of matmul", ".0f"), "peak_gib": ("peak GiB", ".1f"),
           "first_s": ("first call, s", ".1f")}


def read_arguments(description, count, default, what):
    """-> args arguments, settings, device. All other arguments are settings.

    count, default, what: name, default and help of the option for the number of timed calls.
    args.modes are those to compare, as from `read_modes`. Raises BadInput.
    """
    parser = OneLineParser(description=description, allow_abbrev=False,
                           epilog="All other options are those of train-flow-ssl.py.")
    parser.add_argument(f"--{count}", type=int, default=default, help=what)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--profile", type=int, default=0, metavar="N",
                        help="also list the N longest kernels (on a CPU: operators) of a call")
    parser.add_argument("--modes", help="comma-separated: a precision (fp32, tf32, bf16) followed "
                        "by +compile, +graph, both or neither")
    args, rest = parser.parse_known_args()
    _, settings = read_settings(rest)
    if args.profile < 0:
        raise BadInput(f"--profile must be at least 0, not {args.profile}")
    if getattr(args, count) < 1:
        raise BadInput(f"{count} must be at least 1, not {getattr(args, count)}")
    check_output(args.json)
    if settings.cons_weight and DATASETS[settings.data].grey_levels is None:
        raise BadInput(f"cons_weight needs images, for augmentation; {settings.data} has points")
    device = set_up_torch(settings, Processes())
    args.modes = read_modes(args.modes, settings, device)
    return args, settings, device


def read_modes(names, settings, device):
    """The modes in `names`, separated by commas, or the default ones: [(name, Speed)].

    A name is for example bf16+compile+graph. Raises BadInput.
    """
    gpu, points = device.type == "cuda", DATASETS[settings.data].grey_levels is None
    default = "fp32" if points else GPU_MODES if gpu else CPU_MODES
    modes = []
    for name in map(str.strip, (names or default).split(",")):
        precision, *more = name.split("+")
        if precision not in ("fp32", "tf32", "bf16") or set(more) - {"compile", "graph"}:
            raise BadInput(f"no mode {name}: use fp32, tf32 or bf16 with +compile, +graph")
        if points and precision == "bf16":
            raise BadInput(f"modes in bf16 are for images, and {settings.data} has points")
        if not gpu and (precision == "tf32" or "graph" in more):
            raise BadInput(f"mode {name} needs a GPU")
        modes.append((name, Speed(precision, "compile" in more, "graph" in more,
                                  settings.micro_bs)))
    return modes


def random_data(settings, device):
    """Random data with the shapes of settings.data, on which alone the times depend.

    There are as many training examples, and test examples, as fill a batch.
    """
    n = max(2048, settings.train_bs, settings.test_bs)
    dataset = DATASETS[settings.data]
    if dataset.shape is None:
        raise BadInput("benchmarks make random data, and need a dataset of known shape, not "
                       f"{settings.data}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, *dataset.shape, generator=generator)
    if dataset.grey_levels:
        x = torch.randint(dataset.grey_levels, x.shape, dtype=torch.uint8, generator=generator)
    y = torch.arange(2 * n) % len(dataset.classes)
    return SemiSupervisedData(x[:n], y[:n], x[n:], y[n:], torch.arange(100), dataset.grey_levels,
                              device,
                              augmentation=dataset.augmentation if settings.cons_weight else None,
                              clf_noise=settings.clf_noise, spread_labels=settings.spread_labels)


def fresh_model(settings, data):
    """An initialised model; its networks' last layers are not zero, as after some training."""
    torch.manual_seed(settings.seed)
    with value_errors_as_bad_input():
        model = build_model(settings, data.shape, data.n_classes,
                            grey_levels=data.grey_levels).to(data.device)
    noise = torch.Generator(data.device).manual_seed(0)
    model.initialize(data.dequantize(data.train_x[:256], noise), data.train_x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("last.weight"):
                p.normal_(0, 0.01)
    return model


def count_flops(call):
    """The FLOPs of the convolutions and matrix products in `call()`."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def time_modes(modes, make_call, n, images, flops, limits, device, longest=0):
    """Time `n` calls in each of `modes`, which are as from `read_modes` -> the rows of the table.

    make_call: gives, for a Speed, the function to call.
    images, flops: of a call.
    limits: as from `measure_limits`.
    longest: how many kernels of a call to print.
    """
    rows, matmul = [], limits.get("matrix product bf16")        # on a GPU
    for name, speed in modes:
        start_mode(device)
        with convolutions_in(speed.precision):
            call = make_call(speed)
            warm_up = WARM_UP_CALLS + 2 if device.type == "cuda" else 1
            seconds, first = time_calls(call, n, device, warm_up)
            low, median, high = statistics.quantiles(seconds, n=4) if n > 1 else seconds * 3
            tflops = flops / median / 1e12
            rows.append({
                "mode": name, "ms": 1e3 * median, "ms_low": 1e3 * low, "ms_high": 1e3 * high,
                "images_per_s": images / median, "tflops": tflops,
                "of_convolution": 100 * tflops / limits[f"convolution {speed.precision}"],
                "of_matmul": matmul and 100 * tflops / matmul, "peak_gib": peak_gib(device),
                "first_s": first})
            if longest:
                print_profile(name, call, device, longest)
        print(f"{name}: {1e3 * median:.2f} ms", file=sys.stderr)
        del call                    # and with it the model, before the next mode starts
    return rows


def time_calls(call, n, device, warm_up):
    """Time `n` calls after `warm_up` others.

    -> the seconds of each; the seconds of the first call of all, which may compile.
    """
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
    wait()
    start = time.perf_counter()
    call()
    wait()
    first = time.perf_counter() - start
    for _ in range(warm_up - 1):
        call()
    if device.type == "cuda":                       # the calls follow each other as in training
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        wait()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)], first
    times = [time.perf_counter()]
    for _ in range(n):
        call()
        times.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(times)], first


def print_profile(name, call, device, longest):
    """Print the kernels of a call on a GPU, or the operators on a CPU: their number and time in
    all, and the `longest` ones by the sum of their times."""
    gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as recorded:
        call()
        if gpu:
            torch.cuda.synchronize()

    def milliseconds(row):
        return (row.self_device_time_total if gpu else row.self_cpu_time_total) / 1e3
    rows = sorted(recorded.key_averages(), key=milliseconds, reverse=True)
    print(f"{name}: {sum(row.count for row in rows):,} {'kernels' if gpu else 'operators'}, "
          f"{sum(map(milliseconds, rows)):.2f} ms in all; the longest:")
    for row in rows[:longest]:
        print(f"{milliseconds(row):9.3f} ms {row.count:6}  {row.key[:NAME_LENGTH]}")


def measure_limits(precisions, batch, device):
    """The TFLOP/s that the machine reaches, {name: TFLOP/s}.

    For each precision: a 64-channel 3x3 convolution at 28 x 28, forward and backward,
    channels-last, at the best of some batch sizes. On a GPU also a large matrix product in bf16.
    """
    limits = {}
    for precision in sorted(precisions):
        dtype, best = torch.bfloat16 if precision == "bf16" else torch.float32, 0.0
        for n in (*CPU_BATCHES, batch) if device.type == "cpu" else (batch, 4 * batch):
            x, w, grad = (t.to(device, dtype, memory_format=torch.channels_last) for t in (
                torch.randn(n, 64, 30, 30), torch.randn(64, 64, 3, 3), torch.ones(n, 64, 28, 28)))
            x.requires_grad_()
            w.requires_grad_()

            def call(x=x, w=w, grad=grad):
                x.grad = w.grad = None
                F.conv2d(x, w).backward(grad)
            with convolutions_in(precision):
                seconds, _ = time_calls(call, 10, device, 3)
            flops = 3 * 2 * n * 28 * 28 * 64 * 64 * 9
            best = max(best, flops / statistics.median(seconds) / 1e12)
        limits[f"convolution {precision}"] = best
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        seconds, _ = time_calls(lambda: a @ a, 20, device, 5)
        limits["matrix product bf16"] = 2 * 8192**3 / statistics.median(seconds) / 1e12
    return limits


@contextlib.contextmanager
def convolutions_in(precision):
    """Set cuDNN's TF32 as a run of that precision does (training/device.py)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def start_mode(device):
    """Free memory and compiled functions of earlier modes, but not the compiler's disk cache."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)                 # glibc: return free memory
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")    # Linux: reset the peak


def peak_gib(device):
    """Peak memory since `start_mode`, in GiB: reserved on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(title, device, limits, rows, columns, path):
    """Print `rows` as a table with `columns`, {key: (heading, format)}; write all to `path`."""
    cpu = platform.processor() or platform.machine()
    print(f"\n{title}\nPyTorch {torch.__version__} on {device_name(device)}, {cpu}")
    for name, tflops in limits.items():
        print(f"limit: {name}, {tflops:.3f} TFLOP/s")
    table = {heading: ["" if row[key] is None else format(row[key], fmt) for row in rows]
             for key, (heading, fmt) in columns.items()}
    print(pd.DataFrame(table).to_string(index=False))
    if path:
        content = {"title": title, "torch": torch.__version__, "device": device_name(device),
                   "limits_tflops": limits, "modes": rows}
        write_json(path, content)
