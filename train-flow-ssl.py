"""Semi-Conditional Normalizing Flows for semi-supervised learning (Atanov et al. 2019, arXiv 1905.00505).

    python train-flow-ssl.py --config config.yaml                    train; any option overrides the file
    python train-flow-ssl.py --config configs/mnist-small.yaml --pretrained      evaluate weights that ship
    python train-flow-ssl.py --resume logs/exman-train-flow-ssl.py/runs/RUN
    torchrun --nproc_per_node N train-flow-ssl.py --config config.yaml      on N GPUs

The model (models/): x --f_w--> (z_aux, z_f), z_f --h_phi( . ; y)--> z_h, so that

    log p(x | y) = log|det df_w/dx| + log N(z_aux) + log|det dh_phi/dz_f| + log N(z_h)
    log p(x)     = logsumexp_y [ log p(x | y) + log p(y) ]           one pass of f_w, K of h_phi

The loss of a batch, a labelled row i with weight `sup_weight`, an unlabelled one j with weight 1,
the weights normalised to sum to 1 (objective):

    - sum_i w_i log p(x_i, y_i) - sum_j w_j u(x_j)  +  cl_weight * mean_i [ -log p(y_i | x_i) ]

    ssl_alg sgd:  u(x) = log p(x)
    ssl_alg em:   u(x) = sum_y q(y) log p(x, y), q(y) = p(y | x) held constant

With `cons_weight`, not in the paper, x' being the image x moved a little (`alter` in utils/data.py), L_clf is the mean
of those of x_i and x'_i, and a consistency term is added, after FixMatch (Sohn et al. 2020, arXiv 2001.07685):

    + cons_weight * mean_j [ - sum_y q_j(y) log p(y | x'_j) if max q_j > SURE, else 0 ],   q_j = p(y | x_j) held constant
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from models import build_model
from utils import BadInput
from utils.checkpoint import (CheckpointWriter, copy_to_cpu, get_rng_state, load_checkpoint, load_weights, save_whole,
                              set_rng_state, shipped_weights)
from utils.data import load_data
from utils.device import choose_speed, device_name, set_up_torch
from utils.figures import draw_curves, draw_density, draw_samples
from utils.metrics import MetricsLog, average_is_better
from utils.processes import Processes
from utils.settings import SHIPPED, Run, read_settings
from utils.step import TrainingStep, arrange, scorer
from utils.stopping import Stopping

SURE = 0.95             # of the consistency term: p(y | x) from which on it is a target
FIGURES_EACH = 300      # seconds between two drawings of a long run's figures
TERMS = ("loss", "elbo", "cl_loss", "cons_loss", "sure", "correct", "labelled")               # what `objective` gives


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message is one line."""


def main(argv=None, processes=None):
    """The experiment. argv: the command line, sys.argv[1:] if None. Raises BadInput, TrainingFailed."""
    processes = processes or Processes()
    parser, settings = read_settings(argv)
    stopping = Stopping(settings.time_limit)
    device = set_up_torch(settings, processes)
    speed = choose_speed(settings, device, processes)
    if settings.train_bs % processes.size and not settings.pretrained:
        raise BadInput(f"train_bs {settings.train_bs} cannot be shared by {processes.size} processes: make it a multiple")
    processes.connect(device)
    with processes.main_first():                             # it may have to fetch them
        data = load_data(settings, device)
    if settings.cons_weight and not data.levels:
        raise BadInput(f"cons_weight needs images, which can be moved a little; {settings.data} has points")
    torch.manual_seed(settings.seed)
    model = build_model(settings, data.shape, data.n_classes, data.class_probs).to(device)

    if settings.pretrained:
        path = shipped_weights(settings) if settings.pretrained == SHIPPED else settings.pretrained
        load_weights(model, path)
        report_evaluation(model, data, settings, speed, processes, path)
        return

    checkpoint = None
    if settings.resume:
        checkpoint = load_checkpoint(Path(settings.resume) / "checkpoint.pt", model, len(TERMS))
        if checkpoint["epoch"] >= settings.epochs and (Path(settings.resume) / "model.torch").exists():
            print(f"{settings.resume} has all its {settings.epochs} epochs: nothing to do")
            return
        processes.wait()                                     # as the main one may move the run
    run = None
    try:
        with contextlib.ExitStack() as around:
            if processes.main:
                run = around.enter_context(Run.resumed(settings) if settings.resume else parser.start_run(settings))
            stopped = train(model, data, settings, speed, processes, stopping, run and run.run, checkpoint)
            if stopped and processes.main:
                print(f"{stopped}; to go on: {resume_command(run)}")
            processes.wait()                                 # none leaves while the main one still writes
    except TrainingFailed as error:
        raise TrainingFailed(f"{error}. The last good checkpoint is {run and run.run}/checkpoint.pt") from None
    except KeyboardInterrupt:
        if run and (run.run / "checkpoint.pt").exists():
            print(f"\nInterrupted; to go on: {resume_command(run)}", file=sys.stderr)
        raise


def resume_command(run):
    return f"python {sys.argv[0]} --resume {os.path.relpath(run.run)}"


def train(model, data, settings, speed, processes, stopping, run_dir=None, checkpoint=None):
    """Train `model` and, in the main process, fill `run_dir`; go on from `checkpoint`, if there is one.

    -> None, or where and why `stopping` ended the run. Raises TrainingFailed.
    """
    generator = torch.Generator(data.device).manual_seed(settings.seed)
    labelled_prob = data.labelled_prob(settings.sup_sample_weight)
    steps = -(-len(data.train_x) // settings.train_bs)       # an epoch: as many draws as examples, full batches
    if not checkpoint:
        model.initialize(data.draw(settings.train_bs, labelled_prob, generator)[0])
    log_joint, pass_size = arrange(model, speed)
    step = TrainingStep(log_joint, pass_size, objective, settings, processes, speed.cuda_graph)
    scores = [scorer(log_joint, pass_size, speed.cuda_graph) for _ in range(2)]      # of test and held-out batches
    progress = SimpleNamespace(epoch=0, step=0, sums=torch.zeros(len(TERMS), device=data.device), seconds=0.0)
    if checkpoint:
        restore(checkpoint, model, step, generator, progress)
        progress.sums *= processes.main                      # they are all processes', and will be added up again
        print(f"Going on after {place(progress, steps)}")
    print(f"PyTorch {torch.__version__} on {device_name(data.device)}{f' and {processes.size - 1} more' * (processes.size > 1)}; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(data.labelled)} labelled of {len(data.train_x)} "
          f"examples; {steps} steps an epoch; {speed.precision}{', compiled' * speed.compile}")

    with stopping, CheckpointWriter(run_dir and run_dir / "checkpoint.pt") as writer:
        def save():
            if processes.main:
                writer.write({"model": model.state_dict(), "optimizer": step.state_dict(), **vars(progress),
                              "generator": generator.get_state(), "rng": get_rng_state(), "settings": vars(settings)})

        if processes.main:
            log = MetricsLog(run_dir / "metrics.csv", up_to_epoch=progress.epoch)
            (run_dir / "model.torch").unlink(missing_ok=True)
        if not checkpoint:
            if processes.main:
                np.savetxt(run_dir / "labelled.txt", data.labelled_ids, "%d")
            save()
        drawn = time.perf_counter()
        while progress.epoch < settings.epochs:
            epoch = progress.epoch + 1
            stopped = train_epoch(step, data, settings, processes, stopping, generator, labelled_prob, steps, progress)
            if stopped:
                progress.sums.copy_(processes.add(progress.sums))
                save()
                return f"Stopped {stopped} after {place(progress, steps)}"
            sums = dict(zip(TERMS, processes.add(progress.sums).tolist()))
            lr = learning_rate(epoch, steps, steps, settings)
            progress.epoch, progress.step = epoch, 0
            progress.sums.zero_()
            if epoch % settings.log_each and epoch != settings.epochs:
                continue
            began = time.perf_counter()
            row = measure(scores, data, settings, processes)
            if settings.ema:
                with step.averaged():
                    row.update({f"ema_{key}": value for key, value in measure(scores, data, settings, processes).items()})
            seconds = progress.seconds + time.perf_counter() - began
            progress.seconds = 0.0
            if processes.main:
                means = {key: sums[key] / steps for key in ("elbo", "cl_loss", "cons_loss", "sure")}
                log.append({"epoch": epoch, "train_loss": sums["loss"] / steps, **means,
                            "labelled_acc": sums["correct"] / max(sums["labelled"], 1), **row, "lr": lr, "seconds": seconds})
                save()
                if time.perf_counter() - drawn > FIGURES_EACH:
                    draw_figures(model, data, log, run_dir, settings.seed)
                    drawn = time.perf_counter()
    if processes.main:
        last, chosen = log.rows[-1], ""
        averaged = average_is_better(last)
        if settings.ema:
            chosen = f" of the {'averaged' if averaged else 'last'} weights, the likelier ones on held-out images"
        with step.averaged() if averaged else contextlib.nullcontext():
            draw_figures(model, data, log, run_dir, settings.seed)
            save_whole(copy_to_cpu(model.state_dict()), run_dir / "model.torch") # the last file: with it, the run is complete
        print(f"Test error{chosen} {1 - last['ema_test_acc' if averaged else 'test_acc']:.2%}; "
              f"weights, curves and samples are in {os.path.relpath(run_dir)}")
    return None


def measure(scores, data, settings, processes):
    """test_log_p, test_acc, test_bpd, and held_out_log_p, NaN where nothing is held out.

    scores: for `evaluate`, one for each of the two sets, as their batches may differ in size.
    """
    test = data.test_x, data.test_y
    log_p, accuracy = evaluate(scores[0], data, test, settings.test_bs, settings.seed, processes)
    row = {"test_log_p": log_p, "test_acc": accuracy, "test_bpd": data.bits_per_dim(log_p), "held_out_log_p": math.nan}
    if len(data.held_out):
        held_out = data.train_x[data.held_out], data.train_y[data.held_out]
        row["held_out_log_p"], _ = evaluate(scores[1], data, held_out, settings.test_bs, settings.seed, processes)
    return row


def place(progress, steps):
    """How far training has come, in words."""
    return f"epoch {progress.epoch}" if not progress.step else f"step {progress.step} of {steps} in epoch {progress.epoch + 1}"


def draw_figures(model, data, log, run_dir, seed):
    """The run's pictures: curves, samples and, for points, the density."""
    draw_curves(log.rows, run_dir / "curves.png")
    draw_samples(model, run_dir / "samples.png", seed)
    if not model.image:
        draw_density(model, data, run_dir / "density.png")


def train_epoch(step, data, settings, processes, stopping, generator, labelled_prob, steps, progress):
    """The rest of an epoch, from progress.step on -> None, or why it stopped before its end.

    progress.sums grows by the TERMS of its batches, of this process's rows, and stays on the
    device: it is read at the end, and for a bar that someone sees once a second. Raises
    TrainingFailed, naming the step, if a loss or a weight is not finite.
    """
    sums, first, began = progress.sums, progress.step + 1, time.perf_counter()
    finite = torch.zeros((), dtype=torch.long, device=data.device)           # steps from `first` on with a finite loss
    bar = tqdm(total=steps * settings.train_bs, initial=progress.step * settings.train_bs, unit="img", unit_scale=True,
               desc=f"epoch {progress.epoch + 1}/{settings.epochs}", leave=False, disable=None if processes.main else True)
    reads_between = not bar.disable and processes.size == 1  # of several processes none may leave alone
    stopped = None

    def check(finite):
        if first + finite <= progress.step:
            raise TrainingFailed(f"The loss is not finite at step {first + finite} of {steps} in epoch {progress.epoch + 1}")

    with bar:
        shown = time.perf_counter()
        lr = None
        while progress.step < steps and not stopped:
            was, lr = lr, learning_rate(progress.epoch + 1, progress.step + 1, steps, settings)
            if lr != was:
                step.lr.fill_(lr)
            sums += step(*data.draw(settings.train_bs, labelled_prob, generator, settings.cons_weight > 0))
            progress.step += 1
            finite += sums[0].isfinite()                     # once it is not, the sum never is again
            if processes.any(stopping.reason is not None):
                stopped = processes.first(stopping.reason)
            if reads_between and time.perf_counter() - shown > 1:
                shown = time.perf_counter()
                check(int(finite))
                bar.update(progress.step * settings.train_bs - bar.n)
                bar.set_postfix(loss=f"{float(sums[0]) / progress.step:.3f}", refresh=False)
    check(int(processes.smallest(finite)))
    if not step.vector.isfinite().all():
        raise TrainingFailed(f"A weight is not finite after step {progress.step} of {steps} in epoch {progress.epoch + 1}")
    progress.seconds += time.perf_counter() - began
    return stopped


def objective(log_joint, y, settings, batch_y=None, altered=None):
    """The loss of a batch and what is logged of it (see the top of this file).

    log_joint (B, K); y (B,), -1 where the label is hidden -> loss, elbo, cl_loss, cons_loss, the share
    of unlabelled rows with a sure label, and the numbers of labelled rows that p(y | x) gets right and
    of labelled rows, all of shape (). The elbo is the weighted mean of log p(x, y) and u(x). batch_y:
    the labels of the whole batch, where the rows given are a part of one: the terms are this part's
    share, and those of all parts sum to the batch's. altered: log p(x', y), (B, K), of the altered images.
    """
    batch_y = y if batch_y is None else batch_y
    labelled = y >= 0
    own = log_joint.gather(1, y.clamp(min=0)[:, None])[:, 0]                  # log p(x, y)
    marginal = log_joint.logsumexp(1)                                         # log p(x)
    if settings.ssl_alg == "em":
        unlabelled_term = (log_joint.softmax(1).detach() * log_joint).sum(1)
    else:
        unlabelled_term = marginal

    def row_weight(y):
        return torch.ones_like(y, dtype=log_joint.dtype).masked_fill(y >= 0, settings.sup_weight)
    elbo = (row_weight(y) * torch.where(labelled, own, unlabelled_term)).sum() / row_weight(batch_y).sum()
    n_labelled = (batch_y >= 0).sum()
    cons_loss = sure = torch.zeros_like(elbo)
    if altered is None:
        surprise = marginal - own                                             # -log p(y | x)
    else:
        surprise = (marginal - own + F.cross_entropy(altered, y.clamp(min=0), reduction="none")) / 2
        target = log_joint.detach().softmax(1)
        is_sure = ~labelled & (target.amax(1) > SURE)
        n_unlabelled = (len(batch_y) - n_labelled).clamp(min=1)
        cons_loss = (F.cross_entropy(altered, target, reduction="none") * is_sure).sum() / n_unlabelled
        sure = is_sure.sum() / n_unlabelled
    cl_loss = surprise.masked_fill(~labelled, 0).sum() / n_labelled.clamp(min=1)
    loss = -elbo
    for weight, term in ((settings.cl_weight, cl_loss), (settings.cons_weight, cons_loss)):
        loss = loss + weight * term if weight else loss
    correct = (labelled & (log_joint.argmax(1) == y)).sum()
    return loss, elbo, cl_loss, cons_loss, sure, correct.to(loss.dtype), labelled.sum().to(loss.dtype)


def learning_rate(epoch, step, steps, settings):
    """The learning rate of a step of an epoch of `steps`, both counted from 1, by settings.lr_schedule and warmup_steps."""
    done = (epoch - 1) * steps + step                        # with this step
    lr = settings.lr * min(1, done / settings.warmup_steps) if settings.warmup_steps else settings.lr
    if settings.lr_schedule == "linear":
        return lr * (1 - epoch / settings.epochs)
    if settings.lr_schedule == "hat":
        if epoch <= settings.lr_warmup:
            return lr * epoch / settings.lr_warmup
        return lr * (settings.epochs - epoch) / (settings.epochs - settings.lr_warmup)
    if settings.lr_schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (done - 1) / (settings.epochs * steps))) / 2
    return lr


def evaluate(score, data, examples, batch_size, seed, processes):
    """Mean log p(x) of `examples`, images or points and their labels, in nats, and accuracy of argmax p(y | x), from 0 to 1.

    score: x (B, C, H, W) -> log p(x, y) (B, K), called with batches of one size, at most
    `batch_size`. The dequantisation noise follows `seed`: two evaluations of the same weights on a
    device agree. Each process takes its share of the batches.
    """
    generator = torch.Generator(data.device).manual_seed(seed)
    images, y = examples
    n = len(images)
    n_batches = -(-n // batch_size)
    batch_size = -(-n // n_batches)
    sums = torch.zeros(2, dtype=torch.float64, device=data.device)           # log p(x), correct
    for i in range(n_batches):
        rows = torch.arange(i * batch_size, (i + 1) * batch_size, device=data.device)
        counted, rows = rows < n, rows.clamp(max=n - 1)
        x = data.dequantize(images[rows], generator)
        if i % processes.size == processes.rank:
            log_joint = score(x)
            correct = log_joint.argmax(1) == y[rows]
            sums += (torch.stack((log_joint.logsumexp(1).double(), correct.double())) * counted).sum(1)
    log_p, correct = (processes.add(sums) / n).tolist()
    return log_p, correct


def report_evaluation(model, data, settings, speed, processes, path):
    """Print what `--pretrained` is for: the mean over `draws` draws of the dequantisation noise, and each."""
    began = time.perf_counter()
    score = scorer(*arrange(model, speed), speed.cuda_graph)
    test = data.test_x, data.test_y
    log_p, accuracy = np.transpose([evaluate(score, data, test, settings.test_bs, settings.seed + draw, processes)
                                    for draw in range(settings.draws)])

    def figure(values, digits, unit=""):
        each = f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{unit}{each}"
    print(f"Weights      {path}\n"
          f"Test set     {len(data.test_x)} examples of {settings.data}, {time.perf_counter() - began:.1f} s "
          f"on {device_name(data.device)}\n"
          f"Test error   {figure(100 * (1 - accuracy), 2, '%')}\n"
          f"log p(x)     {figure(log_p, 3, ' nats')}" +
          (f"\nbits/dim     {figure(data.bits_per_dim(log_p), 4)}" if data.levels else ""))


def restore(checkpoint, model, step, generator, progress):
    """Put everything back as the checkpoint has it."""
    model.load_state_dict(checkpoint["model"])
    step.load_state_dict(checkpoint["optimizer"])
    progress.epoch, progress.step, progress.seconds = (checkpoint[key] for key in ("epoch", "step", "seconds"))
    progress.sums.copy_(checkpoint["sums"])
    set_rng_state(checkpoint["rng"])
    try:
        generator.set_state(checkpoint["generator"])
    except RuntimeError:                                     # made on another kind of device
        generator.manual_seed(generator.initial_seed() + checkpoint["epoch"])
        print("Resumed on another kind of device: the batches will not be the ones an unstopped run would see")


def cli(argv=None):
    """`main` as a command: returns the exit code, 2 for bad input, 1 for failed training, 130 if interrupted.

    Of several processes only the main one prints.
    """
    processes = None
    try:
        processes = Processes()
        with contextlib.redirect_stdout(sys.stdout if processes.main else None):
            main(argv, processes)
    except (BadInput, TrainingFailed) as error:
        if not processes or processes.main:
            print(f"train-flow-ssl.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        if processes:
            processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(cli())
