"""Label spreading along a graph of images that look alike."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import load_tiny
from sklearn.neighbors import KNeighborsClassifier, kneighbors_graph
from torch.nn import functional as F

from utils.label_spreading import NEIGHBOURS, deskew, orientation_histograms, spread_labels

DIGITS = {"num_examples": -1, "supervised": 100}


def bar(size=28):
    """An upright bar, 4 of 28 pixels wide, in the middle: (1, 1, size, size), uint8."""
    image = torch.zeros(1, 1, size, size)
    image[..., size // 7:-(size // 7), 3 * size // 7:4 * size // 7] = 200
    return image.to(torch.uint8)


def shear(image, slant):
    """Row y of the image moves by -slant * (y - the middle)."""
    to_source = torch.tensor([[[1, slant, 0.], [0, 1, 0]]])
    return F.grid_sample(image.float(), F.affine_grid(to_source, list(image.shape),
                                                      align_corners=False), align_corners=False)


def test_labels_spread_further_than_to_the_nearest_images():
    data = load_tiny(**DIGITS, spread_labels=0.9)
    hidden = load_tiny(**{**DIGITS, "supervised": -1}).train_y
    s = spread_labels(orientation_histograms(data.train_x), data.train_y)
    torch.testing.assert_close(s.sum(1), torch.ones(len(s), dtype=torch.float64))
    images, own = data.train_x.flatten(1).numpy(), data.labelled
    nearest = KNeighborsClassifier(1).fit(images[own], data.train_y[own]).predict(images)
    error, of_nearest = (float((torch.as_tensor(predicted) != hidden).float().mean())
                         for predicted in (s.argmax(1), nearest))
    assert error < 0.03 and error < of_nearest / 3
    sure = s.amax(1) > 0.95
    assert sure.float().mean() > 0.3 and (s.argmax(1) == hidden)[sure].float().mean() > 0.99
    torch.testing.assert_close(data.log_prior_ratio, (10 * (0.9 * s + 0.01)).log().float())


def test_the_graph_joins_each_image_with_its_nearest_neighbours(monkeypatch):
    """Found in parts, they are those of scikit-learn's own graph."""
    histograms, graphs = orientation_histograms(load_tiny(**DIGITS).train_x[:500]), []

    def fit(self, x, y):
        graphs.append(self.kernel())
        self.label_distributions_ = np.ones((len(y), 1))
    monkeypatch.setattr("sklearn.semi_supervised.LabelSpreading.fit", fit)
    spread_labels(histograms, torch.zeros(500))
    neighbours = kneighbors_graph(histograms.numpy(), NEIGHBOURS)
    assert (graphs[0] != neighbours.maximum(neighbours.T)).nnz == 0


def test_double_precision_changes_nothing(float64):
    images = torch.randint(256, (10, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    histograms = orientation_histograms(images.to(torch.uint8))
    assert histograms.shape == (10, 392) and histograms.dtype == torch.float32


def test_batches_have_the_priors_of_their_images():
    data = load_tiny(**DIGITS, cons_weight=1, spread_labels=0.9)
    batch = data.sample_batch(200, torch.Generator().manual_seed(0))
    labelled = batch.y >= 0
    assert torch.equal(batch.log_prior_ratio.argmax(1)[labelled], batch.y[labelled])
    other = load_tiny(**DIGITS, cons_weight=1).sample_batch(20, torch.Generator())
    assert other.copies is not None and other.log_prior_ratio is None


def test_labels_spread_within_a_group_of_images():
    upright, lying = bar(), bar().transpose(2, 3)
    images = torch.cat([torch.roll(image, shift, (2, 3)) for image in (upright, lying)
                        for shift in itertools.product(range(-2, 2), (-3, 0, 3))])
    histograms = orientation_histograms(images)
    s = spread_labels(histograms, torch.tensor([0, *[-1] * 11, 1, *[-1] * 11]))
    assert s.shape == (24, 2) and s.dtype == torch.float64
    assert s.argmax(1).tolist() == [0] * 12 + [1] * 12
    other = spread_labels(histograms, torch.tensor([0, 1, *[-1] * 22]))   # only of the first group
    assert other[12:].eq(0.5).all() and other[:2].argmax(1).tolist() == [0, 1]
    few = spread_labels(histograms[10:14], torch.tensor([0, -1, 1, -1]))  # fewer than neighbours
    assert few.shape == (4, 2) and bool(few.isfinite().all())


@pytest.mark.parametrize("size", [8, 28, 32])
def test_histograms_are_of_the_orientations_of_edges(size):
    """The left edge of a bar has gradient (+, 0), the right one (-, 0): orientations 0 and 4."""
    strength = orientation_histograms(bar(size)).view(8, 7, 7)
    of_orientation = strength.sum((1, 2)) / strength.sum()
    assert of_orientation[0] + of_orientation[4] > 0.6
    assert of_orientation[0] == pytest.approx(of_orientation[4].item(), rel=0.02)
    assert strength[0, :, :3].sum() > 5 * strength[0, :, 4:].sum()
    lying = orientation_histograms(bar(size).transpose(2, 3)).view(8, 7, 7)
    torch.testing.assert_close(lying.sum((1, 2)).roll(-2)[[0, 4]],
                               strength.sum((1, 2))[[0, 4]], rtol=0.02, atol=0)


def test_histograms_hardly_depend_on_slant_position_and_brightness():
    image = bar()
    one = orientation_histograms(image)
    for other in (shear(image, 0.3), torch.roll(image, (2, -3), (2, 3)), image // 2):
        assert F.cosine_similarity(orientation_histograms(other), one) > 0.97
    assert F.cosine_similarity(orientation_histograms(image.transpose(2, 3)), one) < 0.5


def test_deskewing_makes_the_main_axis_upright():
    slanted = shear(bar(), math.tan(math.radians(20)))
    torch.testing.assert_close(deskew(deskew(slanted)), deskew(slanted), rtol=0, atol=12)
    columns = deskew(slanted)[0, 0].sum(0) / slanted.sum()
    assert columns[11:17].sum() > 0.97 > 0.8 > slanted[0, 0].sum(0)[11:17].sum() / slanted.sum()
    assert bool(deskew(torch.zeros(2, 1, 28, 28)).eq(0).all())
