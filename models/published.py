"""The layout of the state dict of the authors' code, in terms of ours.

There the layers of f_w are flow.modules_.N and those of h_phi prior.flow.modules_.N, numbered
consecutively; a split counts as one layer, a conditional flow step as its three parts. The masks,
which are constants, are ignored.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .bijections import MultiScale
from .h_phi import ConditionalFlow
from .networks import ResNet
from .scnf import SemiConditionalFlow

_PREFIXES = {"h_phi.mu.": "prior.flow.modules_.0.factors.",
             "h_phi.embedding.": "prior.flow.embeddings.",
             "base_aux.": "prior.shallow_prior.",
             "base_h.": "prior.deep_prior."}
_LEAVES = {"initialized": "requires_init", "v": "vec", "s": "s_factor"}


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` has the published layout."""
    return any(key.startswith(("flow.modules_.", "prior.")) for key in state)


def from_published(model: SemiConditionalFlow, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a published state dict to the names of `model`.

    model: which has all reflections of a Householder product in one tensor
    state: in the published layout

    Returns {our name: value}; entries without a counterpart in `model` keep their names. Raises
    ValueError if the mean of a base density is not zero: it is not trained there, and fixed at zero
    here.
    """
    state = dict(state)
    for key in list(state):
        if key.endswith(".mask"):
            del state[key]
        elif key.endswith("_prior.mean") and state.pop(key).any():
            raise ValueError(f"{key} is not zero: the base densities here have mean zero")
    renamed, state_of_model = {}, model.state_dict()
    for ours, theirs in published_names(model).items():
        if theirs.endswith(".vec"):  # ours holds all reflections
            v = state_of_model[ours]
            keys = [f"{theirs}_{i}" for i in range(len(v))]
            if all(key in state and state[key].shape == v[0].shape for key in keys):
                renamed[ours] = torch.stack([state.pop(key) for key in keys])
        elif theirs in state:
            value = state.pop(theirs)
            if theirs.endswith(".requires_init"):
                value = ~value.bool().any()
            renamed[ours] = value
    return {**renamed, **state}


def published_names(model: SemiConditionalFlow) -> dict[str, str]:
    """{our name: published name} of the parameters and buffers that both have.

    `v`, the reflections of a Householder product, maps to `vec`, the stem of vec_0, vec_1, ...
    """
    names = {}
    for key in model.state_dict():
        for ours, theirs in _PREFIXES.items():
            if key.startswith(ours):
                names[key] = theirs + key.removeprefix(ours)
    names.update(_layer_names("f_w", "flow", model.f_w))
    if isinstance(model.h_phi, ConditionalFlow):
        names.update(_layer_names("h_phi.flow", "prior.flow", model.h_phi.flow))
    return names


def _layer_names(ours: str, theirs: str, flow: MultiScale) -> dict[str, str]:
    """{our name: published name} of the layers of `flow`, called `ours` here and `theirs` there."""
    names, n = {}, 0
    for i, scale in enumerate(flow.levels):
        n += i > 0  # the split before this scale
        for j, bijection in enumerate(scale):
            for part, module in _parts(bijection):
                for key in module.state_dict():
                    name = f"{ours}.levels.{i}.{j}.{part}{key}"
                    names[name] = f"{theirs}.modules_.{n}.{_leaf(module, key)}"
                n += 1
    return names


def _parts(bijection: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that count as a layer each there, and the prefixes of their names here."""
    if isinstance(bijection, nn.Sequential):    # a conditional flow step
        return [(f"{name}.", part) for name, part in bijection.named_children()]
    return [("", bijection)]


def _leaf(module: nn.Module, key: str) -> str:
    """The published name of entry `key` of a bijection."""
    head, _, rest = key.partition(".")
    net = getattr(module, head)
    if isinstance(net, ResNet):
        return f"{head}.{_resnet_leaf(net, rest)}"
    return _LEAVES.get(key, key)


def _resnet_leaf(net: ResNet, key: str) -> str:
    """The published name of entry `key` of a network: there it is one sequence, in which a padding
    layer precedes each 3x3 convolution."""
    pad, n_blocks = int(isinstance(net.last, nn.Conv2d)), len(net.blocks)
    places = {"first": f"{pad}", "norm": f"{pad + 1 + n_blocks}",
              "last": f"{2 * pad + 3 + n_blocks}"}
    for i in range(n_blocks):
        places[f"blocks.{i}.layer1"] = f"{pad + 1 + i}.net.{pad + 1}"
        places[f"blocks.{i}.layer2"] = f"{pad + 1 + i}.net.{2 * pad + 3}"
    stem, leaf = key.rsplit(".", 1)
    return f"{places.get(stem, stem)}.{_LEAVES.get(leaf, leaf)}"     # a PositionBias: not there
