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
from .pixels import Logit
from .pyramid import PixelPyramid, pixel_pyramid
from .scnf import SemiConditionalFlow

PIXELS: dict[str, Callable[..., Bijection]] = {     # (shape, grey_levels=...)
    "logit": lambda shape, grey_levels: Logit(), "marginal": MarginalGaussian}

# The options that describe a model, with the defaults of the paper's MNIST run.
MODEL_OPTIONS: dict[str, Any] = {
    "model": "mnist-masked", "pixels": "logit", "width": 0, "n_blocks": 0, "position_bias": False,
    "conv": "full", "hh_factors": 2, "l": 8,
    "ssl_model": "cond-flow", "ssl_dim": 196, "ssl_l": 2, "ssl_k": 4, "ssl_hd": 256, "ssl_std": 1.0,
    "ssl_conv": "full", "ssl_hh": 2,
}
MODEL_CHOICES = {"model": (*FLOWS, "pyramid"), "pixels": tuple(PIXELS), "conv": tuple(CONVS),
                 "ssl_conv": tuple(CONVS), "ssl_model": tuple(HEADS)}

__all__ = ["MODEL_CHOICES", "MODEL_OPTIONS", "SemiConditionalFlow", "build_model"]


def build_model(settings: Mapping[str, Any] | SimpleNamespace | argparse.Namespace,
                data_shape: Sequence[int], n_classes: int,
                class_probs: Sequence[float] | None = None,
                grey_levels: int | None = None) -> SemiConditionalFlow:
    """Build the semi-conditional flow that `settings` describes, not yet initialised.

    settings: a mapping or namespace with the keys of MODEL_OPTIONS; missing keys have their
    defaults; ssl_nclasses, if given, must agree with n_classes; all other keys are ignored.
    data_shape: (C, H, W), or (2, 1, 1) for points. class_probs: p(y), K numbers, or None for
    uniform. grey_levels: of the images, 256 for MNIST; pixels marginal and model pyramid need it.
    Raises ValueError if these do not fit together.
    """
    given = settings if isinstance(settings, Mapping) else vars(settings)
    values = {key: given.get(key, default) for key, default in MODEL_OPTIONS.items()}
    options = SimpleNamespace(**values, grey_levels=grey_levels)
    for key, choices in MODEL_CHOICES.items():
        if getattr(options, key) not in choices:
            raise ValueError(f"unknown {key} {getattr(options, key)!r}: "
                             f"choose from {', '.join(choices)}")
    for key in ("hh_factors", "l", "ssl_l", "ssl_k", "ssl_hd", "ssl_hh"):
        if getattr(options, key) < 1:
            raise ValueError(f"{key} must be at least 1, not {getattr(options, key)}")
    if given.get("ssl_nclasses", -1) not in (-1, n_classes):
        raise ValueError(f"ssl_nclasses is {given['ssl_nclasses']}, "
                         f"but the data has {n_classes} classes")
    is_pyramid = options.model == "pyramid"
    pixels = partial(PIXELS[options.pixels], grey_levels=grey_levels)
    f_w = (pixel_pyramid if is_pyramid else FLOWS[options.model])(
        tuple(data_shape), options, pixels)
    dim = math.prod(data_shape)
    ssl_dim = dim if options.ssl_dim == -1 else options.ssl_dim
    if not 2 <= ssl_dim <= dim or ssl_dim % 2:
        raise ValueError(f"ssl_dim must be an even number from 2 to the data's {dim} dimensions "
                         f"(or -1 for all of them), not {options.ssl_dim}")
    h_phi = HEADS[options.ssl_model](ssl_dim, n_classes, options)
    kind = PixelPyramid if is_pyramid else SemiConditionalFlow
    return kind(f_w, h_phi, data_shape, ssl_dim, n_classes, class_probs)
