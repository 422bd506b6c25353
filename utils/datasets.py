"""Loading of datasets. images.py reads one's own."""

import contextlib
import hashlib
import http.client
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import Settings
from .data import Augmentation, SemiSupervisedData
from .errors import BadInput, value_errors_as_bad_input
from .examples import ROWS, Examples, Source, choose_labelled, listed, read_indices, set_aside
from .files import atomic_write
from .images import load_arrays, load_folder
from .runs import PARAMS_FILE, read_params
from .terminal import say

MOONS_NOISE, CIRCLES_NOISE, CIRCLES_FACTOR = 0.1, 0.05, 0.5
DATA_FILE = "data.yaml"     # in the directory of a run on own images


def load_data(settings: Settings, device: str | torch.device = "cpu") -> SemiSupervisedData:
    """The dataset that settings.data names, on `device`.

    settings: data, data_root, image_size, validation, test, num_examples, data_seed, supervised,
        labelled, sup_sample_weight, cons_weight, clf_noise, spread_labels, aug_rotation,
        aug_scaling, aug_shift; resume, pretrained: of a run, whose files are compared with the data

    The validation images are the same whatever the seeds; they are chosen among those that have
    labels, as the labelled ones are. With test false own images need no test set, and have none.
    Batches have augmented copies if cons_weight is positive.
    Raises BadInput if the files cannot be had, the settings ask for more examples than there are,
    or points for what is for images.
    """
    dataset = DATASETS[settings.data]
    if settings.cons_weight and not dataset.augmentation:
        raise BadInput(f"cons_weight needs images, for augmentation; {settings.data} has points")
    if settings.clf_noise != "true" and dataset.grey_levels is None:
        raise BadInput(f"clf_noise {settings.clf_noise} is for images; {settings.data} has points, "
                       "without noise")
    if settings.image_size and settings.data != "folder":
        raise BadInput(f"image_size is for data folder, not {settings.data}")
    train_x, train_y, test_x, test_y, classes = dataset.load(settings)
    run = _run_of(settings)
    then = read_description(run) if run else {}
    if then and dataset.shape is None and then["shape"][:1] == [3]:
        train_x, test_x = (x.expand(-1, 3, -1, -1) for x in (train_x, test_x))
    if len(classes) < 2 and settings.supervised:
        raise BadInput(f"the data have {len(classes) or 'no'} class{'es' * (not classes)}, and a "
                       "classifier needs two: for the density alone set supervised to 0")
    if settings.supervised and (without := int((test_y < 0).sum())):
        raise BadInput(f"{without} test examples have no label, which is for supervised 0 alone")
    kept, validation = np.arange(len(train_x)), None
    if settings.validation:
        kept, held_out = set_aside(train_y.numpy(), settings.validation, classes)
        validation = train_x[held_out], train_y[held_out]
    if settings.num_examples > len(kept):
        others = f" beside the {settings.validation} for validation" if validation else ""
        raise BadInput(f"num_examples {settings.num_examples} is more than the {len(kept)} "
                       f"training examples of {settings.data}{others}")
    rng = np.random.default_rng(settings.data_seed)
    if settings.num_examples != -1:
        kept = kept[np.sort(rng.permutation(len(kept))[:settings.num_examples])]
    train_x, train_y = train_x[kept], train_y[kept]
    if settings.labelled:
        chosen = listed(_labelled_file(settings, run), kept, train_y.numpy(), classes)
    else:
        chosen = choose_labelled(train_y.numpy(), classes, settings.supervised, rng)
    labelled = torch.from_numpy(chosen)
    augmentation = None
    if settings.cons_weight and dataset.augmentation:
        augmentation = Augmentation(*(
            default if (largest := getattr(settings, f"aug_{name}")) == -1 else largest
            for name, default in dataset.augmentation._asdict().items()))
    with value_errors_as_bad_input():
        data = SemiSupervisedData(
            train_x, train_y, test_x, test_y, labelled, dataset.grey_levels, device,
            torch.from_numpy(kept)[labelled], validation, settings.sup_sample_weight, augmentation,
            settings.clf_noise, settings.spread_labels, classes)
    _compare_with_run(settings, data, run, then)
    return data


def _run_of(settings: Settings) -> Path | None:
    """The directory of the run that is resumed, or whose weights are evaluated."""
    if settings.resume:
        return Path(settings.resume)
    beside = Path(settings.pretrained).parent
    is_run = os.path.isfile(settings.pretrained) and (beside / PARAMS_FILE).is_file()
    return beside if is_run else None


def _labelled_file(settings: Settings, run: Path | None) -> str | Path:
    """settings.labelled or, if it has gone, what the run in question has written."""
    if run and not os.path.isfile(settings.labelled) and (run / "labelled.txt").is_file():
        return run / "labelled.txt"
    return settings.labelled


def _compare_with_run(settings: Settings, data: SemiSupervisedData, run: Path | None,
                      then: dict[str, Any]) -> None:
    """Raise BadInput if the files of data have changed since the run that is resumed, whose weights
    are evaluated, or whose labelled.txt is taken.

    run: the first or the second of these, if any; then: its `read_description`
    """
    if then and then["shape"] != list(data.shape):
        raise BadInput(f"{run}/{DATA_FILE} names another shape, {then['shape']}, than "
                       f"{settings.data_root} has now, {list(data.shape)}")
    if then and then["classes"] and len(data.labelled) and then["classes"] != list(data.classes):
        raise BadInput(f"{run}/{DATA_FILE} names other classes than {settings.data_root} has now")
    files = [Path(settings.labelled)] if settings.labelled and not settings.pretrained else []
    if run and settings.resume and (run / "labelled.txt").is_file():
        files.append(own := run / "labelled.txt")
        if sorted(read_indices(own)) != sorted(data.labelled_ids.tolist()):
            raise BadInput(f"{own} lists other examples than those that the data and settings now "
                           "give: the data have changed")
    for file in files:
        then = read_description(file.parent) if file.name == "labelled.txt" else {}
        if then and then["shape"] == list(data.shape) and (
                then["labelled"] != describe(data)["labelled"]):
            raise BadInput(f"{file} is of other images than those that {settings.data_root} now "
                           "has at these places: they, or the list, have changed")


def describe(data: SemiSupervisedData) -> dict[str, Any]:
    """What a run on own images keeps of them: what a model has to know, and a checksum of the
    labelled ones."""
    order, checksum = data.labelled_ids.argsort().to(data.device), hashlib.sha256()
    for part in data.labelled[order].split(ROWS):
        checksum.update(data.train_x[part].cpu().numpy().data)
    return {"shape": list(data.shape), "n_classes": data.n_classes,
            "classes": list(data.classes) if len(data.labelled) else [],
            "labelled": checksum.hexdigest()}


def read_description(run: Path) -> dict[str, Any]:
    """What `describe` returned, from the directory of a run on own images; {} of another directory.
    Raises BadInput if it is damaged."""
    path = run / DATA_FILE
    is_one = path.is_file() and path.with_name(PARAMS_FILE).is_file()
    content = read_params(path) if is_one else {}
    if content and not ({"n_classes", "classes", "labelled"} <= content.keys()
                        and isinstance(content.get("shape"), list)):
        raise BadInput(f"{path} is damaged: it lacks an entry")
    return content


def check_test_images(data: SemiSupervisedData) -> None:
    """Raise BadInput if there are none."""
    if not len(data.test_x):
        raise BadInput("this needs test images, which are not read with test false: give "
                       "--test true")


def _load_mnist(settings: Settings) -> Source:
    """MNIST, or another dataset in its format, from its folder in settings.data_root."""
    # Imported here because it takes a second.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    root, mnist, name = Path(settings.data_root), DATASETS[settings.data], MNISTS[settings.data]
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]

    def missing(folder: Path) -> list[str]:
        return [name for name in names if not os.path.isfile(folder / name)]
    # data_root may also be the dataset's own folder, or that of its files.
    own = root / name / "raw"
    raw = next((folder for folder in (own, root / "raw", root) if not missing(folder)), own)
    others = set(MNISTS.values()) - {name}
    parts = set(raw.absolute().parts)       # the files of all have the same names and sizes
    if raw != own and (others & parts or (name != "MNIST" and name not in parts)):
        raw = own
    if missing(raw):
        _download_mnist(name, raw, names)
    assert mnist.shape
    arrays = []
    for file in names:
        n = mnist.n_train if file.startswith("train") else mnist.n_test
        is_images = "images" in file
        path = str(raw / file)
        try:
            array = read_image_file(path).unsqueeze(1) if is_images else read_label_file(path)
            if tuple(array.shape) != ((n, *mnist.shape) if is_images else (n,)):
                raise ValueError(f"shape {tuple(array.shape)}")
            if not is_images and array.max() >= len(mnist.classes):
                raise ValueError(f"label {array.max()}")
        except (AssertionError, RuntimeError, ValueError, OSError, TypeError, KeyError):
            raise BadInput(f"{path} is truncated or not {name}'s: remove it to have it downloaded "
                           "again") from None
        arrays.append(array)
    train_x, train_y, test_x, test_y = arrays
    return Source(train_x, train_y, test_x, test_y, mnist.classes)


def _download_mnist(name: str, raw: Path, names: list[str]) -> None:
    """Download the files, by way of a temporary folder: a failure leaves nothing in `raw`."""
    import torchvision.datasets

    say("Download", f"{name}, 12 to 31 MB, to {raw}")
    stderr = sys.stderr if sys.stderr and sys.stderr.isatty() else io.StringIO()
    try:
        with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
              contextlib.redirect_stderr(stderr)):
            getattr(torchvision.datasets, name)(folder, download=True)
            raw.mkdir(parents=True, exist_ok=True)
            for file in names:
                with atomic_write(raw / file, "wb") as f:
                    f.write(Path(folder, name, "raw", file).read_bytes())
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as e:
        raise BadInput(
            f"no {name} in {raw} ({', '.join(names)}), and downloading it failed "
            f"({type(e).__name__}): put the four files there, name their folder with --data_root, "
            "or train offline with --config configs/digits.yaml") from None


def _load_digits(settings: Settings) -> Source:
    """scikit-learn's handwritten digits; the test images are the same ones whatever the seeds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=DATASETS["digits"].n_test, stratify=digits.target,
        random_state=0)

    def images(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(torch.uint8).unsqueeze(1)
    return Source(images(train_x), torch.from_numpy(train_y), images(test_x),
                  torch.from_numpy(test_y), DIGITS)


def _load_points(settings: Settings) -> Source:
    """Two moons or two circles, generated from data_seed; those for validation come on top."""
    from sklearn.datasets import make_circles, make_moons

    def make(n: int, seed: int) -> Examples:
        if settings.data == "moons":
            x, y = make_moons(n, noise=MOONS_NOISE, random_state=seed)
        else:
            x, y = make_circles(n, noise=CIRCLES_NOISE, factor=CIRCLES_FACTOR, random_state=seed)
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        return x.to(torch.get_default_dtype())[:, :, None, None], y
    points = DATASETS[settings.data]
    n = points.n_train if settings.num_examples == -1 else settings.num_examples
    n += settings.validation
    return Source(*make(n, 2 * settings.data_seed),
                  *make(points.n_test, 2 * settings.data_seed + 1), points.classes)


@dataclass(frozen=True)
class Dataset:
    """A dataset that settings.data can name."""

    shape: tuple[int, int, int] | None      # (C, H, W) of an example; None: that of the files
    classes: tuple[str, ...]                # (): those of the files
    grey_levels: int | None                 # None for points
    n_train: int                            # any number of points can be generated for training
    n_test: int
    load: Callable[[Settings], Source]
    augmentation: Augmentation | None = None    # None for points


DIGITS = tuple("0123456789")
MNISTS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}    # in torchvision
DATASETS = {
    **{name: Dataset((1, 28, 28), classes, 256, 60_000, 10_000, _load_mnist,
                     Augmentation(15, 0.1, 2))
       for name, classes in (
           ("mnist", DIGITS),
           ("fashion-mnist", ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt",
                              "sneaker", "bag", "boot")),
           ("kmnist", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")))},
    "digits": Dataset((1, 8, 8), DIGITS, 17, 1437, 360, _load_digits, Augmentation(15, 0.1, 1)),
    "moons": Dataset((2, 1, 1), DIGITS[:2], None, 1000, 1000, _load_points),
    "circles": Dataset((2, 1, 1), DIGITS[:2], None, 1000, 1000, _load_points),
    "folder": Dataset(None, (), 256, 0, 0, load_folder, Augmentation(15, 0.1, 2)),
    "npz": Dataset(None, (), 256, 0, 0, load_arrays, Augmentation(15, 0.1, 2)),
}
