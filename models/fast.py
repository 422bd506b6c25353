"""The same model arranged for speed: the same parameters, and the same log p(x, y) to rounding."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from .bijections import ActNorm, Bijection, ChannelCoupling, CheckerboardCoupling
from .conv1x1 import FullConv, log_abs_det
from .networks import Conv3x3, NetworkNorm, ResNet, reflect_pad

NETWORKS = {CheckerboardCoupling: ("net",), ChannelCoupling: ("net1", "net2")}
TINY = 2**14    # elements of a convolution's matrix up to which a CPU is faster at the product
GRAPHS = 256    # of one function that torch.compile may make: one for each shape, with and without gradient


class FastLogJoint(nn.Module):
    """x (B, C, H, W) -> log p(x, y) (B, K): what `model.log_joint` computes.

    It computes with a twin of `model`, which has the same parameter and buffer objects, and where

    - the log-dets of ActNorms and free 1x1 convolutions, the same for every x, are no part of the
      pass: they are computed once a call, all matrices of a size at once (WeightLogDet), on a GPU
      beside the pass, on a stream of their own;
    - images, their gradients and the weights of convolutions lie in memory with the channels last;
    - a convolution of a single pixel, on a CPU one of a tiny image too, is a product with one matrix;
    - with `precision` bf16 the networks inside the couplings, and nothing else, run in bfloat16
      under autocast, their first layer apart, where rounding x would be the largest error: scales,
      log-dets, bases and logsumexp keep the model's type;
    - with `compiled` each coupling, ActNorm and 1x1 convolution is one graph of torch.compile; equal
      ones share theirs, so that a flow of many steps compiles in the time of a few.

    `model` must be on its device, and stay there. `largest`: bytes, for one image, of the largest
    tensor of the pass.
    """

    def __init__(self, model, precision="fp32", compiled=False):
        super().__init__()
        shapes, self.largest = _survey(model)
        for p in model.parameters():
            if p.dim() == 4:
                p.data = torch.empty_like(p.data, memory_format=torch.channels_last).copy_(p.data)
        self.twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        linear = []
        for name, shape in shapes.items():
            part = self.twin.get_submodule(name)
            if isinstance(part, Conv3x3):
                if not part.weight.is_cuda and math.prod(shape) ** 2 * part.weight[:, :, 0, 0].numel() <= TINY:
                    self.twin.set_submodule(name, _TinyConv3x3(part, shape))
            elif isinstance(part, nn.Conv2d):
                if shape == part.kernel_size == (1, 1):
                    self.twin.set_submodule(name, _PixelConv(part))
            else:
                linear.append((part, math.prod(shape)))
                self.twin.set_submodule(name, _WithoutLogDet(part))
        self.weight_log_det = WeightLogDet(linear)
        for part in list(self.twin.modules()):
            for net in NETWORKS.get(type(part), ()):
                setattr(part, net, _Network(getattr(part, net), precision == "bf16"))
            if isinstance(part, ResNet) and precision == "bf16":
                part.first = _ToBfloat16(part.first)
                if not model.log_p_y.is_cuda:
                    part.norm = _FusedNorm(part.norm)
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
            for part in self.twin.modules():
                if isinstance(part, (*NETWORKS, _WithoutLogDet)):
                    part.compile(fullgraph=True, dynamic=False)
        self.side_stream = torch.cuda.Stream() if model.log_p_y.is_cuda else None

    def forward(self, x):
        weights = self.weight_log_det.gather()               # on the main stream, where their gradients are wanted
        if self.side_stream is None:
            return self.twin.log_joint(x) + self.weight_log_det(weights)
        main = torch.cuda.current_stream()
        self.side_stream.wait_stream(main)
        with torch.cuda.stream(self.side_stream):
            log_det = self.weight_log_det(weights)
        for w in weights:
            w.record_stream(self.side_stream)
        log_joint = self.twin.log_joint(x)
        main.wait_stream(self.side_stream)
        log_det.record_stream(main)
        return log_joint + log_det


class WeightLogDet:
    """The part of ldj that does not depend on x: the sum over `parts` of pixels times their log|det|, ().

    parts: pairs of an ActNorm or FullConv and the number of pixels it works on.
    """

    def __init__(self, parts):
        matrices = {}
        for part, pixels in parts:
            if isinstance(part, FullConv):
                matrices.setdefault(len(part.W), []).append((part.W, pixels))
        logs = [(part.logs, pixels) for part, pixels in parts if isinstance(part, ActNorm)]
        self.logs = [p for p, _ in logs]
        self.of_logs = torch.cat([torch.full_like(p, pixels) for p, pixels in logs]).detach() if logs else None
        self.matrices = [[w for w, _ in group] for group in matrices.values()]
        self.of_matrices = [group[0][0].new_tensor([pixels for _, pixels in group]) for group in matrices.values()]

    def gather(self):
        """The weights it is computed from: (N, C, C) for each size C of matrices, then all scales (sum of C,)."""
        return [torch.stack(group) for group in self.matrices] + ([torch.cat(self.logs)] if self.logs else [])

    def __call__(self, weights):
        log_dets = [log_abs_det(group) @ pixels for group, pixels in zip(weights, self.of_matrices)]
        if self.logs:
            log_dets.append(weights[-1] @ self.of_logs)
        return sum(log_dets)


class _WithoutLogDet(Bijection):
    """An ActNorm or 1x1 convolution whose log-det is counted elsewhere."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part.transform(x), 0.0


class _PixelConv(nn.Module):
    """A 1x1 convolution of images of one pixel."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return F.linear(x.flatten(1), self.conv.weight.flatten(1), self.conv.bias)[:, :, None, None]


class _TinyConv3x3(nn.Module):
    """A Conv3x3 of images of `size` as a product with the matrix that maps them to its output."""

    def __init__(self, conv, size):
        super().__init__()
        self.conv, self.size, self.pixels = conv, size, math.prod(size)
        places = torch.arange(1, self.pixels + 1, dtype=torch.float64).view(1, 1, *size)
        padded = reflect_pad(places) if conv.reflects else F.pad(places, (1, 1, 1, 1))
        seen = F.unfold(padded, 3)[0].long()                                  # (9, q): the pixel p of each tap and output, from 1
        taps = F.one_hot(seen, self.pixels + 1)[..., 1:]                      # none where the padding is zero
        self.register_buffer("taps", taps.to(conv.weight).flatten(1), persistent=False)

    def forward(self, x):
        c_out, c_in = self.conv.weight.shape[:2]
        n = self.pixels
        with torch.autocast(x.device.type, enabled=False):                    # sums of weights are rounded once, at the end
            w = (self.conv.weight.reshape(c_out * c_in, 9) @ self.taps).view(c_out, c_in, n, n)
            w = w.transpose(1, 2).reshape(c_out * n, c_in * n)
        bias = self.conv.bias[:, None].expand(-1, n).reshape(-1)
        return F.linear(x.reshape(-1, c_in * n), w, bias).view(-1, c_out, *self.size)


class _FusedNorm(nn.Module):
    """A NetworkNorm in one kernel, from and to bfloat16; on a CPU arithmetic of two types is slow."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.register_buffer("zeros", torch.zeros_like(norm.bias), persistent=False)
        self.register_buffer("ones", torch.ones_like(norm.bias), persistent=False)

    def forward(self, x):
        scale = self.norm.logs.exp()
        no_eps = 1e-30                                       # PyTorch 2.11 wants more than 0
        return F.batch_norm(x, self.zeros, self.ones, scale, -self.norm.bias * scale, eps=no_eps)


class _Network(nn.Module):
    """A network of a coupling with the channels last, in bfloat16 or not, from and to the type of its input."""

    def __init__(self, net, in_bfloat16):
        super().__init__()
        self.net, self.in_bfloat16 = net, in_bfloat16

    def forward(self, x):
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16, cache_enabled=False):
            out = self.net(x).to(x.dtype)
        return _GradientChannelsLast.apply(out) if x.dim() == 4 else out


class _ToBfloat16(nn.Module):
    """A layer in the type of its input, with its output rounded to bfloat16."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x).bfloat16()


class _GradientChannelsLast(torch.autograd.Function):
    """The identity; without it the couplings' halves give the network a gradient with the channels first."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _survey(model):
    """A pass of one example -> {name: (H, W) or ()} of the flow's ActNorms and full 1x1 convolutions and of the
    networks' convolutions, by what they see; bytes of the largest tensor."""
    shapes, largest, hooks = {}, [0], []

    def look(name, part, x, out):
        out = out[0] if isinstance(out, tuple) else out
        largest[0] = max(largest[0], out.numel() * out.element_size())
        if isinstance(part, (FullConv, nn.Conv2d, ActNorm)) and not isinstance(part, NetworkNorm):
            shapes[name] = tuple(x[0].shape[2:])
    for name, part in model.named_modules():
        hooks.append(part.register_forward_hook(lambda part, x, out, name=name: look(name, part, x, out)))
    try:
        model.log_joint(model.log_p_y.new_zeros(1, *model.data_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes, largest[0]
