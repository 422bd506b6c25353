"""M1+M2, two generative models of semi-supervised images, to compare the flow with.

`fit_m1_m2(data, seed)` trains them. The settings are fixed, one for images of the size of digits,
and one for larger ones; the comments say how they were chosen, in which test images had no part.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.fixmatch import Predict, as_grey, choose, classify, cosine_steps, is_small
from utils.data import SemiSupervisedData


class M1(nn.Module):
    """A variational autoencoder of images x (B, D), grey levels from 0 to 1.

    Section 2.1, "M1", of Kingma, Rezende, Mohamed and Welling, "Semi-Supervised Learning with Deep
    Generative Models" (2014, arXiv 1406.5298), equations 1, 3 and 5:

        p(z1) = N(0, I)     p(n x | z1) = Binomial(n, f(z1))    q(z1 | x) = N(mu(x), sigma(x)^2)
        log p(x) >= E_q [log p(x | z1)] - KL(q(z1 | x) || p(z1))

    f, mu and log sigma^2 are networks with two hidden layers of softplus units. A pixel of
    scikit-learn's digits counts the dots of ink among 16, so there n is 16. The paper has n = 1,
    Bernoulli: a grey level is then the probability of ink, and the bound the mean of those of all
    black-and-white versions of the image.

    n_pixels, n_latent: D and L, the dimensions of x and of z1.
    width: units of a hidden layer.
    n_trials: n.
    """

    def __init__(self, n_pixels: int, n_latent: int, width: int, n_trials: int = 1):
        super().__init__()
        self.n_trials = n_trials
        self.encoder = mlp(n_pixels, width, width, 2 * n_latent)
        self.decoder = mlp(n_latent, width, width, n_pixels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z1 | x), (B, L) each."""
        return self.encoder(x).chunk(2, 1)

    def bound(self, x: Tensor, noise: Tensor) -> Tensor:
        """The lower bound on log p(x) of each image, (B,) nats, with one sample of q.

        It lacks the logarithms of the binomial coefficients, which do not depend on the weights.
        noise: standard normal, (B, L).
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

    The sum over y is exact. The networks have one hidden layer of softplus units; y enters as a
    one-hot vector.

    n_latent1, n_latent2: dimensions of z1 and of z2.
    width: units of a hidden layer.
    prior: p(y), (K,).
    """

    def __init__(self, n_latent1: int, n_latent2: int, width: int, prior: Tensor):
        super().__init__()
        n_classes = len(prior)
        self.classifier = mlp(n_latent1, width, n_classes)
        self.encoder = mlp(n_classes + n_latent1, width, 2 * n_latent2)
        self.decoder = mlp(n_classes + n_latent2, width, 2 * n_latent1)
        self.register_buffer("log_prior", prior.log())

    def labelled_bound(self, z1: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """-L(z1, y), the lower bound on log p(z1, y), (B,) nats, with one sample of q(z2 | y, z1).

        y: classes (B,).
        noise: standard normal, (B, dimensions of z2).
        """
        one_hot = F.one_hot(y, len(self.log_prior)).to(z1.dtype)
        mean, log_var = self.encoder(torch.cat((one_hot, z1), 1)).chunk(2, 1)
        z2 = mean + (log_var / 2).exp() * noise
        decoded = self.decoder(torch.cat((one_hot, z2), 1)).chunk(2, 1)
        return log_normal(z1, *decoded) + self.log_prior[y] - kl_to_standard_normal(mean, log_var)

    def unlabelled_bound(self, z1: Tensor, noise: Tensor) -> Tensor:
        """-U(z1), the lower bound on log p(z1), (B,) nats; noise: (K, B, dimensions of z2)."""
        n_classes = len(self.log_prior)
        every_y = torch.arange(n_classes, device=z1.device).repeat_interleave(len(z1))
        bounds = self.labelled_bound(z1.repeat(n_classes, 1), every_y, noise.flatten(0, 1))
        log_q = self.classifier(z1).log_softmax(1).T
        return (log_q.exp() * (bounds.view(n_classes, -1) - log_q)).sum(0)


class M1M2Settings(NamedTuple):
    """Dimensions of the latents, widths of the networks and training steps, of M1 and of M2."""

    n_trials: int       # of M1
    n_latent1: int
    width1: int
    steps1: int
    n_latent2: int      # of M2
    width2: int
    steps2: int
    batch_size: int     # of both
    lr: float           # of Adam, at the start of a cosine schedule
    alpha: float        # the paper's alpha is N times this: its objective is a sum over N images


# Chosen by the mean validation error of digits over three choices of labelled images, among
# thirteen combinations of n_trials (1, 16), alpha (0.1, 1, 3, 10) and the other settings. n_trials
# matters most; M1 overfits in 6,000 steps.
SMALL = M1M2Settings(n_trials=16, n_latent1=20, width1=200, steps1=3000,
                     n_latent2=10, width2=200, steps2=1000,
                     batch_size=128, lr=3e-3, alpha=1)
# The sizes and the alpha of the paper; as many steps as take about ten minutes on two CPU cores.
LARGE = M1M2Settings(n_trials=1, n_latent1=50, width1=600, steps1=10_000,
                     n_latent2=50, width2=500, steps2=6000,
                     batch_size=128, lr=1e-3, alpha=0.1)


def fit_m1_m2(data: SemiSupervisedData, seed: int) -> Predict:
    """Train M1 on all training images, then M2 on samples of their latents.

    Returns a function from images (N, C, H, W), uint8, to classes (N,): the y of the largest
    q(y | z1), where z1 is the mean of q(z1 | x).
    data: its images, and of the labels those that it shows.
    seed: of the initial weights, the batches and the noise.
    """
    torch.manual_seed(seed)
    generator = torch.Generator(data.device).manual_seed(seed)
    settings = SMALL if is_small(data) else LARGE

    def pixels(images: Tensor) -> Tensor:
        return as_grey(images, data).flatten(1)
    m1 = train_m1(pixels(data.train_x), settings, generator)
    m2 = train_m2(m1, pixels(data.train_x), data, settings, generator)

    def predict(images: Tensor) -> Tensor:
        return classify(lambda batch: m2.classifier(m1.encode(pixels(batch))[0]), images)
    return predict


def train_m1(x: Tensor, settings: M1M2Settings, generator: torch.Generator) -> M1:
    """Maximise the mean bound on log p(x) of the images x (N, D)."""
    m1 = M1(x.shape[1], settings.n_latent1, settings.width1, settings.n_trials).to(x.device)
    optimizer = torch.optim.Adam(m1.parameters(), settings.lr)
    for step in cosine_steps(m1, optimizer, settings.steps1):
        batch = choose(x, settings.batch_size, generator)
        step(-m1.bound(batch, normal(generator, len(batch), settings.n_latent1)).mean())
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

    def latents(indices: Tensor) -> tuple[Tensor, Tensor]:
        """Samples z1 of a batch of the images with these indices, and the labels."""
        index = choose(indices, settings.batch_size, generator)
        noise = normal(generator, len(index), settings.n_latent1)
        return mean[index] + deviation[index] * noise, data.train_y[index]
    optimizer = torch.optim.Adam(m2.parameters(), settings.lr)
    for step in cosine_steps(m2, optimizer, settings.steps2):
        z1, y = latents(data.labelled)
        noise = normal(generator, len(z1), settings.n_latent2)
        bound = share_labelled * m2.labelled_bound(z1, y, noise).mean()
        classification = F.cross_entropy(m2.classifier(z1), y)
        if len(data.unlabelled):
            z1, _ = latents(data.unlabelled)
            noise = normal(generator, data.n_classes, len(z1), settings.n_latent2)
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


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator, device=generator.device)
