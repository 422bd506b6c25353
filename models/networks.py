"""The networks inside the couplings. They are ordinary functions: nothing here is inverted."""

from torch import nn
from torch.nn import functional as F

from .bijections import ActNorm


def _conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode="reflect")


class ResidualBlock(nn.Module):
    """x + layer2(relu(layer1(relu(x)))), layers that keep the width."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer1, self.layer2 = layer(width, width), layer(width, width)

    def forward(self, x):
        return x + self.layer2(F.relu(self.layer1(F.relu(x)), inplace=True))


class ResNet(nn.Module):
    """Residual network of `layer(c_in, c_out)`: in, `n_blocks` residual blocks, ActNorm, ReLU, out.

    The last layer is zero at start, so that the coupling around it starts as a fixed scaling.
    The ActNorm is no part of the flow: its log-det counts nowhere.
    """

    def __init__(self, layer, c_in, c_out, width, n_blocks):
        super().__init__()
        self.first = layer(c_in, width)
        self.blocks = nn.Sequential(*(ResidualBlock(layer, width) for _ in range(n_blocks)))
        self.norm = ActNorm(width)
        self.last = layer(width, c_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        h, _ = self.norm(self.blocks(self.first(x)))
        return self.last(F.relu(h, inplace=True))


def resnet3x3(c_in, c_out, width=64, n_blocks=4):
    """3x3 convolutions with reflect padding: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return ResNet(_conv3x3, c_in, c_out, width, n_blocks)


def resnet1x1(c_in, c_out, width=256, n_blocks=4):
    """1x1 convolutions on 1 x 1 images, which are linear layers: (B, c_in) -> (B, c_out)."""
    return ResNet(nn.Linear, c_in, c_out, width, n_blocks)


def toy_network(c_in, c_out, width=64):
    """The network of `model: toy`, 1x1 convolutions with LeakyReLU: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(nn.Conv2d(c_in, width, 1), nn.LeakyReLU(),
                         nn.Conv2d(width, width, 1), nn.LeakyReLU(),
                         nn.Conv2d(width, c_out, 1))
