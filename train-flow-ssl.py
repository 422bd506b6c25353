"""Semi-Conditional Normalizing Flows for semi-supervised learning (arXiv 1905.00505).

    python train-flow-ssl.py --config config.yaml                       train; options override it
    python train-flow-ssl.py --config configs/digits.yaml --pretrained  evaluate shipped weights
    python train-flow-ssl.py --resume RUN_DIR                           continue a run
    torchrun --nproc_per_node N train-flow-ssl.py --config config.yaml  train on N GPUs

The model (models/scnf.py): x --f_w--> (z_aux, z_f) and z_f --h_phi( . ; y)--> z_h, so that

    log p(x | y) = log|det df_w/dx| + log N(z_aux) + log|det dh_phi/dz_f| + log N(z_h)
    log p(x)     = logsumexp_y [ log p(x | y) + log p(y) ]

with one pass of the large flow f_w, and one pass of the small flow h_phi for each of the K classes.

The loss (training/objective.py) is the mean over a batch of -log p(x, y) for labelled rows and of
-log p(x) for unlabelled ones, plus, optionally, the paper's L_clf. On average a third of the rows
is labelled: of the 60,000 rows of an epoch on MNIST, 20,000 come from the 100 labelled images.
"""

import contextlib
import signal
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":          # the imports take seconds, and Ctrl-C ends them silently
    HEEDS_CTRL_C = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if HEEDS_CTRL_C:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stderr and sys.stderr.isatty():
        print("Loading PyTorch", end="\r", file=sys.stderr, flush=True)

import torch

from models import build_model
from training.assessment import print_evaluation
from training.beyond import Beyond
from training.checkpoint import (CheckpointWriter, load_checkpoint, load_pretrained, load_weights,
                                 restore, state_of_run)
from training.device import choose_speed, measure_cpu, set_up_torch, torch_errors_as_failed
from training.distributed import Processes
from training.evaluation import RunEvaluation
from training.objective import objective
from training.optim import Optimizer, learning_rate
from training.progress import Limits, Progress
from training.report import RunFiles, announce
from training.speed import Accelerated, Captured
from utils.data import Batch
from utils.datasets import load_data
from utils.errors import BadInput, Failed, one_line, value_errors_as_bad_input
from utils.runs import Run
from utils.settings import read_settings
from utils.terminal import say, show, sturdy_output, working


def main(processes):
    """Read the settings, load the data, build the model; then train, or evaluate given weights."""
    parser, settings = read_settings()
    limits = Limits(settings.time_limit)
    device = set_up_torch(settings, processes)
    speed = choose_speed(settings, device, processes)
    if settings.train_bs % processes.size and not settings.pretrained:
        raise BadInput(f"train_bs {settings.train_bs} is not a multiple of the {processes.size} "
                       "processes")
    processes.connect(device)
    with processes.together(), processes.main_first(), working("loading the data"):
        data = load_data(settings, device)
    torch.manual_seed(settings.seed)
    with value_errors_as_bad_input(), working("building the model"):
        model = build_model(settings, data.shape, data.n_classes, data.class_probs,
                            data.grey_levels).to(device)

    if settings.pretrained:
        say("Weights", load_pretrained(model, settings))
        print_evaluation(Accelerated(model, *speed), data, settings, processes)
        return

    checkpoint = None
    if settings.resume:
        checkpoint = load_checkpoint(Path(settings.resume, "checkpoint.pt"), model, settings)
        processes.barrier()                         # before the main process moves a failed run
    if settings.initial_weights and not checkpoint:
        load_weights(model, settings.initial_weights)
    if device.type == "cpu" and processes.size == 1 and not settings.resume:
        with working("measuring what is fastest on this CPU"):
            measure_cpu(settings, model)
        speed = speed._replace(precision=settings.precision)
    run = None
    try:
        with torch_errors_as_failed(), limits, contextlib.ExitStack() as stack:
            if processes.is_main:
                start = Run.resumed if settings.resume else parser.start_run
                run = stack.enter_context(start(settings))
            run_dir = run and run.run
            stopped = train(model, data, settings, speed, processes, limits, run_dir, checkpoint)
            if stopped and processes.is_main:
                say("Stopped", f"{stopped}; to continue:")
                show(run.resume_command)
            processes.barrier()                     # no process leaves while the main one writes
    except (Failed, OSError) as error:      # an OSError is, for example, a full disk
        of_all = getattr(error, "of_all", False)            # a number was not finite
        hint = run.way_back(settings, diverged=of_all) if run else ""
        raise Failed(f"{one_line(error)}{hint}", of_all) from None
    except KeyboardInterrupt:
        if run:
            print(f"\nInterrupted; to continue:\n{run.resume_command}", file=sys.stderr)
        raise


def make_training_step(accelerated, settings, processes):
    """-> training_step, optimizer.

    training_step(*batch) takes the fields of a Batch, and returns the terms of the loss, summed
    over this process's rows.
    """
    network = processes.parallel(accelerated)           # it may change the parameters
    optimizer = Optimizer(accelerated.model, settings)
    goes_beyond = settings.cons_weight or settings.vat_weight
    beyond = Beyond(accelerated, optimizer, settings) if goes_beyond else None

    def training_step(*fields):
        batch = Batch(*fields)
        parts = accelerated.micro_batches(processes.shard(batch))       # one on a GPU
        targets = beyond.targets(parts) if beyond else [None] * len(parts)
        optimizer.zero_grad()
        sums = {}
        for part, target in zip(parts, targets):
            with processes.gradient_sync(network, part is parts[-1]):
                log_joint, copy_logits = network(part.x, part.copies)   # log p(x, y), (B, K)
                terms = objective(log_joint, part.y, batch.y, settings, copy_logits)
                if beyond:
                    terms = beyond.add(terms, part, batch.y, log_joint, copy_logits, target)
                (terms["loss"] * processes.size).backward()     # DistributedDataParallel averages
            sums = {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
        optimizer.step()
        return sums
    return Captured(training_step) if accelerated.cuda_graph else training_step, optimizer


def train(model, data, settings, speed, processes, limits, run_dir, checkpoint):
    """Train, from `checkpoint` if there is one -> None, or why and where `limits` ended it.

    run_dir: of the run, which the main process fills; None on the others. Raises Failed.
    """
    generator = torch.Generator(data.device).manual_seed(settings.seed)
    announce(model, data, settings, speed, processes, run_dir)
    data.prepare()
    if not checkpoint and not settings.initial_weights:
        rows = max(settings.train_bs, 64)       # the spread of a few would be far from that of all
        batch = data.sample_batch(rows, generator, augmented=False)
        with value_errors_as_bad_input(), working("initialising the model"):
            model.initialize(batch.x, data.train_x)
    accelerated = Accelerated(model, *speed)
    training_step, optimizer = make_training_step(accelerated, settings, processes)
    steps_per_epoch = -(-len(data.train_x) // settings.train_bs)
    progress = Progress(steps_per_epoch, settings, optimizer.parameters, processes, limits)
    evaluation = RunEvaluation(accelerated, data, settings, processes)
    if checkpoint:
        restore(checkpoint, model, optimizer, progress, generator)
        say("Continuing", f"after {progress} of {settings.epochs}")
        if settings.lr_schedule != "no" and settings.epochs != checkpoint["settings"]["epochs"]:
            say("Schedule", f"now of {settings.epochs} epochs, not of "
                            f"{checkpoint['settings']['epochs']}")

    state = partial(state_of_run, model, optimizer, progress, generator)
    file = run_dir and run_dir / "checkpoint.pt"
    with CheckpointWriter(file, settings, state) as checkpoints, progress:
        files = RunFiles(run_dir, model, data, settings, progress.epoch)
        if not checkpoint:
            checkpoints.write(wait=True)        # before metrics.csv has a row
        while progress.epoch < settings.epochs:
            for i in progress.steps():
                optimizer.set_lr(learning_rate(progress.epoch + 1, i, steps_per_epoch, settings))
                batch = data.sample_batch(settings.train_bs, generator)
                progress.add(training_step(*batch))
            if progress.stopped:
                checkpoints.write()
                return f"{progress.stopped} after {progress}"
            row = progress.finish_epoch()
            if progress.epoch % settings.log_each and progress.epoch != settings.epochs:
                continue
            lr = learning_rate(progress.epoch, steps_per_epoch, steps_per_epoch, settings)
            row.update(lr=lr, **evaluation(optimizer, progress.epoch))
            files.log({**row, "seconds": progress.lap()})
            checkpoints.write()
            files.draw()
    with optimizer.averaged(files.keeps_average):
        files.finish(evaluation)
    return None


def cli():
    """Run `main` -> exit code: 0, 1 if training failed, 2 for bad input, 130 if interrupted."""
    processes = None
    try:
        processes = Processes()
        stdout = sys.stdout if processes.is_main else None
        with contextlib.redirect_stdout(stdout), torch_errors_as_failed():
            main(processes)
    except (BadInput, Failed, OSError) as error:
        message = f"train-flow-ssl.py: error: {one_line(error)}"
        if processes:
            processes.report(message, of_all=getattr(error, "of_all", False))
        else:
            print(message, file=sys.stderr)
        return 1 if isinstance(error, Failed) else 2
    except KeyboardInterrupt:
        return 130
    finally:
        if processes:
            processes.close()
    return 0


if __name__ == "__main__":
    if HEEDS_CTRL_C:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with sturdy_output():
        sys.exit(cli())
