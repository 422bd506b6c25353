"""The model: `build_model(settings, data_shape, n_classes)` gives a SemiConditionalFlow."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from .bijections import Bijection
from .conv1x1 import CONVS
from .f_w import FLOWS
from .h_phi import HEADS
from .marginal import MarginalGaussian
from .options import Option
from .pixels import Logit
from .pyramid import PixelPyramid, pixel_pyramid
from .scnf import SemiConditionalFlow

__all__ = ["MODEL_OPTIONS", "SemiConditionalFlow", "build_model"]

PIXELS: dict[str, Callable[..., Bijection]] = {     # (shape, grey_levels=...)
    "logit": lambda shape, grey_levels: Logit(), "marginal": MarginalGaussian}

# The options that describe a model. The defaults describe the paper's MNIST run.
MODEL_OPTIONS: dict[str, tuple[Option, ...]] = {
    "f_w: the large flow, independent of y": (
        Option("model", str, "mnist-masked", choices=(*FLOWS, "pyramid")),
        Option("pixels", str, "logit", choices=tuple(PIXELS)),
        Option("width", int, 0, low=0, high=4096),
        Option("n_blocks", int, 0, low=0, high=100),
        Option("position_bias", bool, False),
        Option("conv", str, "full", choices=tuple(CONVS)),
        Option("hh_factors", int, 2, low=1, high=1000),
        Option("l", int, 8, low=1, high=1000),
    ),
    "h_phi: the small flow, conditioned on y": (
        Option("ssl_model", str, "cond-flow", choices=tuple(HEADS)),
        Option("ssl_dim", int, 196, low=2, also=(-1, -2)),
        Option("ssl_l", int, 2, low=1, high=100),
        Option("ssl_k", int, 4, low=1, high=1000),
        Option("ssl_hd", int, 256, low=1, high=4096),
        Option("ssl_std", float, 1.0, low=0, open_below=True),
        Option("ssl_conv", str, "full", choices=tuple(CONVS)),
        Option("ssl_hh", int, 2, low=1, high=1000),
    ),
}


def build_model(settings: Mapping[str, Any] | SimpleNamespace | argparse.Namespace,
                data_shape: Sequence[int], n_classes: int,
                class_probs: Sequence[float] | None = None,
                grey_levels: int | None = None) -> SemiConditionalFlow:
    """Build the semi-conditional flow that `settings` describes, not yet initialised.

    settings: the options of MODEL_OPTIONS, as a mapping or namespace; missing ones have their
        defaults, and other keys are ignored. Values have the types of the options.
    data_shape: (C, H, W), or (2, 1, 1) for points.
    n_classes: K.
    class_probs: p(y), K numbers, or None for uniform.
    grey_levels: of the images, 256 for MNIST; only pixels marginal and model pyramid need it.

    Raises ValueError if a value is not of an option's type, among its choices and in its range, or
    if these do not fit together.
    """
    if len(data_shape) != 3:
        raise ValueError(f"data_shape must be (C, H, W), not {tuple(data_shape)}")
    for name, number, least in (*(("a side of data_shape", side, 1) for side in data_shape),
                                ("n_classes", n_classes, 1), ("grey_levels", grey_levels, 2)):
        problem = Option(name, int, least, low=least).problem(number)
        if number is not None and problem:
            raise ValueError(f"{name} {problem}")
    given = settings if isinstance(settings, Mapping) else vars(settings)
    options = SimpleNamespace(grey_levels=grey_levels)
    for option in (option for group in MODEL_OPTIONS.values() for option in group):
        value = given.get(option.name, option.default)
        if problem := option.problem(value):
            raise ValueError(f"{option.name}: {problem}")
        setattr(options, option.name, value)
    dim = math.prod(data_shape)
    options.ssl_dim = {-1: dim, -2: dim // 8 * 2}.get(options.ssl_dim, options.ssl_dim)
    is_pyramid = options.model == "pyramid"
    options.first_layer = partial(PIXELS[options.pixels], grey_levels=grey_levels)
    f_w = (pixel_pyramid if is_pyramid else FLOWS[options.model])(tuple(data_shape), options)
    if not 2 <= options.ssl_dim <= dim or options.ssl_dim % 2:
        raise ValueError(f"ssl_dim must be an even number from 2 to the data's {dim} dimensions "
                         f"(or -1 for all of them, -2 for a quarter), not {options.ssl_dim}")
    h_phi = HEADS[options.ssl_model](options.ssl_dim, n_classes, options)
    kind = PixelPyramid if is_pyramid else SemiConditionalFlow
    return kind(f_w, h_phi, data_shape, options.ssl_dim, n_classes, class_probs)
