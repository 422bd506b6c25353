"""What a trained model is worth beyond its mean error and likelihood: an Assessment.

Confusion of classes, calibration of p(y | x), the most confident mistakes, and how well p(x) tells
the test images from images of other kinds.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from utils import Settings
from utils.data import SemiSupervisedData
from utils.datasets import DATASETS
from utils.examples import Examples
from utils.figures import plot_mistakes
from utils.terminal import NO_BREAK, say

from .device import device_name
from .distributed import Processes
from .evaluation import Inference, predict, summary
from .speed import Accelerated

BINS = 15           # of the confidence, in the calibration error
N_OTHERS = 200      # images of each other kind
N_MISTAKES = 25


@dataclass(frozen=True)
class Assessment:
    """What a model says of N examples of K classes; what needs labels is NaN or empty without."""

    name: str                   # of the examples
    classes: tuple[str, ...]    # their names
    error: float                # share of wrong classes, from 0 to 1
    log_p: float                # mean log p(x), nats
    bits_per_dim: float         # NaN for points
    nll: float                  # mean of -log p(y | x), nats
    calibration_error: float    # see there
    confusion: Tensor           # examples of each class (row) taken for each class (column), (K, K)
    mistakes: Tensor            # indices of the wrong examples, the most confident first
    predicted: Tensor           # the class with the largest p(y | x) of each example, (N,)
    confidence: Tensor          # that p(y | x), (N,)
    auroc: dict[str, float]     # of images, {kind: the probability that p(x) of a test image
                                # exceeds that of an image of that kind}; NaN if one is NaN

    def show(self) -> None:
        """Print what there is beyond error and likelihood."""
        if self.has_labels:
            say("-log p(y|x)", f"{self.nll:.4f} nats")
            say("Calibration", f"{self.calibration_error:.2%} expected calibration error")
        if self.auroc:
            kinds = ", ".join(f"{kind} {shown}".replace(" ", NO_BREAK)
                              for kind, shown in self.shown_auroc(3).items())
            say("AUROC", f"of log p(x), {self.name} images against images of other kinds: {kinds}. "
                         f"{self.meaning_of_auroc}")
        if not self.has_labels:
            return
        counts = self.confusion.sum(1)
        errors = 1 - self.confusion.diagonal() / counts         # NaN of a class without examples
        say("Confusion", "row: the true class; column: the predicted one")
        if self.classes != tuple(map(str, range(len(self.classes)))):
            say("Classes", ", ".join(f"{j}{NO_BREAK}{name}" for j, name in enumerate(self.classes)))
        width = max(len(str(int(counts.max()))), 2) + 2
        print("class" + "".join(f"{j:{width}}" for j in range(len(counts))) + "    error")
        for i, (row, error) in enumerate(zip(self.confusion.tolist(), errors.tolist())):
            shown = "-" if np.isnan(error) else f"{error:.2%}"
            print(f"{i:5}" + "".join(f"{n or '.':>{width}}" for n in row) + f"{shown:>9}")

    @property
    def has_labels(self) -> bool:
        """Whether the examples have labels."""
        return not np.isnan(self.error)

    @property
    def meaning_of_auroc(self) -> str:
        """Which values are good and, if some are not, why (Serrà et al. 2020, arXiv 1909.11480)."""
        meaning = f"An AUROC of 1 means that log p(x) of the {self.name} images is always higher"
        if min(self.auroc.values()) < 0.5:
            meaning += (", 0 that it never is. The easier an image is to predict, the higher its "
                        "log p(x): a black one is the easiest")
        return f"{meaning}."

    def shown_auroc(self, digits: int) -> dict[str, str]:
        """{kind: its AUROC in words}."""
        return {kind: "not finite" if np.isnan(value) else f"{value:.{digits}f}"
                for kind, value in self.auroc.items()}

    def plot_mistakes(self, examples: Examples) -> Figure:
        """The most confident of the mistakes on `examples`, images and classes.

        Raises ValueError if there are none.
        """
        shown = self.mistakes[:N_MISTAKES]
        if not len(shown):
            raise ValueError(f"there are no mistakes on the {self.name} images")
        images, y = (part.cpu()[shown] for part in examples)
        return plot_mistakes(images, y, self.predicted[shown], self.confidence[shown],
                             self.classes)


def assess(infer: Inference, others: Inference, data: SemiSupervisedData, examples: Examples,
           name: str, settings: Settings,
           predictions: tuple[Tensor, Tensor] | None = None) -> Assessment:
    """The Assessment of `examples`, images and classes as in `data`.

    others: the same for images of other kinds, as each accepts batches of one size only
    settings: data, data_root, test_bs, seed
    predictions: what `predict` returned for the examples, if it has been called

    Raises Failed if predictions are not finite.
    """
    images, y = examples
    batch, seed = settings.test_bs, settings.seed
    log_p, logits = predictions or predict(infer, data, images, batch, seed)
    mean_log_p, accuracy = summary(log_p, logits, y)
    log_posterior = logits.double().log_softmax(1)
    confidence, predicted = (t.cpu() for t in log_posterior.exp().max(1))
    y_cpu, k = y.cpu(), logits.shape[1]
    known = y_cpu >= 0          # all of them, or none
    wrong = torch.nonzero(known & (predicted != y_cpu))[:, 0]
    auroc = {}
    if data.grey_levels is not None:
        kinds = other_images(data, images, settings)
        of_others, _ = predict(others, data, torch.cat(list(kinds.values())), batch, seed)
        parts = of_others.split([len(x) for x in kinds.values()])
        auroc = {kind: area_under_roc(log_p, part) for kind, part in zip(kinds, parts)}
    return Assessment(
        name=name, classes=data.classes, error=1 - accuracy, log_p=mean_log_p,
        bits_per_dim=data.bits_per_dim(mean_log_p),
        nll=float(F.nll_loss(log_posterior, y, ignore_index=-1)),
        calibration_error=calibration_error(confidence[known], (predicted == y_cpu)[known]),
        confusion=(y_cpu * k + predicted)[known].bincount(minlength=k * k).view(k, k),
        mistakes=wrong[confidence[wrong].argsort(descending=True, stable=True)],
        predicted=predicted, confidence=confidence, auroc=auroc)


def assessed_examples(data: SemiSupervisedData, settings: Settings) -> tuple[str, Examples]:
    """The test set and its name or, with settings.test false, the validation set."""
    if settings.test:
        return "test", (data.test_x, data.test_y)
    return "validation", (data.val_x, data.val_y)


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """The expected calibration error: sum over bins of the confidence of

        (share of the examples in the bin) |mean confidence - accuracy|,

    with BINS bins of equal width (Guo et al. 2017, arXiv 1706.04599, equation 3). confidence, from
    0 to 1, and correct: (N,).
    """
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    difference = torch.zeros(BINS, dtype=torch.float64)
    difference.index_add_(0, bins, confidence.double() - correct.double())
    return float(difference.abs().sum() / len(bins))


def area_under_roc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a score in `positive`, (N,), exceeds one in `negative`, (M,); NaN if one
    is NaN or inf."""
    from sklearn.metrics import roc_auc_score   # imported here because it takes a second

    scores = torch.cat((positive, negative)).cpu()
    if (scores.isnan() | (scores == torch.inf)).any():
        return float("nan")
    scores = scores.clamp(min=-1e30)            # scikit-learn refuses -inf
    labels = [1] * len(positive) + [0] * len(negative)
    return float(roc_auc_score(labels, scores.numpy()))


def other_images(data: SemiSupervisedData, images: Tensor,
                 settings: Settings) -> dict[str, Tensor]:
    """Images of other kinds, {kind: grey levels (N_OTHERS, C, H, W)}, some made from `images`."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape, levels = (N_OTHERS, *data.shape), data.grey_levels
    assert levels is not None, "points have no grey levels"
    chosen = images[:N_OTHERS]
    if DATASETS[settings.data].shape is None:       # own images can be sorted by class
        chosen = images[torch.linspace(0, len(images) - 1, len(chosen)).long()]
    chosen = chosen.cpu()

    def random(*size: int) -> Tensor:
        return torch.randint(levels, size, generator=generator).to(chosen.dtype)
    order = torch.rand(len(chosen), chosen[0].numel(), generator=generator).argsort(1)
    kinds = {"noise": random(*shape), "black": torch.zeros(shape, dtype=chosen.dtype),
             "constant": random(N_OTHERS, 1, 1, 1).clamp(min=1).expand(shape),
             "inverted": levels - 1 - chosen,
             "shuffled pixels": chosen.flatten(1).gather(1, order).view_as(chosen)}
    if settings.data == "mnist":
        digits = DATASETS["digits"]
        small = digits.load(settings)[2][:N_OTHERS]
        assert digits.grey_levels is not None
        large = F.interpolate(small.float(), size=data.shape[1:], mode="bilinear")
        kinds["scikit-learn's digits"] = (
            large * (levels - 1) / (digits.grey_levels - 1)).round().to(chosen.dtype)
    return {kind: x.to(images.device) for kind, x in kinds.items()}


def print_evaluation(accelerated: Accelerated, data: SemiSupervisedData,
                     settings: Settings, processes: Processes) -> None:
    """Print error, if there are labels, likelihood and the rest of an Assessment on the test set;
    with settings.test false, on the validation set.

    Error and likelihood are means over settings.draws samples of the dequantisation noise; the
    values follow them. The rest is of the first sample. Raises Failed if a value is not finite.
    """
    start = time.perf_counter()
    infer, (name, (images, y)) = Inference(accelerated), assessed_examples(data, settings)
    draws = [predict(infer, data, images, settings.test_bs, settings.seed + i, processes)
             for i in range(settings.draws)]
    log_p, accuracy = np.transpose([summary(*draw, y) for draw in draws])
    seconds = time.perf_counter() - start

    def mean(values: np.ndarray, digits: int, unit: str = "") -> str:
        each = f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{unit}{each}"
    title = name.capitalize()
    say(f"{title} set", f"{len(y):,} examples of {settings.data}, {seconds:.1f} s on "
                        f"{device_name(data.device)}")
    if len(data.labelled):
        say(f"{title} error", mean(100 * (1 - accuracy), 2, "%"))
    say("log p(x)", mean(log_p, 3, " nats"))
    if data.grey_levels:
        say("bits/dim", mean(data.bits_per_dim(log_p), 4))
    if processes.is_main:
        if settings.draws > 1:
            say("Noise", "the following is of its first sample")
        assess(infer, Inference(accelerated), data, (images, y), name, settings, draws[0]).show()
