"""The networks inside the couplings. They are ordinary functions: nothing inverts them."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bijections import ActNorm

NORM_GROUPS = 8     # of the channels of an ImageNetwork


def reflect_pad(x: Tensor) -> Tensor:
    """Reflection padding by one pixel: (B, C, H, W) -> (B, C, H + 2, W + 2)."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _reflect_pad_by_slices(x)  # F.pad's gradient is not deterministic on a GPU
    with torch.autocast(x.device.type, enabled=False):  # on a CPU it would pad in float32
        return F.pad(x, (1, 1, 1, 1), mode="reflect")


def _reflect_pad_by_slices(x: Tensor) -> Tensor:
    x = torch.cat((x[:, :, 1:2], x, x[:, :, -2:-1]), 2)
    return torch.cat((x[..., 1:2], x, x[..., -2:-1]), 3)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width. padding_mode: "reflect" or "zeros".

    With `relu` it is one of relu(x). It computes in the memory format of its weight.
    """

    def __init__(self, c_in: int, c_out: int, padding_mode: str = "reflect", relu: bool = False):
        super().__init__(c_in, c_out, 3, padding=1 if padding_mode == "zeros" else 0)
        self.reflects, self.relu = padding_mode == "reflect", relu

    def prepare(self, x: Tensor) -> Tensor:
        """What is convolved: x or relu(x), reflection-padded, in the memory format of the weight.
        """
        if self.reflects:
            x = reflect_pad(x)
        if self.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)  # padding loses the format on a GPU
        # ReLU comes last: what its gradient needs, its output, is then what the convolution keeps.
        return F.relu(x, inplace=self.reflects) if self.relu else x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.prepare(x))


class Linear(nn.Linear):
    """A linear layer; with `relu`, one of relu(x)."""

    def __init__(self, c_in: int, c_out: int, relu: bool = False):
        super().__init__(c_in, c_out)
        self.relu = relu

    def prepare(self, x: Tensor) -> Tensor:
        """What is multiplied: x or relu(x)."""
        return F.relu(x) if self.relu else x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.prepare(x))


class ResidualBlock(nn.Module):
    """x + layer2(relu(layer1(relu(x)))), with layers that keep the number of channels."""

    def __init__(self, layer: Callable[..., nn.Module], width: int):
        super().__init__()
        self.layer1, self.layer2 = (layer(width, width, relu=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer2(self.layer1(x))


class NetworkNorm(ActNorm):
    """An ActNorm inside a network. It is not part of the flow, so it has no log-determinant."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.transform(x)


class PositionBias(nn.Module):
    """Adds a learned bias per channel and pixel, zero at the start, to images of `size`."""

    def __init__(self, channels: int, size: tuple[int, int]):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, *size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class ResNet(nn.Module):
    """A residual network: first layer, `n_blocks` residual blocks, ActNorm, ReLU, last layer.

    layer(c_in, c_out, relu=False): makes the layers. The last one is zero at the start, so that the
    coupling around the network starts as a constant scaling. With `size`, (H, W) of its images, the
    first layer has a PositionBias.
    """

    def __init__(self, layer: Callable[..., nn.Module], c_in: int, c_out: int,
                 width: int, n_blocks: int, size: tuple[int, int] | None = None):
        super().__init__()
        self.first = layer(c_in, width)
        if size:
            self.first = nn.Sequential(self.first, PositionBias(width, size))
        self.blocks = nn.Sequential(*(ResidualBlock(layer, width) for _ in range(n_blocks)))
        self.norm: nn.Module = NetworkNorm(width)
        self.last = layer(width, c_out, relu=True)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.blocks(self.first(x))))


class ImageNetwork(nn.Module):
    """A network of a whole image of `size`: (B, c_in, H, W) -> (B, n_out).

    A 3x3 convolution, one of stride 2, `n_blocks` residual blocks, another one of stride 2, each
    after group norm (Wu & He 2018, arXiv 1803.08494) and ReLU; and a linear layer, zero at the
    start. width: of the blocks; half of it before them.
    """

    def __init__(self, c_in: int, size: tuple[int, int], n_out: int, width: int, n_blocks: int):
        super().__init__()
        def norm_relu(c: int) -> list[nn.Module]:
            return [nn.GroupNorm(NORM_GROUPS, c), nn.ReLU()]
        def half(c_in: int, c_out: int) -> nn.Module:
            return nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.convs = nn.Sequential(
            nn.Conv2d(c_in, width // 2, 3, padding=1), *norm_relu(width // 2),
            half(width // 2, width),
            *(NormedBlock(width) for _ in range(n_blocks)), *norm_relu(width),
            half(width, width), *norm_relu(width), nn.Flatten())
        pixels = math.prod(-(-side // 4) for side in size)
        self.last = nn.Linear(width * pixels, n_out)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.convs(x))


class NormedBlock(nn.Module):
    """x + conv2(relu(norm2(conv1(relu(norm1(x)))))), with 3x3 convolutions and group norm."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(*(
            layer for _ in range(2) for layer in (nn.GroupNorm(NORM_GROUPS, width), nn.ReLU(),
                                                  nn.Conv2d(width, width, 3, padding=1))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet3x3(c_in: int, c_out: int, width: int = 64, n_blocks: int = 4,
              padding_mode: str = "reflect", size: tuple[int, int] | None = None) -> ResNet:
    """A residual network of 3x3 convolutions: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return ResNet(partial(Conv3x3, padding_mode=padding_mode), c_in, c_out, width, n_blocks, size)


def resnet1x1(c_in: int, c_out: int, width: int = 256, n_blocks: int = 4) -> ResNet:
    """A residual network of linear layers: (B, c_in) -> (B, c_out).

    They are 1x1 convolutions of images of one pixel.
    """
    return ResNet(Linear, c_in, c_out, width, n_blocks)


def toy_network(c_in: int, c_out: int, width: int = 64) -> nn.Sequential:
    """1x1 convolutions with LeakyReLU, for model toy: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(nn.Conv2d(c_in, width, 1), nn.LeakyReLU(),
                         nn.Conv2d(width, width, 1), nn.LeakyReLU(),
                         nn.Conv2d(width, c_out, 1))
