"""The models for torch.hub, which FOLDER, a clone of this repository, gives without installation:

    model = torch.hub.load(FOLDER, "scnf", weights="mnist-best", source="local")
"""

import os
import sys

# Modules that torch.hub looks for first, so that it can say which are missing.
dependencies = ["torch", "torchvision", "numpy", "pandas", "yaml", "exman", "configargparse",
                "filelock", "tqdm"]
_FOLDER = os.path.dirname(os.path.realpath(__file__))


def scnf(weights="mnist-best", config="config.yaml", data_shape=None, n_classes=None, **options):
    """A semi-conditional normalizing flow: a SemiConditionalFlow (models/scnf.py), on the CPU.

    weights: those that ship, which pretrained/README.md compares: mnist-best, mnist-small,
        mnist-marginal, mnist-glow, digits, or model, of the paper's network; or the directory of a
        run; or None: random ones, for `initialize` and training
    config: of a model with random weights: config.yaml, the paper's, or another file, as seen from
        this repository, such as configs/mnist-glow.yaml
    data_shape, n_classes, options: (C, H, W), K and options of such a model, where they differ

        x = model.sample(torch.arange(10))      # images (10, 1, 28, 28), x = (grey level + u) / 256
        model.log_prob(x)                       # log p(x) in nats, (10,)
        model.posterior(x)                      # p(y | x), (10, 10)

    Raises ValueError for what does not exist or fit, and ImportError if modules of another project
    have the names of ours.
    """
    for name in sys.modules.keys() & {"models", "training", "utils"}:
        file = getattr(sys.modules[name], "__file__", None) or ""       # a folder has none
        if not (file and os.path.realpath(file).startswith(_FOLDER + os.sep)):
            raise ImportError(f"another module is called {name} ({file}): load the model before "
                              "importing that, or in a process of its own")
    from models import MODEL_OPTIONS, build_model
    from training.checkpoint import PRETRAINED, load_pretrained
    from utils.datasets import DATASETS, load_data
    from utils.settings import read_settings

    shipped = {file.stem: f"configs/{file.stem}.yaml" for file in PRETRAINED.glob("*.torch")}
    shipped["model"] = "config.yaml"
    if weights is not None and weights not in shipped and not os.path.isdir(weights):
        raise ValueError(f"weights must be one of {', '.join(sorted(shipped))}, the directory of a "
                         f"run, or None, not {weights!r}")
    known = {option.name for group in MODEL_OPTIONS.values() for option in group}
    if (weights is not None and (data_shape or n_classes or options)) or options.keys() - known:
        raise ValueError("data_shape, n_classes and options are for random weights, weights=None, "
                         f"and the options are {', '.join(sorted(known))}")
    config = os.path.join(_FOLDER, shipped.get(weights, config))
    _, settings = read_settings(["--config", config] if weights is None else
                                ["--config", config, "--pretrained"] if weights in shipped else
                                ["--pretrained", weights])
    dataset = DATASETS[settings.data]
    data = dataset if data_shape or dataset.shape else load_data(settings)      # one's own images
    model = build_model({**vars(settings), **options}, data_shape or data.shape,
                        n_classes or len(data.classes), grey_levels=data.grey_levels)
    if weights is not None:
        load_pretrained(model, settings)
    return model.eval()
