"""What the parts of the latent space know about the class: z_f, z_h and z_aux of a trained model.

    python experiments/obfuscation.py --config configs/digits.yaml --pretrained
    python experiments/obfuscation.py --pretrained RUN_DIR
        [--picture FILE.png] [--save FILE.npz] [--json FILE.json] [options of train-flow-ssl.py]

With a flow that models p(z_f | y) well, z_h = h_phi(z_f; y) follows the same distribution whatever
the class, so nothing can tell the class from z_h: the label has been taken out of it. This is the
paper's claim of obfuscation. To test it, training and test images are mapped to z_f, z_aux and,
with their own labels, z_h, and on each of these a classifier is trained with the labels of all
training images: the one of the authors' code (five linear layers), and logistic regression. A test
accuracy near chance, the share of the largest class, means that the class is not to be found.

Prints a table, which --json writes too; --picture draws z_f and z_h of test images in the plane, by
t-SNE; --save writes the latents of all images.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.fixmatch import classify
from experiments.pictures import load
from utils.datasets import check_test_images
from utils.errors import OneLineParser, check_output, run_command
from utils.figures import CLASS_COLOURS, FORMATS, TITLE, save, short
from utils.files import atomic_write, write_json
from utils.terminal import bar

PARTS = ("z_f", "z_h", "z_aux")
WIDTH, DROPOUT, EPOCHS, BATCH = 256, 0.3, 100, 256      # of the authors' classifier
LEARNING_RATE = 1e-3
MAX_ITERATIONS = 1000                                   # of logistic regression
IN_PICTURE, MARKER_SIZE = 5000, 20                      # test images, and their size
NAMED = 20                                              # classes, at most, in the legend


def main(argv=None):
    parser = OneLineParser(description="What z_f, z_h and z_aux know about the class.",
                           allow_abbrev=False,
                           epilog="All other options are those of train-flow-ssl.py.")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("--save", type=Path, metavar="FILE.npz")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    args, rest = parser.parse_known_args(argv)
    for path, suffixes in ((args.picture, FORMATS), (args.save, (".npz",)), (args.json, ())):
        check_output(path, suffixes)
    model, data, settings = load(rest, ["--supervised", "-1", "--labelled="])    # all labels
    noise = torch.Generator(data.device).manual_seed(settings.seed)
    check_test_images(data)
    y, test_y = data.train_y[data.labelled], data.test_y
    train, test = (latents(model, data.dequantize(x, noise), y, settings.test_bs)
                   for x, y in ((data.train_x[data.labelled], y), (data.test_x, test_y)))
    chance = float(test_y.bincount().max() / len(test_y))
    rows = {part: {"dimensions": train[part].shape[1],
                   "classifier": accuracy_of_classifier(train[part], y, test[part], test_y,
                                                        settings.seed),
                   "linear": accuracy_of_linear_probe(train[part], y, test[part], test_y)}
            for part in bar(PARTS, "probing", unit="part") if train[part].shape[1]}
    report = {"weights": settings.pretrained, "config": settings.config_file,
              "train": len(y), "test": len(test_y), "chance": chance, "parts": rows}
    show(report)
    if args.json:
        write_json(args.json, report)
    if args.save:
        arrays = {f"{name}_{part}": z[part].cpu().numpy()
                  for name, z in (("train", train), ("test", test)) for part in PARTS}
        with atomic_write(args.save, "wb") as f:
            np.savez_compressed(f, train_y=y.cpu().numpy(), test_y=test_y.cpu().numpy(), **arrays)
    if args.picture:
        save(plot_latents(test, test_y, settings.seed, data.classes), args.picture)
        print(f"Saved {args.picture}")


@torch.no_grad()
def latents(model, x, y, batch_size):
    """x (N, C, H, W), y (N,) -> {"z_f": (N, ssl_dim), "z_h": the same, "z_aux": the rest of z}.

    z_h = h_phi(z_f; y), with the label of each image.
    """
    found = {part: [] for part in PARTS}
    for images, labels in zip(x.split(batch_size), y.split(batch_size)):
        z_aux, z_f = model.split_latent(model.encode(images)[0])
        for part, z in zip(PARTS, (z_f, model.h_phi(z_f, labels)[0], z_aux)):
            found[part].append(z)
    return {part: torch.cat(batches) for part, batches in found.items()}


def accuracy_of_classifier(x, y, test_x, test_y, seed):
    """The test accuracy of the classifier of the authors' code, trained on x (N, D) and y (N,).

    Five linear layers with LeakyReLU, dropout after the first; Adam, with a learning rate that
    decays linearly to zero.
    """
    torch.manual_seed(seed)
    k = int(y.max()) + 1
    widths = [x.shape[1], *[WIDTH] * 4]
    hidden = [layer for a, b in itertools.pairwise(widths)
              for layer in (nn.Linear(a, b), nn.LeakyReLU())]
    net = nn.Sequential(*hidden[:2], nn.Dropout(DROPOUT), *hidden[2:], nn.Linear(WIDTH, k)).to(x)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    for epoch in bar(range(EPOCHS), "training a classifier", unit="epoch"):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - epoch / EPOCHS)
        for rows in torch.randperm(len(x), device=x.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval()
    return float((classify(net, test_x) == test_y).double().mean())


def accuracy_of_linear_probe(x, y, test_x, test_y):
    """The test accuracy of logistic regression on x (N, D), standardised, and y (N,)."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    probe.fit(x.cpu().numpy(), y.cpu().numpy())
    return float(probe.score(test_x.cpu().numpy(), test_y.cpu().numpy()))


def show(report):
    """Print the table."""
    print(f"Trained on {report['train']:,} images, accuracy on {report['test']:,} test images; "
          f"chance: {report['chance']:.1%}\n\n{'':6}{'dimensions':>12}{'classifier':>12}"
          f"{'linear':>10}")
    for part, row in report["parts"].items():
        print(f"{part:6}{row['dimensions']:12}{row['classifier']:12.1%}{row['linear']:10.1%}")


def plot_latents(z, y, seed, classes=()):
    """z_f and z_h of the first test images in the plane by t-SNE, coloured by class.

    z: what `latents` returns; y: the labels, (N,); classes: their names; (): their numbers.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    y = y[:IN_PICTURE].cpu().numpy()
    classes = classes or [str(k) for k in range(y.max() + 1)]
    parts = (("z_f", "z_f"), ("z_h", "z_h, given the class"))
    for (part, title), axes in zip(bar(parts, "t-SNE", unit="part"), panels):
        plane = TSNE(perplexity=min(30, (len(y) - 1) / 3), random_state=seed, init="pca"
                     ).fit_transform(z[part][:IN_PICTURE].cpu().numpy())
        for k in range(len(classes)):           # the mark is its number
            axes.scatter(*plane[y == k].T, s=MARKER_SIZE, marker=f"${k}$", linewidths=0,
                         color=CLASS_COLOURS[k % len(CLASS_COLOURS)])
        axes.set_title(f"{title}, of {len(y):,} test images", fontsize=TITLE)
        axes.set_xticks([])
        axes.set_yticks([])
    if len(classes) <= NAMED and any(name != str(k) for k, name in enumerate(classes)):
        legend = figure.legend(
            axes.collections, [f"{k} {short(name)}" for k, name in enumerate(classes)],
            loc="outside right center")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


if __name__ == "__main__":
    run_command(main)
