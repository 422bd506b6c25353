"""Loading of datasets, and the choice of the labelled examples."""

import contextlib
import http.client
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import Settings
from .data import Augmentation, Examples, SemiSupervisedData
from .errors import BadInput
from .files import atomic_write
from .terminal import say

MOONS_NOISE, CIRCLES_NOISE, CIRCLES_FACTOR = 0.1, 0.05, 0.5


def load_data(settings: Settings, device: str | torch.device = "cpu") -> SemiSupervisedData:
    """The dataset that settings.data names, on `device`.

    settings: data, data_root, validation, num_examples, data_seed, supervised, sup_sample_weight,
        cons_weight, clf_noise, spread_labels, aug_rotation, aug_scaling, aug_shift

    The validation images are the same whatever the seeds. Batches have augmented copies if
    cons_weight is positive. Raises BadInput if the files cannot be had, the settings ask for more
    examples than there are, or points for what is for images.
    """
    dataset = DATASETS[settings.data]
    if settings.cons_weight and not dataset.augmentation:
        raise BadInput(f"cons_weight needs images, for augmentation; {settings.data} has points")
    if settings.clf_noise != "true" and dataset.grey_levels is None:
        raise BadInput(f"clf_noise {settings.clf_noise} is for images; {settings.data} has points, "
                       "without noise")
    train_x, train_y, test_x, test_y = dataset.load(settings)
    kept, validation = np.arange(len(train_x)), None
    if settings.validation:
        kept, set_aside = _split(train_y, settings.validation, dataset)
        validation = train_x[set_aside], train_y[set_aside]
    if settings.num_examples > len(kept):
        others = f" beside the {settings.validation} for validation" if validation else ""
        raise BadInput(f"num_examples {settings.num_examples} is more than the {len(kept)} "
                       f"training examples of {settings.data}{others}")
    rng = np.random.default_rng(settings.data_seed)
    if settings.num_examples != -1:
        kept = kept[np.sort(rng.permutation(len(kept))[:settings.num_examples])]
    train_x, train_y = train_x[kept], train_y[kept]
    labelled = torch.from_numpy(
        choose_labelled(train_y.numpy(), dataset.n_classes, settings.supervised, rng))
    augmentation = None
    if settings.cons_weight and dataset.augmentation:
        augmentation = Augmentation(*(
            default if (largest := getattr(settings, f"aug_{name}")) == -1 else largest
            for name, default in dataset.augmentation._asdict().items()))
    return SemiSupervisedData(
        train_x, train_y, test_x, test_y, labelled, dataset.grey_levels, device,
        torch.from_numpy(kept)[labelled], validation, settings.sup_sample_weight, augmentation,
        settings.clf_noise, settings.spread_labels)


def _split(y: Tensor, n: int, dataset: "Dataset") -> tuple[np.ndarray, np.ndarray]:
    """The sorted indices of the training examples that remain, and of `n` for validation.

    y: the classes of all. The choice is stratified, and always the same. Raises BadInput if a part
    would have fewer examples than there are classes.
    """
    if not dataset.n_classes <= n <= len(y) - dataset.n_classes:
        raise BadInput(f"validation must be at least one for each of the {dataset.n_classes} "
                       f"classes, and leave as many of the {len(y)} training examples, not {n}")
    from sklearn.model_selection import train_test_split    # imported here as it takes a second

    parts = train_test_split(np.arange(len(y)), test_size=n, stratify=y, random_state=0)
    return np.sort(parts[0]), np.sort(parts[1])


def choose_labelled(y: np.ndarray, n_classes: int, supervised: int,
                    rng: np.random.Generator) -> np.ndarray:
    """Sorted indices of `supervised` random examples (-1: all), equally many of each class.

    y: the classes of all examples. Where equal numbers are impossible, the first classes get one
    more, and a class that has too few gives all it has; 0 gives none. Raises BadInput if another
    `supervised` is less than the number of classes or more than the examples, or if a class has no
    examples.
    """
    if supervised == 0:
        return np.arange(0)
    of_class = [rng.permutation(np.flatnonzero(y == k)) for k in range(n_classes)]
    if not all(map(len, of_class)):
        missing = [len(members) for members in of_class].index(0)
        raise BadInput(f"the {len(y)} training examples have none of class {missing}: "
                       "use more (num_examples)")
    if supervised == -1:
        return np.arange(len(y))
    if not n_classes <= supervised <= len(y):
        raise BadInput(f"supervised must be at least one for each of the {n_classes} classes and "
                       f"at most the {len(y)} training examples (or -1 for all, 0 for none), not "
                       f"{supervised}")
    # Round j takes the j-th example of each class that has one.
    rounds = sorted((j, k, i) for k, members in enumerate(of_class)
                    for j, i in enumerate(members))
    return np.sort([i for _, _, i in rounds[:supervised]])


def _load_mnist(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Imported here because it takes a second.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    root, mnist = Path(settings.data_root), DATASETS["mnist"]
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]

    def missing(folder: Path) -> list[str]:
        return [name for name in names if not os.path.isfile(folder / name)]
    # data_root may also be MNIST's own folder, or that of its files.
    own = root / "MNIST" / "raw"
    raw = next((folder for folder in (own, root / "raw", root) if not missing(folder)), own)
    if missing(raw):
        _download_mnist(raw, names)
    arrays = []
    for name in names:
        n = mnist.n_train if name.startswith("train") else mnist.n_test
        is_images = "images" in name
        path = str(raw / name)
        try:
            array = read_image_file(path).unsqueeze(1) if is_images else read_label_file(path)
            if tuple(array.shape) != ((n, *mnist.shape) if is_images else (n,)):
                raise ValueError(f"shape {tuple(array.shape)}")
            if not is_images and array.max() >= mnist.n_classes:
                raise ValueError(f"label {array.max()}")
        except (AssertionError, RuntimeError, ValueError, OSError, TypeError, KeyError):
            raise BadInput(f"{path} is truncated or not MNIST's: remove it to have it downloaded "
                           "again") from None
        arrays.append(array)
    train_x, train_y, test_x, test_y = arrays
    return train_x, train_y, test_x, test_y


def _download_mnist(raw: Path, names: list[str]) -> None:
    """Download MNIST's files, by way of a temporary folder: a failure leaves nothing in `raw`."""
    from torchvision.datasets import MNIST

    say("Download", f"MNIST, 12 MB, to {raw}")
    stderr = sys.stderr if sys.stderr and sys.stderr.isatty() else io.StringIO()
    try:
        with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
              contextlib.redirect_stderr(stderr)):
            MNIST(folder, download=True)
            raw.mkdir(parents=True, exist_ok=True)
            for name in names:
                with atomic_write(raw / name, "wb") as f:
                    f.write(Path(folder, "MNIST", "raw", name).read_bytes())
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as e:
        raise BadInput(
            f"no MNIST in {raw} ({', '.join(names)}), and downloading it failed "
            f"({type(e).__name__}): put the four files there, name their folder with --data_root, "
            "or train offline with --config configs/digits.yaml") from None


def _load_digits(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits; the test images are the same ones whatever the seeds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits, n_test = load_digits(), DATASETS["digits"].n_test
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=n_test, stratify=digits.target, random_state=0)

    def images(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(torch.uint8).unsqueeze(1)
    return images(train_x), torch.from_numpy(train_y), images(test_x), torch.from_numpy(test_y)


def _load_points(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    return *make(n, 2 * settings.data_seed), *make(points.n_test, 2 * settings.data_seed + 1)


@dataclass(frozen=True)
class Dataset:
    """A dataset that settings.data can name."""

    shape: tuple[int, int, int]             # (C, H, W) of an example
    n_classes: int
    grey_levels: int | None                 # None for points
    n_train: int                            # any number of points can be generated for training
    n_test: int
    load: Callable[[Settings], tuple[Tensor, Tensor, Tensor, Tensor]]   # train_x, _y, test_x, _y
    augmentation: Augmentation | None = None    # None for points


DATASETS = {
    "mnist": Dataset((1, 28, 28), 10, 256, 60_000, 10_000, _load_mnist, Augmentation(15, 0.1, 2)),
    "digits": Dataset((1, 8, 8), 10, 17, 1437, 360, _load_digits, Augmentation(15, 0.1, 1)),
    "moons": Dataset((2, 1, 1), 2, None, 1000, 1000, _load_points),
    "circles": Dataset((2, 1, 1), 2, None, 1000, 1000, _load_points),
}
