"""What the tests share: running the script, small settings, MNIST where it is available."""

import os

# Of the tests and of the commands that they start: the models are small, and several threads that
# wait for each other are slow beside other programs. To be set before PyTorch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch

from models import build_model
from models.bijections import ActNorm
from models.conv1x1 import HouseholderConv, QRConv
from training.checkpoint import load_weights
from training.distributed import Processes
from training.speed import Accelerated
from utils.datasets import load_data
from utils.errors import BadInput
from utils.settings import OPTIONS

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = PROJECT / "train-flow-ssl.py"
MNIST_FOLDERS = [Path(p) for p in (os.environ.get("SCNF_DATA_ROOT"), PROJECT / "data") if p]
# Warnings of the project's modules are errors in the commands that the tests start too. pyproject's
# pattern cannot be said here: PYTHONWARNINGS takes whole names.
MODULES = ["__main__", *(f"{path.parent.name}.{path.stem}".removesuffix(".__init__")
                         for path in PROJECT.glob("*/*.py"))]
os.environ["PYTHONWARNINGS"] = ",".join(f"error:::{module}" for module in MODULES)

# Every run of the tests has the same examples.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

# A model and a run that take seconds.
TINY = {"data": "digits", "model": "digits-masked", "ssl_dim": 16, "ssl_l": 2, "ssl_k": 1,
        "ssl_hd": 8, "supervised": 20, "num_examples": 200, "train_bs": 64, "test_bs": 256,
        "lr_schedule": "no", "log_each": 1, "device": "cpu", "precision": "fp32"}
# The changes of TINY for a model of points.
POINTS = {"data": "moons", "model": "toy", "ssl_dim": -1, "ssl_l": 1, "conv": "qr", "l": 3}


@pytest.fixture(scope="session")
def mnist_root():
    """A data_root that contains MNIST; without one the test is skipped."""
    for folder in MNIST_FOLDERS:
        if (folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file():
            return folder
    pytest.skip("no MNIST in $SCNF_DATA_ROOT or data/: `python train-flow-ssl.py --config "
                "configs/mnist-best.yaml --pretrained` downloads it, in a minute")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def fresh_gpu(request):
    """For GPU tests: no compiled graphs of other tests, the LU of a run, float32 without TF32."""
    if request.node.get_closest_marker("gpu"):
        torch._dynamo.reset()
        torch.backends.cuda.preferred_linalg_library("cusolver")
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def float64():
    """Models and tensors are in double precision during the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run_script(argv):
    """Run train-flow-ssl.py with the arguments `argv` in this process -> its exit code.

    Nothing can import the script, because its file name has hyphens. Its own imports are executed
    anew in each run, so a test replaces a function or class in the module that defines it.
    """
    own_argv, sys.argv = sys.argv, [str(SCRIPT), *argv]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return 0 if end.code is None else end.code
    finally:
        sys.argv = own_argv
    return 0


def make_step(settings, model, micro_bs=0, **speed):
    """-> the script's function that makes a training step, and its Optimizer."""
    script = runpy.run_path(str(SCRIPT))
    accelerated = Accelerated(model, micro_bs=micro_bs, **speed)
    return script["make_training_step"](accelerated, settings, Processes())


def execute(folder, command, **environment):
    """Run a command in `folder`, with changes of the environment -> the completed process."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})


def words(text):
    """`text` in one line, however it is wrapped."""
    return " ".join(text.split())


def runs(folder, kind="runs"):
    """The directories of the runs started in `folder`: its runs, fails, tmp or index."""
    assert kind in ("runs", "fails", "tmp", "index")
    return sorted((folder / "logs" / "exman-train-flow-ssl.py" / kind).glob("*"))


def options(**changes):
    """TINY with `changes`, as a command line."""
    return [word for key, value in {**TINY, **changes}.items() for word in (f"--{key}", str(value))]


def load_tiny(**changes):
    """The dataset of TINY with `changes`."""
    defaults = {option.name: option.default for option in OPTIONS.values()}
    return load_data(SimpleNamespace(**{**defaults, **TINY, **changes}))


@torch.no_grad()
def randomize(module, seed=0, scale=1.0):
    """Give every parameter of `module` a moderate random value; initially the last layers are zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(p):
        return scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        for name, p in own.items():
            if name == "W":
                p.copy_(torch.eye(len(p)) + 0.3 / len(p) ** 0.5 * noise(p))
            elif isinstance(part, HouseholderConv) and name == "v":
                p.copy_(noise(p) / scale)
            elif isinstance(part, QRConv) and name == "s":
                p.copy_(p + 0.3 * noise(p))
            elif isinstance(part, ActNorm) or p.dim() < 2:
                p.copy_(0.3 * noise(p))
            else:
                p.copy_(0.5 / p[0].numel() ** 0.5 * noise(p))
    return module


def new_model():
    """The model of TINY."""
    return build_model(TINY, (1, 8, 8), 10)


def weights_in(path):
    """The state dict of the model of TINY with the weights in a file."""
    model = new_model()
    load_weights(model, path)
    return model.state_dict()


def same(a, b):
    """Whether two contents of files are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return (isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
                and a.numpy().tobytes() == b.numpy().tobytes())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def outcome(path, data, load, expected):
    """What becomes of `data` as the content of `path`."""
    path.write_bytes(data)
    try:
        return "right" if same(load(path), expected) else "different"
    except BadInput:
        return "error"


def outcomes(path, load, n, seed=0):
    """How often each outcome follows n damages of the file at `path`: flipped bits, or, of every
    fourth, a truncation."""
    whole, expected, rng = path.read_bytes(), load(path), random.Random(seed)
    counts = Counter()
    for i in range(n):
        data = bytearray(whole)
        if i % 4 == 3:
            del data[rng.randrange(len(data)):]
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 8))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        counts[outcome(path, data, load, expected)] += 1
    path.write_bytes(whole)
    return counts
