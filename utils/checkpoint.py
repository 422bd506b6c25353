"""Files of weights and checkpoints: ours, and the layout of the published code's state dict."""

import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from . import BadInput, sha256, whole_file
from .published import from_published, is_published

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
SHIPPED_WEIGHTS = {("mnist", "mnist-masked"): "model.torch", ("mnist", "mnist-small"): "mnist-small.torch",
                   ("digits", "digits-masked"): "digits.torch"}              # by data and model
RUNS = {("mnist", "mnist-masked"): "config.yaml", ("mnist", "mnist-small"): "configs/mnist-small.yaml",
        ("digits", "digits-masked"): "configs/digits.yaml", ("moons", "toy"): "configs/moons.yaml",
        ("circles", "toy"): "configs/circles.yaml"}                          # that train such weights
CHECKPOINT_KEYS = {"model", "optimizer", "epoch", "step", "sums", "seconds", "generator", "rng", "settings"}


def load_weights(model, path):
    """Load weights into `model` (in place, cast to its dtype) from the file at `path`.

    The file: a `model.torch` or `checkpoint.pt` of a run, or a state dict in the published
    layout, with or without `module.` prefixes and masks. Raises BadInput if it is missing, is
    no such file, or holds another architecture (the message names the first mismatches).
    """
    content = load_file(path)
    state = weights_in(content.get("model", content), path)
    if is_published(state):
        state = from_published(model, state)
    check_fit(model, state, path)
    model.load_state_dict(state, strict=False)


def shipped_weights(settings):
    """The file in pretrained/ for settings.data and settings.model.

    Raises BadInput if there is none, saying how to make it, or if it is not the one whose SHA-256
    pretrained/SHA256SUMS has.
    """
    key = settings.data, settings.model
    path = PRETRAINED / SHIPPED_WEIGHTS.get(key, "none")
    if not path.is_file():
        how = f" (python train-flow-ssl.py --config {RUNS[key]})" if key in RUNS else ""
        raise BadInput(f"no weights ship for {settings.data} and model {settings.model}: train them{how}, "
                       "then give the run's model.torch to --pretrained")
    listed = PRETRAINED / "SHA256SUMS"
    sums = dict(reversed(line.split()) for line in listed.read_text().splitlines()) if listed.is_file() else {}
    found = sha256(path)
    if found != sums.get(path.name):
        raise BadInput(f"{path} is damaged, or not the file that ships: its SHA-256 is {found}, not {sums.get(path.name)}")
    return path


def load_checkpoint(path, model, n_terms):
    """The content of a run's checkpoint.pt, whose weights fit `model` and which has sums of `n_terms` terms. Raises BadInput."""
    checkpoint = load_file(path)
    if set(checkpoint) != CHECKPOINT_KEYS or len(checkpoint["sums"]) != n_terms:
        raise BadInput(f"{path} is no checkpoint of a run, or one of another version")
    check_fit(model, weights_in(checkpoint["model"], path), path)
    return checkpoint


def weights_in(state, path):
    """`state` if it is a mapping of names to tensors. Raises BadInput."""
    if not isinstance(state, dict) or not state or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        raise BadInput(f"{path} holds no weights: expected a mapping of names to tensors")
    return state


def check_fit(model, state, path):
    """Raise BadInput, naming the first three misfits, if `state` is not of the architecture of `model`."""
    own = model.state_dict()
    misfits = [f"{key} is missing" for key in own if key not in state and key != "log_p_y"]
    misfits += [f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
                for key in own if key in state and state[key].shape != own[key].shape]
    misfits += [f"{key} is not in the model" for key in state if key not in own]
    if misfits:
        more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise BadInput(f"{path} holds weights of another architecture: {'; '.join(misfits[:3])}{more}")


def load_file(path):
    """The mapping that torch.save wrote to `path`, its tensors on the CPU. Raises BadInput."""
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"no file {path}") from None
    except Exception as e:                  # of many types, by what the damaged bytes happen to mean
        raise BadInput(f"{path} is no checkpoint that torch.load can read safely ({type(e).__name__})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}, not the mapping of a checkpoint")
    return content


class CheckpointWriter:
    """A context whose `write` copies a checkpoint to the CPU's memory and returns; a thread writes the file.

    On leaving it the last file is whole. An error in writing shows at the next call, or on leaving.
    """

    def __init__(self, path):
        self.path, self.thread, self.written = path, ThreadPoolExecutor(1), None

    def write(self, content):
        self.wait()
        self.written = self.thread.submit(save_whole, copy_to_cpu(content), self.path)

    def wait(self):
        if self.written:
            self.written.result()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()
        self.wait()


def copy_to_cpu(content):
    """`content`, nested mappings of tensors and anything else, with copies of the tensors on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: copy_to_cpu(value) for key, value in content.items()}
    return content


def save_whole(content, path):
    """torch.save `content` to `path` so that the file is, at any moment, the old or the new one whole."""
    with whole_file(path, "wb") as f:
        torch.save(content, f)


def get_rng_state():
    """The states of Python's, NumPy's and PyTorch's global generators, in types torch.load reads safely."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state):
    """Undo to `get_rng_state`. GPUs' states are set where as many GPUs are there as were."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
