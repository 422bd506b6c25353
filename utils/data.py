"""Semi-supervised datasets: loading, the choice of the labelled examples, batches."""

import contextlib
import http.client
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits, make_circles, make_moons
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from . import Settings
from .errors import BadInput
from .label_spreading import orientation_histograms, spread_labels

MOONS_NOISE, CIRCLES_NOISE, CIRCLES_FACTOR = 0.1, 0.05, 0.5

Examples = tuple[Tensor, Tensor]        # x (N, C, H, W), y (N,)


class Augmentation(NamedTuple):
    """The largest changes that `augment` makes."""

    rotation: float     # degrees
    scaling: float      # share of the size
    shift: float        # pixels


class SemiSupervisedData:
    """Training and test examples on `device`; few of the training labels are shown.

    train_x, test_x: (N, C, H, W), images as uint8 grey levels from 0 to grey_levels - 1, or points
    as floats (grey_levels is then None). train_y, test_y: classes (N,). labelled: indices of the
    training examples whose labels are shown, at least one of each class; the other training labels
    are not stored. labelled_ids: the indices of the same examples in the full training set, if
    train_x is a part of it. val_x, val_y: validation examples, which are not in train_x; none if
    `validation` is None. augmentation: of the copies that `sample_batch` makes. clf_noise: whether
    these copies, and the images whose classification is evaluated, are dequantised with noise.
    spread_labels: w of `log_prior_ratio`, which `sample_batch` then returns.
    """

    def __init__(self, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor,
                 labelled: Tensor, grey_levels: int | None, device: str | torch.device = "cpu",
                 labelled_ids: Tensor | None = None, validation: Examples | None = None,
                 augmentation: Augmentation | None = None, clf_noise: str = "true",
                 spread_labels: float = 0.0):
        self.n_classes = int(train_y[labelled].max()) + 1
        self.labelled = labelled.to(device)
        self.labelled_ids = labelled if labelled_ids is None else labelled_ids
        is_labelled = torch.zeros(len(train_y), dtype=torch.bool)
        is_labelled[labelled] = True
        self.unlabelled = (~is_labelled).nonzero()[:, 0].to(device)
        self.train_x, self.train_y = train_x.to(device), train_y.where(is_labelled, -1).to(device)
        self.test_x, self.test_y = test_x.to(device), test_y.to(device)
        val_x, val_y = validation or (train_x[:0], train_y[:0])
        self.val_x, self.val_y = val_x.to(device), val_y.to(device)
        self.grey_levels, self.augmentation = grey_levels, augmentation
        self.clf_noise, self.spread_labels = clf_noise, spread_labels
        self.device = torch.device(device)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one example."""
        return tuple(self.train_x.shape[1:])

    @property
    def class_probs(self) -> Tensor:
        """p(y): the frequencies of the classes among the labelled examples, (K,) float64."""
        counts = torch.bincount(self.train_y[self.labelled], minlength=self.n_classes)
        return counts.double().cpu() / len(self.labelled)

    @cached_property
    def log_prior_ratio(self) -> Tensor:
        """log r(y) / p(y) of each training image, (N, K), for its prior r = w s + (1 - w) p.

        s is from `spread_labels` (label_spreading.py), w is self.spread_labels.
        """
        s = spread_labels(orientation_histograms(self.train_x), self.train_y)
        w = self.spread_labels
        ratio = ((w * s + (1 - w) * self.class_probs) / self.class_probs).log()
        return ratio.to(torch.get_default_dtype()).to(self.device)

    def dequantize(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(grey level + u) / grey_levels, with u uniform in [0, 1) from `generator`.

        Points are returned as they are.
        """
        if self.grey_levels is None:
            return x
        dtype = torch.get_default_dtype()
        noise = torch.rand(x.shape, generator=generator, dtype=dtype, device=x.device)
        return (x.to(dtype) + noise) / self.grey_levels

    def middle_of_levels(self, x: Tensor) -> Tensor:
        """(grey level + 1/2) / grey_levels: dequantised without noise."""
        assert self.grey_levels is not None, "points have no grey levels"
        return (x.to(torch.get_default_dtype()) + 0.5) / self.grey_levels

    def sample_batch(self, batch_size: int, labelled_prob: float, generator: torch.Generator,
                     augmented: bool = False) -> tuple[Tensor, ...]:
        """A training batch: x (B, C, H, W), dequantised; y (B,), -1 where the label is hidden.

        Each row is, independently, a labelled example with probability `labelled_prob` and
        otherwise an unlabelled one, chosen uniformly with replacement; without unlabelled examples
        all rows are labelled. With `augmented` there is a third tensor: the augmented copies of the
        same images, dequantised with their own noise, or without noise if `clf_noise` is "false".
        If it is "train", the images themselves without noise follow; and with `spread_labels`
        each row's `log_prior_ratio`, (B, K).
        """
        def choose(indices: Tensor) -> Tensor:
            return indices[torch.randint(len(indices), (batch_size,), generator=generator,
                                         device=self.device)]
        index = choose(self.labelled)
        if len(self.unlabelled):
            u = torch.rand(batch_size, generator=generator, device=self.device)
            index = torch.where(u < labelled_prob, index, choose(self.unlabelled))
        images, y = self.train_x[index], self.train_y[index]
        x = self.dequantize(images, generator)
        if not augmented:
            return x, y
        assert self.augmentation is not None, "these data have no augmentation"
        copies = augment(images, self.augmentation, generator)
        copies = (self.middle_of_levels(copies) if self.clf_noise == "false"
                  else self.dequantize(copies, generator))
        clean = [self.middle_of_levels(images)] if self.clf_noise == "train" else []
        ratio = [self.log_prior_ratio[index]] if self.spread_labels else []
        return x, y, copies, *clean, *ratio

    def labelled_prob(self, sup_sample_weight: float) -> float:
        """The probability that a row of a batch is labelled.

        It is w / (1 + w) for w = sup_sample_weight, or for w = -1 the share of labelled examples.
        """
        if sup_sample_weight == -1:
            return len(self.labelled) / len(self.train_x)
        return sup_sample_weight / (1 + sup_sample_weight)

    def bits_per_dim(self, log_p: Any) -> Any:
        """log2(grey_levels) - log p(x) / (D ln 2), or NaN for points.

        log_p: log p(x) of dequantised images, in nats.
        """
        if self.grey_levels is None:
            return math.nan
        return math.log2(self.grey_levels) - log_p / (math.prod(self.shape) * math.log(2))


def augment(images: Tensor, largest: Augmentation, generator: torch.Generator) -> Tensor:
    """Augmented copies of `images` (B, C, H, W), uint8, each transformed at random.

    With probability 1/2 an image is rotated, scaled and translated, uniformly up to the `largest`
    changes, with bilinear interpolation. Otherwise it is translated by whole pixels only, because
    interpolation blurs edges and the flow could learn to treat blurred images separately. What lies
    beyond the border of an image is black.
    """
    uniform = 2 * torch.rand(5, len(images), generator=generator, device=images.device) - 1
    rotation, scale, *shift, half = uniform
    whole_pixels = half < 0
    angle = (rotation * math.radians(largest.rotation)).masked_fill(whole_pixels, 0)
    scale = (1 + scale * largest.scaling).masked_fill(whole_pixels, 1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    *_, height, width = images.shape
    # grid_sample's coordinates go from -1 to 1 in both directions, whatever the size.
    dx, dy = (2 / size * torch.where(whole_pixels, d.round(), d)
              for d, size in zip((s * largest.shift for s in shift), (width, height)))
    to_source = torch.stack((torch.stack((cos, -sin * height / width, dx), 1),
                             torch.stack((sin * width / height, cos, dy), 1)), 1)
    grid = F.affine_grid(to_source, list(images.shape), align_corners=False)
    return F.grid_sample(images.to(grid.dtype), grid, align_corners=False).round().to(images.dtype)


def load_data(settings: Settings, device: str | torch.device = "cpu") -> SemiSupervisedData:
    """The dataset that settings.data names, on `device`.

    settings: data, data_root, validation, num_examples, data_seed, supervised, cons_weight,
    clf_noise, spread_labels, aug_rotation, aug_scaling, aug_shift. The validation images are the
    same whatever the seeds. Raises BadInput if the files cannot be had, the settings ask for more
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
    augmentation = dataset.augmentation and Augmentation(*(
        default if (given := getattr(settings, f"aug_{name}")) == -1 else given
        for name, default in dataset.augmentation._asdict().items()))
    return SemiSupervisedData(train_x, train_y, test_x, test_y, labelled, dataset.grey_levels,
                              device, torch.from_numpy(kept)[labelled], validation, augmentation,
                              settings.clf_noise, settings.spread_labels)


def _split(y: Tensor, n: int, dataset: "Dataset") -> tuple[np.ndarray, np.ndarray]:
    """The sorted indices of the training examples that remain, and of `n` for validation.

    y: the classes of all. The choice is stratified, and always the same. Raises BadInput if a part
    would have fewer examples than there are classes.
    """
    if not dataset.n_classes <= n <= len(y) - dataset.n_classes:
        raise BadInput(f"validation must be at least one for each of the {dataset.n_classes} "
                       f"classes, and leave as many of the {len(y)} training examples, not {n}")
    parts = train_test_split(np.arange(len(y)), test_size=n, stratify=y, random_state=0)
    return np.sort(parts[0]), np.sort(parts[1])


def choose_labelled(y: np.ndarray, n_classes: int, supervised: int,
                    rng: np.random.Generator) -> np.ndarray:
    """Sorted indices of `supervised` random examples (-1: all), equally many of each class.

    y: the classes of all examples. Where equal numbers are impossible, the first classes get one
    more, and a class that has too few gives all it has. Raises BadInput if `supervised` is less
    than the number of classes or more than the examples, or if a class has no examples.
    """
    of_class = [rng.permutation(np.flatnonzero(y == k)) for k in range(n_classes)]
    if not all(map(len, of_class)):
        missing = [len(members) for members in of_class].index(0)
        raise BadInput(f"the {len(y)} training examples have none of class {missing}: "
                       "use more (num_examples)")
    if supervised == -1:
        return np.arange(len(y))
    if not n_classes <= supervised <= len(y):
        raise BadInput(f"supervised must be at least one for each of the {n_classes} classes and "
                       f"at most the {len(y)} training examples (or -1 for all), not {supervised}")
    # Round j takes the j-th example of each class that has one.
    rounds = sorted((j, k, i) for k, members in enumerate(of_class)
                    for j, i in enumerate(members))
    return np.sort([i for _, _, i in rounds[:supervised]])


def _load_mnist(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Imported here because it takes a second.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    root, mnist = Path(settings.data_root), DATASETS["mnist"]
    raw = root / "MNIST" / "raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]
    def missing() -> list[str]:
        return [name for name in names if not os.path.isfile(raw / name)]
    if missing():
        _download_mnist(root, raw, names)
    if missing():       # torchvision downloads nothing where files of its older versions lie
        raise BadInput(f"{raw} lacks {', '.join(missing())}: put the four files there, or remove "
                       f"{raw.parent} to have them downloaded")
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


def _download_mnist(root: Path, raw: Path, names: list[str]) -> None:
    from torchvision.datasets import MNIST

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(root, download=True)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as e:
        raise BadInput(
            f"no MNIST in {raw} ({', '.join(names)}), and downloading it failed "
            f"({type(e).__name__}): put the four files there, name their folder with --data_root, "
            "or train offline with --config configs/digits.yaml") from None


def _load_digits(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits; the test images are the same ones whatever the seeds."""
    digits, n_test = load_digits(), DATASETS["digits"].n_test
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=n_test, stratify=digits.target, random_state=0)

    def images(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(torch.uint8).unsqueeze(1)
    return images(train_x), torch.from_numpy(train_y), images(test_x), torch.from_numpy(test_y)


def _load_points(settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two moons or two circles, generated from data_seed; those for validation come on top."""
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
    """A dataset that settings.data can name.

    shape: (C, H, W) of an example; grey_levels: None for points; n_train, n_test: numbers of
    examples (any number of points can be generated for training); load: settings -> train_x,
    train_y, test_x, test_y; augmentation: None for points.
    """

    shape: tuple[int, int, int]
    n_classes: int
    grey_levels: int | None
    n_train: int
    n_test: int
    load: Callable[[Settings], tuple[Tensor, Tensor, Tensor, Tensor]]
    augmentation: Augmentation | None = None


DATASETS = {
    "mnist": Dataset((1, 28, 28), 10, 256, 60_000, 10_000, _load_mnist, Augmentation(15, 0.1, 2)),
    "digits": Dataset((1, 8, 8), 10, 17, 1437, 360, _load_digits, Augmentation(15, 0.1, 1)),
    "moons": Dataset((2, 1, 1), 2, None, 1000, 1000, _load_points),
    "circles": Dataset((2, 1, 1), 2, None, 1000, 1000, _load_points),
}
