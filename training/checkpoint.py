"""Files of weights, and checkpoints."""

import contextlib
import io
import math
import os
import random
import reprlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from models import SemiConditionalFlow
from models.published import from_published, is_published
from utils import Settings
from utils.errors import BadInput, value_errors_as_bad_input
from utils.files import PROJECT, atomic_write, sha256
from utils.metrics import read_metrics
from utils.settings import RESUMABLE, SHIPPED
from utils.terminal import say

from .optim import OPTIMIZERS, Optimizer
from .progress import Progress

PRETRAINED = PROJECT / "pretrained"
# The version of the content of checkpoint.pt, which counts up whenever older files cannot be read.
CHECKPOINT_FORMAT = 5
# What DataParallel and DistributedDataParallel, and torch.compile, put into the names of weights,
# and the entry that AveragedModel adds.
WRAPPERS, NOT_WEIGHTS = ("module", "_orig_mod"), "n_averaged"
LONGEST_NAME = 200      # of weights and settings, in characters
LOG_SUM = 0.01      # the largest |log sum p(y)|, of log p(y) in half precision
CHECKPOINT_TYPES = {"format": int, "model": dict, "average": dict, "optimizer": dict, "epoch": int,
                    "step": int, "sums": dict, "seconds": float, "generator": Tensor, "rng": dict,
                    "settings": dict}
REAL = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
        torch.bfloat16, torch.float32, torch.float64}


def load_weights(model: SemiConditionalFlow, path: str | Path, averaged: bool = False) -> str:
    """Load weights into `model`, in place and cast to its types, from the file at `path`.

    The file is a run's `model.torch` or `checkpoint.pt`, or a state dict of the authors' code, with
    or without masks, and with or without what wrappers put into its names. averaged: load the
    moving average of the weights, which the checkpoint of a run with ema has beside the last ones.
    -> which of the two the weights are, or "" if the file has no choice. Raises BadInput if the
    file is missing, is none of these, has no average, holds values that are not finite, or another
    architecture; the message then names the first differences.
    """
    content = load_file(path)
    state = without_wrappers(as_state_dict(content.get("model", content), path, content), path)
    average = content.get("average", {})
    if average != {}:
        average = without_wrappers(as_state_dict(average, path), path)
    which = "averaged" if averaged else "last" if average else ""
    if averaged:
        if not average:
            raise BadInput(f"{path} has no averaged weights: they are in the checkpoint.pt of a "
                           "run with ema")
        if lacking := [name for name, _ in model.named_parameters() if name not in average]:
            raise BadInput(f"{path} has averaged weights that lack {lacking[0]}")
        state = {**state, **average}
    if is_published(state):
        with value_errors_as_bad_input():
            state = from_published(model, state)
    # Linear layers are 1x1 convolutions in the authors' code, and some in earlier versions of ours.
    of_model = model.state_dict()
    shapes = shapes_of(of_model)
    state = {key: value.flatten(1) if value.shape == (*shapes.get(key, ()), 1, 1) else value
             for key, value in state.items()}
    check_architecture(model, state, path)
    for key, value in state.items():
        if value.is_floating_point() != of_model[key].is_floating_point():
            raise BadInput(f"{path} has {key} of type {value.dtype}, and the model of "
                           f"{of_model[key].dtype}")
        state[key] = value.to(of_model[key].dtype)
    check_finite(state.items(), path)
    if abs(float(state.get("log_p_y", of_model["log_p_y"]).logsumexp(0))) > LOG_SUM:
        raise BadInput(f"{path} has a log_p_y that is not the logarithm of probabilities")
    model.load_state_dict(state, strict=False)
    return which


def load_pretrained(model: SemiConditionalFlow, settings: Settings) -> str:
    """Load the weights that settings.pretrained names, or those that ship for the config.

    settings: pretrained, weights, config_file. -> the file and which of its weights, in words.
    Raises BadInput as `shipped_weights` and `load_weights` do.
    """
    shipped = settings.pretrained == SHIPPED
    path = shipped_weights(settings.config_file) if shipped else settings.pretrained
    which = load_weights(model, path, averaged=settings.weights == "averaged")
    return f"{path}{which and f', the {which} ones'}"


def shipped_weights(config_file: str | None) -> Path:
    """The weights that ship for a config: pretrained/NAME.torch for NAME.yaml.

    For config.yaml, or without a config, they are pretrained/model.torch. Raises BadInput if there
    are none, or if the file's SHA-256 is not the one in pretrained/SHA256SUMS.
    """
    config = Path(config_file or "config.yaml")
    path = PRETRAINED / ("model.torch" if config.name == "config.yaml" else f"{config.stem}.torch")
    if not path.is_file():
        raise BadInput(f"no weights ship for {config.name} (there is no pretrained/{path.name}): "
                       f"train them (python train-flow-ssl.py --config {config}), then give the "
                       "run's model.torch to --pretrained")
    sums = PRETRAINED / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.is_file() else []
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}.get(
        path.name)
    found = sha256(path)
    if found != expected:
        raise BadInput(f"{path} is damaged, or not the file that ships: "
                       f"its SHA-256 is {found}, not {expected}")
    return path


def state_of_run(model: SemiConditionalFlow, optimizer: Optimizer, progress: Progress,
                 generator: torch.Generator) -> dict[str, Any]:
    """All that changes while a run trains, which a checkpoint holds beside its settings.

    generator: of the batches. Of several processes, all have to call this.
    """
    return {"model": model.state_dict(), **optimizer.state_dict(), **progress.state_dict(),
            "generator": generator.get_state(), "rng": get_rng_state()}


def restore(checkpoint: dict[str, Any], model: SemiConditionalFlow, optimizer: Optimizer,
            progress: Progress, generator: torch.Generator) -> None:
    """Restore what `state_of_run` returned, in place."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint)
    progress.load_state_dict(checkpoint)
    set_rng_state(checkpoint["rng"])
    try:
        generator.set_state(checkpoint["generator"])
    except RuntimeError:  # it is of another kind of device
        generator.manual_seed(generator.initial_seed() + checkpoint["epoch"])
        say("Batches", "differ from those of an uninterrupted run: the checkpoint is from another "
                       "kind of device")


def load_checkpoint(path: Path, model: SemiConditionalFlow,
                    settings: Settings) -> dict[str, Any] | None:
    """The content of a run's checkpoint.pt; None if the run was ended before its first one.

    Raises BadInput if it is not a checkpoint of a run of `model`, has another format, is of a run
    with other settings than `settings`, apart from those that may change, has begun more epochs,
    holds values that are not finite, or lacks metrics.
    """
    rows = read_metrics(path.with_name("metrics.csv"))
    if not rows and not path.exists() and not path.with_name("model.torch").exists():
        return None
    checkpoint = load_file(path)
    written = checkpoint.get("format", 1 if "optimizer" in checkpoint else None)
    if isinstance(written, int) and written != CHECKPOINT_FORMAT:
        raise BadInput(f"{path} has format {written}, and this version reads format "
                       f"{CHECKPOINT_FORMAT}: continue the run with the commit in its params.yaml")
    if not is_checkpoint(checkpoint):
        raise BadInput(f"{path} is not a checkpoint of a run")
    check_architecture(model, as_state_dict(checkpoint["model"], path), path)
    done = checkpoint["epoch"] + (checkpoint["step"] > 0)
    if settings.epochs < done:
        raise BadInput(f"the run in {path.parent} is in epoch {done} already: its epochs can be "
                       f"{done} or more, not {settings.epochs}")
    finished = checkpoint["epoch"] == settings.epochs
    if finished and settings.epochs not in [row["epoch"] for row in rows]:
        raise BadInput(f"the metrics.csv of {path.parent} lacks its last epoch: restore it, or "
                       "resume with more epochs")
    changed = [key for key, value in checkpoint["settings"].items()
               if key not in RESUMABLE and vars(settings).get(key) != value]
    if changed:
        key = changed[0]
        raise BadInput(f"{path} was trained with {key} "
                       f"{reprlib.repr(checkpoint['settings'][key])}, and the run's params.yaml "
                       f"says {vars(settings).get(key)!r}: restore it")
    optimizer, shapes = checkpoint["optimizer"], shapes_of(dict(model.named_parameters()))
    average_fits = shapes_of(checkpoint["average"]) == (shapes if settings.ema else {})
    _, moments = OPTIMIZERS[settings.optimizer]
    if not average_fits or (optimizer and (
            shapes_of({"step": optimizer.get("step")}) != {"step": ()}
            or any(shapes_of(optimizer.get(key)) != shapes for key in moments))):
        raise BadInput(f"{path} is damaged: the optimiser's state does not fit the weights")
    for name in ("model", "average", "sums"):
        check_finite(checkpoint[name].items(), path)
    for key in moments if optimizer else ():
        check_finite(((f"{key} of {name}", t) for name, t in optimizer[key].items()), path)
    check_rng_state(checkpoint["rng"], path)
    return checkpoint


def is_checkpoint(content: dict[str, Any]) -> bool:
    """Whether `content` has the keys and types of a checkpoint of a run."""
    if content.keys() != CHECKPOINT_TYPES.keys() or not all(
            isinstance(content[key], kind) for key, kind in CHECKPOINT_TYPES.items()):
        return False
    sums, generator = shapes_of(content["sums"]), content["generator"]
    return ("log_p_y" in content["model"] and min(content["epoch"], content["step"]) >= 0
            and math.isfinite(content["seconds"])
            and "" not in sums and not any(sums.values())
            and ("loss" in sums) == (content["step"] > 0)
            and is_plain(generator) and generator.dtype == torch.uint8 and generator.dim() == 1
            and "epochs" in content["settings"]
            and all(isinstance(key, str) and len(key) < LONGEST_NAME
                    and isinstance(value, str | int | float | None)
                    for key, value in content["settings"].items()))


def is_plain(value: Any) -> bool:
    """Whether `value` is a dense tensor of real numbers, each of which its storage holds.

    An expanded one has a shape of any size, and nothing is to be computed with it.
    """
    return (isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in REAL
            and not (value.is_meta or value.is_nested)
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def shapes_of(tensors: Any) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a mapping of names to plain tensors; {"": ()} of anything else."""
    if not isinstance(tensors, dict) or not all(map(is_plain, tensors.values())):
        return {"": ()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_finite(tensors: Iterable[tuple[str, Tensor]], path: str | Path) -> None:
    """Raise BadInput, which names the first of the named tensors that has a value not finite."""
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise BadInput(f"{path} has values that are not finite: {name}")


def as_state_dict(state: Any, path: str | Path, content: Any = None) -> dict[str, Tensor]:
    """`state`, from the file at `path`, if it maps names to tensors of real numbers.

    Otherwise raises BadInput, which names the entries of the file's `content` that do.
    """
    if not is_state_dict(state):
        entries = entries_with_weights(content)[:3]
        hint = f", such as its {' or '.join(entries)}: save that alone" if entries else ""
        raise BadInput(f"{path} holds no weights: expected a mapping of names to tensors{hint}")
    return state


def is_state_dict(state: Any) -> bool:
    """Whether `state` maps names to tensors of real numbers."""
    return isinstance(state, dict) and bool(state) and all(
        isinstance(key, str) and len(key) < LONGEST_NAME and is_plain(value)
        for key, value in state.items())


def entries_with_weights(content: Any) -> list[str]:
    """The names of the state dicts within nested mappings, in the form ['a']['b'].

    Only short names are looked for, and each mapping once: it may be within others, even itself.
    """
    entries, places, seen = [], [("", content)], set()
    for name, part in places:       # which grows
        if name and is_state_dict(part):
            entries.append(name)
        elif isinstance(part, dict) and id(part) not in seen and len(name) < LONGEST_NAME:
            seen.add(id(part))
            places += [(f"{name}[{reprlib.repr(key)}]", value) for key, value in part.items()
                       if isinstance(key, str)]     # an optimiser's state has numbers
    return entries


def without_wrappers(state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """`state` without the parts of its names that come from WRAPPERS, or that all names begin with.

    Raises BadInput if two entries then have the same name.
    """
    names = {key: [part for part in key.split(".") if part not in WRAPPERS]
             for key in state if key != NOT_WEIGHTS}
    while len({tuple(parts[:1]) for parts in names.values()}) == 1 and all(
            len(parts) > 1 for parts in names.values()):
        names = {key: parts[1:] for key, parts in names.items()}
    renamed = {".".join(parts): state[key] for key, parts in names.items()}
    if len(renamed) < len(names):
        raise BadInput(f"{path} has two entries for one weight, with and without "
                       f"{' or '.join(WRAPPERS)} in their names")
    return renamed


def check_architecture(model: SemiConditionalFlow, state: Mapping[str, Tensor],
                       path: str | Path) -> None:
    """Raise BadInput, naming the first three differences, if `state` does not fit `model`."""
    expected, found = shapes_of(model.state_dict()), shapes_of(state)
    # Published state dicts have no log_p_y: the model's own is kept.
    differences = [f"{key} is missing" for key in expected if key not in found and key != "log_p_y"]
    differences += [f"{key} is {found[key]} in the file and {shape} in the model"
                    for key, shape in expected.items() if found.get(key, shape) != shape]
    differences += [f"{key} is not in the model" for key in found if key not in expected]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise BadInput(f"{path} holds weights of another architecture: "
                       f"{'; '.join(differences[:3])}{more}")


def load_file(path: str | Path) -> dict[str, Any]:
    """The mapping that torch.save wrote to `path`, with its tensors on the CPU.

    Raises BadInput if it is none, or damaged, which files of PyTorch 1.5 and earlier do not reveal.
    """
    if not os.path.isfile(path):
        raise BadInput(f"no file {path}")
    try:
        with open(path, "rb") as f, warnings.catch_warnings(action="ignore"):
            without_checksums = f.read(1) == b"\x80"        # of PyTorch 1.5 and earlier: a pickle
            f.seek(0)
            content = torch.load(f if without_checksums else verified(f), map_location="cpu",
                                 weights_only=True)
    except Exception as e:  # damaged bytes raise errors of many types
        raise BadInput(f"{path} is no checkpoint that torch.load can read safely "
                       f"({type(e).__name__})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}, not the mapping of a checkpoint")
    return content


def verified(f: IO[bytes]) -> IO[bytes]:
    """A copy in memory of the zip file `f`, whose entries have the checksums that `f` has for them.

    torch.load compares none, and takes the sizes of entries, and what is an entry, from other bytes
    of the file than zipfile. Raises an error of any type if `f` is damaged.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(f) as entries, zipfile.ZipFile(copy, "w") as copied:
        if sum(entry.file_size for entry in entries.infolist()) > os.fstat(f.fileno()).st_size:
            raise zipfile.BadZipFile("compressed entries, which could be of any size")
        for entry in entries.infolist():
            copied.writestr(entry.filename, entries.read(entry))
    copy.seek(0)
    return copy


class CheckpointWriter(contextlib.AbstractContextManager):
    """A context whose `write` copies a checkpoint to the CPU and returns; a thread writes the file.

    path: of the file; None on the processes that write nothing: of several, all but the main one
    settings: of the run, which the file holds too
    state: returns the rest, nested mappings of tensors and plain values; all processes call it

    When the context ends, the last checkpoint has been written. An error in writing is raised by
    the next call, or at the end of the context.
    """

    def __init__(self, path: Path | None, settings: Settings, state: Callable[[], dict[str, Any]]):
        self.path, self.settings, self.state = path, settings, state
        self.thread, self.pending = ThreadPoolExecutor(1), Future[None]()
        self.pending.set_result(None)

    def write(self, wait: bool = False) -> None:
        """Write the state of the run as it is now. wait: until it has been written."""
        state = self.state()
        if self.path is None:
            return
        self.wait()
        content = {"format": CHECKPOINT_FORMAT, **state, "settings": vars(self.settings)}
        self.pending = self.thread.submit(save_atomically, copy_to_cpu(content), self.path)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the last checkpoint. Raises the error that writing it raised."""
        self.pending.result()

    def __exit__(self, *_: Any) -> None:
        self.thread.shutdown()
        self.wait()


def copy_to_cpu(content: Any) -> Any:
    """`content`, nested mappings of tensors and plain values, with tensors copied to the CPU."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: copy_to_cpu(value) for key, value in content.items()}
    return content


def save_atomically(content: Any, path: Path) -> None:
    """torch.save `content` so that `path` always holds either the old or the new file."""
    with atomic_write(path, "wb") as f:
        torch.save(content, f)


def get_rng_state() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and PyTorch.

    They consist of types that torch.load reads safely.
    """
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `get_rng_state` returned, for GPUs only if their number is the same."""
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    keys = np.fromiter(words, np.int64)
    if (keys >> 32).any():
        raise OverflowError("a key of NumPy's generator has more than 32 bits")
    np.random.set_state((kind, keys.astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def check_rng_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Raise BadInput unless `set_rng_state` can restore `state`. The generators keep theirs."""
    own = get_rng_state()
    try:
        set_rng_state(state)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RuntimeError):
        raise BadInput(f"{path} is damaged: it has no states of the random generators") from None
    finally:
        set_rng_state(own)
