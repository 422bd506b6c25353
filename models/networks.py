"""The networks inside the couplings. They are ordinary functions: nothing inverts them.

Images are channels-last in memory, as are the weights of convolutions and, on a GPU, the gradients
of images. Training may have a network compute in bfloat16 (`Network.dtype`).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bijections import ActNorm
from .kernels import channels_last, gpu_conv2d

# Of images of so few pixels a CPU computes a convolution as a product with its matrix.
FEW_PIXELS = 4


class Network(nn.Module):
    """Base class of networks that can compute in another type than their input and output.

    dtype: that type; None: the same one.
    """

    dtype: torch.dtype | None = None


def reflect_pad(x: Tensor) -> Tensor:
    """Reflection padding by one pixel: (B, C, H, W) -> (B, C, H + 2, W + 2)."""
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width: x (B, c_in, H, W) -> (B, c_out, H, W).

    It computes in the type of x, and returns images of another `dtype` if forward gets one.

    padding_mode: "reflect" or "zeros"
    relu: whether it is a convolution of relu(x)
    """

    bias: nn.Parameter

    def __init__(self, c_in: int, c_out: int, padding_mode: str = "reflect", relu: bool = False):
        super().__init__(c_in, c_out, 3, padding=1 if padding_mode == "zeros" else 0)
        self.reflects, self.relu = padding_mode == "reflect", relu
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        if x.shape[2:].numel() <= FEW_PIXELS and not x.is_cuda:
            return self.product(x).to(dtype)
        x = reflect_pad(x) if self.reflects else x
        x = x.contiguous(memory_format=torch.channels_last)
        if self.relu:   # last: what its gradient needs, its output, is what the convolution keeps
            x = F.relu(x, inplace=self.reflects)
        if x.is_cuda and dtype == torch.bfloat16:
            return gpu_conv2d(x, self.weight.to(x.dtype), self.bias, self.padding)
        out = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)
        return channels_last(out).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """The convolution as a product with its matrix."""
        (c_out, c_in), (h, w) = self.weight.shape[:2], x.shape[2:]
        n = h * w
        units = torch.eye(n, dtype=self.weight.dtype, device=x.device).view(n, 1, h, w)
        padded = reflect_pad(units) if self.reflects else F.pad(units, (1, 1, 1, 1))
        taps = F.unfold(padded, 3).permute(1, 2, 0).flatten(1)  # (9, outputs * inputs)
        matrix = (self.weight.reshape(-1, 9) @ taps).view(c_out, c_in, n, n).transpose(1, 2)
        matrix = matrix.reshape(c_out * n, c_in * n).to(x.dtype)
        x = F.linear((F.relu(x) if self.relu else x).flatten(1), matrix)
        return x.view(-1, c_out, h, w) + self.bias.to(x.dtype)[:, None, None]


class Linear(nn.Linear):
    """A linear layer: x (B, c_in) -> (B, c_out), with `relu` one of relu(x).

    It computes in the types of Conv3x3.
    """

    def __init__(self, c_in: int, c_out: int, relu: bool = False):
        super().__init__(c_in, c_out)
        self.relu = relu

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = F.relu(x) if self.relu else x
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).to(dtype or x.dtype)


class ResidualBlock(nn.Module):
    """x + layer2(relu(layer1(relu(x)))), with layers that keep the number of channels."""

    def __init__(self, layer: Callable[..., nn.Module], width: int):
        super().__init__()
        self.layer1, self.layer2 = (layer(width, width, relu=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(x + self.layer2(self.layer1(x)))


class NetworkNorm(ActNorm):
    """An ActNorm within a network, in the type of x, of which no log-determinant is due.

    On a CPU it is one kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = self.logs.exp()
        no_eps = 1e-30      # PyTorch 2.11 refuses 0
        return F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale,
                            -self.bias * scale, eps=no_eps)


class PositionBias(nn.Module):
    """Adds a learned bias per channel and pixel, zero at the start, to images of `size`."""

    def __init__(self, channels: int, size: tuple[int, int]):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, *size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)


class ResNet(Network):
    """A residual network: first layer, residual blocks, ActNorm, ReLU, last layer.

    The last layer is zero at the start, so that the coupling around the network starts as a
    constant scaling. In bfloat16 the first layer is exact but for its output, as rounding x would
    be the largest error.

    layer: layer(c_in, c_out, relu=False) makes a layer
    c_in, c_out, width: channels of input, output and in between
    n_blocks: number of residual blocks
    size: (H, W) of its images, for a PositionBias after the first layer; None: without one
    """

    def __init__(self, layer: Callable[..., nn.Module], c_in: int, c_out: int,
                 width: int, n_blocks: int, size: tuple[int, int] | None = None):
        super().__init__()
        self.first = layer(c_in, width)
        if size:
            self.first = nn.Sequential(self.first, PositionBias(width, size))
        self.blocks = nn.Sequential(*(ResidualBlock(layer, width) for _ in range(n_blocks)))
        self.norm = NetworkNorm(width)
        self.last = layer(width, c_out, relu=True)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.dtype or x.dtype
        if isinstance(self.first, nn.Sequential):
            layer, position_bias = self.first
            h = position_bias(layer(x, dtype))
        else:
            h = self.first(x, dtype)
        h = channels_last(self.norm(self.blocks(h)))
        return self.last(h).to(x.dtype)


def resnet3x3(c_in: int, c_out: int, width: int = 64, n_blocks: int = 4,
              padding_mode: str = "reflect", size: tuple[int, int] | None = None) -> ResNet:
    """A ResNet of 3x3 convolutions: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return ResNet(partial(Conv3x3, padding_mode=padding_mode), c_in, c_out, width, n_blocks, size)


def resnet1x1(c_in: int, c_out: int, width: int = 256, n_blocks: int = 4) -> ResNet:
    """A ResNet of linear layers, 1x1 convolutions of one pixel: (B, c_in) -> (B, c_out)."""
    return ResNet(Linear, c_in, c_out, width, n_blocks)


class PointNetwork(nn.Sequential):
    """Linear layers with LeakyReLU, for model toy: points (B, c_in, 1, 1) -> (B, c_out, 1, 1)."""

    def __init__(self, c_in: int, c_out: int, width: int = 64):
        super().__init__(nn.Linear(c_in, width), nn.LeakyReLU(),
                         nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))[:, :, None, None]
