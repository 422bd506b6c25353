"""Two semi-supervised neural networks to compare the flow with: M1+M2 and FixMatch.

`fit_m1_m2(data, seed)` and `fit_fixmatch(data, seed)` train on the images of a SemiSupervisedData,
the labels that it shows and nothing else, and return a function from images, uint8 (N, C, H, W), to
their classes, (N,). Initial weights, batches and noise follow from `seed`. The settings are fixed,
one for images of the size of digits, and one for larger ones. The comments say how they were
chosen; test images played no part in that.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.data import Augmentation, SemiSupervisedData, augment

Predict = Callable[[Tensor], Tensor]


# M1+M2


class M1(nn.Module):
    """A variational autoencoder of images x (B, D), grey levels from 0 to 1.

    Section 2.1, "M1", of Kingma, Rezende, Mohamed and Welling, "Semi-Supervised Learning with Deep
    Generative Models" (2014, arXiv 1406.5298), equations 1, 3 and 5:

        p(z1) = N(0, I)     p(n x | z1) = Binomial(n, f(z1))    q(z1 | x) = N(mu(x), sigma(x)^2)
        log p(x) >= E_q [log p(x | z1)] - KL(q(z1 | x) || p(z1))

    f, mu and log sigma^2 are networks with two hidden layers of `width` softplus units. n is
    n_trials. A pixel of scikit-learn's digits counts the dots of ink among 16, so there n is 16.
    The paper has n = 1, Bernoulli: a grey level is then the probability of ink, and the bound the
    mean of those of all black-and-white versions of the image.
    """

    def __init__(self, n_pixels: int, n_latent: int, width: int, n_trials: int = 1):
        super().__init__()
        self.n_trials = n_trials
        self.encoder = mlp(n_pixels, width, width, 2 * n_latent)
        self.decoder = mlp(n_latent, width, width, n_pixels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z1 | x), (B, L) each."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        return mean, log_var

    def bound(self, x: Tensor, noise: Tensor) -> Tensor:
        """The lower bound on log p(x) of each image, (B,) nats, with one sample of q.

        It lacks the logarithms of the binomial coefficients, which do not depend on the weights.
        noise: (B, L), standard normal.
        """
        mean, log_var = self.encode(x)
        z1 = mean + (log_var / 2).exp() * noise
        log_f = -F.binary_cross_entropy_with_logits(self.decoder(z1), x, reduction="none")
        return self.n_trials * log_f.sum(1) - kl_to_standard_normal(mean, log_var)


class M2(nn.Module):
    """A generative model of latents z1 (B, L) of M1 and of their classes y, with latents z2.

    Section 2.1, "M2", and the objective of section 3.1.2 of the same paper, with z1 for its x:

        p(y) = Cat(prior)        p(z2) = N(0, I)       p(z1 | y, z2) = N(mu(y, z2), sigma(y, z2)^2)
        q(y | z1) = Cat(pi(z1))  q(z2 | y, z1) = N(mu(y, z1), sigma(y, z1)^2)

        log p(z1, y) >= -L(z1, y) = E_q(z2 | y, z1) [log p(z1 | y, z2)] + log p(y)
                                    - KL(q(z2 | y, z1) || p(z2))                      equation 6
        log p(z1) >= -U(z1) = sum_y q(y | z1) (-L(z1, y)) + H(q(y | z1))              equation 7

    The sum over y is exact. The networks have one hidden layer of `width` softplus units; y enters
    as a one-hot vector. prior: p(y), (K,).
    """

    def __init__(self, n_latent1: int, n_latent2: int, width: int, prior: Tensor):
        super().__init__()
        n_classes = len(prior)
        self.classifier = mlp(n_latent1, width, n_classes)
        self.encoder = mlp(n_classes + n_latent1, width, 2 * n_latent2)
        self.decoder = mlp(n_classes + n_latent2, width, 2 * n_latent1)
        self.log_prior: Tensor
        self.register_buffer("log_prior", prior.log())

    def labelled_bound(self, z1: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """-L(z1, y), the lower bound on log p(z1, y), (B,) nats, with one sample of q(z2 | y, z1).

        y: classes (B,); noise: (B, dimensions of z2), standard normal.
        """
        one_hot = F.one_hot(y, len(self.log_prior)).to(z1.dtype)
        mean, log_var = self.encoder(torch.cat((one_hot, z1), 1)).chunk(2, 1)
        z2 = mean + (log_var / 2).exp() * noise
        decoded = self.decoder(torch.cat((one_hot, z2), 1)).chunk(2, 1)
        return (log_normal(z1, *decoded) + self.log_prior[y]
                - kl_to_standard_normal(mean, log_var))

    def unlabelled_bound(self, z1: Tensor, noise: Tensor) -> Tensor:
        """-U(z1), the lower bound on log p(z1), (B,) nats; noise: (K, B, dimensions of z2)."""
        n_classes = len(self.log_prior)
        every_y = torch.arange(n_classes, device=z1.device).repeat_interleave(len(z1))
        bounds = self.labelled_bound(z1.repeat(n_classes, 1), every_y, noise.flatten(0, 1))
        log_q = self.classifier(z1).log_softmax(1).T
        return (log_q.exp() * (bounds.view(n_classes, -1) - log_q)).sum(0)


class M1M2Settings(NamedTuple):
    """Of both models: numbers of latents, widths of the networks, training steps."""

    n_trials: int
    n_latent1: int
    width1: int
    steps1: int
    n_latent2: int
    width2: int
    steps2: int
    batch_size: int
    lr: float           # of Adam, at the start of a cosine schedule
    alpha: float        # the paper's alpha is N times this: its objective is a sum over N images


# Chosen by the mean validation error of digits over three choices of labelled images, among
# thirteen combinations of n_trials (1, 16), alpha (0.1, 1, 3, 10), lr, batch sizes, training steps,
# widths and numbers of latents. n_trials matters most; M1 overfits in 6,000 steps.
M1_M2_SMALL = M1M2Settings(n_trials=16, n_latent1=20, width1=200, steps1=3000,
                           n_latent2=10, width2=200, steps2=1000,
                           batch_size=128, lr=3e-3, alpha=1)
# The sizes and the alpha of the paper; as many steps as take about ten minutes on two CPU cores.
M1_M2_LARGE = M1M2Settings(n_trials=1, n_latent1=50, width1=600, steps1=10_000,
                           n_latent2=50, width2=500, steps2=6000,
                           batch_size=128, lr=1e-3, alpha=0.1)


def fit_m1_m2(data: SemiSupervisedData, seed: int) -> Predict:
    """Train M1 on all training images, then M2 on samples of their latents -> predict.

    `predict` returns the y of the largest q(y | z1), where z1 is the mean of q(z1 | x).
    """
    torch.manual_seed(seed)
    generator = torch.Generator(data.device).manual_seed(seed)
    settings = M1_M2_SMALL if is_small(data) else M1_M2_LARGE

    def pixels(images: Tensor) -> Tensor:
        return as_grey(images, data).flatten(1)
    m1 = train_m1(pixels(data.train_x), settings, generator)
    m2 = train_m2(m1, pixels(data.train_x), data, settings, generator)

    def predict(images: Tensor) -> Tensor:
        return in_batches(lambda batch: m2.classifier(m1.encode(pixels(batch))[0]), images)
    return predict


def train_m1(x: Tensor, settings: M1M2Settings, generator: torch.Generator) -> M1:
    """Maximise the mean bound on log p(x) of the images x (N, D)."""
    m1 = M1(x.shape[1], settings.n_latent1, settings.width1, settings.n_trials).to(x.device)
    every_row = torch.arange(len(x), device=x.device)
    optimizer = torch.optim.Adam(m1.parameters(), settings.lr)
    for step in cosine_steps(m1, optimizer, settings.steps1):
        batch = x[choose(every_row, settings.batch_size, generator)]
        step(-m1.bound(batch, normal((len(batch), settings.n_latent1), generator)).mean())
    return m1


def train_m2(m1: M1, x: Tensor, data: SemiSupervisedData, settings: M1M2Settings,
             generator: torch.Generator) -> M2:
    """Train M2 on the latents z1 of the images x (N, D), the training images of `data`.

    It minimises equations 8 and 9 of the paper, divided by N, the number of images:

        (N_l / N) E_labelled [L(z1, y)] + (N_u / N) E_unlabelled [U(z1)]
        - alpha E_labelled [log q(y | z1)]

    Each batch has new samples z1 from q(z1 | x). It is half labelled and half not.
    """
    with torch.no_grad():
        mean, log_var = m1.encode(x)
        deviation = (log_var / 2).exp()
    m2 = M2(settings.n_latent1, settings.n_latent2, settings.width2,
            data.class_probs.to(x.dtype)).to(x.device)
    share_labelled = len(data.labelled) / len(x)

    def noise_of_z2(*shape: int) -> Tensor:
        return normal((*shape, settings.n_latent2), generator)

    def latents(indices: Tensor) -> tuple[Tensor, Tensor]:
        """Samples z1 of images drawn from those with these indices, and their labels."""
        index = choose(indices, settings.batch_size, generator)
        noise = normal((len(index), settings.n_latent1), generator)
        return mean[index] + deviation[index] * noise, data.train_y[index]
    optimizer = torch.optim.Adam(m2.parameters(), settings.lr)
    for step in cosine_steps(m2, optimizer, settings.steps2):
        z1, y = latents(data.labelled)
        bound = share_labelled * m2.labelled_bound(z1, y, noise_of_z2(len(z1))).mean()
        classification = F.cross_entropy(m2.classifier(z1), y)
        if len(data.unlabelled):
            z1, _ = latents(data.unlabelled)
            noise = noise_of_z2(data.n_classes, len(z1))
            bound = bound + (1 - share_labelled) * m2.unlabelled_bound(z1, noise).mean()
        step(settings.alpha * classification - bound)
    return m2


def mlp(*sizes: int) -> nn.Sequential:
    """A network with layers of these sizes and softplus between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Softplus(), nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers[1:])


def log_normal(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(x; mean, diag(exp log_var)) of each row, (B,)."""
    return -(math.log(2 * math.pi) + log_var + (x - mean)**2 / log_var.exp()).sum(1) / 2


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, diag(exp log_var)) || N(0, I)) of each row, (B,) nats."""
    return (mean**2 + log_var.exp() - 1 - log_var).sum(1) / 2


# FixMatch

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
FIXMATCH_SMALL = FixMatchSettings(width=32, steps=1000, n_labelled=32, n_unlabelled=128,
                                  weak=Augmentation(0, 0, 1), strong=Augmentation(25, 0.2, 1.5),
                                  cutout=2)
# No others were tried; as many steps as take about ten minutes on two CPU cores.
FIXMATCH_LARGE = FixMatchSettings(width=16, steps=4000, n_labelled=32, n_unlabelled=128,
                                  weak=Augmentation(0, 0, 2), strong=Augmentation(30, 0.25, 4),
                                  cutout=8)
THRESHOLD = 0.95


def fit_fixmatch(data: SemiSupervisedData, seed: int) -> Predict:
    """Train a small convolutional network with FixMatch -> predict, with averaged weights.

    Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence"
    (2020, arXiv 2001.07685), section 2.2. With the weak augmentation a, the strong one A and the
    cross-entropy H, the loss of labelled images x and unlabelled images u is

        mean H(y, p(. | a(x))) + mean [max q >= THRESHOLD] H(argmax q, p(. | A(u)))
        q = p(. | a(u)), without gradient

    The optimiser is SGD with Nesterov momentum; the learning rate falls as cos(7 pi t / 16 T).
    Without unlabelled images only the first term is left.
    """
    torch.manual_seed(seed)
    generator = torch.Generator(data.device).manual_seed(seed)
    settings = FIXMATCH_SMALL if is_small(data) else FIXMATCH_LARGE
    network = small_cnn(data.shape[0], settings.width, data.n_classes).to(data.device)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema),
                             use_buffers=True)

    def weak(images: Tensor) -> Tensor:
        return as_grey(augment(images, settings.weak, generator), data)

    def strong(images: Tensor) -> Tensor:
        changed = augment(images, settings.strong, generator)
        return as_grey(cut_out(changed, settings.cutout, generator), data)
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
        return in_batches(lambda batch: averaged(as_grey(batch, data)), images)
    return predict


def pseudo_labels(logits: Tensor, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
    """The most probable class of each row of `logits` (B, K), and whether it counts: (B,), (B,).

    It counts, as 1.0 and not 0.0, if its probability is at least `threshold`.
    """
    probability, y = logits.detach().softmax(1).max(1)
    return y, (probability >= threshold).to(logits.dtype)


def unlabelled_loss(of_weak: Tensor, of_strong: Tensor) -> Tensor:
    """FixMatch's second term, a scalar, from the logits (B, K) of both views of each image.

    It is the mean over all rows, also those whose pseudo-label does not count.
    """
    y, counts = pseudo_labels(of_weak)
    return (counts * F.cross_entropy(of_strong, y, reduction="none")).mean()


def cut_out(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`images` (B, C, H, W) with a black square each, with sides of `size` pixels.

    It lies anywhere within the image.
    """
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


# Both


def is_small(data: SemiSupervisedData) -> bool:
    """Whether the images are as small as scikit-learn's digits."""
    return math.prod(data.shape) < 200


def as_grey(images: Tensor, data: SemiSupervisedData) -> Tensor:
    """uint8 images of `data` as floats from 0 to 1."""
    assert data.grey_levels is not None, "these data are points"
    return images / (data.grey_levels - 1)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator, device=generator.device)


def cosine_steps(network: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int,
                 part_of_cosine: float = 1) -> Iterator[Callable[[Tensor], None]]:
    """Yield, `n_steps` times, a function that makes a training step from a loss.

    The learning rate starts as the optimiser's and falls as cos(part_of_cosine * pi t / 2 T).
    `network` is in training mode before, and in evaluation mode after the last step.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: math.cos(part_of_cosine * math.pi * t / (2 * n_steps)))

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.train()
    for _ in range(n_steps):
        yield step
    network.eval()


def choose(indices: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` of the `indices`, uniformly with replacement."""
    return indices[torch.randint(len(indices), (n,), generator=generator, device=indices.device)]


@torch.no_grad()
def in_batches(logits: Callable[[Tensor], Tensor], images: Tensor, size: int = 1000) -> Tensor:
    """The classes (N,) that have the largest logits, computed for `size` images at a time."""
    return torch.cat([logits(batch).argmax(1) for batch in images.split(size)])
