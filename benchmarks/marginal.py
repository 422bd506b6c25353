"""The cost of log p(x) and of its gradient against the number of classes K.

    python benchmarks/marginal.py --json FILE.json --picture FILE.png

Compares, in turns, on a batch of 64 images, models that for ten classes have almost as many
parameters as SCNF-GLOW, on MNIST's shape one million, and for other K the same networks. The first
three need one pass of f_w for all classes (SCNF-GMM and FlowGMM without the parameters of a large
h_phi); the others are called once for each class:

    SCNF-GLOW, SCNF-GMM   ours, with the f_w of mnist-glow
    FlowGMM               that f_w, and a mixture of Gaussians in all of z (Izmailov et al. 2020)
    conditional flow      that f_w, where each coupling's network, wider than there, sees an
                          embedding of the label
    normflows             its multi-scale Glow, with Gaussians of each class as base: its
                          log_prob(x, y) repeats the Glow, though one pass would do
    zuko                  its neural spline flow, autoregressive, of x as a vector, given the label

Prints for each K the median and the quartiles of the milliseconds, the most memory that a call adds
to the process, and the time of 100 samples by class; and the K from which one model is faster than
another, interpolated in logarithms. If K > 10, the last three get the gradient of log p(x) as
sum_y p(y | x) grad log p(x, y), after passes for the posterior: the graphs of all passes might not
fit into memory.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

import normflows as nf
import numpy as np
import pandas as pd
import torch
import zuko
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import peak_gib, start_mode
from models import build_model
from models.bijections import ChannelCoupling, CheckerboardCoupling
from models.h_phi import EMBEDDING_DIM, embed
from models.networks import resnet3x3
from models.scnf import DiagonalGaussian
from training.device import device_name
from utils.errors import BadInput, OneLineParser, check_output, run_command
from utils.figures import FORMATS, save
from utils.files import write_json

BATCH, SAMPLES = 64, 100
F_W = {"model": "mnist-glow", "ssl_l": 1, "ssl_hd": 64}      # sizes of configs/mnist-glow.yaml
MATCHED = 10                # classes for which models have as many parameters as SCNF-GLOW
GRAPHS = 10                 # passes at most that one backward pass goes through
LABEL = 0.05                # between the lines' names in the picture, of a panel's height


class PerClass(nn.Module):
    """Base class of models that are called once for each class: log_prob_given(x, y) -> (B,)."""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes

    def log_joint(self, x):
        """log p(x, y) of each class, for uniform p(y): (B, K)."""
        return torch.stack([self.log_prob_given(x, torch.full((len(x),), y))
                            for y in range(self.n_classes)], 1) - math.log(self.n_classes)

    def backward(self, x):
        """Add the gradient of the mean of log p(x) to the parameters'."""
        if self.n_classes <= GRAPHS:
            return self.log_joint(x).logsumexp(1).mean().backward()
        with torch.no_grad():
            posterior = self.log_joint(x).softmax(1)
        for y in range(self.n_classes):
            log_p = self.log_prob_given(x, torch.full((len(x),), y))
            (posterior[:, y] * log_p).mean().backward()


class SeesLabel(nn.Module):
    """A coupling's network, which gets an embedding of the label as further channels.

    net: of x and the embedding
    owner: whose `context`, (B, E), is that embedding
    """

    def __init__(self, net, owner):
        super().__init__()
        self.net, self.owner = net, [owner]         # in a list, it is no submodule

    def forward(self, x):
        context = self.owner[0].context[:, :, None, None]
        return self.net(torch.cat((x, context.expand(-1, -1, *x.shape[2:])), 1))


class ConditionalFlow(PerClass):
    """The f_w of mnist-glow, where the network of each coupling sees an embedding of the label."""

    def __init__(self, shape, n_classes, width):
        super().__init__(n_classes)
        self.f = build_model({**F_W, "ssl_dim": -2}, shape, n_classes).f_w
        self.base = DiagonalGaussian(self.f.dim)
        self.embedding = nn.Embedding(n_classes, EMBEDDING_DIM)

        def seeing(net):
            c_in, c_out = net.first.in_channels, net.last.out_channels
            return SeesLabel(resnet3x3(c_in + EMBEDDING_DIM, c_out, width, 1, "zeros"), self)
        for part in list(self.f.modules()):
            if isinstance(part, CheckerboardCoupling):
                part.net = seeing(part.net)
            if isinstance(part, ChannelCoupling):
                part.net1, part.net2 = seeing(part.net1), seeing(part.net2)

    def log_prob_given(self, x, y):
        self.context = embed(self.embedding, y)
        z, ldj = self.f(x)
        return ldj + self.base.log_prob(z)

    def sample(self, y):
        self.context = embed(self.embedding, y)
        return self.f.inverse(self.base.sample(torch.randn(len(y), self.f.dim)))


class OfNormflows(PerClass):
    """normflows' multi-scale Glow of two scales; its bases have a Gaussian for each class."""

    def __init__(self, shape, n_classes, width):
        super().__init__(n_classes)
        (c, h, w), scales = shape, 2
        flows, merges, bases = [], [], []
        for i in range(scales):
            blocks = [nf.flows.GlowBlock(c * 2 ** (scales + 1 - i), width) for _ in range(4)]
            flows.append([*blocks, nf.flows.Squeeze()])
            merges += [nf.flows.Merge()] * bool(i)
            left = scales - i
            latent = (c * 2 ** (left + (not i)), h // 2**left, w // 2**left)
            bases.append(nf.distributions.ClassCondDiagGaussian(latent, n_classes))
        self.flow = nf.MultiscaleFlow(bases, flows, merges)

    def log_prob_given(self, x, y):
        return self.flow.log_prob(x, y)

    def sample(self, y):
        return self.flow.sample(len(y), y)[0]


class OfZuko(PerClass):
    """zuko's neural spline flow of x as a vector, given an embedding of the label."""

    def __init__(self, shape, n_classes, width):
        super().__init__(n_classes)
        dim = torch.Size(shape).numel()
        self.embedding = nn.Embedding(n_classes, EMBEDDING_DIM)
        self.flow = zuko.flows.NSF(dim, EMBEDDING_DIM, transforms=2, bins=4,
                                   hidden_features=[width])

    def given(self, y):
        return self.flow(embed(self.embedding, y))

    def log_prob_given(self, x, y):
        return self.given(y).log_prob(x.flatten(1))

    def sample(self, y):
        return self.given(y).sample()


def size(model):
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def closest(make, shape, wanted):
    """The width, a multiple of 4, for which the size of make(shape, MATCHED, width) is closest to
    `wanted`."""
    def missing(width):
        return wanted - size(make(shape, MATCHED, width))
    width = 4
    while missing(2 * width) > 0:
        width *= 2
    while missing(width + 4) > 0:
        width += 4
    return min(width, width + 4, key=lambda width: abs(missing(width)))


def make_models(shape, n_classes):
    """{name: model}, each with log_joint(x) -> (B, K) and sample(y)."""
    def ours(ssl_dim, ssl_model, n_classes=n_classes):
        return build_model({**F_W, "ssl_dim": ssl_dim, "ssl_model": ssl_model}, shape, n_classes)
    wanted = size(ours(-2, "cond-flow", MATCHED))
    return {"SCNF-GLOW": ours(-2, "cond-flow"), "SCNF-GMM": ours(-2, "cond-shift"),
            "FlowGMM": ours(-1, "cond-shift"), **{
                name: make(shape, n_classes, closest(make, shape, wanted)) for name, make in (
                    ("conditional flow", ConditionalFlow), ("normflows", OfNormflows),
                    ("zuko", OfZuko))}}


def calls(model, x):
    """{what: function} of the calls that are compared."""
    @torch.no_grad()
    def value():
        return model.log_joint(x).logsumexp(1)

    def gradient():
        model.zero_grad()
        if isinstance(model, PerClass):
            model.backward(x)
        else:
            model.log_joint(x).logsumexp(1).mean().backward()

    @torch.no_grad()
    def samples():
        return model.sample(torch.arange(SAMPLES) % model.n_classes)
    return {"value": value, "gradient": gradient, "samples": samples}


def measure(shape, n_classes, rounds, longest):
    """The rows of the table for this number of classes.

    rounds: of all calls in turns; longest: seconds after which a call is not repeated
    """
    device = torch.device("cpu")
    torch.manual_seed(0)
    x, models = torch.rand(BATCH, *shape), make_models(shape, n_classes)
    for model in models.values():
        if hasattr(model, "initialize"):
            model.initialize(x)
    todo = {(name, what): call for name, model in models.items()
            for what, call in calls(model, x).items()}
    seconds, memory = {key: [] for key in todo}, {}
    for round_ in range(rounds + 1):
        for key, call in todo.items():
            if sum(seconds[key]) > longest:
                continue
            start_mode(device)
            before, start = peak_gib(device), time.perf_counter()
            call()
            taken = time.perf_counter() - start
            memory[key] = max(memory.get(key, 0), peak_gib(device) - before)
            if round_ or taken > longest:           # the first call of a model is a warm-up
                seconds[key].append(taken)
            print(f"{'x'.join(map(str, shape[1:]))}, K = {n_classes}, {' '.join(key)}: "
                  f"{1e3 * taken:.0f} ms", file=sys.stderr)
    rows = []
    for (name, what), times in seconds.items():
        low, median, high = (statistics.quantiles(times, n=4, method="inclusive")
                             if len(times) > 1 else times * 3)
        rows.append({"side": shape[-1], "classes": n_classes, "model": name,
                     "parameters": size(models[name]), "what": what, "ms": 1e3 * median,
                     "ms_low": 1e3 * low, "ms_high": 1e3 * high, "calls": len(times),
                     "mib": 1024 * memory[name, what]})
    return rows


def crossings(table):
    """Lines that say from which K one model is faster than another, if the quartiles of the two do
    not overlap at one of the neighbouring K."""
    found = []
    for (side, what), part in table[table["what"] != "samples"].groupby(["side", "what"],
                                                                         sort=False):
        ms = part.pivot(index="classes", columns="model", values=["ms", "ms_low", "ms_high"])
        for slower, faster in itertools.permutations(part["model"].unique(), 2):
            clear = ((ms["ms_high"][faster] < ms["ms_low"][slower])
                     | (ms["ms_low"][faster] > ms["ms_high"][slower]))
            ahead = np.log(ms["ms"][faster] / ms["ms"][slower])
            for (k, before), (next_k, after) in itertools.pairwise(ahead.items()):
                if before > 0 >= after and (clear[k] or clear[next_k]):
                    at = k * (next_k / k) ** (before / (before - after))
                    found.append(f"{side}x{side}, {what}: {faster} is faster than {slower} "
                                 f"from K = {at:.1f}")
    return found


def plot(table):
    """Milliseconds of value and gradient against K, with the names at the lines' ends, a row of
    panels for each shape -> Figure."""
    panels = table[table["what"] != "samples"].groupby(["side", "what"], sort=False)
    figure = Figure(figsize=(11, 2.2 * len(panels)), layout="constrained")
    classes = sorted(table["classes"].unique())
    for axes, ((side, what), rows) in zip(figure.subplots(len(panels) // 2, 2).flat, panels):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(classes, map(str, classes))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xticks([], minor=True)
        ends = {}
        for name, part in rows.groupby("model", sort=False):
            line, = axes.plot(part["classes"], part["ms"], marker="o")
            axes.fill_between(part["classes"], part["ms_low"], part["ms_high"], alpha=0.2)
            ends[part["ms"].iloc[-1]] = name, line.get_color()
        bottom, top = axes.get_ylim()
        lowest = 0.0
        for end, (name, colour) in sorted(ends.items()):        # upwards, none on top of another
            lowest = max(end, lowest * (top / bottom) ** LABEL)
            axes.annotate(name, (classes[-1], lowest), (8, 0), textcoords="offset points",
                          va="center", color=colour)
        axes.set_xlim(classes[0] / 1.3, classes[-1] * (classes[-1] / classes[0]) ** 0.45)
        axes.set_ylim(top=1.5 * top)
        axes.set_xlabel("classes K")
        axes.set_ylabel(f"{what} of log p(x), ms")
        axes.set_title(f"{BATCH} images of {side}x{side}")
        axes.grid(alpha=0.3)
    return figure


def main(argv=None):
    parser = OneLineParser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument("--sides", type=int, nargs="+", default=[28, 8], help="of grey images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=float, default=60,
                        help="seconds after which a call is not repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(argv)
    for path, suffixes in ((args.json, ()), (args.picture, FORMATS)):
        check_output(path, suffixes)
    if min(*args.classes, args.rounds, args.threads) < 1 or any(
            side % 4 or side < 8 for side in args.sides):
        raise BadInput("classes, rounds and threads must be at least 1, and sides multiples of 4 "
                       "that are at least 8")
    torch.set_num_threads(args.threads)
    about = {"torch": torch.__version__, "device": device_name(torch.device("cpu"))}
    rows = []
    for side, k in itertools.product(dict.fromkeys(args.sides), sorted(set(args.classes))):
        rows += measure((1, side, side), k, args.rounds, args.longest)
        if args.json:                               # also of a run that is stopped early
            write_json(args.json, {**about, "rows": rows})
    table = pd.DataFrame(rows)
    print(f"PyTorch {torch.__version__} on {about['device']}")
    print(table.to_string(index=False, float_format="{:.1f}".format))
    print(*crossings(table), sep="\n")
    if args.picture:
        save(plot(table), args.picture)


if __name__ == "__main__":
    run_command(main)
