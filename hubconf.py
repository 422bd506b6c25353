"""The models for torch.hub, which FOLDER, a clone of this repository, gives without installation:

    model = torch.hub.load(FOLDER, "scnf", weights="mnist-best", source="local")
"""

import os
import sys
from pathlib import Path

# Modules that torch.hub looks for first, so that it can say which are missing.
dependencies = ["torch", "torchvision", "numpy", "pandas", "yaml", "exman", "configargparse",
                "filelock", "tqdm"]
_FOLDER = os.path.dirname(os.path.realpath(__file__))


def scnf(weights="mnist-best", config=None, data_shape=None, n_classes=None, **options):
    """A semi-conditional normalizing flow: a SemiConditionalFlow (models/scnf.py), on the CPU.

    weights: those that ship, which pretrained/README.md compares: mnist-best, mnist-small,
        mnist-marginal, mnist-glow, digits, or model, of the paper's network; or the directory of a
        run; or None: random ones, for `initialize` and training
    config: of a model with random weights: a file, as seen from this repository, such as
        configs/mnist-glow.yaml; None: config.yaml, the paper's
    data_shape, n_classes, options: (C, H, W), K and options of such a model, where they differ from
        the config's

        x = model.sample(torch.arange(10))      # images (10, 1, 28, 28), x = (grey level + u) / 256
        model.log_prob(x)                       # log p(x) in nats, (10,)
        model.posterior(x)                      # p(y | x), (10, 10)

    Raises ValueError for what does not exist or fit, and ImportError if modules of another project
    are called models, training or utils, as ours are.
    """
    for name in sys.modules.keys() & {"models", "training", "utils"}:
        file = getattr(sys.modules[name], "__file__", None) or "a folder"
        if not os.path.realpath(file).startswith(os.path.join(_FOLDER, name) + os.sep):
            raise ImportError(f"another module is called {name} ({file}), as one of this project: "
                              "rename it, or load the model in a process of its own")
    from models import MODEL_OPTIONS, build_model
    from training.checkpoint import PRETRAINED, load_pretrained
    from utils.datasets import DATASETS, read_description
    from utils.settings import read_settings

    shipped = {file.stem: f"configs/{file.stem}.yaml" for file in PRETRAINED.glob("*.torch")}
    shipped["model"] = "config.yaml"
    if isinstance(weights, str | os.PathLike):
        weights = os.path.expanduser(weights)
    changes = {**options, "config": config, "data_shape": data_shape, "n_classes": n_classes}
    if weights is not None and any(value is not None for value in changes.values()):
        raise ValueError("config, data_shape, n_classes and options are for weights=None")
    known = {option.name for group in MODEL_OPTIONS.values() for option in group} - {"model"}
    if unknown := options.keys() - known:
        raise ValueError(f"there is no option {min(unknown)}: {', '.join(sorted(known))}; config "
                         "gives the model")
    if weights is None:
        argv = ["--config", os.path.join(_FOLDER, config or "config.yaml")]
    elif isinstance(weights, str) and weights in shipped:
        argv = ["--config", os.path.join(_FOLDER, shipped[weights]), "--pretrained"]
    elif isinstance(weights, str) and os.path.isdir(weights):
        argv = ["--pretrained", weights]
    else:
        raise ValueError(f"weights must be one of {', '.join(sorted(shipped))}, the directory of a "
                         f"run, or None, not {weights!r}")
    _, settings = read_settings(argv)
    data = DATASETS[settings.data]
    if data.shape is None and weights is not None:      # of own images
        about = read_description(Path(weights))
        if not about:
            raise ValueError(f"{weights} has no data.yaml: resume the run with its images, once")
        data_shape, n_classes = about["shape"], about["n_classes"]
    elif data.shape is None and None in (data_shape, n_classes):
        raise ValueError(f"{config} is for own images, and needs data_shape and n_classes")
    model = build_model({**vars(settings), **options},
                        data.shape if data_shape is None else data_shape,
                        len(data.classes) if n_classes is None else n_classes,
                        grey_levels=data.grey_levels)
    if weights is not None:
        load_pretrained(model, settings)
    return model.eval()
