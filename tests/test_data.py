"""Datasets, the choice of the labelled examples, batches, augmentation and dequantisation."""

import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, load_tiny

from models import build_model
from training.evaluation import Inference, predict, summary
from training.speed import Accelerated
from utils.data import Augmentation, SemiSupervisedData, augment
from utils.examples import choose_labelled
from utils.errors import BadInput

DIGITS = {"num_examples": -1, "supervised": 100}
COPIES = {**DIGITS, "cons_weight": 1, "sup_sample_weight": 1}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_digits():
    data = load_tiny(**DIGITS)
    assert data.shape == (1, 8, 8) and data.n_classes == 10 and data.grey_levels == 17
    assert (len(data.train_x), len(data.test_x)) == (1437, 360)
    assert data.train_x.dtype == torch.uint8 and data.train_x.max() == 16
    assert torch.bincount(data.test_y).min() >= 34                          # stratified


def test_mnist(mnist_root):
    data = load_tiny(data="mnist", data_root=str(mnist_root), **DIGITS)
    assert data.shape == (1, 28, 28) and data.grey_levels == 256
    assert data.train_x.dtype == torch.uint8
    assert (len(data.train_x), len(data.test_x)) == (60000, 10000)
    assert torch.bincount(data.train_y[data.labelled]).tolist() == [10] * 10
    for folder in ("MNIST", "MNIST/raw"):       # its own folders are recognised
        again = load_tiny(data="mnist", data_root=str(mnist_root / folder), **DIGITS)
        assert torch.equal(again.test_y, data.test_y)


@pytest.mark.parametrize("name", ["moons", "circles"])
def test_points(name):
    settings = {"data": name, "num_examples": 500, "supervised": 10}
    data = load_tiny(**settings)
    assert data.shape == (2, 1, 1) and data.n_classes == 2 and data.grey_levels is None
    assert (len(data.train_x), len(data.test_x)) == (500, 1000)
    x = data.sample_batch(1000, generator()).x
    assert (x[:, None] == data.train_x).flatten(2).all(2).any(1).all()      # not dequantised
    assert np.isnan(data.bits_per_dim(1.0))
    assert not torch.equal(data.train_x, load_tiny(**settings, data_seed=1).train_x)


def test_labelled_choice_is_stratified_and_seeded():
    data = load_tiny(**DIGITS)
    assert torch.bincount(data.train_y[data.labelled]).tolist() == [10] * 10
    assert torch.equal(data.labelled, load_tiny(**DIGITS).labelled)
    assert not torch.equal(data.labelled, load_tiny(**DIGITS, data_seed=1).labelled)
    assert torch.equal(data.test_x, load_tiny(**DIGITS, data_seed=1).test_x)


def test_labelled_choice_of_unequal_classes():
    y = np.array([0] * 2 + [1] * 50 + [-1] * 30 + [2] * 50)
    def chosen(supervised):
        index = choose_labelled(y, "abc", supervised, np.random.default_rng(0))
        assert len(set(index)) == len(index) and not (y[index] == -1).any()
        return np.bincount(y[index]).tolist()
    assert chosen(21) == [2, 10, 9]
    assert chosen("1,5,20") == [1, 5, 20]
    assert chosen(-1) == chosen(102) == [2, 50, 50]


def test_class_probs_are_the_labelled_frequencies():
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    x = torch.zeros(8, 2, 1, 1)
    data = SemiSupervisedData(x, y, x, y, torch.tensor([0, 3, 4, 5]), None)
    assert data.class_probs.tolist() == [0.25, 0.75]


def own_data(**changes):
    """30 images of 3 classes, the first 6 labelled, and as many for the test."""
    y = torch.arange(30) % 3
    x = torch.randint(17, (30, 1, 8, 8))
    x[0, 0, 0, :2] = torch.tensor([0, 16])
    return SemiSupervisedData(**{
        "train_x": x, "train_y": y, "test_x": x, "test_y": y, "labelled": torch.arange(6),
        "grey_levels": 17, **changes})


def test_own_data():
    hidden = torch.where(torch.arange(30) < 6, torch.arange(30) % 3, -1)
    few = torch.tensor([5, 3, 1], dtype=torch.int32)
    small = {"train_y": (LABELS % 3).to(torch.uint8), "test_y": LABELS.to(torch.int8)}
    for changes in ({}, {"train_y": hidden}, {"labelled": few}, small):
        data = own_data(**changes)
        assert data.n_classes == len(data.class_probs) == 3 and data.test_y.dtype == torch.int64
        x, y, *_ = data.sample_batch(100, generator())
        assert 0 <= x.min() < 0.2 and 0.8 < x.max() <= 1 and set(y.tolist()) == {-1, 0, 1, 2}
    points = own_data(grey_levels=None, **{f"{part}_x": torch.randn(30, 2, 1, 1)
                                           for part in ("train", "test")})
    assert math.isnan(points.bits_per_dim(0.0))


@pytest.mark.parametrize("y, n_classes", [(torch.arange(30) % 3, 3), (torch.full((30,), -1), 1)])
def test_own_data_without_labels(y, n_classes):
    """What is there of labels is not used; the number of classes is that of the mixture p(x)."""
    data = own_data(train_y=y, test_y=y, labelled=torch.arange(0), validation=(IMAGES, y))
    assert data.n_classes == n_classes and (data.class_probs == 1 / n_classes).all()
    assert all((labels == -1).all() for labels in (
        data.train_y, data.val_y, data.test_y, data.sample_batch(100, generator()).y))
    model = build_model(TINY, data.shape, data.n_classes, data.class_probs)
    log_p, logits = predict(Inference(Accelerated(model)), data, data.test_x, 30, seed=0)
    mean, accuracy = summary(log_p, logits, data.test_y)
    assert mean == pytest.approx(float(log_p.mean())) and math.isnan(accuracy)


LABELS, IMAGES = torch.arange(30) % 3, torch.randint(17, (30, 1, 8, 8))


@pytest.mark.parametrize("changes, message", [
    ({"train_x": IMAGES / 16}, "train_x must be integers, not of type"),
    ({"test_x": IMAGES.double()}, "test_x must be integers"),
    ({"train_x": IMAGES > 8}, "must be integers, not of type torch.bool"),
    ({"train_x": IMAGES + 1}, "train_x have grey levels from 1 to 17, and must have them from 0"),
    ({"test_x": IMAGES - 1}, "test_x have grey levels from -1 to 15"),
    ({"validation": (IMAGES * 2, LABELS)}, "val_x have grey levels from 0 to 32"),
    ({"grey_levels": None}, r"without grey_levels train_x must be points, .N, C, 1, 1., finite"),
    ({"grey_levels": None, "train_x": IMAGES / 16}, r"not .30, 1, 8, 8. of torch.float32"),
    ({"grey_levels": None, "augmentation": Augmentation(1, 1, 1)}, "points cannot be augmented"),
    ({"clf_noise": "no"}, "clf_noise: invalid choice: 'no'"),
    ({"sup_sample_weight": -2}, "sup_sample_weight: must be more than 0 or -1, not -2"),
    ({"sup_sample_weight": math.nan}, "sup_sample_weight: must be .* not nan"),
    ({"spread_labels": 1}, "spread_labels: must be at most 0.99"),
    ({"train_x": IMAGES[:, 0]}, r"shapes .30, 8, 8. and .30,., and must have .N, C, H, W. and"),
    ({"test_x": IMAGES[:, :, 1:]}, r"test_x and test_y have shapes .* must have .N, 1, 8, 8."),
    ({"test_y": LABELS[1:]}, r"shapes .30, 1, 8, 8. and .29,."),
    ({"train_y": LABELS.float()}, "train_y must be integers"),
    ({"test_y": LABELS - 1}, "test_y has class -1, and classes start at 0"),
    ({"train_y": LABELS - 2}, "train_y has class -2, and classes start at -1"),
    ({"train_y": LABELS - 1}, "a labelled example has class -1"),
    ({"labelled": torch.arange(30) < 6}, "labelled is a mask, and must be indices"),
    ({"labelled": torch.arange(6.0)}, "labelled must be integers"),
    ({"labelled": torch.tensor([0, 1, 2, 1])}, "it must be different indices"),
    ({"labelled": torch.arange(0), "spread_labels": 0.5}, "spread_labels needs labelled examples"),
    ({"labelled": torch.tensor([0, 1, 30])}, "indices from 0 to 30, and must have them from 0"),
    ({"labelled": torch.tensor([0, 1, -1])}, "indices from -1 to 1"),
    ({"labelled": torch.tensor([0, 1])}, "the labelled examples have none of class 2"),
    ({"labelled": torch.tensor([0, 2])}, "the labelled examples have none of class 1"),
    ({"test_y": LABELS + 1}, "the labelled examples have none of class 3")])
def test_own_data_of_another_kind(changes, message):
    with pytest.raises(ValueError, match=message):
        own_data(**changes)


def test_images_that_are_no_grey_levels():
    data = own_data()
    for call in (data.middle_of_levels, lambda x: data.dequantize(x, generator())):
        with pytest.raises(ValueError, match="images must be integers, not of type"):
            call(data.test_x / 16)


def test_hidden_labels_are_not_stored():
    data = load_tiny(**DIGITS)
    assert (data.train_y[data.unlabelled] == -1).all()
    assert (data.train_y[data.labelled] >= 0).all()
    assert len(data.unlabelled) + len(data.labelled) == len(data.train_x)


def test_batches_mix_labelled_and_unlabelled():
    data = load_tiny(**DIGITS)
    assert data.labelled_share == pytest.approx(1 / 3)
    share = load_tiny(**DIGITS, sup_sample_weight=-1).labelled_share
    assert share == pytest.approx(100 / 1437)
    x, y, *more = data.sample_batch(30_000, generator())
    assert more == [None, None, None]
    assert x.shape == (30_000, 1, 8, 8) and x.dtype == torch.float32
    assert abs((y >= 0).float().mean() - 1 / 3) < 5 * (2 / 9 / 30_000) ** 0.5
    counts = torch.bincount(y[y >= 0])
    assert counts.min() > 800 and counts.max() < 1200                       # each 1,000 on average
    data.labelled_share = 1.0
    assert (data.sample_batch(50, generator()).y >= 0).all()
    all_labelled = load_tiny(supervised=-1)
    assert (all_labelled.sample_batch(50, generator()).y >= 0).all()


def test_augmented_batches():
    """The copies are of the same images, and x and y are those of a batch without copies."""
    data = load_tiny(**COPIES, aug_shift=0.5)
    x, y, augmented, *more = data.sample_batch(500, generator())
    plain = data.sample_batch(500, generator(), augmented=False)
    assert torch.equal(x, plain.x) and torch.equal(y, plain.y)
    assert more == [None, None] and plain.copies is None
    assert augmented.shape == x.shape and augmented.min() >= 0 and augmented.max() <= 1
    assert not (augmented == x).flatten(1).all(1).any()                     # noise of their own
    own, other = (((augmented - image) ** 2).flatten(1).mean(1) for image in (x, x.roll(1, 0)))
    assert own.mean() < 0.5 * other.mean() and (own < other).float().mean() > 0.8


def test_copies_without_noise_are_in_the_middle_of_the_grey_levels():
    x, y, copies, *_ = load_tiny(**COPIES, clf_noise="false").sample_batch(500, generator())
    levels = copies * 17 - 0.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert levels.min() > -0.1 and levels.max() < 16.1
    noisy = load_tiny(**COPIES).sample_batch(500, generator())
    assert torch.equal(x, noisy.x) and torch.equal(y, noisy.y)


def test_images_without_noise_follow_their_copies():
    noisy = load_tiny(**COPIES).sample_batch(500, generator())
    batch = load_tiny(**COPIES, clf_noise="train").sample_batch(500, generator())
    assert all(map(torch.equal, batch[:3], noisy[:3]))
    torch.testing.assert_close(batch.clean, ((batch.x * 17).floor() + 0.5) / 17)


def test_rows_of_a_batch():
    batch = load_tiny(**COPIES, clf_noise="train").sample_batch(20, generator())
    part = batch.rows(slice(1, None, 2))
    assert part.log_prior_ratio is None
    for field in ("x", "y", "copies", "clean"):
        assert torch.equal(getattr(part, field), getattr(batch, field)[1::2])


def test_augment_translates_rotates_and_scales():
    """Where a bright bar in the middle of many images ends up.

    Half of the images are translated by whole pixels. The moments of the others give their
    position, angle and size.
    """
    images = torch.zeros(2000, 1, 57, 57, dtype=torch.uint8)
    images[:, :, 18:39, 27:30] = 255
    images[:, :, 18:22, 24:33] = 255                                        # its top is wider
    largest = Augmentation(rotation=15, scaling=0.1, shift=4)
    augmented = augment(images, largest, generator())
    assert augmented.dtype == torch.uint8
    assert torch.equal(augmented, augment(images, largest, generator()))
    grey_levels = torch.tensor([0, 255])
    whole = torch.isin(augmented.long(), grey_levels).flatten(1).all(1)
    assert 0.47 < whole.float().mean() < 0.53
    corners = {(int(i.nonzero()[0, 1]), int(i.nonzero()[0, 2])) for i in augmented[whole]}
    assert corners == {(18 + dy, 24 + dx) for dy in range(-4, 5) for dx in range(-4, 5)}
    assert ((augmented[whole] > 0).sum((1, 2, 3)) == (images[0] > 0).sum()).all()

    augmented = augmented[~whole]
    mass = augmented[:, 0].double() / augmented.double().sum((1, 2, 3))[:, None, None]
    coordinates = torch.arange(57, dtype=torch.float64) - 28
    y, x = (mass.sum(2) @ coordinates), (mass.sum(1) @ coordinates)
    dy, dx = coordinates - y[:, None], coordinates - x[:, None]             # from the centre
    size = augmented.double().sum((1, 2, 3)) / images[0].double().sum()
    vertical, horizontal = (mass.sum(2) * dy ** 2).sum(1), (mass.sum(1) * dx ** 2).sum(1)
    both = (mass * dy[:, :, None] * dx[:, None, :]).sum((1, 2))
    angle = (0.5 * torch.atan2(2 * both, vertical - horizontal)).rad2deg()
    assert abs(x).max() < 4 + 1.5 and x.std() > 2 and abs(x.mean()) < 0.2
    assert abs(angle).max() < 15.5 and 8 < angle.std() < 9.3                # 15 / sqrt(3) = 8.7
    assert 0.78 < size.min() < 0.84 and 1.16 < size.max() < 1.25            # 0.9 ** 2, 1.1 ** 2


@pytest.mark.parametrize("name, size", [("digits", 8), ("mnist", 28)])
def test_few_augmented_copies_are_the_image_itself(name, size, request):
    """Whole pixels that are zero in both directions: of half of the copies a quarter or less."""
    root = str(request.getfixturevalue("mnist_root")) if name == "mnist" else "data"
    data = load_tiny(**COPIES, data=name, data_root=root)
    images = data.train_x[:1000]
    copies = augment(images, data.augmentation, generator())
    unchanged = float((copies == images).flatten(1).all(1).float().mean())
    assert images.shape[-1] == size and unchanged < 0.16


def test_augmentation_of_the_data_and_of_the_settings():
    assert load_tiny(**COPIES).augmentation == Augmentation(15, 0.1, 1)
    assert load_tiny(**DIGITS).augmentation is None
    changed = load_tiny(**COPIES, aug_rotation=0, aug_shift=3)
    assert changed.augmentation == Augmentation(0, 0.1, 3)
    points = {"data": "moons", "num_examples": 500, "supervised": 10}
    assert load_tiny(**points, aug_shift=3).augmentation is None


def test_rotation_does_not_shear_images_that_are_not_square():
    """A square in the middle of a wide image keeps its second moments when it is rotated."""
    images = torch.zeros(400, 1, 30, 90, dtype=torch.uint8)
    images[:, :, 10:20, 40:50] = 255
    copies = augment(images, Augmentation(45, 0, 0), generator())[:, 0].double()
    mass = copies / copies.sum((1, 2))[:, None, None]
    dy, dx = torch.arange(30.0).double() - 14.5, torch.arange(90.0).double() - 44.5
    vertical, horizontal = mass.sum(2) @ dy ** 2, mass.sum(1) @ dx ** 2
    both = (mass * dy[:, None] * dx).sum((1, 2))
    square = torch.full_like(vertical, (10 ** 2 - 1) / 12)
    torch.testing.assert_close(vertical, square, rtol=0.05, atol=0)
    torch.testing.assert_close(horizontal, square, rtol=0.05, atol=0)
    assert both.abs().max() < 0.3


@pytest.mark.parametrize("changes", [{"data": "digits", "validation": 143},
                                     {"data": "moons", "validation": 50, "supervised": 10}])
def test_validation_examples_are_in_no_batch(changes):
    changes = {**DIGITS, **changes}
    data, n = load_tiny(**changes), changes["validation"]
    total = 1437 if changes["data"] == "digits" else 1000 + n
    assert len(data.val_x) == len(data.val_y) == n and len(data.train_x) == total - n
    assert len(data.labelled) + len(data.unlabelled) == total - n
    train = {tuple(x.tolist()) for x in data.train_x.flatten(1)}
    assert not train & {tuple(x.tolist()) for x in data.val_x.flatten(1)}
    assert torch.bincount(data.val_y).min() >= 0.9 * n / data.n_classes     # stratified
    assert len(load_tiny(**{**changes, "validation": 0}).val_x) == 0


def test_validation_images_do_not_depend_on_the_seeds():
    data, other = (load_tiny(**{**DIGITS, "validation": 143, **changes})
                   for changes in ({}, {"data_seed": 3, "num_examples": 300, "supervised": 20}))
    assert torch.equal(data.val_x, other.val_x) and torch.equal(data.val_y, other.val_y)
    assert not torch.equal(data.labelled_ids[:20], other.labelled_ids)
    full = load_tiny(**DIGITS)
    for one in (data, other):               # of the whole training set
        assert torch.equal(full.train_x[one.labelled_ids], one.train_x[one.labelled])


def test_the_validation_images_of_mnist(mnist_root):
    data = load_tiny(data="mnist", data_root=str(mnist_root), **DIGITS, validation=5000)
    assert (len(data.train_x), len(data.val_x), len(data.test_x)) == (55000, 5000, 10000)
    counts = torch.bincount(data.val_y)
    assert counts.min() > 440 and counts.max() < 570


def test_dequantisation():
    data = load_tiny(**DIGITS)
    x = data.train_x[:500]
    a, b = data.dequantize(x, generator(0)), data.dequantize(x, generator(1))
    assert not torch.equal(a, b) and torch.equal(a, data.dequantize(x, generator(0)))
    noise = a * 17 - x
    assert noise.min() > -1e-5 and noise.max() < 1 + 1e-5
    assert abs(noise.mean() - 0.5) < 5 * (1 / 12 / noise.numel()) ** 0.5


def test_bits_per_dim_of_the_uniform_density():
    data = load_tiny(**DIGITS)
    assert data.bits_per_dim(0.0) == pytest.approx(np.log2(17))             # density 1 on [0, 1]
    assert data.bits_per_dim(64 * np.log(17)) == pytest.approx(0)           # all mass on one image


@pytest.mark.parametrize("changes, message", [
    ({"supervised": 9}, "one for each"), ({"supervised": 201}, "at most the 200"),
    ({"num_examples": 1438}, "more than the 1437 training examples of digits"),
    ({"num_examples": 5}, "none of class"),
])
def test_settings_that_do_not_fit_the_data(changes, message):
    with pytest.raises(BadInput, match=message):
        load_tiny(**changes)


def test_labelled_ids_are_indices_in_the_full_training_set():
    part, full = load_tiny(num_examples=300, supervised=20), load_tiny(**DIGITS)
    assert torch.equal(full.train_x[part.labelled_ids], part.train_x[part.labelled])
    assert not torch.equal(part.labelled_ids, part.labelled)


@pytest.mark.parametrize("damage", ["half", "empty", "other", "labels of 255"])
def test_damaged_mnist(mnist_root, tmp_path, damage):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_root / "MNIST" / "raw", raw, ignore=shutil.ignore_patterns("*.gz"),
                    copy_function=os.symlink)
    victim = raw / "train-labels-idx1-ubyte"
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes({"half": content[:30_000], "empty": b"", "other": content[::-1],
                        "labels of 255": content[:8] + b"\xff" * 60_000}[damage])
    with pytest.raises(BadInput, match=f"{victim.name} is truncated"):
        load_tiny(data="mnist", data_root=str(tmp_path), **DIGITS)
