"""Samples from p(x | y): whether they look like their class, and how exactly they are inverted.

    python experiments/samples.py --config configs/mnist-best.yaml --pretrained
    python experiments/samples.py --pretrained RUN_DIR
        [--temperatures 1 0.7] [--samples 1000] [--json FILE.json] [options of train-flow-ssl.py]

The CNN of fixmatch.py is trained on the training images with all their labels. Its accuracy on
samples is GAN-test of Shmelkov et al. 2018 (arXiv 1807.09499). A sample that is not finite counts
as not recognised. The inversion error is the largest |decode(encode(x)) - x| of the samples, if all
are finite, and of as many test images with dequantisation noise. Prints these figures, which --json
writes too.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.fixmatch import fit_fixmatch
from experiments.pictures import MAX_TEMPERATURE, load
from utils.datasets import check_test_images
from utils.errors import (BadInput, Failed, OneLineParser, check_output, run_command,
                          value_errors_as_bad_input)
from utils.files import write_json


@value_errors_as_bad_input()        # of a matrix in the weights that has no inverse
def main(argv=None):
    parser = OneLineParser(description="Samples from p(x | y), recognised and inverted.",
                           allow_abbrev=False,
                           epilog="All other options are those of train-flow-ssl.py.")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7], metavar="T",
                        help="standard deviations of the noise (default: 1 0.7)")
    parser.add_argument("--samples", type=int, default=1000, metavar="N",
                        help="samples for each temperature, at most, equally many of each class "
                             "(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    args, rest = parser.parse_known_args(argv)
    check_output(args.json)
    if not all(0 <= t <= MAX_TEMPERATURE for t in args.temperatures):
        raise BadInput(f"--temperatures must be from 0 to {MAX_TEMPERATURE}")
    model, data, settings = load(rest, ["--supervised", "-1", "--labelled="])    # all labels
    if not model.image:
        raise BadInput(f"samples are classified as images, unlike {settings.data}")
    if args.samples < data.n_classes:
        raise BadInput(f"--samples must be at least one for each of the {data.n_classes} classes")
    check_test_images(data)
    classify = fit_fixmatch(data, settings.seed)
    y = torch.arange(data.n_classes, device=data.device).repeat(args.samples // data.n_classes)
    noise = torch.randn(len(y), model.dim, generator=torch.Generator().manual_seed(settings.seed))
    test_x = data.dequantize(data.test_x[:len(y)],
                             torch.Generator(data.device).manual_seed(settings.seed))
    report = {"weights": settings.pretrained, "config": settings.config_file,
              "samples": len(y), "seed": settings.seed,
              "test_accuracy": accuracy(classify, data.test_x, data.test_y),
              "sample_accuracy": {},
              "inversion_error": {"test": inversion_error(model, test_x, settings.test_bs)}}
    print(f"CNN: {report['test_accuracy']:.2%} accuracy on {len(data.test_y):,} test images")
    print(f"{len(test_x):,} test images: inversion error {report['inversion_error']['test']:.1e}")
    for temperature in args.temperatures:
        x = torch.cat([model.sample(*part) for part in zip(
            y.split(settings.test_bs),
            (temperature * noise).to(data.device).split(settings.test_bs))])
        finite = x.isfinite().flatten(1).all(1)
        images = (x.nan_to_num() * data.grey_levels).clamp(max=data.grey_levels - 1).byte()
        share = accuracy(classify, images, y.where(finite, -1))
        report["sample_accuracy"][f"{temperature:g}"] = share
        line = (f"temperature {temperature:g}: {share:.1%} of {len(y):,} samples recognised, "
                f"{int((~finite).sum())} not finite")
        if finite.all():
            error = inversion_error(model, x, settings.test_bs)
            report["inversion_error"][f"{temperature:g}"] = error
            line += f"; inversion error {error:.1e}"
        print(line)
    if args.json:
        write_json(args.json, report)


def accuracy(classify, images, y):
    """The share of images (N, C, H, W), uint8, to which `classify` assigns their class y (N,)."""
    return float((classify(images) == y).double().mean())


@torch.no_grad()
def inversion_error(model, x, batch_size):
    """The largest |decode(encode(x)) - x| of images x (N, C, H, W). Raises Failed if one is not
    finite."""
    errors = torch.cat([(model.f_w.inverse(model.encode(part)[0]) - part).abs().flatten(1).amax(1)
                        for part in x.split(batch_size)])
    if not errors.isfinite().all():
        raise Failed(f"Not finite: decode(encode(x)) of {int((~errors.isfinite()).sum())} of "
                     f"{len(x)} images")
    return float(errors.max())


if __name__ == "__main__":
    run_command(main)
