"""Pictures of what a trained model does.

    python experiments/pictures.py samples --config configs/digits.yaml --pretrained \
        --save FILE.png [--temperature T] [options of train-flow-ssl.py]
    python experiments/pictures.py samples --pretrained RUN_DIR --save FILE.png
    python experiments/pictures.py redrawn ...        test images, each with every other label
    python experiments/pictures.py interpolation ...  between two test images of each class
    python experiments/pictures.py mistakes ...       the most confident ones, on test images
    python experiments/pictures.py latent ...         for points in the plane: z_f and z_h
    python experiments/pictures.py density ...        for points: log p(x) and p(y | x)
    python experiments/pictures.py curves RUN_DIR [RUN_DIR ...] --save FILE.png

FILE can also be a .pdf or .svg. Each picture is also a function in utils/figures.py that returns a
Figure. The first test images of each class are taken.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build_model
from training.assessment import assess, assessed_examples
from training.checkpoint import load_pretrained
from training.device import set_up_torch
from training.distributed import Processes
from training.evaluation import Inference
from training.speed import Accelerated
from utils.datasets import check_test_images, load_data
from utils.errors import (BadInput, OneLineParser, check_output, run_command,
                          value_errors_as_bad_input)
from utils.figures import (FORMATS, plot_curves_of_runs, plot_density, plot_interpolation,
                           plot_latent_space, plot_redrawn, plot_samples, save)
from utils.metrics import read_metrics
from utils.settings import read_settings
from utils.terminal import working

OF_POINTS = ("latent", "density")
MAX_TEMPERATURE = 10


def main(argv=None):
    parser = OneLineParser(description="Pictures of a trained model.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    for name in ("samples", "redrawn", "interpolation", "mistakes", *OF_POINTS, "curves"):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("--save", type=Path, required=True, metavar="FILE.png")
        if name == "samples":
            command.add_argument("--temperature", type=float, default=1.0, metavar="T",
                             help="standard deviation of the noise (default: %(default)s)")
        if name == "curves":
            command.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
        else:
            command.epilog = "All other options are those of train-flow-ssl.py."
    args, rest = parser.parse_known_args(argv)
    check_output(args.save, FORMATS)
    with working("drawing"):
        if args.command == "curves":
            figure = curves(args.runs, rest)
        else:
            with value_errors_as_bad_input():       # a matrix in the weights that has no inverse
                figure = picture(args, *load(rest))
        save(figure, args.save)
    print(f"Saved {args.save}")


def curves(runs, rest):
    """The Figure of the directories `runs`. Raises BadInput, for example if options are left."""
    if rest:
        raise BadInput(f"unknown option {rest[0]}")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    with value_errors_as_bad_input():
        return plot_curves_of_runs(dict(zip(names, map(rows_of, runs))))


def picture(args, model, data, settings):
    """The Figure of args.command. Raises BadInput if it cannot be drawn of this model."""
    if args.command == "samples":
        if not 0 <= args.temperature <= MAX_TEMPERATURE:
            raise BadInput(f"--temperature must be from 0 to {MAX_TEMPERATURE}, not "
                           f"{args.temperature}")
        return plot_samples(model, settings.seed, args.temperature, data.classes)
    if (args.command in OF_POINTS) == model.image:
        kind = "points in the plane" if args.command in OF_POINTS else "images"
        raise BadInput(f"{args.command} is for {kind}, unlike {settings.data}")
    if args.command == "density":
        return plot_density(model, data)
    if not len(data.labelled):
        raise BadInput(f"{args.command} needs labels, and supervised is 0")
    if args.command == "latent":
        if model.ssl_dim != 2:
            raise BadInput(f"latent needs ssl_dim 2, not {model.ssl_dim}")
        return plot_latent_space(model, data.test_x, data.test_y)
    if args.command == "mistakes":
        infer = Inference(Accelerated(model))
        name, examples = assessed_examples(data, settings)
        assessment = assess(infer, infer, data, examples, name, settings)
        with value_errors_as_bad_input():
            return assessment.plot_mistakes(examples)
    check_test_images(data)
    noise = torch.Generator(data.device).manual_seed(settings.seed)
    x = data.dequantize(data.test_x, noise)
    of_class = [torch.nonzero(data.test_y == k)[:2, 0] for k in range(data.n_classes)]
    if alone := [name for name, index in zip(data.classes, of_class) if len(index) < 2]:
        raise BadInput(f"{args.command} needs two test images of each class: there are fewer of "
                       f"{alone[0]}")
    first, second = torch.stack(of_class).T
    y = data.test_y[first]
    if args.command == "redrawn":
        return plot_redrawn(model, x[first], y, data.classes)
    return plot_interpolation(model, x[first], x[second], y)


def load(argv, fixed=()):
    """The model with the weights, the data and the settings of a command line. `fixed` is as in
    read_settings. Raises BadInput."""
    _, settings = read_settings(argv, fixed)
    if not settings.pretrained:
        raise BadInput("name the weights: --pretrained RUN_DIR or FILE, or --pretrained for those "
                       "that ship")
    device = set_up_torch(settings, Processes())
    data = load_data(settings, device)
    with value_errors_as_bad_input():
        model = build_model(settings, data.shape, data.n_classes, data.class_probs,
                            data.grey_levels).to(device)
    load_pretrained(model, settings)
    return model, data, settings


def rows_of(run):
    """The metrics of a run's directory. Raises BadInput if it has none."""
    rows = read_metrics(run / "metrics.csv")
    if not rows:
        raise BadInput(f"{run} is not the directory of a run with metrics")
    return rows


if __name__ == "__main__":
    run_command(main)
