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
-log p(x) for unlabelled ones. Optional terms are added to it: classification of the labelled rows
(the paper's L_clf) and consistency under augmentation. On average a third of the rows is
labelled: of the 60,000 rows of an epoch on MNIST, 20,000 come from the 100 labelled images.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from models import build_model
from training.assessment import print_evaluation
from training.checkpoint import (CheckpointWriter, copy_to_cpu, load_checkpoint, load_pretrained,
                                 load_weights, save_atomically)
from training.evaluation import RunEvaluation
from training.loop import TrainingFailed, TrainingState, train_epoch
from training.processes import Processes
from training.report import report_run
from training.schedule import learning_rate
from training.speed import Accelerated, choose_speed, device_name, set_up_torch
from training.stopping import Stopping
from utils.data import load_data
from utils.errors import BadInput, one_line, value_errors_as_bad_input
from utils.figures import plot_run
from utils.metrics import MetricsLog, average_is_better, line, result
from utils.settings import Run, read_settings

SECONDS_BETWEEN_PLOTS = 300     # during training


def main(processes):
    """Read the settings, load the data, build the model; then train, or evaluate given weights."""
    parser, settings = read_settings()
    stopping = Stopping(settings.time_limit)
    device = set_up_torch(settings, processes)
    speed = choose_speed(settings, device, processes)
    if settings.train_bs % processes.size and not settings.pretrained:
        raise BadInput(f"train_bs {settings.train_bs} is not a multiple of the {processes.size} "
                       "processes")
    processes.connect(device)
    with processes.together(), processes.main_first():      # it may have to download the data
        data = load_data(settings, device)
    torch.manual_seed(settings.seed)
    with value_errors_as_bad_input():
        model = build_model(settings, data.shape, data.n_classes, data.class_probs,
                            data.grey_levels).to(device)

    if settings.pretrained:
        print(f"Weights      {load_pretrained(model, settings)}")
        print_evaluation(Accelerated(model, *speed), data, settings, processes)
        return

    checkpoint = None
    if settings.resume:
        checkpoint = load_checkpoint(Path(settings.resume, "checkpoint.pt"), model, settings)
        processes.barrier()                         # before the main process moves a failed run
    elif settings.initial_weights:
        load_weights(model, settings.initial_weights)
    run = None
    try:
        with stopping, contextlib.ExitStack() as stack:
            if processes.is_main:
                start = Run.resumed if checkpoint else parser.start_run
                run = stack.enter_context(start(settings))
            run_dir = run and run.run
            stopped = train(model, data, settings, speed, processes, stopping, run_dir, checkpoint)
            if stopped and processes.is_main:
                print(f"Stopped {stopped}; to continue: {run.resume_command}")
            processes.barrier()                     # no process leaves while the main one writes
    except (TrainingFailed, OSError) as error:      # an OSError is, for example, a full disk
        last_good = run and run.run / "checkpoint.pt"
        hint = f". The last good checkpoint is {last_good}" if run and last_good.exists() else ""
        of_all = isinstance(error, TrainingFailed)
        raise TrainingFailed(f"{one_line(error)}{hint}", of_all) from None
    except KeyboardInterrupt:
        if run and (run.run / "checkpoint.pt").exists():
            print(f"\nInterrupted; to continue: {run.resume_command}", file=sys.stderr)
        raise


def train(model, data, settings, speed, processes, stopping, run_dir, checkpoint):
    """Train, from `checkpoint` if there is one; the main process fills `run_dir`.

    -> None, or why and where `stopping` ended it. Raises TrainingFailed.
    """
    generator = torch.Generator(data.device).manual_seed(settings.seed)
    if not checkpoint and not settings.initial_weights:
        labelled_prob = data.labelled_prob(settings.sup_sample_weight)
        x, _ = data.sample_batch(settings.train_bs, labelled_prob, generator)
        model.initialize(x, data.train_x)
    accelerated = Accelerated(model, *speed)
    evaluation = RunEvaluation(accelerated, data, settings, processes)
    state = TrainingState.create(accelerated, data, generator, settings, processes)
    if checkpoint:
        state.load_state_dict(checkpoint, processes)
        print(f"Continuing after {state}")
        if settings.lr_schedule != "no" and settings.epochs != checkpoint["settings"]["epochs"]:
            print(f"The learning rate now follows the schedule of {settings.epochs} epochs, not of "
                  f"{checkpoint['settings']['epochs']}")
    others = f" and {processes.size - 1} more" if processes.size > 1 else ""
    print(f"PyTorch {torch.__version__} on {device_name(data.device)}{others}; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{len(data.labelled)} labelled of {len(data.train_x)} examples; "
          f"{state.steps_per_epoch} training steps per epoch; "
          f"{speed.precision}{', compiled' * speed.compile}")
    if data.spread_labels:
        print(f"Before the first step: label spreading over {len(data.train_x):,} images")

    with CheckpointWriter(run_dir and run_dir / "checkpoint.pt", settings) as writer:
        if processes.is_main:
            log, weights = MetricsLog(run_dir / "metrics.csv", state.epoch), run_dir / "model.torch"
            if state.epoch < settings.epochs and weights.exists():      # those of fewer epochs
                weights.rename(run_dir / f"model-epoch{state.epoch}.torch")
        if not checkpoint:
            if processes.is_main:
                np.savetxt(run_dir / "labelled.txt", data.labelled_ids, "%d")
            writer.write(state.state_dict())
        plotted = time.perf_counter()
        while state.epoch < settings.epochs:
            stopped = train_epoch(state, data, settings, processes, stopping)
            if stopped:
                state.sums.copy_(processes.sum(state.sums))
                writer.write(state.state_dict())
                return f"{stopped} after {state}"
            row = state.finish_epoch(processes)
            if state.epoch % settings.log_each and state.epoch != settings.epochs:
                continue
            start = time.perf_counter()
            row.update(epoch=state.epoch, **evaluation(state.training_step, state.epoch))
            steps, logged = state.steps_per_epoch, time.perf_counter()
            row["lr"] = learning_rate(state.epoch, steps, steps, settings)
            row["seconds"], state.seconds = state.seconds + logged - start, 0.0
            if processes.is_main:
                log.append(row)
            writer.write(state.state_dict())
            if processes.is_main:
                print(line(log.rows[-1]))
                if time.perf_counter() - plotted > SECONDS_BETWEEN_PLOTS:
                    plot_run(model, data, log.rows, run_dir, settings.seed)
                    plotted = time.perf_counter()
            state.seconds = time.perf_counter() - logged    # of the next row

    if processes.is_main:
        with state.training_step.averaged(average_is_better(log.rows[-1])):
            save_atomically(copy_to_cpu(model.state_dict()), weights)
            plot_run(model, data, log.rows, run_dir, settings.seed)
            report_run(evaluation, log.rows, run_dir)
        print(f"{result(log.rows[-1])}; weights, pictures and a report are in "
              f"{os.path.relpath(run_dir)}")
    return None


def cli():
    """Run `main` -> exit code: 0, 1 if training failed, 2 for bad input, 130 if interrupted."""
    processes = None
    try:
        processes = Processes()
        with contextlib.redirect_stdout(sys.stdout if processes.is_main else None):
            main(processes)
    except (BadInput, TrainingFailed, OSError) as error:
        message = f"train-flow-ssl.py: error: {one_line(error)}"
        if processes:
            processes.report(message, of_all=getattr(error, "of_all", False))
        else:
            print(message, file=sys.stderr)
        return 1 if isinstance(error, TrainingFailed) else 2
    except KeyboardInterrupt:
        return 130
    finally:
        if processes:
            processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(cli())
