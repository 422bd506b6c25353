"""Beyond the paper: label spreading along a graph of images that look alike, a first guess of the
hidden labels.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .terminal import bar

SIDE = 28               # pixels, of the images that are compared
ORIENTATIONS, CELL = 8, 4
NEIGHBOURS = 7
PARTS = 20              # of the search for them, in the progress bar
ALPHA = 0.99            # share of an image's distribution that its neighbours decide, at each step
SHARPNESS = 2


def spread_labels(histograms: Tensor, y: Tensor) -> Tensor:
    """A distribution over the classes for each image: (N, K), float64.

    histograms: the `orientation_histograms` of the images, (N, D)
    y: their labels, (N,), -1 where the label is hidden

    The labels spread (Zhou et al. 2003, "Learning with local and global consistency") along
    a graph in which two images are connected if one of them is among the 7 nearest neighbours of
    the other, by Euclidean distance. What comes out is far less sure than it is right: on MNIST 99
    % of the images whose largest value is between 0.5 and 0.6 are of that class. It is therefore
    squared and normalised. It is uniform where no label can be reached.
    """
    # Imported here because it takes a second.
    from scipy.sparse import tril, triu, vstack
    from sklearn.neighbors import NearestNeighbors
    from sklearn.semi_supervised import LabelSpreading

    n = len(histograms)
    with bar(None, "label spreading: neighbours", total=n, unit="img") as images:
        # Each image is one of its own neighbours.
        search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, n)).fit(histograms.numpy())
        graphs = []
        for part in histograms.split(-(-n // PARTS)):
            graphs.append(search.kneighbors_graph(part.numpy()))
            images.update(len(part))
        images.set_description("label spreading: spreading")
        graph = vstack(graphs, "csr")
        graph = tril(graph, -1) + triu(graph, 1)
        graph = graph.maximum(graph.T)
        spreading = LabelSpreading(kernel=lambda *_: graph, alpha=ALPHA, max_iter=1000)
        spreading.fit(np.zeros((n, 1)), y.cpu().numpy())
    s = torch.from_numpy(spreading.label_distributions_) ** SHARPNESS
    total = s.sum(1, keepdim=True)
    return torch.where(total > 0, s / total, 1 / s.shape[1])


def orientation_histograms(images: Tensor) -> Tensor:
    """How strong the edges of each orientation are, in each part of the upright image.

    images: (N, C, H, W) -> (N, 8 * 7 * 7) float32, on the CPU. A variant of HOG (Dalal & Triggs
    2005) without its normalisation. The images, averaged over channels, are resized to 28 x 28
    pixels and sheared upright. The gradient of each pixel is shared by the two orientations next
    to its own, and each orientation is averaged over overlapping cells, 4 pixels apart.
    """
    parts = bar(images.cpu().split(1000), "label spreading: edges", unit="kimg")
    return torch.cat([_histograms(part.float()) for part in parts])


def _histograms(images: Tensor) -> Tensor:
    x = images.mean(1, keepdim=True)
    x = deskew(F.interpolate(x, (SIDE, SIDE), mode="bilinear"))
    padded = F.pad(x, (1, 1, 1, 1))
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    orientation = torch.atan2(dy, dx) * (ORIENTATIONS / (2 * math.pi))
    k = torch.arange(ORIENTATIONS)[:, None, None]
    half = ORIENTATIONS / 2
    distance = ((orientation - k + half) % ORIENTATIONS - half).abs()
    strength = (1 - distance).clamp(min=0) * (dx ** 2 + dy ** 2).sqrt()
    smooth = F.avg_pool2d(strength, CELL + 1, 1, CELL // 2)
    return F.avg_pool2d(smooth, CELL).flatten(1)


def deskew(x: Tensor) -> Tensor:
    """Images whose rows are moved so that the main axis is upright, and the centre of mass in the
    middle: x (N, 1, H, W) -> (N, 1, H, W)."""
    # Coordinates as those of grid_sample: from -1 to 1 between the outer edges.
    coordinates = (2 * torch.arange(SIDE, dtype=x.dtype) + 1) / SIDE - 1
    mass = x[:, 0] / x.sum((1, 2, 3)).clamp(min=1e-6)[:, None, None]
    of_rows, of_columns = mass.sum(2), mass.sum(1)
    center_y, center_x = of_rows @ coordinates, of_columns @ coordinates
    dy, dx = coordinates - center_y[:, None], coordinates - center_x[:, None]
    covariance = (mass * dy[:, :, None] * dx[:, None]).sum((1, 2))
    slant = covariance / (of_rows * dy ** 2).sum(1).clamp(min=1e-6)
    to_source = x.new_zeros(len(x), 2, 3)
    to_source[:, 0, 0] = to_source[:, 1, 1] = 1
    to_source[:, 0, 1], to_source[:, 0, 2], to_source[:, 1, 2] = slant, center_x, center_y
    return F.grid_sample(x, F.affine_grid(to_source, list(x.shape), align_corners=False),
                         align_corners=False)
