"""Two semi-supervised neural networks to compare the flow with: M1+M2 and FixMatch.

`fit_m1_m2(data, seed)` and `fit_fixmatch(data, seed)` train on the images of a SemiSupervisedData,
the labels that it shows and nothing else, and return a function from images, uint8 (N, C, H, W), to
their classes, (N,). Their settings are fixed: they were chosen by the error on the validation
images of digits, over three choices of the labelled images; the comments say how many were tried.
Networks, batches and noise follow from `seed`.
"""

import itertools
import math
from collections.abc import Callable

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

        p(z1) = N(0, I)     p(x | z1) = Bernoulli(x; f(z1))     q(z1 | x) = N(mu(x), sigma(x)^2)
        log p(x) >= E_q [log p(x | z1)] - KL(q(z1 | x) || p(z1))

    f, mu and log sigma^2 are networks with two hidden layers of `width` softplus units. A grey
    level is the probability that a pixel is white: in x the bound is linear, so that this is its
    mean over all black-and-white versions of the image.
    """

    def __init__(self, n_pixels: int, n_latent: int, width: int):
        super().__init__()
        self.encoder = mlp(n_pixels, width, width, 2 * n_latent)
        self.decoder = mlp(n_latent, width, width, n_pixels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z1 | x), (B, L) each."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        return mean, log_var

    def bound(self, x: Tensor, noise: Tensor) -> Tensor:
        """The lower bound on log p(x) of each image, (B,) nats, with one sample of q.

        noise: (B, L), standard normal.
        """
        mean, log_var = self.encode(x)
        z1 = mean + (log_var / 2).exp() * noise
        log_likelihood = -F.binary_cross_entropy_with_logits(self.decoder(z1), x, reduction="none")
        return log_likelihood.sum(1) - kl_to_standard_normal(mean, log_var)


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


# Of M1+M2 by the size of the images: M1's latents, its width and epochs; M2's latents z2, its width
# and training steps.
SMALL_M1_M2 = {"n_latent1": 20, "width1": 200, "epochs": 100,
               "n_latent2": 10, "width2": 200, "steps": 3000}
LARGE_M1_M2 = {"n_latent1": 50, "width1": 600, "epochs": 20,
               "n_latent2": 50, "width2": 500, "steps": 6000}
M1_M2_BATCH, M1_M2_LR = 128, 1e-3
ALPHA = 0.1       # the paper's alpha is 0.1 N; its objective is a sum over N images, ours a mean


def fit_m1_m2(data: SemiSupervisedData, seed: int) -> Predict:
    """Train M1 on all training images, then M2 on samples of their latents -> predict.

    M2 minimises, as equations 8 and 9 of the paper divided by the number of images N,

        (N_l / N) E_labelled [L(z1, y)] + (N_u / N) E_unlabelled [U(z1)]
        - ALPHA E_labelled [log q(y | z1)]

    where each batch has new samples z1 from q(z1 | x). The optimiser is Adam, with a cosine
    schedule. `predict` returns the y of the largest q(y | z1), where z1 is the mean of q(z1 | x).
    """
    torch.manual_seed(seed)
    generator = torch.Generator(data.device).manual_seed(seed)
    sizes = SMALL_M1_M2 if math.prod(data.shape) < 200 else LARGE_M1_M2

    def pixels(images: Tensor) -> Tensor:
        return images.flatten(1) / (data.grey_levels - 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=data.device)
    x = pixels(data.train_x)
    m1 = M1(x.shape[1], sizes["n_latent1"], sizes["width1"]).to(data.device)
    n_steps = sizes["epochs"] * math.ceil(len(x) / M1_M2_BATCH)
    for step in cosine_steps(m1, torch.optim.Adam(m1.parameters(), M1_M2_LR), n_steps):
        index = torch.randint(len(x), (M1_M2_BATCH,), generator=generator, device=data.device)
        step(-m1.bound(x[index], normal(M1_M2_BATCH, sizes["n_latent1"])).mean())

    with torch.no_grad():
        mean, log_var = m1.encode(x)
        deviation = (log_var / 2).exp()
    m2 = M2(sizes["n_latent1"], sizes["n_latent2"], sizes["width2"], data.class_probs.float())
    m2 = m2.to(data.device)
    share_labelled = len(data.labelled) / len(x)

    def latents(indices: Tensor) -> tuple[Tensor, Tensor]:
        """Samples z1 of a batch of the images with these indices; the images' labels."""
        index = choose(indices, M1_M2_BATCH, generator)
        z1 = mean[index] + deviation[index] * normal(M1_M2_BATCH, sizes["n_latent1"])
        return z1, data.train_y[index]
    for step in cosine_steps(m2, torch.optim.Adam(m2.parameters(), M1_M2_LR), sizes["steps"]):
        z1, y = latents(data.labelled)
        bound = share_labelled * m2.labelled_bound(
            z1, y, normal(M1_M2_BATCH, sizes["n_latent2"])).mean()
        loss = ALPHA * F.cross_entropy(m2.classifier(z1), y) - bound
        if len(data.unlabelled):
            z1, _ = latents(data.unlabelled)
            noise = normal(data.n_classes, M1_M2_BATCH, sizes["n_latent2"])
            loss = loss - (1 - share_labelled) * m2.unlabelled_bound(z1, noise).mean()
        step(loss)

    def predict(images: Tensor) -> Tensor:
        return in_batches(lambda batch: m2.classifier(m1.encode(pixels(batch))[0]), images)
    return predict


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

# By the size of the images: channels of the first layer, training steps, batches, augmentation.
# Weak augmentation is a shift; strong augmentation shifts, rotates and scales, and cuts out a
# square with sides of `cutout` pixels.
SMALL_FIXMATCH = {"width": 32, "steps": 1500, "n_labelled": 32, "n_unlabelled": 128,
                  "weak": Augmentation(0, 0, 1), "strong": Augmentation(25, 0.2, 1.5), "cutout": 2}
LARGE_FIXMATCH = {"width": 16, "steps": 4000, "n_labelled": 32, "n_unlabelled": 128,
                  "weak": Augmentation(0, 0, 2), "strong": Augmentation(30, 0.25, 4), "cutout": 8}
FIXMATCH_LR, MOMENTUM, WEIGHT_DECAY, DECAY_OF_AVERAGE = 0.03, 0.9, 5e-4, 0.995
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
    sizes = SMALL_FIXMATCH if math.prod(data.shape) < 200 else LARGE_FIXMATCH
    network = small_cnn(data.shape[0], sizes["width"], data.n_classes).to(data.device)

    def grey(images: Tensor) -> Tensor:
        return images / (data.grey_levels - 1)

    def weak(images: Tensor) -> Tensor:
        return grey(augment(images, sizes["weak"], generator))

    def strong(images: Tensor) -> Tensor:
        return grey(cut_out(augment(images, sizes["strong"], generator), sizes["cutout"],
                            generator))
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY_OF_AVERAGE),
                             use_buffers=True)
    optimizer = torch.optim.SGD(network.parameters(), FIXMATCH_LR, MOMENTUM, nesterov=True,
                                weight_decay=WEIGHT_DECAY)
    for step in cosine_steps(network, optimizer, sizes["steps"], part_of_cosine=7 / 8):
        index = choose(data.labelled, sizes["n_labelled"], generator)
        x, y = weak(data.train_x[index]), data.train_y[index]
        if len(data.unlabelled):
            u = data.train_x[choose(data.unlabelled, sizes["n_unlabelled"], generator)]
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
        return in_batches(lambda batch: averaged(grey(batch)), images)
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


def cosine_steps(network: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int,
                 part_of_cosine: float = 1):
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
