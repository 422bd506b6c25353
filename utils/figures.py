"""The pictures of a run: curves.png, samples.png, and for points in the plane density.png."""

import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from models import SemiConditionalFlow

from .data import SemiSupervisedData
from .files import atomic_write
from .metrics import Row

CLASS_COLOURS = ["#1f77b4", "#d62728"]   # of points
# Of the curves, in every panel; colour-blind people can tell them apart (Okabe and Ito).
CURVES = {"train": ("training", "0.5"), "labelled": ("training, labelled", "0.5"),
          "val": ("validation", "#0072b2"),
          "ema_val": ("validation, averaged weights", "#e69f00"), "test": ("test", "black")}
IMAGES_PER_CLASS, POINTS_PER_CLASS = 10, 1000


def plot_run(model: SemiConditionalFlow, data: SemiSupervisedData, rows: list[Row],
             run_dir: Path, seed: int) -> None:
    """Write the pictures of a run with the metrics `rows` to its directory.

    A failure is reported, and does not end the run: its weights are worth more than its pictures.
    """
    try:
        plot_curves(rows, run_dir / "curves.png")
        plot_samples(model, run_dir / "samples.png", seed)
        if not model.image:
            plot_density(model, data, run_dir / "density.png")
    except Exception as error:
        traceback.print_exc()
        print(f"The pictures could not be drawn ({type(error).__name__}); the run goes on")


def plot_curves(rows: list[Row], path: Path) -> None:
    """Loss, error and likelihood against the epoch, from the rows of a MetricsLog."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, error, likelihood = figure.subplots(1, 3)
    epoch = [row["epoch"] for row in rows]

    def curve(axes: Axes, name: str, quantity: str,
              of: Callable[[float], float] = lambda v: v) -> None:
        label, colour = CURVES[name]
        values = [of(row[f"{name}_{quantity}"]) for row in rows]
        single = np.isfinite(values).sum() == 1         # of the test set, after the last epoch
        axes.plot(epoch, values, label=label, color=colour,
                  marker="D" if single else "." if len(rows) < 30 else None)

    def error_percent(accuracy: float) -> float:
        return 100 * (1 - accuracy)
    curve(loss, "train", "loss")
    loss.set_ylabel("loss, nats")
    curve(error, "labelled", "acc", error_percent)
    shown = [name for name in ("val", "ema_val", "test")
             if any(np.isfinite(row[f"{name}_log_p"]) for row in rows)]
    for name in shown:
        curve(error, name, "acc", error_percent)
    error.set_ylabel("error, %")
    error.set_ylim(bottom=0)
    images = any(np.isfinite(row[f"{name}_bpd"]) for row in rows for name in shown)
    for name in shown:
        curve(likelihood, name, "bpd" if images else "log_p")
    likelihood.set_ylabel("bits/dim" if images else "log p(x), nats")
    for axes in (loss, error, likelihood):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)


def plot_samples(model: SemiConditionalFlow, path: Path, seed: int) -> None:
    """Samples from p(x | y), a column per class, a row per noise vector.

    The noise depends on `seed` alone.
    """
    k, device = model.n_classes, model.log_p_y.device
    rows = IMAGES_PER_CLASS if model.image else POINTS_PER_CLASS
    noise = torch.randn(rows, model.dim, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(k, device=device).repeat(rows)
    x = model.sample(y, noise.repeat_interleave(k, 0).to(device, model.log_p_y.dtype)).cpu()
    x = x.unflatten(0, (rows, k)).float()  # (rows, K, C, H, W)
    if model.image:
        from torchvision.utils import make_grid  # imported here because it takes a second

        w = x.shape[-1]
        grid = make_grid(x.flatten(0, 1), nrow=k, padding=1, pad_value=0.5)  # (3, height, width)
        figure = Figure(figsize=(k * 0.6, rows * 0.6 + 0.5), layout="constrained")
        axes = figure.subplots()
        axes.imshow(grid.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([(j + 0.5) * (w + 1) for j in range(k)], [str(j) for j in range(k)])
        axes.set_yticks([])
        axes.set_xlabel("class y")
    else:
        figure = Figure(figsize=(4 * k, 4), layout="constrained")
        for j, axes in enumerate(figure.subplots(1, k, sharex=True, sharey=True)):
            axes.scatter(*x[:, j, :, 0, 0].numpy().T, s=4, color=CLASS_COLOURS[j])
            axes.set_title(f"x ~ p(x | y = {j})")
            axes.set_aspect("equal")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG file: the old picture stays whole until the new one is."""
    with atomic_write(path, "wb") as f:
        figure.savefig(f, dpi=100, format="png")


@torch.no_grad()
def plot_density(model: SemiConditionalFlow, data: SemiSupervisedData, path: Path,
                 cells: int = 200) -> None:
    """For points: log p(x) with the training points, and p(y = 1 | x) with the test points.

    Both are evaluated on a grid of cells x cells.
    """
    points = data.train_x[:, :, 0, 0].cpu().numpy()
    low, high = points.min(0) - 0.4, points.max(0) + 0.4
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    left, right, bottom, top = extent
    xs, ys = torch.linspace(left, right, cells), torch.linspace(bottom, top, cells)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).view(-1, 2, 1, 1).to(data.train_x)
    log_joint = torch.cat([model.log_joint(part) for part in grid.split(4096)]).cpu()
    log_p = log_joint.logsumexp(1).view(cells, cells)
    posterior = log_joint.softmax(1)[:, 1].view(cells, cells)
    figure = Figure(figsize=(12, 5), layout="constrained")
    density, regions = figure.subplots(1, 2)
    image = density.imshow(log_p.clamp(min=float(log_p.max()) - 12).numpy(), origin="lower",
                           extent=extent, cmap="viridis")
    figure.colorbar(image, ax=density, label="log p(x), nats")
    density.scatter(*points.T, s=3, color="white", alpha=0.4, linewidths=0)
    density.set_title("density and training points, labelled ones large")
    image = regions.imshow(posterior.numpy(), origin="lower", extent=extent, cmap="RdBu_r",
                           vmin=0, vmax=1, alpha=0.7)
    figure.colorbar(image, ax=regions, label="p(y = 1 | x)")
    regions.scatter(*data.test_x[:, :, 0, 0].cpu().numpy().T, s=4, c=data.test_y.cpu().numpy(),
                    cmap=ListedColormap(CLASS_COLOURS))
    regions.set_title("posterior and test points, labelled ones large")
    labelled, y = data.labelled.cpu().numpy(), data.train_y[data.labelled].cpu().numpy()
    for axes in (density, regions):
        axes.scatter(*points[labelled].T, s=60, c=y, cmap=ListedColormap(CLASS_COLOURS),
                     edgecolors="black", linewidths=1.2)
    save(figure, path)
