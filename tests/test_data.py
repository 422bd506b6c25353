"""Datasets, the choice of the labelled examples, batches and dequantisation."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import load_tiny

from utils import BadInput
from utils.data import SemiSupervisedData, alter, choose_labelled

DIGITS = {"num_examples": -1, "supervised": 100}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_digits():
    data = load_tiny(**DIGITS)
    assert data.shape == (1, 8, 8) and data.n_classes == 10 and data.levels == 17
    assert (len(data.train_x), len(data.test_x)) == (1437, 360)
    assert data.train_x.dtype == torch.uint8 and data.train_x.max() == 16
    assert torch.bincount(data.test_y).min() >= 34                            # stratified


def test_mnist(mnist_root):
    data = load_tiny(data="mnist", data_root=str(mnist_root), **DIGITS)
    assert data.shape == (1, 28, 28) and data.levels == 256 and data.train_x.dtype == torch.uint8
    assert (len(data.train_x), len(data.test_x)) == (60000, 10000)
    assert torch.bincount(data.train_y[data.labelled]).tolist() == [10] * 10


@pytest.mark.parametrize("name", ["moons", "circles"])
def test_points(name):
    data = load_tiny(data=name, num_examples=500, supervised=10)
    assert data.shape == (2, 1, 1) and data.n_classes == 2 and data.levels is None
    assert (len(data.train_x), len(data.test_x)) == (500, 1000)
    x, _ = data.draw(1000, 0.5, generator())
    assert (x[:, None] == data.train_x).flatten(2).all(2).any(1).all()        # drawn as they are
    assert np.isnan(data.bits_per_dim(1.0))
    assert not torch.equal(data.train_x, load_tiny(data=name, num_examples=500, supervised=10, data_seed=1).train_x)


def test_labelled_choice_is_stratified_and_seeded():
    data = load_tiny(**DIGITS)
    assert torch.bincount(data.train_y[data.labelled]).tolist() == [10] * 10
    assert torch.equal(data.labelled, load_tiny(**DIGITS).labelled)
    assert not torch.equal(data.labelled, load_tiny(**DIGITS, data_seed=1).labelled)
    assert torch.equal(data.test_x, load_tiny(**DIGITS, data_seed=1).test_x)


def test_labelled_choice_of_unequal_classes():
    y = np.array([0] * 2 + [1] * 50 + [2] * 50)
    chosen = y[choose_labelled(y, 3, 21, np.random.default_rng(0))]
    assert np.bincount(chosen).tolist() == [2, 10, 9]
    assert len(choose_labelled(y, 3, -1, np.random.default_rng(0))) == 102
    assert len(set(choose_labelled(y, 3, 102, np.random.default_rng(0)))) == 102


def test_class_probs_are_the_labelled_frequencies():
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    x = torch.zeros(8, 2, 1, 1)
    data = SemiSupervisedData(x, y, x, y, torch.tensor([0, 3, 4, 5]), None)
    assert data.class_probs.tolist() == [0.25, 0.75]


def test_hidden_labels_are_not_kept():
    data = load_tiny(**DIGITS)
    assert (data.train_y[data.unlabelled] == -1).all() and (data.train_y[data.labelled] >= 0).all()
    assert len(data.unlabelled) + len(data.labelled) == len(data.train_x)


def test_draws_mix_labelled_and_unlabelled():
    data = load_tiny(**DIGITS)
    assert data.labelled_prob(0.5) == pytest.approx(1 / 3)
    assert data.labelled_prob(-1) == pytest.approx(100 / 1437)
    x, y = data.draw(30_000, 1 / 3, generator())
    assert x.shape == (30_000, 1, 8, 8) and x.dtype == torch.float32
    assert abs((y >= 0).float().mean() - 1 / 3) < 5 * (2 / 9 / 30_000) ** 0.5
    counts = torch.bincount(y[y >= 0])
    assert counts.min() > 800 and counts.max() < 1200                         # 1,000 expected of each class
    assert (data.draw(50, 1.0, generator())[1] >= 0).all()
    everything = load_tiny(supervised=-1)
    assert (everything.draw(50, 1 / 3, generator())[1] >= 0).all()


def test_altered_draws():
    """The same rows, moved within the stated bounds; without them the draws are what they were."""
    data = load_tiny(**DIGITS)
    x, y, altered = data.draw(500, 0.5, generator(), altered=True)
    plain_x, plain_y = data.draw(500, 0.5, generator())
    assert torch.equal(x, plain_x) and torch.equal(y, plain_y)
    assert altered.shape == x.shape and 0 <= altered.min() and altered.max() <= 1
    assert not (altered == x).flatten(1).all(1).any()                         # the noise at least is another
    own, other = (((altered - image) ** 2).flatten(1).mean(1) for image in (x, x.roll(1, 0)))
    assert own.mean() < 0.5 * other.mean() and (own < other).float().mean() > 0.8


def test_alter_moves_turns_and_scales():
    """A bright bar in the middle of each of many images: where it comes to lie. Half of them move by whole pixels."""
    images = torch.zeros(2000, 1, 57, 57, dtype=torch.uint8)
    images[:, :, 18:39, 27:30] = 255
    images[:, :, 18:22, 24:33] = 255                                          # its upper end is wider
    moved = alter(images, generator())
    assert moved.dtype == torch.uint8 and torch.equal(moved, alter(images, generator()))
    levels = torch.tensor([0, 255])
    whole = torch.isin(moved.long(), levels).flatten(1).all(1)
    assert 0.47 < whole.float().mean() < 0.53
    corners = {(int(i.nonzero()[0, 1]), int(i.nonzero()[0, 2])) for i in moved[whole]}
    assert corners == {(18 + dy, 24 + dx) for dy in range(-4, 5) for dx in range(-4, 5)}
    assert ((moved[whole] > 0).sum((1, 2, 3)) == (images[0] > 0).sum()).all()
    moved = moved[~whole]
    mass = moved[:, 0].double() / moved.double().sum((1, 2, 3))[:, None, None]
    coordinates = torch.arange(57, dtype=torch.float64) - 28
    y, x = (mass.sum(2) @ coordinates), (mass.sum(1) @ coordinates)
    size = moved.double().sum((1, 2, 3)) / images[0].double().sum()
    vertical = (mass.sum(2) * (coordinates - y[:, None]) ** 2).sum(1)
    horizontal = (mass.sum(1) * (coordinates - x[:, None]) ** 2).sum(1)
    both = (mass * (coordinates[None, :, None] - y[:, None, None]) * (coordinates[None, None, :] - x[:, None, None])).sum((1, 2))
    turn = (0.5 * torch.atan2(2 * both, vertical - horizontal)).rad2deg()
    assert abs(x).max() < 57 * 2 / 28 + 1.5 and x.std() > 2 and abs(x.mean()) < 0.2
    assert abs(turn).max() < 15.5 and 8 < turn.std() < 9.3                    # uniform: 15 / sqrt(3) = 8.7
    assert 0.78 < size.min() < 0.84 and 1.16 < size.max() < 1.25              # of areas: 0.9 ** 2 and 1.1 ** 2


def test_held_out_examples_are_never_drawn():
    data = load_tiny(**DIGITS, ema=0.9)
    assert len(data.held_out) == 133 and not set(data.held_out.tolist()) & set(data.unlabelled.tolist() + data.labelled.tolist())
    assert torch.equal(data.held_out, load_tiny(**DIGITS, ema=0.9).held_out)
    assert len(load_tiny(**DIGITS).held_out) == 0 and torch.equal(data.labelled, load_tiny(**DIGITS).labelled)
    assert len(data.held_out) + len(data.unlabelled) + len(data.labelled) == 1437
    with pytest.raises(BadInput, match="ema needs unlabelled"):
        load_tiny(supervised=-1, ema=0.9)


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
    assert data.bits_per_dim(0.0) == pytest.approx(np.log2(17))              # density 1 on [0, 1]
    assert data.bits_per_dim(64 * np.log(17)) == pytest.approx(0)            # all mass on one image


@pytest.mark.parametrize("changes, message", [
    ({"supervised": 9}, "one for each"), ({"supervised": 201}, "at most the 200"),
    ({"num_examples": 1438}, "more than digits's 1437"), ({"num_examples": 5}, "none of class"),
])
def test_data_that_do_not_fit(changes, message):
    with pytest.raises(BadInput, match=message):
        load_tiny(**changes)


def test_labelled_ids_are_places_in_the_whole_training_set():
    part, whole = load_tiny(num_examples=300, supervised=20), load_tiny(**DIGITS)
    assert torch.equal(whole.train_x[part.labelled_ids], part.train_x[part.labelled])
    assert not torch.equal(part.labelled_ids, part.labelled)


@pytest.mark.parametrize("damage", ["half", "empty", "other", "labels of 255"])
def test_damaged_mnist(mnist_root, tmp_path, damage):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_root / "MNIST" / "raw", raw, ignore=shutil.ignore_patterns("*.gz"), copy_function=os.symlink)
    victim = raw / "train-labels-idx1-ubyte"
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes({"half": content[:30_000], "empty": b"", "other": content[::-1],
                        "labels of 255": content[:8] + b"\xff" * 60_000}[damage])
    with pytest.raises(BadInput, match=f"{victim.name} is truncated"):
        load_tiny(data="mnist", data_root=str(tmp_path), **DIGITS)
