"""The examples of a dataset: which are labelled, and which are set aside for validation."""

import operator
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import BadInput

Examples = tuple[Tensor, Tensor]        # x (N, C, H, W), y (N,)
ROWS = 1000                             # compared at a time, to save memory


class Source(NamedTuple):
    """The examples of a dataset, before any are chosen.

    x: (N, C, H, W), images as integer grey levels or points as floats; y: classes (N,), -1 where
    the label is not known; classes: their names.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]


def as_array(name: str, values: Any) -> np.ndarray:
    """A copy of `values`, called `name`: of an array, a tensor, or what NumPy makes an array of.
    Raises ValueError if it cannot."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        return np.array(values, order="C")
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} is no array: {e}") from None


def source_of_arrays(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray | None = None,
                     y_test: np.ndarray | None = None, grey_levels: int | None = 256) -> Source:
    """The examples in arrays.

    x: images, (N, H, W) or (N, H, W, 1 or 3), uint8; or, if grey_levels is None, points (N, D)
    y: (N,), integers from 0, -1 where the label is not known

    Images are grey if all have three equal channels. Raises ValueError for anything else.
    """
    given, images = [("train", x_train, y_train)], []
    if x_test is not None and y_test is not None:
        given.append(("test", x_test, y_test))
    for part, x, y in given:
        if grey_levels is None:
            if x.ndim != 2 or x.dtype.kind not in "iuf":
                raise ValueError(f"x_{part} has shape {x.shape} and type {x.dtype}: points must be "
                                 "numbers of shape (N, D)")
            x = x.astype(np.float64)[:, None, None]
        elif x.dtype != np.uint8 or not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))):
            raise ValueError(f"x_{part} has shape {x.shape} and type {x.dtype}: images must be "
                             "uint8, of shape (N, H, W) or (N, H, W, 3)")
        if not x.size:
            raise ValueError(f"x_{part} is empty")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(f"y_{part} has shape {y.shape} and type {y.dtype}: labels must be "
                             f"integers of shape ({len(x)},)")
        if y.min() < -1:
            raise ValueError(f"y_{part} has a label {y.min()}: labels are classes from 0, or -1 "
                             "for none")
        images.append(torch.from_numpy(x if x.ndim == 4 else x[..., None]))
    n_classes = int(max(y.max() for _, _, y in given)) + 1
    if n_classes > len(y_train):
        raise ValueError(f"there is a class {n_classes - 1}, and too few examples to have them all")
    if grey_levels is None:
        images = [x.to(torch.get_default_dtype()) for x in images]
    elif all((rows == rows[..., :1]).all() for x in images for rows in x.split(ROWS)):
        images = [x[..., :1] for x in images]
    else:
        images = [x.expand(-1, -1, -1, 3) for x in images]
    if len({x.shape[1:] for x in images}) > 1:
        raise ValueError(f"x_train has shape {x_train.shape}, and x_test has shape "
                         f"{given[1][1].shape}: all must be of one size")
    train, *test = ((x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64)))
                    for x, (_, _, y) in zip(images, given))
    test_x, test_y = test[0] if test else (part[:0] for part in train)
    return Source(*train, test_x, test_y, tuple(map(str, range(n_classes))))


def choose_labelled(y: np.ndarray, classes: Sequence[str], supervised: int | str | Sequence[int],
                    rng: np.random.Generator) -> np.ndarray:
    """Sorted indices of `supervised` random examples (-1: all), equally many of each class, or of
    as many of each class as a list of numbers says, such as "5,5,20" or (5, 5, 20).

    y: the classes of all examples, -1 where there is no label
    classes: their names

    Where equal numbers are impossible, the first classes get one more, and a class that has too few
    gives all it has; 0 gives none. Raises BadInput if another `supervised` is less than the number
    of classes or more than the examples with labels, or if a class has too few.
    """
    n_classes, given = len(classes), np.flatnonzero(y >= 0)
    numbers = integers(supervised)
    if numbers == 0:
        return np.arange(0)
    if not len(given):
        raise BadInput("no training example has a label: for the density alone set supervised to 0")
    of_class = [rng.permutation(np.flatnonzero(y == k)) for k in range(n_classes)]
    counts = [1] * n_classes if isinstance(numbers, int) else numbers
    if len(counts) != n_classes:
        raise BadInput(f"supervised {supervised} has {len(counts)} numbers, and there are "
                       f"{n_classes} classes: {', '.join(classes)}")
    for name, members, count in zip(classes, of_class, counts):
        if len(members) < count:
            raise BadInput(f"the {len(given)} training examples with labels have "
                           f"{len(members) or 'none'} of class {name}, and {count} would be needed")
    if not isinstance(numbers, int):
        return np.sort(np.concatenate([m[:count] for m, count in zip(of_class, counts)]))
    if numbers == -1:
        return given
    if not n_classes <= numbers <= len(given):
        raise BadInput(f"supervised must be at least one for each of the {n_classes} classes and "
                       f"at most the {len(given)} training examples with labels (or -1 for all, 0 "
                       f"for none), not {supervised}")
    # Round j takes the j-th example of each class that has one.
    rounds = sorted((j, k, i) for k, members in enumerate(of_class)
                    for j, i in enumerate(members))
    return np.sort([i for _, _, i in rounds[:numbers]])


def integers(supervised: Any) -> int | list[int]:
    """`supervised` as an integer from -1, or as one from 1 for each class: "5,5,20", (5, 5, 20).
    Raises BadInput if it is neither."""
    given: Any = supervised
    try:
        if isinstance(supervised, str):
            given = [int(word) for word in supervised.split(",")]
            given = given if len(given) > 1 else given[0]
        if isinstance(given, bool):
            raise TypeError
        numbers = list(map(operator.index, given)) if np.ndim(given) else operator.index(given)
    except (TypeError, ValueError):
        raise BadInput("supervised must be an integer, or one for each class, not "
                       f"{reprlib.repr(supervised)}: 100 or 5,5,20, for example") from None
    if numbers < -1 if isinstance(numbers, int) else min(numbers, default=0) < 1:
        raise BadInput("supervised must be at least 0 or -1, in a list at least 1 of each class, "
                       f"not {reprlib.repr(supervised)}")
    return numbers


def set_aside(y: np.ndarray, n: int, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The sorted indices of the training examples that remain, and of `n` for validation.

    y: the classes of all, -1 where there is no label; classes: their names. The choice, among those
    that have one, is stratified, and always the same. Raises BadInput if a part would have fewer
    examples than there are classes.
    """
    given, n_classes = np.flatnonzero(y >= 0), len(classes)
    if not n_classes <= n <= len(given) - n_classes:
        raise BadInput(f"validation must be at least one for each of the {n_classes} classes, and "
                       f"leave as many of the {len(given)} training examples with labels, not {n}")
    if alone := [classes[k] for k in range(n_classes) if (y == k).sum() == 1]:
        raise BadInput(f"class {alone[0]} has one training example with a label, and validation "
                       "needs two")
    from sklearn.model_selection import train_test_split    # imported here as it takes a second

    _, others = train_test_split(given, test_size=n, stratify=y[given], random_state=0)
    return np.setdiff1d(np.arange(len(y)), others), np.sort(others)


def read_indices(path: str | Path) -> np.ndarray:
    """The integers in a file such as a run's labelled.txt. Raises BadInput."""
    if not os.path.isfile(path):
        raise BadInput(f"no file {path}")
    try:
        return np.array([int(word) for word in Path(path).read_text().split()], dtype=np.int64)
    except (ValueError, OverflowError):
        raise BadInput(f"{path} does not consist of indices of examples") from None


def listed(path: str | Path, kept: np.ndarray, y: np.ndarray,
           classes: Sequence[str]) -> np.ndarray:
    """The places in `kept` of the indices in the file at `path`, as a run's labelled.txt has them.

    y: the classes of the examples in `kept`; classes: the names of all. Raises BadInput if the file
    lists others, one of them twice, one without a label, or none of a class.
    """
    ids = read_indices(path)
    if len(missing := np.setdiff1d(ids, kept)):
        raise BadInput(f"{path} has {missing[0]}, which is not among the training examples, or is "
                       "set aside for validation")
    places = np.searchsorted(kept, ids)
    if (without := y[places] < 0).any():
        raise BadInput(f"{path} has {ids[without][0]}, an example without a label")
    if absent := set(range(len(classes))) - set(y[places]):
        raise BadInput(f"{path} has no example of class {classes[min(absent)]}")
    if len(twice := np.flatnonzero(np.bincount(places) > 1)):
        raise BadInput(f"{path} has {kept[twice[0]]} twice")
    return places
