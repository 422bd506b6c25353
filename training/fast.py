"""The same log p(x, y) as `model.log_joint`, with the same parameters, computed faster.

It is tested against the model: equal to rounding, and in bfloat16 within stated tolerances.
"""

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import SemiConditionalFlow
from models.bijections import (ActNorm, Bijection, ChannelCoupling, CheckerboardCoupling,
                               SplitCoupling)
from models.conv1x1 import FullConv, log_abs_det
from models.networks import Conv3x3, Linear, ResNet, reflect_pad
from models.pixels import ConditionalPixels

NETWORKS = {CheckerboardCoupling: ("net",), ChannelCoupling: ("net1", "net2"),
            SplitCoupling: ("net",), ConditionalPixels: ("networks", "shift", "context")}
# A CPU multiplies by a convolution's dense matrix if it has at most this many elements.
TINY_CONV = 2**14
# Graphs that torch.compile may make of a function: one per shape, with and without gradient.
COMPILED_GRAPHS = 256
# A GPU's convolutions in bfloat16 want a multiple of so many channels.
CHANNELS = 8
# Of the largest activation on a CPU: larger micro-batches take more memory and more time, as they
# do not fit its caches.
MICRO_BATCH_BYTES = 2**23


class FastLogJoint(nn.Module):
    """x (B, C, H, W) -> log p(x, y) (B, K), the value of `model.log_joint`.

    It runs a twin of `model` that shares its parameters and buffers, with these differences:

    - The log-determinants of ActNorms and unconstrained 1x1 convolutions, which do not depend on x,
      are computed once per pass, for all matrices of one size together (WeightLogDet), on a GPU on
      a side stream.
    - Images, their gradients and the weights of convolutions are channels-last in memory, except
      around group norm on a CPU.
    - A convolution of a single pixel, and on a CPU one of a tiny image, is a matrix product.
    - With precision bf16 the networks inside the couplings run in bfloat16 under autocast, except
      their first layer, where rounding x would be the largest error. Their output is rounded to
      bfloat16; all that is computed from it (scales, log-determinants, base densities, logsumexp)
      keeps the type of the model. Points have too few dimensions for these errors to average out.
    - With compile too, as on a GPU, the layers of the ResNets get their weights in bfloat16 all
      together, and have as many channels as a GPU's kernels want (_Bfloat16Layer). Their gradients
      come together too, at the end of the backward pass.
    - With compile each coupling, ActNorm and 1x1 convolution is one graph of torch.compile.
      Equal ones share a graph, so that a deep flow compiles in little more time than a shallow one.

    `model` must be on its device and stay there. `micro_batch_size` is the number of rows for which
    one pass is efficient: micro_bs if positive, else what takes little memory on a CPU, or any
    number on a GPU. `named_model_parameters` has the parameters with their names in `model`.
    `cuda_graph` tells those who call it whether to capture their calls as CUDA graphs. Raises
    ValueError for another precision, and for bf16 if `model` is one of points or in double
    precision.
    """

    def __init__(self, model: SemiConditionalFlow, precision: str = "fp32", compile: bool = False,
                 cuda_graph: bool = False, micro_bs: int = 0):
        super().__init__()
        if precision not in ("fp32", "tf32", "bf16"):
            raise ValueError(f"precision must be fp32, tf32 or bf16, not {precision}")
        if precision == "bf16" and not model.image:
            raise ValueError("precision bf16 is for images: log p(x) of points would be coarse")
        if precision == "bf16" and model.log_p_y.dtype != torch.float32:
            raise ValueError("precision bf16 is for a model in float32")
        self.cuda_graph = cuda_graph
        shapes, largest = _trace_shapes(model)
        if precision == "bf16":
            largest //= 2       # an activation of a network
        fitting = sys.maxsize if model.log_p_y.is_cuda else max(MICRO_BATCH_BYTES // largest, 1)
        power_of_two = 1 << fitting.bit_length() - 1  # as batch sizes are
        self.micro_batch_size = micro_bs or power_of_two
        for p in model.parameters():
            if p.dim() == 4:
                p.data = torch.empty_like(p.data, memory_format=torch.channels_last).copy_(p.data)
        self.named_model_parameters = list(model.named_parameters())
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.twin = copy.deepcopy(model, shared)
        with_weight_log_det = []
        for name, shape in shapes.items():
            part: Any = self.twin.get_submodule(name)
            if isinstance(part, Conv3x3):
                elements = math.prod(shape) ** 2 * part.weight[:, :, 0, 0].numel()
                if not part.weight.is_cuda and elements <= TINY_CONV:
                    self.twin.set_submodule(name, _TinyConv3x3(part, shape))
            elif isinstance(part, nn.Conv2d):
                if shape == part.kernel_size == (1, 1):
                    self.twin.set_submodule(name, _PixelConv(part))
            else:
                with_weight_log_det.append((part, math.prod(shape)))
                self.twin.set_submodule(name, _WithoutLogDet(part))
        self.weight_log_det = WeightLogDet(with_weight_log_det)
        in_bfloat16 = precision == "bf16"
        self.bfloat16_layers: list[_Bfloat16Layer] = []
        parts: list[Any] = list(self.twin.modules())
        for part in parts:
            for name in NETWORKS.get(type(part), ()):
                net = getattr(part, name)
                setattr(part, name, nn.ModuleList(_Network(n, in_bfloat16) for n in net)
                        if isinstance(net, nn.ModuleList) else _Network(net, in_bfloat16))
            if isinstance(part, ResNet) and in_bfloat16:
                part.norm = _FusedNorm(part.norm)
                if compile:
                    self.bfloat16_layers += _replace_layers(part)
                if not isinstance(part.first, _Bfloat16Layer):
                    part.first = _ToBfloat16(part.first)
        if not model.log_p_y.is_cuda:
            norms = [name for name, part in self.twin.named_modules()
                     if isinstance(part, nn.GroupNorm)]
            for name in norms:
                self.twin.set_submodule(name, _ContiguousGroupNorm(self.twin.get_submodule(name)))
        if compile:
            limit = max(torch._dynamo.config.recompile_limit, COMPILED_GRAPHS)
            torch._dynamo.config.recompile_limit = limit
            for part in self.twin.modules():
                if isinstance(part, CheckerboardCoupling | ChannelCoupling | _WithoutLogDet):
                    part.compile(fullgraph=True, dynamic=False)
        self.side_stream = torch.cuda.Stream() if model.log_p_y.is_cuda else None

    def forward(self, x: Tensor, copies: Tensor | None = None) -> Any:
        """-> log p(x, y), (B, K); with `copies` also, for each of them, log p(y | x) up to a term
        that does not depend on y, (B, K)."""
        give_weights(self.bfloat16_layers)
        if copies is None:
            return self._log_joint(x)
        if self.twin.f_w.cheap_last_part:
            return self._log_joint(x), self._logits(copies)
        return self._log_joint(torch.cat((x, copies))).split(len(x))

    def logits(self, x: Tensor) -> Tensor:
        """log p(y | x) up to a term that does not depend on y: x (B, C, H, W) -> (B, K)."""
        give_weights(self.bfloat16_layers)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        if self.twin.f_w.cheap_last_part:
            return self.twin.log_zf_joint(self.twin.encode_f(x))
        return self._log_joint(x)

    def logits_given(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`logits` of x (B, 1, H, W), in model pyramid, as a function of the image that the network
        which shifts z_f sees: (B, 1, H, W) -> (B, K)."""
        give_weights(self.bfloat16_layers)
        f_w: Any = self.twin.f_w
        with torch.no_grad():
            last_part = f_w.last_part_given(x)
        return lambda seen: self.twin.log_zf_joint(last_part(seen))

    def _log_joint(self, x: Tensor) -> Tensor:
        weights = self.weight_log_det.gather()  # on the main stream, as are their gradients
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
    """The part of ldj that does not depend on x: the sum over `parts` of pixels times log|det|, ().

    parts: pairs of an ActNorm or FullConv and the number of pixels that it transforms.
    """

    def __init__(self, parts: list[tuple[Any, int]]):
        matrices: dict[int, list[tuple[Tensor, int]]] = {}
        for part, pixels in parts:
            if isinstance(part, FullConv):
                matrices.setdefault(len(part.W), []).append((part.W, pixels))
        scales = [(part.logs, pixels) for part, pixels in parts if isinstance(part, ActNorm)]
        self.logs: list[Tensor] = [logs for logs, _ in scales]
        pixels_of_logs = [torch.full_like(logs, pixels).detach() for logs, pixels in scales]
        self.pixels_of_logs = torch.cat(pixels_of_logs) if scales else None
        self.matrices = [[w for w, _ in group] for group in matrices.values()]
        self.pixels_of_matrices = [group[0][0].new_tensor([pixels for _, pixels in group])
                                   for group in matrices.values()]

    def gather(self) -> list[Tensor]:
        """The matrices (N, C, C) of each size C, then all ActNorm scales (sum of C,), if any."""
        weights = [torch.stack(group) for group in self.matrices]
        return weights + ([torch.cat(self.logs)] if self.logs else [])

    def __call__(self, weights: list[Tensor]) -> Tensor:
        """The log-determinant, (), of what `gather` returned."""
        log_dets = [log_abs_det(group) @ pixels
                    for group, pixels in zip(weights, self.pixels_of_matrices)]
        if self.pixels_of_logs is not None:
            log_dets.append(weights[-1] @ self.pixels_of_logs)
        return sum(log_dets)


class _WithoutLogDet(Bijection):
    """An ActNorm or 1x1 convolution whose log-determinant is in the WeightLogDet."""

    def __init__(self, part: ActNorm | FullConv):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.part.transform(x), 0.0


class _PixelConv(nn.Module):
    """A 1x1 convolution of images of one pixel, as a linear layer."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.conv.weight.flatten(1), self.conv.bias)[:, :, None, None]


class _TinyConv3x3(nn.Module):
    """A Conv3x3 of images of `size` pixels, as a product with its dense matrix."""

    taps: Tensor

    def __init__(self, conv: Conv3x3, size: tuple[int, ...]):
        super().__init__()
        self.conv, self.size, self.pixels = conv, size, math.prod(size)
        numbered = torch.arange(1, self.pixels + 1, dtype=torch.float64).view(1, 1, *size)
        padded = reflect_pad(numbered) if conv.reflects else F.pad(numbered, (1, 1, 1, 1))
        # (9, pixels): the input pixel of each tap and output pixel, from 1; 0 is zero padding.
        sources = F.unfold(padded, 3)[0].long()
        taps = F.one_hot(sources, self.pixels + 1)[..., 1:]  # zero padding has no input
        self.register_buffer("taps", taps.to(conv.weight).flatten(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.relu:
            x = F.relu(x)
        c_out, c_in = self.conv.weight.shape[:2]
        n = self.pixels
        # Without autocast, the sums of weights are rounded only once, at the end.
        with torch.autocast(x.device.type, enabled=False):
            w = (self.conv.weight.reshape(c_out * c_in, 9) @ self.taps).view(c_out, c_in, n, n)
            w = w.transpose(1, 2).reshape(c_out * n, c_in * n)
        bias: Any = self.conv.bias
        bias = bias[:, None].expand(-1, n).reshape(-1)
        return F.linear(x.reshape(-1, c_in * n), w, bias).view(-1, c_out, *self.size)


class _FusedNorm(nn.Module):
    """A NetworkNorm from and to bfloat16: fewer bytes on a GPU, and one kernel on a CPU."""

    zeros: Tensor
    ones: Tensor

    def __init__(self, norm: Any):
        super().__init__()
        self.norm = norm
        self.register_buffer("zeros", torch.zeros_like(norm.bias), persistent=False)
        self.register_buffer("ones", torch.ones_like(norm.bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm.logs.exp()
        no_eps = 1e-30  # PyTorch 2.11 refuses 0
        return F.batch_norm(x, self.zeros, self.ones, scale, -self.norm.bias * scale, eps=no_eps)


class _ContiguousGroupNorm(nn.Module):
    """Group norm of channels-first images: of channels-last ones a CPU computes it slowly."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.contiguous())


class _Network(nn.Module):
    """A coupling's network, channels-last and possibly in bfloat16.

    Input and output have the same type.
    """

    def __init__(self, net: nn.Module, in_bfloat16: bool):
        super().__init__()
        self.net, self.in_bfloat16 = net, in_bfloat16

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16,
                            cache_enabled=False):
            out = self.net(x).to(x.dtype)
        return _ChannelsLastGradient.apply(out) if out.dim() == 4 else out


class _Bfloat16Layer(nn.Module):
    """A layer of a ResNet in bfloat16, for a GPU, with the weight and bias of `give_weights`.

    With `splits` the weight is the layer's own; input and weight are then each the sum of two
    numbers in bfloat16, high and low, which is more exact than TF32:
    x w = x_high w_high + x_low w_high + x_high w_low, computed as 3C channels.
    """

    weight: Any = None
    bias: Any = None

    def __init__(self, layer: Conv3x3 | Linear, splits: bool):
        super().__init__()
        self.layer, self.splits = layer, splits

    def forward(self, x: Tensor) -> Tensor:
        x, w = self.layer.prepare(x), self.layer.weight if self.splits else self.weight
        if self.splits:
            (x_high, x_low), (w_high, w_low) = _high_and_low(x), _high_and_low(w)
            x, w = torch.cat((x_high, x_low, x_high), 1), torch.cat((w_high, w_high, w_low), 1)
        if isinstance(self.layer, Linear):
            return F.linear(x, w, self.bias)
        out = F.conv2d(_pad(x, 1), _pad(_pad(w, 1), 0), _pad(self.bias, 0),
                       padding=self.layer.padding)
        return out[:, :len(w)]


def _high_and_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = high + low, both in bfloat16, to 16 bits. The gradient is that of high."""
    high = x.bfloat16()
    return high, (x - high).detach().bfloat16()


def _pad(x: Tensor, dim: int) -> Tensor:
    """x with zeros at the end of `dim`, up to a multiple of CHANNELS."""
    padding = [0, 0] * (x.dim() - dim - 1) + [0, -x.shape[dim] % CHANNELS]
    return F.pad(x, padding) if padding[-1] else x


def _replace_layers(net: ResNet) -> list[_Bfloat16Layer]:
    """Make the layers of `net` _Bfloat16Layers, and return these.

    A first linear layer stays in float32: in h_phi gradients of all classes nearly cancel.
    """
    replaced = []
    for name, layer in list(net.named_modules()):
        is_layer = name.rpartition(".")[2] in ("first", "layer1", "layer2", "last")
        kinds = Conv3x3 if name == "first" else (Conv3x3, Linear)
        if is_layer and isinstance(layer, kinds):
            replaced.append(_Bfloat16Layer(layer, splits=name == "first"))
            net.set_submodule(name, replaced[-1])
    return replaced


def give_weights(layers: list[_Bfloat16Layer]) -> None:
    """Give `layers` the weights and biases that they have now, by a few kernels for all of them."""
    places = [(part, name) for part in layers for name in ("weight", "bias")
              if not (part.splits and name == "weight")]
    for part, name in places:       # the graph of the last pass ends here, with its streams
        setattr(part, name, None)
    if places:
        given = _CastTogether.apply(*(getattr(part.layer, name) for part, name in places))
        for (part, name), tensor in zip(places, given):
            setattr(part, name, tensor)


class _CastTogether(torch.autograd.Function):
    """Tensors in float32 -> the same in bfloat16."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)        # p(y | x) alone may not need all of them
        return _cast(tensors, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(_cast(tuple(g for g in grads if g is not None), torch.float32))
        return tuple(None if g is None else next(given) for g in grads)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(t, dtype=dtype) for t in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


class _ToBfloat16(nn.Module):
    """A layer that computes in the type of its input and rounds its output to bfloat16."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x).bfloat16()


class _ChannelsLastGradient(torch.autograd.Function):
    """The identity, with a channels-last gradient.

    The two halves of a coupling return a channels-first one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _trace_shapes(model: SemiConditionalFlow) -> tuple[dict[str, tuple[int, ...]], int]:
    """Run one example through `model` and record what its parts see.

    -> {name: (H, W), or () for vectors} of the ActNorms and unconstrained 1x1 convolutions of the
    flow and of the convolutions of the networks; and the size in bytes of the largest tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    largest = 0

    def record(name: str, part: nn.Module, x: tuple[Tensor, ...], out: Any) -> None:
        nonlocal largest
        out = out[0] if isinstance(out, tuple) else out
        largest = max(largest, out.numel() * out.element_size())
        # Subclasses, such as NetworkNorm, may have another log-determinant.
        if type(part) in (ActNorm, FullConv) or isinstance(part, nn.Conv2d):
            shapes[name] = tuple(x[0].shape[2:])

    hooks = [part.register_forward_hook(lambda part, x, out, name=name: record(name, part, x, out))
             for name, part in model.named_modules()]
    try:
        model.log_joint(model.log_p_y.new_zeros(1, *model.data_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes, largest
