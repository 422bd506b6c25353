"""The bijections of the flow. The forward direction is x -> z.

    forward(x) -> (z, ldj)      ldj: log|det dz/dx| of each sample, in nats, shape (B,)
    inverse(z) -> x

The log-determinant of an `Affine` bijection, z = A x + b, follows from its weights alone: its
forward returns z, and MultiScale, the container of all bijections, adds the log-determinants of all
affine ones at once.

x is (B, C, H, W) for images and (B, C) for vectors. The couplings of h_phi take the embedding of
the label, (B, E), as a second argument, the context. No bijection keeps state between calls.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_shape
from .kernels import beside

Shape = tuple[int, ...]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View v (C,) so that it broadcasts over x (B, C, ...)."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def sum_per_sample(v: Tensor) -> Tensor:
    """Sum v (B, ...) over all dimensions but the first: (B,)."""
    return v.flatten(1).sum(1)


class Bijection(nn.Module):
    """Base class of all bijections: the module's docstring states their contract."""

    inverse: Callable[..., Tensor]
    fitted = True           # whether `fit` has been called, if it does anything

    def in_domain(self, x: Tensor) -> Tensor:
        """Where forward is defined: booleans of x's shape, by default true where x is finite."""
        return x.isfinite()

    def fit(self, images: Tensor | None) -> None:
        """Set what depends on the training images (N, C, H, W), integer grey levels: by default
        nothing."""

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of z for x of shape `shape`, both without the batch dimension."""
        return shape


class Affine(Bijection):
    """Base class of z = A x + b, with the same A for the channels of every pixel.

    forward(x) -> z and inverse(z) -> x; log|det dz/dx| is the number of pixels times log|det A|.
    """

    def log_det_weights(self) -> Tensor:
        """What log|det A| follows from, of a shape that follows from the number of channels."""
        raise NotImplementedError

    @staticmethod
    def log_dets(weights: Sequence[Tensor]) -> Tensor:
        """log|det A| of N layers of this class, (N,).

        weights: their `log_det_weights`, stacked, a tensor (N_1, ...), (N_2, ...), ... for each
            number of channels; N = N_1 + N_2 + ...
        """
        raise NotImplementedError


class Squeeze(Bijection):
    """(C, H, W) -> (4C, H/2, W/2): each 2 x 2 block becomes channels, in the order (dy, dx, c).

    Dinh et al. 2017, section 3.6; the channels are ordered as in the authors' code.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c, h, w = x.shape
        z = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)  # (B, dy, dx, C, H/2, W/2)
        return z.reshape(b, 4 * c, h // 2, w // 2), x.new_zeros(b)

    def inverse(self, z: Tensor) -> Tensor:
        b, c, h, w = z.shape
        x = z.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)  # (B, C, H/2, dy, W/2, dx)
        return x.reshape(b, c // 4, 2 * h, 2 * w)

    def output_shape(self, shape: Shape) -> Shape:
        c, h, w = shape
        return 4 * c, h // 2, w // 2


class ActNorm(Affine):
    """z = (x - bias) * exp(logs), per channel (Kingma & Dhariwal 2018, arXiv 1807.03039, 3.1).

    It is the identity until `initialize` sets it from a batch (data-dependent initialisation),
    which the buffer `initialized` records. The scale is then 1 / (standard deviation + 1e-6), which
    is 1e6 for a channel that is constant.
    """

    initialized: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set bias and logs such that each channel of z that is not constant has mean 0 and
        standard deviation 1.

        x: the batch (B, C, ...). Raises ValueError if it has fewer than two values per channel, or
            values that are not finite.
        """
        check_shape("x", x, (len(self.bias), *x.shape[2:]))
        values = x.transpose(0, 1).flatten(1)  # (C, B * H * W)
        if values.shape[1] < 2 or not values.isfinite().all():
            raise ValueError("ActNorm needs at least two values per channel to initialise from, "
                             "and all of them finite")
        self.bias.copy_(values.mean(1))
        self.logs.copy_(-torch.log(values.std(1) + 1e-6))
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return (x - per_channel(self.bias, x)) * per_channel(self.logs.exp(), x)

    def inverse(self, z: Tensor) -> Tensor:
        return z * per_channel((-self.logs).exp(), z) + per_channel(self.bias, z)

    def log_det_weights(self) -> Tensor:
        return self.logs

    @staticmethod
    def log_dets(weights: Sequence[Tensor]) -> Tensor:
        return torch.cat([logs.sum(1) for logs in weights])


class CheckerboardCoupling(Bijection):
    """z = m x + (1 - m) (x s + t), where (raw, t) = net(m x) and s = sigmoid(raw + 2).

    The mask m alternates over the pixels like a checkerboard and is 1 where x passes unchanged
    (Dinh et al. 2017, section 3.4). As in the authors' code, t is added after scaling and s has no
    offset, while ChannelCoupling adds t before scaling and 1e-6 to s. Where s is too small for the
    type of x, x cannot be recovered from forward's z: the inverse then returns other finite values.

    net: maps C channels to 2C, first raw, then t
    size: (H, W) of x
    parity: m at pixel (0, 0), 0 or 1
    """

    mask: Tensor

    def __init__(self, net: nn.Module, size: tuple[int, int], parity: int):
        super().__init__()
        self.net = net
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        mask = ((rows + columns + parity) % 2).to(torch.get_default_dtype())
        self.register_buffer("mask", mask[None, None], persistent=False)  # (1, 1, H, W)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, transformed = self.mask * x, 1 - self.mask
        raw, t = self.net(kept).chunk(2, dim=1)
        s, log_s = torch.sigmoid(raw + 2), F.logsigmoid(raw + 2)
        return kept + transformed * (x * s + t), sum_per_sample(transformed * log_s)

    def inverse(self, z: Tensor) -> Tensor:
        raw, t = self.net(self.mask * z).chunk(2, dim=1)
        s = torch.sigmoid(raw + 2).clamp(min=torch.finfo(z.dtype).tiny)
        return torch.where(self.mask.bool(), z, (z - t) / s)


def scale_shift(net: nn.Module, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
    """s and t of ChannelCoupling, from x and the context, the input of its network."""
    raw, t = net(torch.cat((x, *context), 1) if context else x).chunk(2, dim=1)
    return torch.sigmoid(raw + 2) + 1e-6, t


class ChannelCoupling(Bijection):
    """With x = (x1, x2), the two halves of the channels:

        z1 = (x1 + t1) s1,  (raw1, t1) = net1(x2)
        z2 = (x2 + t2) s2,  (raw2, t2) = net2(z1)        s = sigmoid(raw + 2) + 1e-6

    With a context (B, E), concatenated to the input of both networks, it is the conditional
    coupling of h_phi. net1 and net2 map C/2 (+ E) channels to C, first raw, then t.
    """

    def __init__(self, net1: nn.Module, net2: nn.Module):
        super().__init__()
        self.net1, self.net2 = net1, net2

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        s1, t1 = scale_shift(self.net1, x2, *context)
        z1 = (x1 + t1) * s1
        s2, t2 = scale_shift(self.net2, z1, *context)
        z2 = (x2 + t2) * s2
        return torch.cat((z1, z2), 1), sum_per_sample(torch.cat((s1, s2), 1).log())

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        z1, z2 = z.chunk(2, dim=1)
        s2, t2 = scale_shift(self.net2, z1, *context)
        x2 = z2 / s2 - t2
        s1, t1 = scale_shift(self.net1, x2, *context)
        return torch.cat((z1 / s1 - t1, x2), 1)


class Split(NamedTuple):
    """Marks, in the list of layers of a MultiScale, where channels leave the flow.

    The first n of C channels, or `split_size(C)` if n is None, become part of z; the next layers
    transform the others (Dinh et al. 2017, section 3.6).
    """

    n: int | None = None


def split_size(channels: int) -> int:
    """How many channels leave at a split: half of `channels`, rounded up to an even number."""
    n = channels // 2
    return n + n % 2


class MultiScale(Bijection):
    """A flow of several scales: bijections in order, and a Split wherever channels leave.

    z (B, D) is what leaves each scale, in order, each part flattened in the order (c, h, w); all
    that is left leaves the last one. A context goes to every bijection that is not affine.

    input_shape: of x, without the batch dimension
    layers: bijections and Splits; an nn.Sequential groups bijections under one number

    Raises ValueError for x or z of another shape.
    """

    levels: Any     # the bijections of each scale, by the name that the weights have
    n_pixels: Tensor

    def __init__(self, input_shape: Sequence[int], layers: Iterable[nn.Module | Split]):
        super().__init__()
        scales: list[list[nn.Module]] = [[]]
        self.part_shapes: list[Shape] = []      # of what leaves each scale
        # The affine layers with their numbers of pixels, grouped by class and number of channels.
        affine: dict[type[Affine], dict[int, list[tuple[Affine, int]]]] = {}
        shape: Shape = tuple(input_shape)
        for layer in layers:
            if isinstance(layer, Split):
                n = layer.n or split_size(shape[0])
                self.part_shapes.append((n, *shape[1:]))
                shape = (shape[0] - n, *shape[1:])
                scales.append([])
                continue
            scales[-1].append(layer)
            for bijection in _in_order([layer]):
                if isinstance(bijection, Affine):
                    group = affine.setdefault(type(bijection), {}).setdefault(shape[0], [])
                    group.append((bijection, math.prod(shape[1:])))
                shape = bijection.output_shape(shape)
        self.part_shapes.append(shape)
        self.input_shape, self.dim = tuple(input_shape), math.prod(input_shape)
        self.levels = nn.ModuleList(map(nn.ModuleList, scales))
        self._affine = {kind: list(by_channels.values()) for kind, by_channels in affine.items()}
        n_pixels = [n for groups in self._affine.values() for group in groups for _, n in group]
        self.register_buffer("n_pixels", torch.tensor(n_pixels, dtype=torch.get_default_dtype()),
                             persistent=False)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        check_shape("x", x, self.input_shape)
        log_det_of_affine = self._start_log_det_of_affine()
        ldjs, parts = [x.new_zeros(len(x))], []
        for scale, (n, *_) in zip(self.levels, self.part_shapes):
            for bijection in _in_order(scale):
                if isinstance(bijection, Affine):
                    x = bijection(x)
                else:
                    x, ldj = bijection(x, *context)
                    ldjs.append(ldj)
            parts.append(x[:, :n].flatten(1))
            x = x[:, n:]
        return torch.cat(parts, 1), torch.stack(ldjs).sum(0) + log_det_of_affine()

    def _start_log_det_of_affine(self) -> Callable[[], Tensor]:
        """Start the sum of pixels times log|det A| over all affine layers -> a function that waits
        for it, a tensor ()."""
        # The gradients of weights are where these are stacked, on the main stream.
        stacked = {kind: [torch.stack([layer.log_det_weights() for layer, _ in group])
                          for group in groups] for kind, groups in self._affine.items()}
        if not stacked:
            return self.n_pixels.sum

        def log_det() -> Tensor:
            return torch.cat([kind.log_dets(weights) for kind, weights in stacked.items()]
                             ) @ self.n_pixels
        return beside(log_det, [w for weights in stacked.values() for w in weights])

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        check_shape("z", z, (self.dim,))
        flat = z.split([math.prod(shape) for shape in self.part_shapes], 1)
        parts = [part.unflatten(1, shape) for part, shape in zip(flat, self.part_shapes)]
        x = parts.pop()
        for scale in reversed(self.levels):
            for bijection in reversed(list(_in_order(scale))):
                x = bijection.inverse(x, *(() if isinstance(bijection, Affine) else context))
            if parts:
                x = torch.cat((parts.pop(), x), 1)
        return x


def _in_order(layers: Iterable[nn.Module]) -> Iterator[Any]:
    """The bijections of `layers`, each nn.Sequential taken apart."""
    for layer in layers:
        yield from layer if isinstance(layer, nn.Sequential) else (layer,)
