"""The bijections of the flow, forward direction x -> z.

One contract for all of them:

    forward(x) -> (z, ldj)      ldj: log|det dz/dx| of each sample, in nats, shape (B,)
    inverse(z) -> x

x is (B, C, H, W), or (B, C) where there is no space left; a bijection of the conditional
part takes the label's embedding as a second argument. Nothing here keeps state between calls.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def per_channel(v, x):
    """View v (C,) so that it broadcasts over the channels of x (B, C, ...)."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def sum_per_sample(v):
    """Sum v (B, ...) over everything but the batch: (B,)."""
    return v.flatten(1).sum(1)


class Bijection(nn.Module):
    """The contract (module docstring), for bijections that keep the shape of their input."""

    def output_shape(self, shape):
        """Shape of z without the batch, for x of shape `shape`."""
        return shape


class Logit(Bijection):
    """x' = x (1 - alpha) + alpha / 2; z = log x' - log(1 - x'), for x in [0, 1].

    Dinh et al. 2017 (arXiv 1605.08803), section 4.1; alpha keeps the ends of [0, 1] finite.
    """

    def __init__(self, alpha=0.05):
        super().__init__()
        self.alpha = alpha

    def forward(self, x):
        x = x * (1 - self.alpha) + self.alpha / 2
        log_x, log_1mx = x.log(), torch.log1p(-x)
        return log_x - log_1mx, sum_per_sample(math.log(1 - self.alpha) - log_x - log_1mx)

    def inverse(self, z):
        return (torch.sigmoid(z) - self.alpha / 2) / (1 - self.alpha)


class Squeeze(Bijection):
    """(C, H, W) -> (4C, H/2, W/2): each 2 x 2 block becomes channels, in the order (dy, dx, c)."""

    def forward(self, x):
        b, c, h, w = x.shape
        z = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)  # (B, dy, dx, C, H/2, W/2)
        return z.reshape(b, 4 * c, h // 2, w // 2), x.new_zeros(b)

    def inverse(self, z):
        b, c, h, w = z.shape
        x = z.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)       # (B, C, H/2, dy, W/2, dx)
        return x.reshape(b, c // 4, 2 * h, 2 * w)

    def output_shape(self, shape):
        c, h, w = shape
        return 4 * c, h // 2, w // 2


class ActNorm(Bijection):
    """z = (x - bias) * exp(logs), per channel (Kingma & Dhariwal 2018, arXiv 1807.03039, 3.1).

    The identity until `initialize` has seen a batch; `initialized` is saved with the weights.
    """

    def __init__(self, channels):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x):
        """Set bias and logs so that every channel of this batch comes out with mean 0, deviation 1.

        Raises ValueError if x (B, C, ...) has fewer than two values a channel.
        """
        values = x.transpose(0, 1).flatten(1)                             # (C, B * H * W)
        if values.shape[1] < 2:
            raise ValueError("ActNorm needs at least two values a channel to initialise from")
        self.bias.copy_(values.mean(1))
        self.logs.copy_(-torch.log(values.std(1) + 1e-6))
        self.initialized.fill_(True)

    def transform(self, x):
        """x (B, C, ...) -> z, without the log-det."""
        return (x - per_channel(self.bias, x)) * per_channel(self.logs.exp(), x)

    def forward(self, x):
        pixels = math.prod(x.shape[2:])
        return self.transform(x), (self.logs.sum() * pixels).expand(len(x))

    def inverse(self, z):
        return z * per_channel((-self.logs).exp(), z) + per_channel(self.bias, z)


class CheckerboardCoupling(Bijection):
    """z = m x + (1 - m) (x s + t), with (raw, t) = net(m x) and s = sigmoid(raw + 2).

    The mask m, 1 where x passes unchanged, alternates over the pixels (Dinh et al. 2017,
    section 3.4). `parity` 0 has m = 0 at pixel (0, 0), parity 1 is its complement.
    net: C channels -> 2C, the first C of them raw.
    """

    def __init__(self, net, size, parity):
        super().__init__()
        self.net = net
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        mask = ((rows + columns + parity) % 2).to(torch.get_default_dtype())
        self.register_buffer("mask", mask[None, None], persistent=False)  # (1, 1, H, W)

    def forward(self, x):
        kept = self.mask * x
        raw, t = self.net(kept).chunk(2, dim=1)
        raw, free = raw + 2, 1 - self.mask
        return kept + free * (x * torch.sigmoid(raw) + t), sum_per_sample(free * F.logsigmoid(raw))

    def inverse(self, z):
        kept = self.mask * z
        raw, t = self.net(kept).chunk(2, dim=1)
        return kept + (1 - self.mask) * (z - t) / torch.sigmoid(raw + 2)


class ChannelCoupling(Bijection):
    """x = (x1, x2) by halves of the channels; x1 <- (x1 + t) s from net1(x2), then
    x2 <- (x2 + t) s from net2(the new x1), with (raw, t) = net(.), s = sigmoid(raw + 2) + 1e-6.

    A context (B, E) given to `forward` and `inverse` is appended to the channels that each net
    sees (the conditional coupling). net: C/2 (+ E) channels -> C, the first C/2 of them raw.
    """

    def __init__(self, net1, net2):
        super().__init__()
        self.net1, self.net2 = net1, net2

    @staticmethod
    def _scale_shift(net, x, context):
        if context:
            x = torch.cat((x, *context), 1)
        raw, t = net(x).chunk(2, dim=1)
        return torch.sigmoid(raw + 2) + 1e-6, t

    def forward(self, x, *context):
        x1, x2 = x.chunk(2, dim=1)
        s1, t = self._scale_shift(self.net1, x2, context)
        z1 = (x1 + t) * s1
        s2, t = self._scale_shift(self.net2, z1, context)
        z2 = (x2 + t) * s2
        return torch.cat((z1, z2), 1), sum_per_sample(s1.log()) + sum_per_sample(s2.log())

    def inverse(self, z, *context):
        z1, z2 = z.chunk(2, dim=1)
        s, t = self._scale_shift(self.net2, z1, context)
        x2 = z2 / s - t
        s, t = self._scale_shift(self.net1, x2, context)
        return torch.cat((z1 / s - t, x2), 1)


class ConditionalStep(Bijection):
    """One step of h_phi: ActNorm, invertible 1x1 convolution, conditional channel coupling."""

    def __init__(self, act, inv, coupling):
        super().__init__()
        self.act, self.inv, self.coupling = act, inv, coupling

    def forward(self, x, e):
        x, ldj_act = self.act(x)
        x, ldj_inv = self.inv(x)
        z, ldj_coupling = self.coupling(x, e)
        return z, ldj_act + ldj_inv + ldj_coupling

    def inverse(self, z, e):
        return self.act.inverse(self.inv.inverse(self.coupling.inverse(z, e)))


def split_size(channels):
    """How many of `channels` leave at a split: half of them, rounded up to an even number."""
    half = channels // 2
    return half + half % 2


class MultiScale(Bijection):
    """Levels of bijections; between two levels a split, where the first half of the channels leaves.

    z (B, D) holds, flattened in the order (c, h, w), what left at each split in turn, then what
    is left at the end. A context, if any, goes to every bijection.
    """

    def __init__(self, levels, input_shape):
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(level) for level in levels)
        self.left_shapes = []                                             # of each part of z
        shape = tuple(input_shape)
        for i, level in enumerate(self.levels):
            if i:
                n = split_size(shape[0])
                self.left_shapes.append((n, *shape[1:]))
                shape = (shape[0] - n, *shape[1:])
            for bijection in level:
                shape = bijection.output_shape(shape)
        self.left_shapes.append(shape)

    def forward(self, x, *context):
        ldj, parts = x.new_zeros(len(x)), []
        for i, level in enumerate(self.levels):
            if i:
                n = split_size(x.shape[1])
                parts.append(x[:, :n].flatten(1))
                x = x[:, n:]
            for bijection in level:
                x, ldj_i = bijection(x, *context)
                ldj = ldj + ldj_i
        parts.append(x.flatten(1))
        return torch.cat(parts, 1), ldj                                   # (B, D), (B,)

    def inverse(self, z, *context):
        parts = z.split([math.prod(shape) for shape in self.left_shapes], 1)
        parts = [part.unflatten(1, shape) for part, shape in zip(parts, self.left_shapes)]
        x = parts[-1]
        for i in reversed(range(len(self.levels))):
            for bijection in reversed(self.levels[i]):
                x = bijection.inverse(x, *context)
            if i:
                x = torch.cat((parts[i - 1], x), 1)
        return x
