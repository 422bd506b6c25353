"""The bijections of the flow. The forward direction is x -> z.

They share one contract:

    forward(x) -> (z, ldj)      ldj: log|det dz/dx| of each sample, in nats, shape (B,)
    inverse(z) -> x

x is (B, C, H, W) for images and (B, C) for vectors. The bijections of h_phi take the embedding of
the label, (B, E), as a second argument, the context. No bijection keeps state between calls.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View v (C,) so that it broadcasts over x (B, C, ...)."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def sum_per_sample(v: Tensor) -> Tensor:
    """Sum v (B, ...) over all dimensions but the first: (B,)."""
    return v.flatten(1).sum(1)


def total(ldjs: Iterable[Tensor | float]) -> Tensor:
    """The sum of log-determinants of each sample, (B,); a part without one has 0.0."""
    return torch.stack([ldj for ldj in ldjs if isinstance(ldj, Tensor)]).sum(0)


class Bijection(nn.Module):
    """Base class of all bijections; the module's docstring states the contract."""

    inverse: Callable[..., Tensor]

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of z for x of shape `shape`, both without the batch dimension."""
        return shape


class Squeeze(Bijection):
    """(C, H, W) -> (4C, H/2, W/2): each 2 x 2 block becomes channels, in the order (dy, dx, c).

    Dinh et al. 2017, section 3.6; the order of the channels is that of the authors' code.
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


class ActNorm(Bijection):
    """z = (x - bias) * exp(logs), per channel (Kingma & Dhariwal 2018, arXiv 1807.03039, 3.1).

    It is the identity until `initialize` sets it from a batch (data-dependent initialisation). The
    buffer `initialized` records that, and is saved with the weights.
    """

    initialized: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set bias and logs such that each channel of z has mean 0 and standard deviation 1.

        x: the batch (B, C, ...). Raises ValueError if it has fewer than two values per channel.
        """
        values = x.transpose(0, 1).flatten(1)  # (C, B * H * W)
        if values.shape[1] < 2:
            raise ValueError("ActNorm needs at least two values per channel to initialise from")
        self.bias.copy_(values.mean(1))
        self.logs.copy_(-torch.log(values.std(1) + 1e-6))
        self.initialized.fill_(True)

    def transform(self, x: Tensor) -> Tensor:
        """x (B, C, ...) -> z, without the log-determinant."""
        return (x - per_channel(self.bias, x)) * per_channel(self.logs.exp(), x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = math.prod(x.shape[2:])
        return self.transform(x), (self.logs.sum() * pixels).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return z * per_channel((-self.logs).exp(), z) + per_channel(self.bias, z)


class CheckerboardCoupling(Bijection):
    """z = m x + (1 - m) (x s + t), where (raw, t) = net(m x) and s = sigmoid(raw + 2).

    The mask m alternates over the pixels like a checkerboard and is 1 where x passes unchanged
    (Dinh et al. 2017, section 3.4). With `parity` 0, m is 0 at pixel (0, 0); with parity 1 it is 1
    there. The network maps C channels to 2C: first raw, then t.

    Here t is added after scaling and s has no offset; ChannelCoupling adds t before scaling and
    1e-6 to s. The two differ in this way in the authors' code.
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
        kept = self.mask * z
        raw, t = self.net(kept).chunk(2, dim=1)
        return kept + (1 - self.mask) * (z - t) / torch.sigmoid(raw + 2)


def _scale_shift(net: nn.Module, x: Tensor,
                 context: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
    """s and t of ChannelCoupling and SplitCoupling."""
    if context:
        x = torch.cat((x, *context), 1)
    raw, t = net(x).chunk(2, dim=1)
    return torch.sigmoid(raw + 2) + 1e-6, t


class ChannelCoupling(Bijection):
    """With x = (x1, x2), the two halves of the channels:

        z1 = (x1 + t1) s1,  (raw1, t1) = net1(x2)
        z2 = (x2 + t2) s2,  (raw2, t2) = net2(z1)        s = sigmoid(raw + 2) + 1e-6

    A context (B, E), if given, is concatenated to the input of both networks: this is the
    conditional coupling of h_phi. Each network maps C/2 (+ E) channels to C: first raw, then t.
    """

    def __init__(self, net1: nn.Module, net2: nn.Module):
        super().__init__()
        self.net1, self.net2 = net1, net2

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        s1, t1 = _scale_shift(self.net1, x2, context)
        z1 = (x1 + t1) * s1
        s2, t2 = _scale_shift(self.net2, z1, context)
        z2 = (x2 + t2) * s2
        return torch.cat((z1, z2), 1), sum_per_sample(s1.log()) + sum_per_sample(s2.log())

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        z1, z2 = z.chunk(2, dim=1)
        s2, t2 = _scale_shift(self.net2, z1, context)
        x2 = z2 / s2 - t2
        s1, t1 = _scale_shift(self.net1, x2, context)
        return torch.cat((z1 / s1 - t1, x2), 1)


class SplitCoupling(Bijection):
    """On vectors x = (x1, x2) with x2 (B, n): z1 = (x1 + t) s and z2 = x2, where
    (raw, t) = net(x2) and s = sigmoid(raw + 2) + 1e-6.

    With x2 = z_f and a Gaussian base of z1, z_aux given z_f is a diagonal Gaussian: the prior of
    Kingma & Dhariwal 2018 (arXiv 1807.03039) for the part that leaves the flow at a split. The
    network maps n dimensions to twice those of x1: first raw, then t.
    """

    def __init__(self, net: nn.Module, n: int):
        super().__init__()
        self.net, self.n = net, n

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x[:, :-self.n], x[:, -self.n:]
        s, t = _scale_shift(self.net, x2)
        return torch.cat(((x1 + t) * s, x2), 1), sum_per_sample(s.log())

    def inverse(self, z: Tensor) -> Tensor:
        z1, x2 = z[:, :-self.n], z[:, -self.n:]
        s, t = _scale_shift(self.net, x2)
        return torch.cat((z1 / s - t, x2), 1)


class ConditionalFlowStep(Bijection):
    """A flow step of h_phi: ActNorm, invertible 1x1 convolution, conditional channel coupling."""

    def __init__(self, act: ActNorm, inv: Bijection, coupling: ChannelCoupling):
        super().__init__()
        self.act, self.inv, self.coupling = act, inv, coupling

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x, ldj_act = self.act(x)
        x, ldj_inv = self.inv(x)
        z, ldj_coupling = self.coupling(x, context)
        return z, total([ldj_act, ldj_inv, ldj_coupling])

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        return self.act.inverse(self.inv.inverse(self.coupling.inverse(z, context)))


class Split:
    """Marks, in the list of layers of a MultiScale, where channels leave the flow.

    The first n of C channels, or `split_size(C)` if n is None, become part of z; the next layers
    transform the others (Dinh et al. 2017, section 3.6).
    """

    def __init__(self, n: int | None = None):
        self.n = n


def split_size(channels: int) -> int:
    """How many channels leave at a split: half of `channels`, rounded up to an even number."""
    half = channels // 2
    return half + half % 2


class MultiScale(Bijection):
    """A flow of `layers`: bijections in order, and a Split wherever channels leave.

    z (B, D) holds the channels that left at each split, in order, and last what reached the end,
    each part flattened in the order (c, h, w). A context, if given, goes to every bijection.
    `levels` has the bijections before, between and after the splits. `cheap_last_part`: whether
    `last_part` computes less than `forward`.
    """

    cheap_last_part = False
    levels: Sequence[Sequence[Bijection]]

    def __init__(self, input_shape: Sequence[int], layers: Iterable[Bijection | Split]):
        super().__init__()
        levels: list[list[Bijection]] = [[]]
        self.part_shapes: list[Shape] = []  # of the parts of z
        shape: Shape = tuple(input_shape)
        for layer in layers:
            if isinstance(layer, Split):
                n = layer.n or split_size(shape[0])
                self.part_shapes.append((n, *shape[1:]))
                shape = (shape[0] - n, *shape[1:])
                levels.append([])
            else:
                shape = layer.output_shape(shape)
                levels[-1].append(layer)
        self.part_shapes.append(shape)
        modules: Any = nn.ModuleList(nn.ModuleList(level) for level in levels)
        self.levels = modules

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        ldjs, parts = [x.new_zeros(len(x))], []
        for i, level in enumerate(self.levels):
            if i:
                n = self.part_shapes[i - 1][0]
                parts.append(x[:, :n].flatten(1))
                x = x[:, n:]
            for bijection in level:
                x, ldj = bijection(x, *context)
                ldjs.append(ldj)
        parts.append(x.flatten(1))
        return torch.cat(parts, 1), total(ldjs)  # (B, D), (B,)

    def last_part(self, x: Tensor, n: int) -> Tensor:
        """The last n dimensions of z: x (B, ...) -> (B, n)."""
        return self(x)[0][:, -n:]

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        flat = z.split([math.prod(shape) for shape in self.part_shapes], 1)
        parts = [part.unflatten(1, shape) for part, shape in zip(flat, self.part_shapes)]
        x = parts[-1]
        for i in reversed(range(len(self.levels))):
            for bijection in reversed(self.levels[i]):
                x = bijection.inverse(x, *context)
            if i:
                x = torch.cat((parts[i - 1], x), 1)
        return x
