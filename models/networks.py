"""The networks inside the couplings. They are ordinary functions: nothing here is inverted."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .bijections import ActNorm


def reflect_pad(x):
    """x (B, C, H, W) with one more row and column on each side, mirrored: (B, C, H + 2, W + 2)."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _reflect_pad_by_slices(x)                    # the other's gradient is not deterministic on a GPU
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def _reflect_pad_by_slices(x):
    x = torch.cat((x[:, :, 1:2], x, x[:, :, -2:-1]), 2)
    return torch.cat((x[..., 1:2], x, x[..., -2:-1]), 3)


class Conv3x3(nn.Conv2d):
    """3x3 convolution that keeps height and width, in the memory layout of its weight; padding_mode: reflect or zeros."""

    def __init__(self, c_in, c_out, padding_mode="reflect"):
        super().__init__(c_in, c_out, 3, padding=1 if padding_mode == "zeros" else 0)
        self.reflects = padding_mode == "reflect"

    def forward(self, x):
        if self.reflects:
            x = reflect_pad(x)
        if self.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)           # on a GPU padding loses the layout
        return super().forward(x)


class ResidualBlock(nn.Module):
    """x + layer2(relu(layer1(relu(x)))), layers that keep the width."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer1, self.layer2 = layer(width, width), layer(width, width)

    def forward(self, x):
        return x + self.layer2(F.relu(self.layer1(F.relu(x)), inplace=True))


class NetworkNorm(ActNorm):
    """An ActNorm that is no part of the flow: its log-det counts nowhere."""

    def forward(self, x):
        return self.transform(x)


class ResNet(nn.Module):
    """Residual network of `layer(c_in, c_out)`: in, `n_blocks` residual blocks, ActNorm, ReLU, out.

    The last layer is zero at start, so that the coupling around it starts as a fixed scaling.
    """

    def __init__(self, layer, c_in, c_out, width, n_blocks):
        super().__init__()
        self.first = layer(c_in, width)
        self.blocks = nn.Sequential(*(ResidualBlock(layer, width) for _ in range(n_blocks)))
        self.norm = NetworkNorm(width)
        self.last = layer(width, c_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.blocks(self.first(x))), inplace=True))


def resnet3x3(c_in, c_out, width=64, n_blocks=4, padding_mode="reflect"):
    """3x3 convolutions: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return ResNet(partial(Conv3x3, padding_mode=padding_mode), c_in, c_out, width, n_blocks)


def resnet1x1(c_in, c_out, width=256, n_blocks=4):
    """1x1 convolutions on 1 x 1 images, which are linear layers: (B, c_in) -> (B, c_out)."""
    return ResNet(nn.Linear, c_in, c_out, width, n_blocks)


def toy_network(c_in, c_out, width=64):
    """The network of `model: toy`, 1x1 convolutions with LeakyReLU: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(nn.Conv2d(c_in, width, 1), nn.LeakyReLU(),
                         nn.Conv2d(width, width, 1), nn.LeakyReLU(),
                         nn.Conv2d(width, c_out, 1))
