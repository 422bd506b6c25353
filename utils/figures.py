"""The pictures of runs and models.

Each `plot_...` returns a Figure of matplotlib, which `save` writes to a file, except `plot_run`,
which writes those of a run to its directory. experiments/pictures.py has commands for them.
"""

import contextlib
import itertools
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from models import SemiConditionalFlow

from .data import SemiSupervisedData
from .errors import Failed, one_line
from .files import atomic_write, from_here
from .metrics import Row, names_of_kept
from .runs import TRACEBACK_FILE
from .terminal import bar, say

# Colours that colour-blind people can tell apart: of Okabe and Ito, and for ten classes, which are
# marked by their digits too, dark ones.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
CLASS_COLOURS = ("#332288", "#0077bb", "#009988", "#117733", "#808000", "#cc6600", "#cc3311",
                 "#882255", "#aa4499", "#000000")
POINT_COLOURS = ListedColormap(["#0072b2", "#d55e00"])      # of both classes of points
POSTERIOR = LinearSegmentedColormap.from_list("posterior", ["#a6d8f4", "white", "#f7cf8a"])
LINES = ("-", "--", ":", "-.")      # of more curves than there are colours
# Of the curves, in every panel.
CURVES = {"train": ("training", "0.5"), "labelled": ("training, labelled", "0.5"),
          "val": ("validation", "#0072b2"),
          "ema_val": ("validation, averaged weights", "#e69f00"), "test": ("test", "black")}
LEGEND = 150                        # characters that fit below three panels
IMAGES_PER_CLASS, POINTS_PER_CLASS = 10, 1000
PADDING = 0.5                       # the grey between images
TEMPERATURE = 0.7                   # of a run's second picture of samples
TITLE, CHARACTERS = 11, 12          # of a title: points; characters of an inch
LONGEST_CLASS = 16                  # characters of a name in pictures
FORMATS = (".png", ".pdf", ".svg")


def plot_run(model: SemiConditionalFlow, data: SemiSupervisedData, rows: list[Row],
             run_dir: Path, seed: int) -> None:
    """Write the pictures of a run to its directory.

    A failure does not end the run, as described at `dispensable`.
    """
    pictures = {"curves.png": lambda: plot_curves(rows),
                "samples.png": lambda: plot_samples(model, seed, classes=data.classes)}
    if model.image:
        pictures[f"samples-{TEMPERATURE}.png"] = lambda: plot_samples(model, seed, TEMPERATURE,
                                                                      data.classes)
    else:
        pictures["density.png"] = lambda: plot_density(model, data)
    # Compiling would take longer than it saves.
    with dispensable("Pictures", run_dir), torch.compiler.set_stance("force_eager"):
        for name, draw in bar(pictures.items(), "drawing pictures"):
            save(draw(), run_dir / name)


@contextlib.contextmanager
def dispensable(what: str, run_dir: Path) -> Iterator[None]:
    """A block that makes what a run can do without: its weights are worth more than its pictures.

    An error costs a line, not the run. Unless its message says all, as of a full disk, its
    traceback is in the run's directory.
    """
    try:
        yield
    except Exception as error:
        is_clear, where = isinstance(error, OSError | Failed), run_dir / TRACEBACK_FILE
        say(what, f"failed ({one_line(error) if is_clear else type(error).__name__}); the run "
                  f"is not affected{'' if is_clear else f'. See {from_here(where)}'}")
        if not is_clear:
            with contextlib.suppress(OSError):
                where.write_text(traceback.format_exc(), "utf-8", "backslashreplace")


def save(figure: Figure, path: Path) -> None:
    """Write `figure` in one of FORMATS: the old picture stays whole until the new one is."""
    with atomic_write(path, "wb") as f, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")       # of a class's name
        figure.savefig(f, dpi=100, format=path.suffix[1:])


def plot_curves(rows: list[Row], columns: int = 3) -> Figure:
    """Loss, error, if there are labels, and likelihood against the epoch, from the rows of a
    MetricsLog.

    columns: of the panels, 3, or 1 for a narrow page
    """
    n = 3 if np.isfinite([row[f"{name}_acc"] for row in rows for name in CURVES
                          if name != "train"]).any() else 2
    columns = min(columns, n)
    figure = Figure(figsize=(4 * columns, 3.4 * (n // columns)), layout="constrained")
    loss, *errors, likelihood = figure.subplots(n // columns, columns)
    epoch = [row["epoch"] for row in rows]

    def curve(axes: Axes, name: str, quantity: str,
              of: Callable[[float], float] = lambda v: v) -> None:
        label, colour = CURVES[name]
        values = [of(row[f"{name}_{quantity}"]) for row in rows]
        single = np.isfinite(values).sum() == 1         # of the test set, after the last epoch
        axes.plot(epoch, values, label=label, color=colour,
                  marker="D" if single else "." if len(rows) < 30 else None)

    curve(loss, "train", "loss")
    shown = [name for name in ("val", "ema_val", "test")
             if any(np.isfinite(row[f"{name}_log_p"]) for row in rows)]
    for error in errors:
        for name in ("labelled", *shown):
            curve(error, name, "acc", lambda accuracy: 100 * (1 - accuracy))
    images = any(np.isfinite(row[f"{name}_bpd"]) for row in rows for name in shown)
    for name in shown:
        curve(likelihood, name, "bpd" if images else "log_p")
    _label_panels(figure, "loss, nats", "error, %", "bits/dim" if images else "log p(x), nats")
    for axes in figure.axes:
        axes.legend()
    return figure


def _label_panels(figure: Figure, loss: str, error: str, likelihood: str) -> None:
    """Labels and grids of the panels of loss, error, if there is one, and likelihood."""
    first, *errors, last = figure.axes
    first.set_ylabel(loss)
    last.set_ylabel(likelihood)
    for axes in errors:
        axes.set_ylabel(error)
        axes.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)


def plot_curves_of_runs(runs: dict[str, list[Row]]) -> Figure:
    """Training loss, error, if a run has labels, and likelihood of several runs against the epoch.

    runs: {label: rows of a MetricsLog}

    Error and likelihood are of the validation set or, without one, of the test set, and of
    the weights that the run would keep. Raises ValueError for runs of images beside runs of points,
    whose likelihoods differ in kind.
    """
    columns = max(1, min(3, LEGEND // (max(map(len, runs)) + 8)))
    figure = Figure(figsize=(12, 3.4 + 0.22 * -(-len(runs) // columns)), layout="constrained")
    judged = {label: names_of_kept(rows) for label, rows in runs.items()}
    labelled = any(np.isfinite(row[f"{name}_acc"]) for label, rows in runs.items()
                   for row, name in zip(rows, judged[label]))
    loss, *errors, likelihood = figure.subplots(1, 2 + labelled)
    styles = ((dashes, colour) for dashes in itertools.cycle(LINES) for colour in COLOURS)
    units = set()
    for (label, rows), (dashes, colour) in zip(runs.items(), styles):
        epoch, names = [row["epoch"] for row in rows], judged[label]
        images = np.isfinite([row[f"{name}_bpd"] for row, name in zip(rows, names)]).any()
        style = {"color": colour, "linestyle": dashes, "marker": "." if len(rows) < 30 else None}
        units.add("bits/dim" if images else "log p(x), nats")
        loss.plot(epoch, [row["train_loss"] for row in rows], label=label, **style)
        for error in errors:
            error.plot(epoch, [100 * (1 - row[f"{name}_acc"]) for row, name in zip(rows, names)],
                       **style)
        likelihood.plot(epoch, [row[f"{name}_{'bpd' if images else 'log_p'}"]
                                for row, name in zip(rows, names)], **style)
    if len(units) > 1:
        raise ValueError("runs of images and runs of points have no likelihood in common: draw "
                         "them in two pictures")
    figure.legend(loc="outside lower center", ncols=columns)
    _label_panels(figure, "training loss, nats", "error (validation, else test), %", units.pop())
    return figure


def plot_samples(model: SemiConditionalFlow, seed: int, temperature: float = 1.0,
                 classes: Sequence[str] = ()) -> Figure:
    """Samples from p(x | y), a column per class, a row per noise vector.

    seed: of the noise, which depends on nothing else
    temperature: standard deviation of the noise; less than 1 gives samples that are less varied and
        more typical
    classes: their names, for images; (): their numbers
    """
    k, device = model.n_classes, model.log_p_y.device
    rows = IMAGES_PER_CLASS if model.image else POINTS_PER_CLASS
    noise = torch.randn(rows, model.dim, generator=torch.Generator().manual_seed(seed))
    noise = temperature * noise
    y = torch.arange(k, device=device).repeat(rows)
    x = model.sample(y, noise.repeat_interleave(k, 0).to(device, model.log_p_y.dtype)).cpu()
    x = x.unflatten(0, (rows, k)).float()  # (rows, K, C, H, W)
    if model.image:
        figure, axes = draw_grid(x, f"Samples from p(x | y), temperature {temperature:g}")
        _name_columns(axes, x, classes or range(k))
        axes.set_xlabel("class y")
        axes.set_ylabel("noise vector")
    else:
        figure = Figure(figsize=(4 * k, 4), layout="constrained")
        for j, axes in enumerate(figure.subplots(1, k, sharex=True, sharey=True, squeeze=False)[0]):
            points = x[:, j, :, 0, 0]
            finite = points.isfinite().all(1)
            axes.scatter(*points[finite].numpy().T, s=4, color=POINT_COLOURS(j))
            axes.set_title(f"Samples from p(x | y = {j})"
                           + left_out(int((~finite).sum()), rows), fontsize=TITLE)
            axes.set_aspect("equal")
    return figure


def draw_grid(x: Tensor, title: str) -> tuple[Figure, Axes]:
    """Images x (rows, columns, C, H, W), from 0 to 1, in one figure without ticks.

    An image that is not finite is left out: its place is grey, and the title says how many are.
    """
    from torchvision.utils import make_grid  # imported here because it takes a second

    finite = x.isfinite().flatten(2).all(2)                                 # (rows, columns)
    x = x.where(finite[:, :, None, None, None], PADDING)
    rows, columns = x.shape[:2]
    width = max(columns * 0.6 + 0.5, 4.2)
    title = (textwrap.fill(title, int(CHARACTERS * width))
             + left_out(int((~finite).sum()), finite.numel()))
    grid = make_grid(x.flatten(0, 1).clamp(0, 1), nrow=columns, padding=1, pad_value=PADDING)
    figure = Figure(figsize=(width, rows * 0.6 + 0.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=TITLE)
    axes.set_xticks([])
    axes.set_yticks([])
    return figure, axes


def left_out(n: int, of: int) -> str:
    """What a title adds if n of so many samples are left out."""
    return f"\n{n} of {of} left out: not finite" if n else ""


def short(name: str) -> str:
    """The name of a class, of up to LONGEST_CLASS characters."""
    return name if len(name) <= LONGEST_CLASS else f"{name[:LONGEST_CLASS - 3]}..."


def _name_columns(axes: Axes, x: Tensor, names: Sequence[object]) -> None:
    """Label the columns of `draw_grid`(x), upright if a name is longer than its column."""
    width = x.shape[-1] + 1                     # with the line between images
    labels = [short(str(name)) for name in names]
    axes.set_xticks([(j + 0.5) * width for j in range(len(labels))], labels,
                    rotation=90 if max(map(len, labels)) > 5 else 0, parse_math=False)


@torch.no_grad()
def plot_redrawn(model: SemiConditionalFlow, x: Tensor, y: Tensor,
                 classes: Sequence[str] = ()) -> Figure:
    """Images, each at the left of its row, and re-drawn as every class: z_aux and
    z_h = h_phi(z_f; y) stay the same, and the label in h_phi's inverse differs.

    x: images, (N, C, H, W)
    y: their classes, (N,)
    classes: names of all; (): their numbers
    """
    k = model.n_classes
    z_aux, z_f = model.split_latent(model.encode(x)[0])
    z_h, _ = model.h_phi(z_f, y)
    other = torch.arange(k, device=x.device).repeat(len(x))                 # (N * K,)
    z_f = model.h_phi.inverse(z_h.repeat_interleave(k, 0), other)
    z = torch.cat((z_aux.repeat_interleave(k, 0), z_f), 1)
    redrawn = model.f_w.inverse(z).unflatten(0, (-1, k))                    # decode refuses some z
    images = torch.cat((x[:, None], redrawn), 1).cpu().float()              # (N, 1 + K, C, H, W)
    figure, axes = draw_grid(images, "Images re-drawn as every class, with their z_aux and z_h")
    _name_columns(axes, images, ["image", *(classes or range(k))])
    axes.set_xlabel("re-drawn as class")
    return figure


@torch.no_grad()
def plot_interpolation(model: SemiConditionalFlow, x: Tensor, other: Tensor, y: Tensor,
                       steps: int = 9) -> Figure:
    """In each row, from one image to another of its class in equal steps of (z_aux, z_h).

    x, other: the first and the last images of the rows, (N, C, H, W)
    y: their classes, (N,)
    """
    def encode(images: Tensor) -> Tensor:
        z_aux, z_f = model.split_latent(model.encode(images)[0])
        return torch.cat((z_aux, model.h_phi(z_f, y)[0]), 1)
    share = torch.linspace(0, 1, steps, device=x.device, dtype=x.dtype)[:, None]
    z = torch.lerp(encode(x)[:, None], encode(other)[:, None], share)       # (N, steps, D)
    z_aux, z_h = model.split_latent(z.flatten(0, 1))
    z_f = model.h_phi.inverse(z_h, y.repeat_interleave(steps))
    images = model.f_w.inverse(torch.cat((z_aux, z_f), 1)).unflatten(0, (-1, steps)).cpu().float()
    figure, axes = draw_grid(images, "From one image to another of its class")
    _name_columns(axes, images, [f"{float(s):.3g}" for s in share])
    axes.set_xlabel("share of the second image in z_aux and z_h")
    return figure


def plot_mistakes(x: Tensor, y: Tensor, predicted: Tensor, confidence: Tensor,
                  classes: Sequence[str]) -> Figure:
    """Images that the model takes for another class, five in a row.

    x: images in any scale, (N, C, H, W)
    y: their classes, (N,)
    predicted: what the model takes them for, (N,)
    confidence: its p(y | x) of that, (N,)
    """
    columns = 5
    rows = -(-len(x) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.7 * rows + 0.3), layout="constrained")
    figure.suptitle("The most confident mistakes, with p(y | x) of the predicted class",
                    fontsize=TITLE)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, image, true, taken_for, p in zip(panels, x, y, predicted, confidence):
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray",
                    interpolation="nearest")
        names = short(classes[true]), short(classes[taken_for])
        gap = "\n" if max(map(len, names)) > 5 else " "
        axes.set_title(f"{names[0]}, predicted{gap}{names[1]}: {float(p):.1%}", fontsize=8,
                       parse_math=False)
    return figure


@torch.no_grad()
def plot_latent_space(model: SemiConditionalFlow, x: Tensor, y: Tensor) -> Figure:
    """z_f of points, and z_h given their class, of a model with ssl_dim 2.

    x: points, (N, 2, 1, 1)
    y: their classes, (N,)
    """
    z_f = model.split_latent(model.encode(x)[0])[1]
    z_h, _ = model.h_phi(z_f, y)
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, z, title in zip(figure.subplots(1, 2), (z_f, z_h),
                              ("z_f of test points", "z_h of test points, given their class")):
        finite = z.isfinite().all(1)
        for k, marker in zip(range(model.n_classes), "ox"):
            axes.scatter(*z[finite & (y == k)].cpu().numpy().T, s=12, marker=marker, linewidths=0.8,
                         color=POINT_COLOURS(k), alpha=0.7, label=f"class {k}")
        axes.set_title(title + left_out(int((~finite).sum()), len(z)), fontsize=TITLE)
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


@torch.no_grad()
def plot_density(model: SemiConditionalFlow, data: SemiSupervisedData, cells: int = 200) -> Figure:
    """For points: log p(x) with the training points and, if there are labels, p(y = 1 | x) with the
    test points; both with the labelled training points.

    They are evaluated on a grid of cells x cells. Raises Failed if none is finite.
    """
    points = data.train_x[:, :, 0, 0].cpu().numpy()
    low, high = points.min(0) - 0.4, points.max(0) + 0.4
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    left, right, bottom, top = extent
    xs, ys = torch.linspace(left, right, cells), torch.linspace(bottom, top, cells)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).view(-1, 2, 1, 1).to(data.train_x)
    log_joint = torch.cat([model.log_joint(part) for part in grid.split(4096)]).cpu()
    finite = log_joint.isfinite().all(1)
    if not finite.any():
        raise Failed("Not finite: log p(x, y) of all points of the picture")
    log_joint[~finite] = torch.nan
    log_p = log_joint.logsumexp(1).view(cells, cells)
    height, panels = 4.6 * (top - bottom) / (right - left) + 1.1, 1 + (len(data.labelled) > 0)
    figure = Figure(figsize=(6 * panels, height), layout="constrained")
    density, *others = figure.subplots(1, panels, squeeze=False)[0]

    def colour_bar(image: AxesImage, axes: Axes, label: str) -> None:
        """As high as the panel, which is lower than its place."""
        figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)), label=label)
    lowest = float(log_p[log_p.isfinite()].max()) - 12
    image = density.imshow(log_p.clamp(min=lowest).numpy(), origin="lower", extent=extent,
                           cmap="viridis")
    colour_bar(image, density, "log p(x), nats")
    density.scatter(*points.T, s=3, color="black", alpha=0.4, linewidths=0)
    density.set_title("Density and training points"
                      + left_out(int((~finite).sum()), len(finite)), fontsize=TITLE)
    if not others:
        return figure
    regions, posterior = others[0], log_joint.softmax(1)[:, 1].view(cells, cells)
    image = regions.imshow(posterior.numpy(), origin="lower", extent=extent, cmap=POSTERIOR,
                           vmin=0, vmax=1)
    colour_bar(image, regions, "p(y = 1 | x)")
    regions.scatter(*data.test_x[:, :, 0, 0].cpu().numpy().T, s=4, c=data.test_y.cpu().numpy(),
                    cmap=POINT_COLOURS)
    regions.set_title("Posterior and test points", fontsize=TITLE)
    figure.supxlabel("Large: the labelled training points", fontsize=TITLE)
    labelled, y = data.labelled.cpu().numpy(), data.train_y[data.labelled].cpu().numpy()
    for axes in (density, regions):
        axes.scatter(*points[labelled].T, s=60, c=y, cmap=POINT_COLOURS,
                     edgecolors="black", linewidths=1.2)
    return figure
