"""Semi-supervised data: dequantisation, batches of labelled and unlabelled examples, augmentation.

datasets.py loads them.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.checks import check_grey_levels, check_integers
from models.options import Option

from .examples import Examples, as_array, choose_labelled, set_aside, source_of_arrays
from .label_spreading import orientation_histograms, spread_labels

class Batch(NamedTuple):
    """B training examples. What is None is for terms of the loss that the paper does not have."""

    x: Tensor                               # dequantised, (B, C, H, W)
    y: Tensor                               # (B,), -1 where the label is hidden
    copies: Tensor | None = None            # augmented, with noise of their own, (B, C, H, W)
    clean: Tensor | None = None             # x without noise, (B, C, H, W)
    log_prior_ratio: Tensor | None = None   # log r(y) / p(y) of each image, (B, K)

    def rows(self, index: slice) -> "Batch":
        """These rows of every field."""
        more = (None if field is None else field[index] for field in self[2:])
        return Batch(self.x[index], self.y[index], *more)


class Augmentation(NamedTuple):
    """The largest changes that `augment` makes."""

    rotation: float     # degrees
    scaling: float      # share of the size
    shift: float        # pixels


# Arguments that are numbers or words.
ARGUMENTS = {option.name: option for option in (
    Option("grey_levels", int, 256, low=2),
    Option("sup_sample_weight", float, 0.5, low=0, open_below=True, also=(-1,)),
    Option("clf_noise", str, "true", choices=("true", "train", "false")),
    Option("spread_labels", float, 0, low=0, high=1 - 1e-9),
    Option("rotation", float, 0, low=0, high=180),
    Option("scaling", float, 0, low=0, high=0.9), Option("shift", float, 0, low=0),
    Option("validation", int, 0, low=0), Option("seed", int, 0, low=0))}


class SemiSupervisedData:
    """Training and test examples on a device; few of the training labels are shown.

    train_x, test_x: (N, C, H, W), images as integer grey levels from 0 to grey_levels - 1, or
        points as floats (grey_levels is then None)
    train_y, test_y: classes (N,), integers from 0; of the training labels only those of `labelled`
        are stored, and the others may be -1
    labelled: indices of the training examples whose labels are shown, at least one of each class
        that occurs anywhere; or none, for the density alone: all labels may then be -1, and those
        of test and validation examples are not stored either
    grey_levels: 256 for MNIST; None for points
    device: of all tensors
    labelled_ids: the indices of the same examples in the full training set, if train_x is a part
        of it
    validation: examples val_x, val_y that are not in train_x
    sup_sample_weight: w: a row of a batch is labelled with probability w / (1 + w); -1: the share
        of labelled examples
    augmentation: of the copies of images in batches; None: no copies
    clf_noise: which images are dequantised with noise: "true": all; "train": all but those that
        give targets and those of evaluation; "false": all but copies and those of evaluation
    spread_labels: w of `log_prior_ratio`; 0: batches have none
    classes: their names; (): their numbers

    Raises ValueError for data of another kind.
    """

    def __init__(self, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor,
                 labelled: Tensor, grey_levels: int | None, device: str | torch.device = "cpu",
                 labelled_ids: Tensor | None = None, validation: Examples | None = None,
                 sup_sample_weight: float = 0.5, augmentation: Augmentation | None = None,
                 clf_noise: str = "true", spread_labels: float = 0.0,
                 classes: Sequence[str] = ()):
        val_x, val_y = validation or (train_x[:0], train_y[:0])
        if grey_levels is None and augmentation:
            raise ValueError("points cannot be augmented")
        if augmentation and not isinstance(augmentation, Augmentation):
            raise ValueError(f"augmentation must be an Augmentation, not {augmentation!r}")
        _check_arguments(sup_sample_weight=sup_sample_weight, clf_noise=clf_noise,
                         spread_labels=spread_labels,
                         **(augmentation._asdict() if augmentation else {}),
                         **({} if grey_levels is None else {"grey_levels": grey_levels}))
        _check_indices(labelled, len(train_x))
        for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y),
                           ("val", val_x, val_y)):
            lowest = -1 if name == "train" or not len(labelled) else 0
            _check_examples(name, x, y, tuple(train_x.shape[1:]), grey_levels, lowest)
        labelled, train_y, test_y, val_y = (t.long() for t in (labelled, train_y, test_y, val_y))
        self.n_classes = max(int(torch.cat((train_y, test_y, val_y)).max()) + 1, len(classes), 1)
        if classes and len(classes) < self.n_classes:
            raise ValueError(f"there are labels of {self.n_classes} classes, and names of "
                             f"{len(classes)}")
        if not (classes and len(labelled)):     # without labels, the names mean nothing
            classes = list(map(str, range(self.n_classes)))
        self.classes = tuple(classes)
        if len(labelled):
            _check_classes(train_y[labelled], self.n_classes)
        elif spread_labels:
            raise ValueError("spread_labels needs labelled examples")
        else:                   # what the model calls a class has nothing to do with these
            test_y, val_y = test_y.new_full(test_y.shape, -1), val_y.new_full(val_y.shape, -1)
        self.labelled = labelled.to(device)
        self.labelled_ids = labelled if labelled_ids is None else labelled_ids
        is_labelled = torch.zeros(len(train_y), dtype=torch.bool)
        is_labelled[labelled] = True
        self.unlabelled = (~is_labelled).nonzero()[:, 0].to(device)
        self.train_x, self.train_y = train_x.to(device), train_y.where(is_labelled, -1).to(device)
        self.test_x, self.test_y = test_x.to(device), test_y.to(device)
        self.val_x, self.val_y = val_x.to(device), val_y.to(device)
        self.labelled_share = (len(labelled) / len(train_x) if sup_sample_weight == -1
                               else sup_sample_weight / (1 + sup_sample_weight))
        self.grey_levels, self.augmentation = grey_levels, augmentation
        self.clf_noise, self.spread_labels = clf_noise, spread_labels
        self.device = torch.device(device)

    @classmethod
    def from_arrays(cls, x_train: Any, y_train: Any, x_test: Any = None, y_test: Any = None,
                    supervised: int | Sequence[int] = -1, grey_levels: int | None = 256,
                    seed: int = 0, classes: Sequence[str] = (), validation: int = 0, **options: Any
                    ) -> "SemiSupervisedData":
        """The data of one's own arrays or tensors, which are copied.

        x_train, y_train, x_test, y_test: as in `source_of_arrays`; a label of -1 is hidden; without
            the last two there are no test examples
        supervised: how many of the other training labels are shown: a number, equally many of each
            class, or a number for each class; -1: all; 0: none
        grey_levels: 256 for values up to 255; None for points
        seed: of the choice of the labels that are shown
        classes: their names; (): their numbers
        validation: how many of the training examples with labels are set aside
        options: augmentation, device, sup_sample_weight, clf_noise, spread_labels, as of the class

        Raises ValueError as `source_of_arrays`, `choose_labelled` and the class do.
        """
        _check_arguments(seed=seed, validation=validation)
        if (x_test is None) != (y_test is None):
            raise ValueError("x_test and y_test belong together")
        named = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        x, y, test_x, test_y, names = source_of_arrays(grey_levels=grey_levels, **{
            name: as_array(name, values) for name, values in named.items() if values is not None})
        names, kept, held_out = tuple(classes) or names, np.arange(len(y)), None
        if validation:
            kept, others = set_aside(y.numpy(), validation, names)
            held_out, x, y = (x[others], y[others]), x[kept], y[kept]
        chosen = choose_labelled(y.numpy(), names, supervised, np.random.default_rng(seed))
        return cls(x, y, test_x, test_y, torch.from_numpy(chosen), grey_levels,
                   labelled_ids=torch.from_numpy(kept[chosen]), validation=held_out, classes=names,
                   **options)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one example."""
        return tuple(self.train_x.shape[1:])

    @property
    def class_probs(self) -> Tensor:
        """p(y): the frequencies of the classes among the labelled examples, (K,) float64; uniform
        without any."""
        if not len(self.labelled):
            return torch.full((self.n_classes,), 1 / self.n_classes, dtype=torch.float64)
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

    def prepare(self) -> None:
        """Compute what batches need that takes a minute: label spreading, if there is any."""
        if self.spread_labels:
            _ = self.log_prior_ratio

    def dequantize(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(grey level + u) / grey_levels, with u uniform in [0, 1) from `generator`.

        Points are returned as they are. Raises ValueError for images that are not integers.
        """
        if self.grey_levels is None:
            return x
        check_integers("images", x)
        dtype = torch.get_default_dtype()
        noise = torch.rand(x.shape, generator=generator, dtype=dtype, device=x.device)
        return (x.to(dtype) + noise) / self.grey_levels

    def middle_of_levels(self, x: Tensor) -> Tensor:
        """(grey level + 1/2) / grey_levels: dequantised without noise.

        Raises ValueError as `dequantize` does.
        """
        assert self.grey_levels is not None, "points have no grey levels"
        check_integers("images", x)
        return (x.to(torch.get_default_dtype()) + 0.5) / self.grey_levels

    def sample_batch(self, batch_size: int, generator: torch.Generator,
                     augmented: bool = True) -> Batch:
        """A training batch of `batch_size` rows.

        Each row is, independently, a labelled example with probability `labelled_share` and
        otherwise an unlabelled one, chosen uniformly with replacement; without examples of one kind
        all rows are of the other. `augmented` false leaves out the copies, and what goes with them.
        """
        def choose(indices: Tensor) -> Tensor:
            return indices[torch.randint(len(indices), (batch_size,), generator=generator,
                                         device=self.device)]
        index = choose(self.labelled if len(self.labelled) else self.unlabelled)
        if len(self.labelled) and len(self.unlabelled):
            u = torch.rand(batch_size, generator=generator, device=self.device)
            index = torch.where(u < self.labelled_share, index, choose(self.unlabelled))
        images, y = self.train_x[index], self.train_y[index]
        x = self.dequantize(images, generator)
        if not (augmented and self.augmentation):
            return Batch(x, y)
        copies = augment(images, self.augmentation, generator)
        return Batch(
            x, y,
            self.middle_of_levels(copies) if self.clf_noise == "false"
            else self.dequantize(copies, generator),
            self.middle_of_levels(images) if self.clf_noise == "train" else None,
            self.log_prior_ratio[index] if self.spread_labels else None)

    def bits_per_dim(self, log_p: Any) -> Any:
        """log2(grey_levels) - log p(x) / (D ln 2), or NaN for points.

        log_p: log p(x) of dequantised images, in nats.
        """
        if self.grey_levels is None:
            return math.nan
        return math.log2(self.grey_levels) - log_p / (math.prod(self.shape) * math.log(2))


def _check_arguments(**values: Any) -> None:
    """Raise ValueError unless these values of ARGUMENTS are allowed."""
    for name, value in values.items():
        if problem := ARGUMENTS[name].problem(value):
            raise ValueError(f"{name}: {problem}")


def _check_examples(name: str, x: Tensor, y: Tensor, shape: tuple[int, ...],
                    grey_levels: int | None, lowest: int) -> None:
    """Raise ValueError unless x (N, *shape) and y (N,), from `lowest`, are examples as in
    SemiSupervisedData."""
    if x.dim() != 4 or tuple(x.shape[1:]) != shape or y.shape != x.shape[:1]:
        wanted = ", ".join(map(str, shape)) if len(shape) == 3 else "C, H, W"
        raise ValueError(f"{name}_x and {name}_y have shapes {tuple(x.shape)} and "
                         f"{tuple(y.shape)}, and must have (N, {wanted}) and (N,)")
    check_integers(f"{name}_y", y)
    if len(y) and int(y.min()) < lowest:
        raise ValueError(f"{name}_y has class {int(y.min())}, and classes start at {lowest}")
    if grey_levels is None:
        if not (x.is_floating_point() and shape[1:] == (1, 1) and x.isfinite().all()):
            raise ValueError(f"without grey_levels {name}_x must be points, (N, C, 1, 1), finite "
                             f"floats, not {tuple(x.shape)} of {x.dtype}")
        return
    check_grey_levels(f"{name}_x", x, grey_levels)


def _check_indices(labelled: Tensor, n: int) -> None:
    """Raise ValueError unless `labelled` are different indices of n examples."""
    if labelled.dtype == torch.bool:
        raise ValueError("labelled is a mask, and must be indices: labelled.nonzero()[:, 0]")
    check_integers("labelled", labelled)
    if labelled.dim() != 1 or len(labelled.unique()) < len(labelled):
        raise ValueError(f"labelled has shape {tuple(labelled.shape)} and {len(labelled.unique())} "
                         "values: it must be different indices, of shape (n,)")
    if len(labelled) and not 0 <= int(labelled.min()) <= int(labelled.max()) < n:
        raise ValueError(f"labelled has indices from {int(labelled.min())} to "
                         f"{int(labelled.max())}, and must have them from 0 to {n - 1}")


def _check_classes(y: Tensor, n_classes: int) -> None:
    """Raise ValueError unless the labelled examples' classes y have each class."""
    shown = set(y.tolist())
    if -1 in shown:
        raise ValueError("a labelled example has class -1")
    if missing := set(range(n_classes)) - shown:
        raise ValueError(f"the labelled examples have none of class {min(missing)}")


def augment(images: Tensor, largest: Augmentation, generator: torch.Generator) -> Tensor:
    """Augmented copies of images, each transformed at random. (The paper has none.)

    images: (B, C, H, W), uint8

    With probability 1/2 an image is rotated, scaled and translated, uniformly up to the largest
    changes, with bilinear interpolation. Otherwise it is translated by whole pixels only, because
    interpolation blurs edges and the flow could learn to treat blurred images separately. What lies
    beyond the border of an image is black.
    """
    uniform = 2 * torch.rand(5, len(images), generator=generator, device=images.device) - 1
    rotation, scale, *shift, coin = uniform
    whole_pixels = coin < 0
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
