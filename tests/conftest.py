"""What the tests share: the script as a module, small settings, MNIST where there is one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.bijections import ActNorm
from models.conv1x1 import HouseholderConv, QRConv
from utils import data, load_script

PROJECT = Path(__file__).resolve().parent.parent
MNIST_FOLDERS = [Path(p) for p in (os.environ.get("SCNF_DATA_ROOT"), PROJECT / "data") if p]

# A model and a run that take seconds.
TINY = {"data": "digits", "model": "digits-masked", "ssl_dim": 16, "ssl_l": 2, "ssl_k": 1, "ssl_hd": 8,
        "supervised": 20, "num_examples": 200, "train_bs": 64, "test_bs": 256, "log_each": 1, "device": "cpu"}


@pytest.fixture(scope="session")
def script():
    """train-flow-ssl.py as a module."""
    return load_script()


@pytest.fixture(scope="session")
def mnist_root():
    """A data_root that holds MNIST, or the test is skipped."""
    for folder in MNIST_FOLDERS:
        if (folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file():
            return folder
    pytest.skip("no MNIST in $SCNF_DATA_ROOT or data/ (run config.yaml once to fetch it)")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def fresh_gpu(request):
    """For tests of a GPU: no graphs of other tests, LU as a run has it, float32 without TF32."""
    if request.node.get_closest_marker("gpu"):
        torch._dynamo.reset()
        torch.backends.cuda.preferred_linalg_library("cusolver")
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def float64():
    """Models and tensors of double precision, within the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def options(**changes):
    """TINY with `changes`, as a command line."""
    return [word for key, value in {**TINY, **changes}.items() for word in (f"--{key}", str(value))]


def load_tiny(**changes):
    """The dataset of TINY with `changes`."""
    settings = {"data_root": "data", "num_examples": -1, "data_seed": 0, "ssl_nclasses": -1, "ema": 0, **TINY, **changes}
    return data.load_data(SimpleNamespace(**settings))


@torch.no_grad()
def randomize(module, seed=0, scale=1.0):
    """Give every parameter of `module` random values, moderate ones: at start the last layers are zero."""
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
