"""The layout of the published code's state dict, in terms of ours.

There the bijections of f_w are flow.modules_.N and those of h_phi prior.flow.modules_.N, counted
through, a split between levels counting as one; a conditional step counts as its three parts.
Prefixes `module.` (DataParallel's) stand anywhere and mean nothing; masks are constants.
"""

import torch
from torch import nn

from models.bijections import ConditionalStep
from models.networks import ResNet

from . import BadInput

_PREFIXES = {"h_phi.mu.": "prior.flow.modules_.0.factors.", "h_phi.embedding.": "prior.flow.embeddings.",
             "base_aux.": "prior.shallow_prior.", "base_h.": "prior.deep_prior."}
_LEAVES = {"initialized": "requires_init", "v": "vec", "s": "s_factor"}


def is_published(state):
    """Whether the keys of `state` are in the published layout."""
    return any(key.replace("module.", "").startswith(("flow.modules_.", "prior.")) for key in state)


def from_published(model, state):
    """The published state dict `state` under the names and in the shapes of `model`.

    Entries that have no place in `model` keep their name. Raises BadInput if a base density's
    mean is not zero (it is not trained there, and fixed at zero here).
    """
    state = {key.replace("module.", ""): value for key, value in state.items()}
    for key in list(state):
        if key.endswith(".mask"):
            del state[key]
        elif key.endswith("_prior.mean") and state.pop(key).any():
            raise BadInput(f"{key} is not zero: the base densities here have mean zero")
    renamed, own = {}, model.state_dict()
    for ours, theirs in published_names(model).items():
        if theirs.endswith(".vec"):                                       # ours: all reflections in one
            keys = [f"{theirs}_{i}" for i in range(len(own[ours]))]
            if all(key in state for key in keys):
                renamed[ours] = torch.stack([state.pop(key) for key in keys])
        elif theirs in state:
            value = state.pop(theirs)
            if theirs.endswith(".requires_init"):
                value = ~value.bool().any()
            elif value.dim() == 4 and own[ours].dim() == 2:               # a 1x1 convolution is a linear layer
                value = value.flatten(1)
            renamed[ours] = value
    return {**renamed, **state}


def published_names(model):
    """{our name: published name} for the parameters and buffers of `model` that both have.

    `v`, the reflections of a Householder product, gets the stem `vec` of vec_0, vec_1, ...
    """
    names = {}
    for key in model.state_dict():
        for ours, theirs in _PREFIXES.items():
            if key.startswith(ours):
                names[key] = theirs + key.removeprefix(ours)
    flows = [("f_w", "flow", model.f_w)]
    if hasattr(model.h_phi, "flow"):
        flows.append(("h_phi.flow", "prior.flow", model.h_phi.flow))
    for ours, theirs, flow in flows:
        n = 0
        for i, level in enumerate(flow.levels):
            n += i > 0                                                    # the split before this level
            for j, bijection in enumerate(level):
                for part, module in _parts(bijection):
                    for key in module.state_dict():
                        names[f"{ours}.levels.{i}.{j}.{part}{key}"] = f"{theirs}.modules_.{n}.{_leaf(module, key)}"
                    n += 1
    return names


def _parts(bijection):
    if isinstance(bijection, ConditionalStep):
        return [(f"{part}.", getattr(bijection, part)) for part in ("act", "inv", "coupling")]
    return [("", bijection)]


def _leaf(module, key):
    """The published name, within a bijection, of its entry `key`."""
    head, _, rest = key.partition(".")
    net = getattr(module, head)
    if isinstance(net, ResNet):
        return f"{head}.{_resnet_leaf(net, rest)}"
    return _LEAVES.get(key, key)


def _resnet_leaf(net, key):
    """There a network is one sequence, where a padding layer precedes each 3x3 convolution."""
    pad, n_blocks = int(isinstance(net.first, nn.Conv2d)), len(net.blocks)
    places = {"first": f"{pad}", "norm": f"{pad + 1 + n_blocks}", "last": f"{2 * pad + 3 + n_blocks}"}
    for i in range(n_blocks):
        places[f"blocks.{i}.layer1"] = f"{pad + 1 + i}.net.{pad + 1}"
        places[f"blocks.{i}.layer2"] = f"{pad + 1 + i}.net.{2 * pad + 3}"
    stem, leaf = key.rsplit(".", 1)
    return f"{places[stem]}.{_LEAVES.get(leaf, leaf)}"
