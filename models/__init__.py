"""The model: `build_model(settings, data_shape, n_classes)` -> SemiConditionalFlow."""

import math
from types import SimpleNamespace

from utils import BadInput

from .architectures import FLOWS, HEADS
from .conv1x1 import CONVS
from .scnf import SemiConditionalFlow

# The options that describe a model, with the defaults of the paper's MNIST run.
MODEL_OPTIONS = {"model": "mnist-masked", "conv": "full", "hh_factors": 2, "l": 8, "width": 0, "n_blocks": 0,
                 "ssl_model": "cond-flow", "ssl_dim": 196, "ssl_l": 2, "ssl_k": 4, "ssl_hd": 256,
                 "ssl_conv": "full", "ssl_hh": 2}
MODEL_CHOICES = {"model": tuple(FLOWS), "conv": tuple(CONVS), "ssl_conv": tuple(CONVS),
                 "ssl_model": tuple(HEADS)}

__all__ = ["MODEL_CHOICES", "MODEL_OPTIONS", "SemiConditionalFlow", "build_model"]


def build_model(settings, data_shape, n_classes, class_probs=None):
    """Build the semi-conditional flow that `settings` describes, its ActNorms not yet initialised.

    settings: mapping or namespace with the keys of MODEL_OPTIONS (others are ignored, missing
    ones take the default); data_shape: (C, H, W), (2, 1, 1) for points; class_probs: p(y), K
    numbers (None: uniform). Raises BadInput, a ValueError, if they do not fit together.
    """
    given = settings if hasattr(settings, "keys") else vars(settings)
    s = SimpleNamespace(**{key: given[key] if key in given else default
                           for key, default in MODEL_OPTIONS.items()})
    for key, choices in MODEL_CHOICES.items():
        if getattr(s, key) not in choices:
            raise BadInput(f"unknown {key} {getattr(s, key)!r}: choose from {', '.join(choices)}")
    for key in ("hh_factors", "l", "ssl_l", "ssl_k", "ssl_hd", "ssl_hh"):
        if getattr(s, key) < 1:
            raise BadInput(f"{key} must be at least 1, not {getattr(s, key)}")
    if given.get("ssl_nclasses", -1) not in (-1, n_classes):
        raise BadInput(f"ssl_nclasses is {given['ssl_nclasses']}, but the data has {n_classes} classes")
    f_w = FLOWS[s.model](data_shape, s)
    dim = math.prod(data_shape)
    ssl_dim = dim if s.ssl_dim == -1 else s.ssl_dim
    if not 2 <= ssl_dim <= dim or ssl_dim % 2:
        raise BadInput(f"ssl_dim must be an even number from 2 to the data's {dim} dimensions "
                       f"(or -1 for all of them), not {s.ssl_dim}")
    h_phi = HEADS[s.ssl_model](ssl_dim, n_classes, s)
    return SemiConditionalFlow(f_w, h_phi, data_shape, ssl_dim, n_classes, class_probs)
