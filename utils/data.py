"""Datasets with few labels, held on the device: choice of the labelled examples, batches, dequantisation."""

import contextlib
import http.client
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from sklearn.datasets import load_digits, make_circles, make_moons
from sklearn.model_selection import train_test_split

from . import BadInput

POINTS = 1000                   # of moons and circles, where num_examples does not say
MOONS_NOISE, CIRCLES_NOISE, CIRCLES_FACTOR = 0.1, 0.05, 0.5
TURN, SCALE, SHIFT = 15, 0.1, 2 / 28    # of `alter`: degrees, a share of the size, a share of the height and width
HELD_OUT = 1000
DIGITS_TEST = 360               # of the 1,797 images: the same ones whatever the seeds


class SemiSupervisedData:
    """Training and test examples on `device`, where the labels of all but a few are hidden.

    train_x, test_x: (N, C, H, W), uint8 grey levels in 0 ... levels - 1, or float points (then
    `levels` is None); train_y, test_y: (N,) classes; labelled: indices of the training examples
    whose labels may be seen, at least one of each class. The other training labels are not kept at
    all. labelled_ids: the same examples' places in the whole training set, where train_x is a part.
    held_out: indices of unlabelled examples that no batch has, to compare weights by their likelihood.
    """

    def __init__(self, train_x, train_y, test_x, test_y, labelled, levels, device="cpu", labelled_ids=None, held_out=()):
        self.n_classes = int(train_y[labelled].max()) + 1
        self.labelled = labelled.to(device)
        self.labelled_ids = labelled if labelled_ids is None else labelled_ids
        shown = torch.zeros(len(train_y), dtype=torch.bool)
        shown[labelled] = True
        held_out = torch.as_tensor(held_out, dtype=torch.long)
        self.held_out = held_out.to(device)
        self.unlabelled = (~shown).index_fill(0, held_out, False).nonzero()[:, 0].to(device)
        self.train_x, self.train_y = train_x.to(device), train_y.where(shown, -1).to(device)
        self.test_x, self.test_y = test_x.to(device), test_y.to(device)
        self.levels, self.device = levels, torch.device(device)

    @property
    def shape(self):
        """(C, H, W) of one example."""
        return tuple(self.train_x.shape[1:])

    @property
    def class_probs(self):
        """p(y): the frequencies of the classes among the labelled examples, (K,) float64."""
        counts = torch.bincount(self.train_y[self.labelled], minlength=self.n_classes)
        return counts.double().cpu() / len(self.labelled)

    def dequantize(self, x, generator):
        """x = (grey level + u) / levels, u uniform in [0, 1) from `generator`; points stay as they are."""
        if self.levels is None:
            return x
        dtype = torch.get_default_dtype()
        return (x.to(dtype) + torch.rand(x.shape, generator=generator, dtype=dtype, device=x.device)) / self.levels

    def draw(self, batch_size, labelled_prob, generator, altered=False):
        """A training batch: x (B, C, H, W) dequantised, y (B,), -1 where the label is hidden.

        Each row is, independently, a labelled example with probability `labelled_prob`, else an
        unlabelled one; which one is uniform, with replacement. With `altered` also, third, the same
        images moved a little (`alter`) and dequantised with noise of their own.
        """
        def pick(indices):
            return indices[torch.randint(len(indices), (batch_size,), generator=generator, device=self.device)]
        index = pick(self.labelled)
        if len(self.unlabelled):
            is_labelled = torch.rand(batch_size, generator=generator, device=self.device) < labelled_prob
            index = torch.where(is_labelled, index, pick(self.unlabelled))
        images, y = self.train_x[index], self.train_y[index]
        x = self.dequantize(images, generator)
        return (x, y, self.dequantize(alter(images, generator), generator)) if altered else (x, y)

    def labelled_prob(self, sup_sample_weight):
        """w / (1 + w), or the labelled examples' share of all for w = -1."""
        if sup_sample_weight == -1:
            return len(self.labelled) / len(self.train_x)
        return sup_sample_weight / (1 + sup_sample_weight)

    def bits_per_dim(self, log_p):
        """log2(levels) - log p(x) / (D ln 2), for log p(x) in nats of dequantised data; NaN for points."""
        if self.levels is None:
            return math.nan
        return math.log2(self.levels) - log_p / (math.prod(self.shape) * math.log(2))


def alter(images, generator):
    """Each of `images` (B, C, H, W), uint8, moved by an amount of its own, black around it.

    Half of them, drawn at random, are turned, scaled and shifted, by uniform amounts of up to TURN degrees,
    SCALE, and SHIFT of the height and width; grey levels in between are interpolated and rounded. A flow
    tells such images from real ones by their softer edges, and could learn of them alone: so the other
    half is shifted by whole pixels, which changes no grey level.
    """
    turn, scale, *shift, half = 2 * torch.rand(5, len(images), generator=generator, device=images.device) - 1
    whole = half < 0
    turn, scale = (turn * math.radians(TURN)).masked_fill(whole, 0), (1 + scale * SCALE).masked_fill(whole, 1)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    *_, height, width = images.shape
    dx, dy = (2 / size * torch.where(whole, (s * SHIFT * size).round(), s * SHIFT * size)     # the image reaches from -1 to 1
              for s, size in zip(shift, (width, height)))
    to_source = torch.stack((torch.stack((cos, -sin, dx), 1), torch.stack((sin, cos, dy), 1)), 1)
    grid = F.affine_grid(to_source, images.shape, align_corners=False)
    return F.grid_sample(images.to(grid.dtype), grid, align_corners=False).round().to(images.dtype)


def load_data(settings, device="cpu"):
    """The dataset that settings.data names, as SemiSupervisedData. Raises BadInput.

    settings: data, data_root, num_examples, data_seed, supervised; ema, with which HELD_OUT unlabelled
    examples are held out, but at most a tenth.
    """
    train_x, train_y, test_x, test_y, levels = LOADERS[settings.data](settings)
    if settings.num_examples > len(train_x):
        raise BadInput(f"num_examples {settings.num_examples} is more than {settings.data}'s {len(train_x)} training examples")
    rng = np.random.default_rng(settings.data_seed)
    kept = torch.arange(len(train_x))
    if settings.num_examples != -1:
        kept = torch.from_numpy(np.sort(rng.permutation(len(train_x))[:settings.num_examples]))
        train_x, train_y = train_x[kept], train_y[kept]
    n_classes = int(test_y.max()) + 1
    labelled = torch.from_numpy(choose_labelled(train_y.numpy(), n_classes, settings.supervised, rng))
    held_out = ()
    if settings.ema:
        unlabelled = np.setdiff1d(np.arange(len(train_y)), labelled)
        if len(unlabelled) < 10:
            raise BadInput("ema needs unlabelled examples, some of which are held out to judge the averaged weights: use ema 0")
        held_out = rng.permutation(unlabelled)[:min(HELD_OUT, len(unlabelled) // 10)]
    return SemiSupervisedData(train_x, train_y, test_x, test_y, labelled, levels, device, kept[labelled], held_out)


def choose_labelled(y, n_classes, supervised, rng):
    """Indices, sorted, of `supervised` examples (-1: all) of labels y, as many of each class as can be.

    Where the classes cannot have equally many, the first ones have one more. Raises BadInput if
    there are fewer than one a class, or more than there are.
    """
    of_class = [rng.permutation(np.flatnonzero(y == k)) for k in range(n_classes)]
    if not all(map(len, of_class)):
        raise BadInput(f"the {len(y)} training examples have none of class {[len(m) for m in of_class].index(0)}: "
                       "use more (num_examples)")
    if supervised == -1:
        return np.arange(len(y))
    if not n_classes <= supervised <= len(y):
        raise BadInput(f"supervised must be at least one for each of the {n_classes} classes and at "
                       f"most the {len(y)} training examples (or -1 for all), not {supervised}")
    # Round j takes one more of each class that has one left.
    rounds = sorted((j, k, i) for k, members in enumerate(of_class) for j, i in enumerate(members))
    return np.sort([i for _, _, i in rounds[:supervised]])


def _load_mnist(settings):
    from torchvision.datasets.mnist import read_image_file, read_label_file       # here: it takes a second

    root = Path(settings.data_root)
    raw = root / "MNIST" / "raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all((raw / name).is_file() for name in names):
        _download_mnist(root, raw, names)
    arrays = []
    for name, n in zip(names, (60000, 60000, 10000, 10000)):
        read, shape = (read_image_file, (n, 28, 28)) if "images" in name else (read_label_file, (n,))
        try:
            array = read(str(raw / name))
            if tuple(array.shape) != shape:
                raise ValueError(f"shape {tuple(array.shape)}")
            if "labels" in name and array.max() > 9:
                raise ValueError(f"label {array.max()}")
        except (AssertionError, RuntimeError, ValueError, OSError, TypeError, KeyError):
            raise BadInput(f"{raw / name} is truncated or not MNIST's: remove it to have it fetched again") from None
        arrays.append(array.unsqueeze(1) if "images" in name else array)
    return *arrays, 256


def _download_mnist(root, raw, names):
    from torchvision.datasets import MNIST

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(root, download=True)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as e:
        raise BadInput(
            f"no MNIST in {raw} ({', '.join(names)}), and fetching it failed ({type(e).__name__}): put the "
            "four files there, name their folder with --data_root, or train offline with "
            "--config configs/digits.yaml") from None


def _load_digits(settings):
    digits = load_digits()
    images, y = digits.images, digits.target
    train_x, test_x, train_y, test_y = train_test_split(images, y, test_size=DIGITS_TEST, stratify=y, random_state=0)

    def to_tensor(x):
        return torch.from_numpy(x).to(torch.uint8).unsqueeze(1)
    return to_tensor(train_x), torch.from_numpy(train_y), to_tensor(test_x), torch.from_numpy(test_y), 17


def _load_points(make):
    def load(settings):
        n = POINTS if settings.num_examples == -1 else settings.num_examples
        train, test = (make(n_samples, random_state=seed) for n_samples, seed in
                       ((n, 2 * settings.data_seed), (POINTS, 2 * settings.data_seed + 1)))

        def to_tensors(x, y):
            return torch.from_numpy(x).to(torch.get_default_dtype())[:, :, None, None], torch.from_numpy(y)
        return *to_tensors(*train), *to_tensors(*test), None
    return load


LOADERS = {
    "mnist": _load_mnist, "digits": _load_digits,
    "moons": _load_points(lambda n, random_state: make_moons(n, noise=MOONS_NOISE, random_state=random_state)),
    "circles": _load_points(lambda n, random_state: make_circles(
        n, noise=CIRCLES_NOISE, factor=CIRCLES_FACTOR, random_state=random_state)),
}
