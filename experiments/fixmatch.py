"""FixMatch, a semi-supervised network, to compare the flow with.

`fit_fixmatch(data, seed)` trains it. The settings are fixed, one for images of the size of digits,
and one for larger ones; the comments say how they were chosen, in which test images had no part.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.data import Augmentation, SemiSupervisedData, augment
from utils.errors import Failed
from utils.terminal import bar

Predict = Callable[[Tensor], Tensor]


class FixMatchSettings(NamedTuple):
    """Weak augmentation shifts an image; strong augmentation shifts, rotates and scales it, and
    cuts out a square with sides of `cutout` pixels.
    """

    width: int                  # channels of the first layer
    steps: int                  # training steps
    n_labelled: int             # images of a batch
    n_unlabelled: int
    weak: Augmentation
    strong: Augmentation
    cutout: int
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ema: float = 0.995          # decay of the average of the weights


# The first settings tried; only the steps were reduced, from 1,500, to save time.
SMALL = FixMatchSettings(width=32, steps=1000, n_labelled=32, n_unlabelled=128, cutout=2,
                         weak=Augmentation(0, 0, 1), strong=Augmentation(25, 0.2, 1.5))
# No others were tried; as many steps as take about ten minutes on two CPU cores.
LARGE = FixMatchSettings(width=16, steps=4000, n_labelled=32, n_unlabelled=128, cutout=8,
                         weak=Augmentation(0, 0, 2), strong=Augmentation(30, 0.25, 4))
THRESHOLD = 0.95            # confidence from which a pseudo-label counts


def fit_fixmatch(data: SemiSupervisedData, seed: int) -> Predict:
    """Train a small convolutional network with FixMatch.

    Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence"
    (2020, arXiv 2001.07685), section 2.2. With the weak augmentation a, the strong one A and the
    cross-entropy H, the loss of labelled images x and unlabelled images u is

        mean H(y, p(. | a(x))) + mean [max q >= THRESHOLD] H(argmax q, p(. | A(u)))
        q = p(. | a(u)), without gradient

    The optimiser is SGD with Nesterov momentum; the learning rate falls as cos(7 pi t / 16 T).
    Without unlabelled images only the first term is left.

    Returns a function from images (N, C, H, W), uint8, to classes (N,), by the averaged weights.
    data: its images, and of the labels those that it shows.
    seed: of the initial weights, the batches and the augmentation.
    """
    torch.manual_seed(seed)
    generator = torch.Generator(data.device).manual_seed(seed)
    settings = SMALL if is_small(data) else LARGE
    network = small_cnn(data.shape[0], settings.width, data.n_classes).to(data.device)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema),
                             use_buffers=True)

    def weak(images: Tensor) -> Tensor:
        return as_grey(augment(images, settings.weak, generator), data)

    def strong(images: Tensor) -> Tensor:
        augmented = augment(images, settings.strong, generator)
        return as_grey(cut_out(augmented, settings.cutout, generator), data)
    optimizer = torch.optim.SGD(network.parameters(), settings.lr, settings.momentum,
                                weight_decay=settings.weight_decay, nesterov=True)
    for step in cosine_steps(network, optimizer, settings.steps, part_of_cosine=7 / 8):
        index = choose(data.labelled, settings.n_labelled, generator)
        x, y = weak(data.train_x[index]), data.train_y[index]
        if len(data.unlabelled):
            u = data.train_x[choose(data.unlabelled, settings.n_unlabelled, generator)]
            # In one pass, so that all of them share the statistics of the batch normalisation.
            logits, of_weak, of_strong = network(torch.cat((x, weak(u), strong(u)))).split(
                (len(x), len(u), len(u)))
            loss = F.cross_entropy(logits, y) + unlabelled_loss(of_weak, of_strong)
        else:
            loss = F.cross_entropy(network(x), y)
        step(loss)
        averaged.update_parameters(network)
    averaged.eval()

    def predict(images: Tensor) -> Tensor:
        return classify(lambda batch: averaged(as_grey(batch, data)), images)
    return predict


def pseudo_labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable class of each row of `logits` (B, K), (B,); and whether it counts, (B,).

    It counts, as 1.0 and not 0.0, if its probability is at least THRESHOLD.
    """
    probability, y = logits.detach().softmax(1).max(1)
    return y, (probability >= THRESHOLD).to(logits.dtype)


def unlabelled_loss(of_weak: Tensor, of_strong: Tensor) -> Tensor:
    """FixMatch's second term, a scalar: the mean over all rows, also those that do not count.

    of_weak, of_strong: logits (B, K) of the weakly and of the strongly augmented images.
    """
    y, counts = pseudo_labels(of_weak)
    return (counts * F.cross_entropy(of_strong, y, reduction="none")).mean()


def cut_out(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`images` (B, C, H, W) with a black square of `size` x `size` pixels each, anywhere."""
    *_, height, width = images.shape

    def covered(length: int) -> Tensor:
        start = torch.randint(length - size + 1, (len(images), 1), generator=generator,
                              device=images.device)
        offset = torch.arange(length, device=images.device) - start
        return (offset >= 0) & (offset < size)
    square = covered(height)[:, None, :, None] & covered(width)[:, None, None, :]
    return images.masked_fill(square, 0)


def small_cnn(n_channels: int, width: int, n_classes: int) -> nn.Sequential:
    """Three 3x3 convolutions with `width`, 2 width and 4 width channels, batch normalisation and
    ReLU, with max pooling between them, and a linear layer on the means over the image.
    """
    layers: list[nn.Module] = []
    for n_out in (width, 2 * width, 4 * width):
        layers += [nn.MaxPool2d(2), nn.Conv2d(n_channels, n_out, 3, padding=1, bias=False),
                   nn.BatchNorm2d(n_out), nn.ReLU()]
        n_channels = n_out
    return nn.Sequential(*layers[1:], nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(n_channels, n_classes))


# What m1_m2.py uses too


def is_small(data: SemiSupervisedData) -> bool:
    """Whether the images are as small as scikit-learn's digits."""
    return math.prod(data.shape) < 200


def as_grey(images: Tensor, data: SemiSupervisedData) -> Tensor:
    """uint8 images of `data` as floats from 0 to 1."""
    return images / (data.grey_levels - 1)


def cosine_steps(network: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int,
                 part_of_cosine: float = 1) -> Iterator[Callable[[Tensor], None]]:
    """Yield, `n_steps` times, a function that makes a training step from a loss.

    network: in training mode during the steps, and in evaluation mode after the last one.
    optimizer: its learning rate falls as cos(part_of_cosine * pi t / 2 T), with T = n_steps.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: math.cos(part_of_cosine * math.pi * t / (2 * n_steps)))

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.train()
    for _ in bar(range(n_steps), "training a network", unit="step"):
        yield step
    network.eval()


def choose(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` of the `rows` of a tensor, uniformly with replacement."""
    return rows[torch.randint(len(rows), (n,), generator=generator, device=rows.device)]


@torch.no_grad()
def classify(logits: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The classes (N,) that have the largest logits, computed for 1,000 images at a time.

    Raises Failed if logits are not finite.
    """
    found = torch.cat([logits(batch) for batch in images.split(1000)])
    if n := int((~found.isfinite().all(1)).sum()):
        raise Failed(f"Not finite: the logits of {n} of {len(images)} images")
    return found.argmax(1)
