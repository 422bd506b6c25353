"""Semi-Conditional Normalizing Flows for semi-supervised learning (Atanov et al. 2019, arXiv 1905.00505).

    python train-flow-ssl.py --config config.yaml                    train; any option overrides the file
    python train-flow-ssl.py --config config.yaml --pretrained       evaluate the weights that ship
    python train-flow-ssl.py --resume logs/exman-train-flow-ssl.py/runs/RUN

The model (models/): x --f_w--> (z_aux, z_f), z_f --h_phi( . ; y)--> z_h, so that

    log p(x | y) = log|det df_w/dx| + log N(z_aux) + log|det dh_phi/dz_f| + log N(z_h)
    log p(x)     = logsumexp_y [ log p(x | y) + log p(y) ]           one pass of f_w, K of h_phi

The loss of a batch, a labelled row i with weight `sup_weight`, an unlabelled one j with weight 1,
the weights normalised to sum to 1 (objective):

    - sum_i w_i log p(x_i, y_i) - sum_j w_j u(x_j)  +  cl_weight * mean_i [ -log p(y_i | x_i) ]

    ssl_alg sgd:  u(x) = log p(x)
    ssl_alg em:   u(x) = sum_y q(y) log p(x, y), q(y) = p(y | x) held constant
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models import build_model
from utils import BadInput
from utils.checkpoint import get_rng_state, load_checkpoint, load_weights, save_whole, set_rng_state
from utils.data import load_data
from utils.figures import draw_curves, draw_density, draw_samples
from utils.metrics import MetricsLog
from utils.settings import SHIPPED, Run, read_settings

FIGURES_EACH = 300      # seconds between two drawings of a long run's figures
SHIPPED_WEIGHTS = {"mnist": "model.torch", "digits": "digits.torch"}     # in pretrained/


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message is one line."""


def main(argv=None):
    """The experiment. argv: the command line, sys.argv[1:] if None. Raises BadInput, TrainingFailed."""
    parser, settings = read_settings(argv)
    device = set_up_torch(settings)
    data = load_data(settings, device)
    torch.manual_seed(settings.seed)
    model = build_model(settings, data.shape, data.n_classes, data.class_probs).to(device)

    if settings.pretrained:
        path = shipped_weights(settings.data) if settings.pretrained == SHIPPED else settings.pretrained
        load_weights(model, path)
        report_evaluation(model, data, settings, path)
        return

    checkpoint = None
    if settings.resume:
        checkpoint = load_checkpoint(Path(settings.resume) / "checkpoint.pt", model)
        if checkpoint["epoch"] >= settings.epochs and (Path(settings.resume) / "model.torch").exists():
            print(f"{settings.resume} has all its {settings.epochs} epochs: nothing to do")
            return
        run = Run.resumed(settings)
    else:
        run = parser.start_run(settings)
    try:
        with run:
            train(model, data, settings, run.run, checkpoint)
    except TrainingFailed as error:
        raise TrainingFailed(f"{error}. The last good checkpoint is {run.run}/checkpoint.pt") from None
    except KeyboardInterrupt:
        if (run.run / "checkpoint.pt").exists():
            print(f"\nInterrupted; to go on: python {sys.argv[0]} --resume {os.path.relpath(run.run)}", file=sys.stderr)
        raise


def set_up_torch(settings):
    """Threads, determinism and the torch.device that settings.device names. Raises BadInput."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False                  # float32 means float32, on a GPU too
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"device must be auto, cpu, cuda or cuda:N, not {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"no device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def train(model, data, settings, run_dir, checkpoint=None):
    """Train `model` and fill `run_dir`; go on from `checkpoint`, if there is one. Raises TrainingFailed."""
    optimizer = torch.optim.Adamax(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, foreach=True)
    generator = torch.Generator(data.device).manual_seed(settings.seed)
    labelled_prob = data.labelled_prob(settings.sup_sample_weight)
    if checkpoint:
        start = restore(checkpoint, model, optimizer, generator)
        (run_dir / "model.torch").unlink(missing_ok=True)
        print(f"Going on after epoch {start}")
    else:
        start = 0
        np.savetxt(run_dir / "labelled.txt", data.labelled_ids, "%d")
        model.initialize(data.draw(settings.train_bs, labelled_prob, generator)[0])
    log = MetricsLog(run_dir / "metrics.csv", up_to_epoch=start)
    steps = -(-len(data.train_x) // settings.train_bs)       # an epoch: as many draws as examples, full batches
    print(f"PyTorch {torch.__version__} on {device_name(data.device)}; {sum(p.numel() for p in model.parameters()):,} "
          f"parameters; {len(data.labelled)} labelled of {len(data.train_x)} examples; {steps} steps an epoch")

    def save(epoch):
        save_whole({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                    "generator": generator.get_state(), "rng": get_rng_state(),
                    "settings": vars(settings)}, run_dir / "checkpoint.pt")

    if not checkpoint:
        save(0)
    began = drawn = time.perf_counter()
    for epoch in range(start + 1, settings.epochs + 1):
        lr = learning_rate(epoch, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = train_epoch(model, data, settings, optimizer, generator, labelled_prob, steps, epoch)
        if epoch % settings.log_each and epoch != settings.epochs:
            continue
        test_log_p, test_acc = evaluate(model, data, settings.test_bs, settings.seed)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        log.append({"epoch": epoch, "train_loss": sums["loss"] / steps, "elbo": sums["elbo"] / steps,
                    "cl_loss": sums["cl_loss"] / steps, "labelled_acc": sums["correct"] / max(sums["labelled"], 1),
                    "test_log_p": test_log_p, "test_acc": test_acc, "test_bpd": data.bits_per_dim(test_log_p),
                    "lr": lr, "seconds": seconds})
        save(epoch)
        if time.perf_counter() - drawn > FIGURES_EACH:
            draw_figures(model, data, log, run_dir, settings.seed)
            drawn = time.perf_counter()
    draw_figures(model, data, log, run_dir, settings.seed)
    save_whole(model.state_dict(), run_dir / "model.torch")  # the last file: with it, the run is complete
    print(f"Test error {1 - log.rows[-1]['test_acc']:.2%}; weights, curves and samples are in {os.path.relpath(run_dir)}")


def draw_figures(model, data, log, run_dir, seed):
    """The run's pictures: curves, samples and, for points, the density."""
    draw_curves(log.rows, run_dir / "curves.png")
    draw_samples(model, run_dir / "samples.png", seed)
    if not model.image:
        draw_density(model, data, run_dir / "density.png")


def train_epoch(model, data, settings, optimizer, generator, labelled_prob, steps, epoch):
    """One epoch -> sums over its batches: loss, elbo, cl_loss, and correct, labelled (numbers of rows).

    The sums stay on the device; they are read for the bar, at most once a second, and at the end.
    Raises TrainingFailed, naming the step, if a loss is not finite.
    """
    names = ("loss", "elbo", "cl_loss", "correct", "labelled")
    sums = torch.zeros(len(names), device=data.device)
    failed = torch.full((), -1, device=data.device)          # the first step whose loss is not finite
    bar = tqdm(total=steps * settings.train_bs, desc=f"epoch {epoch}/{settings.epochs}", unit="img",
               unit_scale=True, leave=False, disable=None)
    with bar:
        shown = time.perf_counter()
        for step in range(1, steps + 1):
            x, y = data.draw(settings.train_bs, labelled_prob, generator)
            terms = objective(model.log_joint(x), y, settings)
            optimizer.zero_grad()
            terms[0].backward()
            if settings.clip_gn:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gn)
            optimizer.step()
            sums += torch.stack(terms).detach()
            failed = torch.where(sums[0].isfinite() | (failed > 0), failed, step)
            if time.perf_counter() - shown > 1 or step == steps:
                shown = time.perf_counter()
                if failed > 0:
                    raise TrainingFailed(f"The loss is not finite at step {int(failed)} of {steps} in epoch {epoch}")
                bar.update(step * settings.train_bs - bar.n)
                bar.set_postfix(loss=f"{float(sums[0]) / step:.3f}", refresh=False)
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise TrainingFailed(f"A weight is not finite after step {steps} of {steps} in epoch {epoch}")
    return dict(zip(names, sums.tolist()))


def objective(log_joint, y, settings):
    """The loss of a batch and what is logged of it (see the top of this file).

    log_joint (B, K); y (B,), -1 where the label is hidden -> loss, elbo, cl_loss, and the numbers of
    labelled rows that p(y | x) gets right and of labelled rows, all of shape (). The elbo is the
    weighted mean of log p(x, y) and u(x).
    """
    labelled = y >= 0
    own = log_joint.gather(1, y.clamp(min=0)[:, None])[:, 0]                  # log p(x, y)
    marginal = log_joint.logsumexp(1)                                         # log p(x)
    if settings.ssl_alg == "em":
        unlabelled_term = (log_joint.softmax(1).detach() * log_joint).sum(1)
    else:
        unlabelled_term = marginal
    weight = torch.where(labelled, settings.sup_weight, 1.0)
    elbo = (weight * torch.where(labelled, own, unlabelled_term)).sum() / weight.sum()
    n_labelled = labelled.sum()
    cl_loss = torch.where(labelled, marginal - own, 0.0).sum() / n_labelled.clamp(min=1)
    loss = -elbo + settings.cl_weight * cl_loss if settings.cl_weight else -elbo
    correct = (labelled & (log_joint.argmax(1) == y)).sum()
    return loss, elbo, cl_loss, correct.to(loss.dtype), n_labelled.to(loss.dtype)


def learning_rate(epoch, settings):
    """The learning rate of an epoch, counted from 1, by settings.lr_schedule."""
    if settings.lr_schedule == "linear":
        return settings.lr * (1 - epoch / settings.epochs)
    if settings.lr_schedule == "hat":
        if epoch <= settings.lr_warmup:
            return settings.lr * epoch / settings.lr_warmup
        return settings.lr * (settings.epochs - epoch) / (settings.epochs - settings.lr_warmup)
    return settings.lr


@torch.no_grad()
def evaluate(model, data, batch_size, seed):
    """Mean log p(x) of the test set, in nats, and accuracy of argmax p(y | x), from 0 to 1.

    The dequantisation noise follows `seed`: two evaluations of the same weights on a device agree.
    """
    generator = torch.Generator(data.device).manual_seed(seed)
    log_p = torch.zeros((), dtype=torch.float64, device=data.device)
    correct = torch.zeros((), dtype=torch.long, device=data.device)
    for x, y in zip(data.test_x.split(batch_size), data.test_y.split(batch_size)):
        log_joint = model.log_joint(data.dequantize(x, generator))
        log_p += log_joint.logsumexp(1).double().sum()
        correct += (log_joint.argmax(1) == y).sum()
    return float(log_p) / len(data.test_x), float(correct) / len(data.test_x)


def report_evaluation(model, data, settings, path):
    """Print what `--pretrained` is for."""
    began = time.perf_counter()
    log_p, accuracy = evaluate(model, data, settings.test_bs, settings.seed)
    print(f"Weights      {path}\n"
          f"Test set     {len(data.test_x)} examples of {settings.data}, {time.perf_counter() - began:.1f} s "
          f"on {device_name(data.device)}\n"
          f"Test error   {1 - accuracy:.2%}\n"
          f"log p(x)     {log_p:.3f} nats" +
          (f"\nbits/dim     {data.bits_per_dim(log_p):.4f}" if data.levels else ""))


def shipped_weights(data):
    """The file in pretrained/ for the dataset `data`. Raises BadInput, saying how to make it, if there is none."""
    path = Path(__file__).resolve().parent / "pretrained" / SHIPPED_WEIGHTS.get(data, "")
    if not path.is_file():
        config = "config.yaml" if data == "mnist" else f"configs/{data}.yaml"
        raise BadInput(f"no weights ship for {data} yet: train them (python train-flow-ssl.py --config {config}), "
                       "then give the run's model.torch to --pretrained")
    return path


def restore(checkpoint, model, optimizer, generator):
    """Put everything back as the checkpoint has it -> its epoch."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    set_rng_state(checkpoint["rng"])
    try:
        generator.set_state(checkpoint["generator"])
    except RuntimeError:                                     # made on another kind of device
        generator.manual_seed(generator.initial_seed() + checkpoint["epoch"])
        print("Resumed on another kind of device: the batches will not be the ones an unstopped run would see")
    return checkpoint["epoch"]


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"


def cli(argv=None):
    """`main` as a command: returns the exit code, 2 for bad input, 1 for failed training, 130 if interrupted."""
    try:
        main(argv)
    except (BadInput, TrainingFailed) as error:
        print(f"train-flow-ssl.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
