"""The loss, the schedule, the loop, evaluation; hidden labels, resumed, stopped and failed runs."""

import contextlib
import math
import os
import re
import shlex
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import (POINTS, PROJECT, SCRIPT, TINY, load_tiny, make_step, options, run_script,
                      runs, words)
from torch.nn import functional as F

from experiments import pictures, table
from models import build_model
from tools import ship
from training.beyond import Beyond
from training.device import choose_speed
from training.distributed import Processes
from training.evaluation import Inference, evaluate, predict, summary
from training.objective import objective
from training.optim import OPTIMIZERS, learning_rate
from training.progress import SAME_EVENT, SIGNALS, Limits, Progress
from training.speed import Accelerated
from utils import metrics
from utils.data import Batch, SemiSupervisedData
from utils.datasets import load_data
from utils.errors import BadInput, Failed
from utils.metrics import MetricsLog, average_is_better, names_of_kept
from utils.settings import read_settings

SGD = {"ssl_alg": "sgd", "sup_weight": 1.0, "cl_weight": 0.0, "cons_weight": 0.0,
       "vat_weight": 0.0}


def terms_of(log_joint, y, of_copies=None, target=None, divergence=None, batch_y=None, **changes):
    """The terms of the loss; with `of_copies` and `divergence`, those that the paper has not."""
    settings, batch_y = SimpleNamespace(**{**SGD, **changes}), y if batch_y is None else batch_y
    terms = objective(log_joint, y, batch_y, settings, of_copies)
    if of_copies is not None or divergence is not None:
        beyond = Beyond(SimpleNamespace(call=lambda *args: None), None, settings)
        terms = beyond.add(terms, Batch(divergence, y), batch_y, log_joint, of_copies, target)
    return SimpleNamespace(**terms)


def terms_and_gradient(log_joint, y, of_copies=None, **changes):
    """The terms as numbers, and the gradient of the loss with respect to log_joint."""
    log_joint = log_joint.clone().requires_grad_()
    terms = terms_of(log_joint, y, of_copies, **changes)
    terms.loss.backward()
    return SimpleNamespace(**{k: term.item() for k, term in vars(terms).items()}), log_joint.grad


@pytest.fixture
def batch(float64):
    """log p(x, y) of six rows, three of them labelled, and y."""
    generator = torch.Generator().manual_seed(0)
    log_joint = 3 * torch.randn(6, 4, generator=generator)
    return log_joint, torch.tensor([2, -1, 0, -1, -1, 3])


def test_objective(batch):
    log_joint, y = batch
    terms, _ = terms_and_gradient(log_joint, y)
    rows = [float(log_joint[i, k]) if k >= 0 else math.log(sum(map(math.exp, log_joint[i])))
            for i, k in enumerate(y)]
    assert terms.log_likelihood == pytest.approx(np.mean(rows))
    assert terms.loss == pytest.approx(-terms.log_likelihood)
    assert terms.cl_loss == pytest.approx(float(F.cross_entropy(log_joint[y >= 0], y[y >= 0])))
    assert terms.labelled == 3 and terms.correct == (log_joint.argmax(1) == y).sum()


def test_weights_of_the_objective(batch):
    log_joint, y = batch
    terms, _ = terms_and_gradient(log_joint, y, sup_weight=4.0, cl_weight=0.5)
    labelled = [float(log_joint[i, k]) for i, k in enumerate(y) if k >= 0]
    unlabelled = log_joint[y < 0].logsumexp(1).tolist()
    expected = (4 * sum(labelled) + sum(unlabelled)) / (4 * 3 + 3)
    assert terms.log_likelihood == pytest.approx(expected)
    assert terms.loss == pytest.approx(-terms.log_likelihood + 0.5 * terms.cl_loss)


def test_consistency(batch):
    """The posterior of a confident unlabelled row is the target, without gradient, for its copy.

    L_clf is the mean of those of the images and of their copies.
    """
    log_joint, y = batch
    log_joint = log_joint / 5
    log_joint[1, 2] += 20           # makes one of the unlabelled rows 1, 3, 4 confident,
    log_joint[0, 1] += 20           # and a labelled row, which does not count
    augmented = log_joint.flip(1).clone().requires_grad_()
    plain, gradient = terms_and_gradient(log_joint, y, augmented.detach())
    terms, with_gradient = terms_and_gradient(log_joint, y, augmented, cl_weight=2.0,
                                              cons_weight=5.0)
    nll, nll_augmented = -log_joint.log_softmax(1), -augmented.detach().log_softmax(1)
    target = log_joint.softmax(1)
    assert terms.confident == pytest.approx(1 / 3)
    assert terms.cons_loss == pytest.approx(float((target[1] * nll_augmented[1]).sum() / 3))
    labelled = [0, 2, 5]
    expected = (nll + nll_augmented)[labelled, y[labelled]].mean() / 2
    assert terms.cl_loss == pytest.approx(float(expected))
    assert terms.loss == pytest.approx(plain.loss + 2 * terms.cl_loss + 5 * terms.cons_loss)
    assert terms.log_likelihood == plain.log_likelihood
    unlabelled = [1, 3, 4]
    assert torch.equal(gradient[unlabelled], with_gradient[unlabelled])     # of the likelihood only
    assert not torch.equal(gradient[labelled], with_gradient[labelled])
    assert augmented.grad[[1, 0, 2, 5]].any(1).all() and not augmented.grad[[3, 4]].any()


def test_targets_are_those_of_consistency_only(batch, monkeypatch):
    """Here with priors: q(y) is proportional to p(x | y) r(y); the log-likelihood keeps p(y)."""
    log_joint, y = batch
    augmented, p_y = log_joint.flip(1), torch.tensor([0.1, 0.2, 0.3, 0.4])
    r = torch.tensor([[0.01, 0.97, 0.01, 0.01]]).expand(len(y), -1)
    monkeypatch.setattr("training.beyond.CONFIDENCE", 0.0)
    target = log_joint + (r / p_y).log()
    terms = terms_of(log_joint, y, augmented, target, cons_weight=1.0)
    p_x_given_y = (log_joint - p_y.log()).exp()
    q = p_x_given_y * r / (p_x_given_y * r).sum(1, keepdim=True)
    expected = -(q * augmented.log_softmax(1)).sum(1)[y < 0].mean()
    assert terms.cons_loss == pytest.approx(float(expected))
    plain = terms_of(log_joint, y, augmented, cons_weight=1.0)
    assert terms.cons_loss != pytest.approx(float(plain.cons_loss))
    assert terms.log_likelihood == plain.log_likelihood and terms.cl_loss == plain.cl_loss


def test_terms_of_micro_batches_sum_to_those_of_the_batch(batch, monkeypatch):
    log_joint, y = batch
    log_joint, augmented = 10 * log_joint, log_joint.flip(0)
    monkeypatch.setattr("training.beyond.virtual_adversarial_loss", lambda logits, x, eps: x)
    weights = {"cl_weight": 2.0, "cons_weight": 5.0, "vat_weight": 3.0, "vat_eps": 1.0}
    divergence = torch.arange(1.0, 7.0)
    whole = terms_of(log_joint, y, augmented, None, divergence, **weights)
    parts = [terms_of(log_joint[s], y[s], augmented[s], None, divergence[s], y, **weights)
             for s in (slice(2), slice(2, 6))]
    for name, term in vars(whole).items():
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), term)
    assert whole.cons_loss > 0 and whole.confident > 0 and whole.vat_loss == 3.5
    without = terms_of(log_joint, y, augmented, **{**weights, "vat_weight": 0.0})
    assert whole.loss == pytest.approx(float(without.loss) + 3 * 3.5)


def test_em_has_the_gradient_of_sgd_and_a_lower_value(batch):
    """The gradient of logsumexp_y log p(x, y) is sum_y q(y) grad log p(x, y) with q = p(y | x).

    The values differ by the entropy of q.
    """
    log_joint, y = batch
    sgd, gradient = terms_and_gradient(log_joint, y)
    em, em_gradient = terms_and_gradient(log_joint, y, ssl_alg="em")
    torch.testing.assert_close(em_gradient, gradient)
    q = log_joint[y < 0].softmax(1)
    entropy = float(-(q * q.log()).sum() / 6)
    assert sgd.log_likelihood - em.log_likelihood == pytest.approx(entropy)


def test_l_clf_of_large_log_likelihoods():
    """log p(x) of an MNIST image is in the thousands, where float32 has steps of 2e-4."""
    log_joint = 3500 + torch.tensor([[0.0, -9.0, -10.0], [-12.0, 0.0, -11.0]])
    y = torch.tensor([0, 1])
    terms, gradient = terms_and_gradient(log_joint, y, cl_weight=1e4)
    exact = F.cross_entropy(log_joint.double(), y)
    assert terms.cl_loss == pytest.approx(float(exact), rel=1e-3)           # not 0 or 2e-4
    _, of_likelihood = terms_and_gradient(log_joint, y)
    assert (gradient - of_likelihood).sum(1).abs().max() < 1e-3             # with weight 1e4


def test_batches_without_labelled_or_without_unlabelled_rows(batch):
    log_joint, _ = batch
    for y in (torch.full((6,), -1), torch.arange(6) % 4):
        terms, gradient = terms_and_gradient(log_joint, y, cl_weight=1.0)
        assert np.isfinite(list(vars(terms).values())).all() and gradient.isfinite().all()


def test_learning_rates():
    def rates(**settings):
        defaults = {"lr": 2.0, "epochs": 4, "warmup_steps": 0}
        s = SimpleNamespace(**{**defaults, **settings})
        return [learning_rate(epoch, step, 2, s) for epoch in range(1, 5) for step in (1, 2)]
    assert rates(lr_schedule="no") == 8 * [2]
    assert rates(lr_schedule="linear") == [1.5, 1.5, 1, 1, 0.5, 0.5, 0, 0]
    assert rates(lr_schedule="no", warmup_steps=4) == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    assert rates(lr_schedule="linear", warmup_steps=4) == [0.375, 0.75, 0.75, 1, 0.5, 0.5, 0, 0]
    cosine = [1 + math.cos(math.pi * i / 8) for i in range(8)]
    assert rates(lr_schedule="cosine") == pytest.approx(cosine)


def assert_same(state, other):
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)


def read_metrics(run):
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    return [dict(zip(names, map(float, line.split(",")), strict=True)) for line in lines]


def figures(row):
    """What two runs of the same steps must agree in; None for NaN, which is not equal to itself."""
    return {key: None if math.isnan(value) else value
            for key, value in row.items() if key != "seconds"}


def assert_same_metrics(run, other):
    for row, other_row in zip(read_metrics(run), read_metrics(other), strict=True):
        assert figures(row) == figures(other_row)


def weights_of(*run_dirs):
    return [torch.load(run / "model.torch") for run in run_dirs]


def test_hidden_labels_have_no_influence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = load_tiny()
    true_y = torch.full_like(shown.train_y, 0)
    true_y[shown.labelled] = shown.train_y[shown.labelled]

    def train_with(y):
        """Train on the digits with other training labels -> the directory of the run."""
        data = SemiSupervisedData(shown.train_x, y, shown.test_x, shown.test_y, shown.labelled,
                                  shown.grey_levels)
        before = set(runs(tmp_path)) if (tmp_path / "logs").exists() else set()
        with monkeypatch.context() as patched:
            patched.setattr("utils.datasets.load_data", lambda settings, device: data)
            assert run_script(options(epochs=2, cl_weight=1)) == 0
        run, = set(runs(tmp_path)) - before
        return run
    same = []
    for hidden in (0, 1):                                       # two ways to label the others
        y = true_y.clone()
        y[shown.unlabelled] = hidden + torch.arange(len(shown.unlabelled)) % 9
        same.append(train_with(y))
    assert_same(*weights_of(*same))
    assert_same_metrics(*same)
    y = true_y.clone()
    y[shown.labelled] = (y[shown.labelled] + 1) % 10            # shown labels do have influence
    other, state = weights_of(train_with(y), same[0])
    assert not all(torch.equal(other[key], state[key]) for key in other)


def test_training_improves_the_density_and_the_labelled_accuracy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=12, lr=5e-3, cl_weight=1)) == 0
    run, = runs(tmp_path)
    rows = read_metrics(run)
    assert rows[-1]["test_log_p"] > rows[0]["test_log_p"] + 10
    assert rows[-1]["labelled_acc"] > rows[0]["labelled_acc"] + 0.2
    assert [row["epoch"] for row in rows] == list(range(1, 13))


@pytest.mark.parametrize("changes, picture, figure", [
    ({"validation": 100, "ema": 0.5}, "redrawn", r"Test bits/dim \d\.\d{4}, of the"),
    (POINTS, "latent", r"Test log p\(x\) -\d\.\d{3} nats")], ids=["images", "points"])
def test_the_density_alone(tmp_path, monkeypatch, capsys, changes, picture, figure):
    """Without labels log p(x) is all that is trained and shown: no error, nothing of classes."""
    monkeypatch.chdir(tmp_path)
    settings = {**TINY, **changes, "supervised": 0, "epochs": 2}
    (tmp_path / "alone.yaml").write_text(yaml.dump(settings))
    line = ["--config", "alone.yaml", "--seed", "0", "--data_seed", "0", "--name", "alone-seed0"]
    assert run_script(line) == 0
    run, = runs(tmp_path)
    page = re.sub('src(set)?="[^"]*"', "", (run / "report.html").read_text())
    for argv in (["--resume", str(run)], ["--pretrained", str(run)]):
        assert run_script(argv) == 0
    out = capsys.readouterr().out
    assert len(re.findall(figure, out)) == 2
    assert not re.search(r"\b(err|error|nan|calibration|confusion)\b", out + page, re.IGNORECASE)
    for row in read_metrics(run):
        assert row["train_loss"] == -row["log_likelihood"] and row["cl_loss"] == 0
        assert all(math.isnan(row[f"{of}_acc"]) for of in ("labelled", "val", "ema_val", "test"))
    assert table.main(["alone.yaml", "--seeds", "0", "--collect", "."]) == 0
    error, bits, n, _ = capsys.readouterr().out.splitlines()[2].split(" | ")[-4:]
    last = read_metrics(run)[-1]
    assert (error, n) == ("-", "1")
    assert bits == ("-" if math.isnan(last["test_bpd"]) else f"{last['test_bpd']:.3f}")
    of_run = ["--pretrained", str(run), "--save", "x.png"]
    with pytest.raises(BadInput, match=f"{picture} needs labels"):
        pictures.main([picture, *of_run])
    with pytest.raises(BadInput, match="a run without labels has none"):
        ship.main([str(run), "alone", "--to", "home"])
    if changes is POINTS:
        pictures.main(["density", *of_run])


def own_data(x, grey_levels=17):
    """60 given examples of 3 classes, two of each labelled; the test set is the same."""
    y = torch.arange(60) % 3
    return SemiSupervisedData(x, y, x, y, torch.arange(6), grey_levels)


BLACK_OR_WHITE = 16 * torch.randint(2, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0))
PAIRS = {"train_bs": 2, "num_examples": 40}


@pytest.mark.parametrize("changes, images", [
    ({"supervised": 10}, None), ({"supervised": -1}, None),         # one label per class, and all
    (PAIRS, None), *(({**POINTS, **PAIRS, "supervised": 2, "seed": seed}, None) for seed in (1, 3)),
    ({"train_bs": 1000, "test_bs": 1000}, None),
    *((pixels, torch.full((60, 1, 8, 8), level)) for level, pixels in (
        (0, {}), (16, {"pixels": "marginal"}))),
    ({}, BLACK_OR_WHITE), ({"pixels": "marginal"}, BLACK_OR_WHITE)])
def test_few_labels_small_batches_and_plain_images(tmp_path, monkeypatch, capsys, changes, images):
    monkeypatch.chdir(tmp_path)
    if images is not None:
        data = own_data(images)
        monkeypatch.setattr("utils.datasets.load_data", lambda settings, device: data)
    assert run_script(options(epochs=1, **changes)) == 0
    run, = runs(tmp_path)
    row, = read_metrics(run)
    assert math.isfinite(row["test_log_p"]) and row["train_loss"] < 50 and 0 <= row["test_acc"] <= 1
    assert all(value.isfinite().all() for value in torch.load(run / "model.torch").values())
    out, err = capsys.readouterr()
    assert "left out" not in out and "could not" not in out and not err
    assert (run / "report.html").exists() and (run / "samples.png").exists()


def test_equal_points_are_refused(tmp_path, monkeypatch, capsys):
    """There is no scale to initialise the model with."""
    monkeypatch.chdir(tmp_path)
    data = own_data(torch.ones(60, 2, 1, 1), None)
    monkeypatch.setattr("utils.datasets.load_data", lambda settings, device: data)
    assert run_script(options(epochs=1, **POINTS)) == 2
    err = capsys.readouterr().err
    assert "two different examples at least, not from 64 equal ones" in err and err.count("\n") == 1
    assert not runs(tmp_path) and not runs(tmp_path, "fails") and not runs(tmp_path, "index")


@pytest.mark.parametrize("changes", [
    {"lr_schedule": "linear"},
    {"ema": 0.9, "validation": 100, "cons_weight": 1, "lr_schedule": "cosine", "warmup_steps": 6,
     "pixels": "marginal"},
    {"cons_weight": 1, "spread_labels": 0.9, "clf_noise": "false", "position_bias": "true"},
    {"model": "pyramid", "width": 8, "n_blocks": 1, "optimizer": "adam", "cons_weight": 1,
     "clf_noise": "train", "vat_weight": 1},
    POINTS])
def test_resumed_run_ends_as_one_never_stopped(tmp_path, monkeypatch, capsys, changes):
    monkeypatch.chdir(tmp_path)
    line = options(epochs=4, cl_weight=1, **changes)
    assert run_script(line) == 0

    calls, per_epoch = [], 2 if "ema" in changes else 1

    def interrupted(*args):                     # in epoch 3, before its checkpoint
        calls.append(1)
        if len(calls) == 2 * per_epoch + 1:
            raise KeyboardInterrupt
        return evaluate(*args)
    with monkeypatch.context() as patched:
        patched.setattr("training.evaluation.evaluate", interrupted)
        assert run_script(line) == 130
    whole, stopped = runs(tmp_path)
    assert f"--resume {stopped.relative_to(tmp_path)}" in capsys.readouterr().err
    assert not (stopped / "model.torch").exists() and not (stopped / "traceback.txt").exists()
    torch.manual_seed(99)                       # the generators continue from the checkpoint
    assert run_script(["--resume", str(stopped)]) == 0

    assert_same(*weights_of(whole, stopped))
    one, two = (torch.load(run / "checkpoint.pt") for run in (whole, stopped))
    assert torch.equal(one["generator"], two["generator"]) and one["epoch"] == two["epoch"] == 4
    names = [name for name in one["model"] if name in one["optimizer"]["exp_avg"]]
    assert names == list(one["optimizer"]["exp_avg"]) and one["optimizer"]["step"] > 0
    assert list(one["average"]) == (names if "ema" in changes else [])
    for key in OPTIMIZERS[changes.get("optimizer", "adamax")][1]:
        assert_same(one["optimizer"][key], two["optimizer"][key])
    assert_same(one["average"], two["average"])
    assert_same_metrics(whole, stopped)


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n): within this context a run stops after its n-th training step."""
    @contextlib.contextmanager
    def stop_after(n):
        batches, sample_batch = [], SemiSupervisedData.sample_batch

        def counted(self, *args, **kwargs):
            batches.append(1)
            return sample_batch(self, *args, **kwargs)

        class Deadline(Limits):
            @property
            def reason(self):                   # the first batch initialises the ActNorms
                return "by the test" if len(batches) >= 1 + n else None
        with monkeypatch.context() as patched:
            patched.setattr(SemiSupervisedData, "sample_batch", counted)
            patched.setattr("training.progress.Limits", Deadline)
            yield
    return stop_after


@pytest.mark.parametrize("after", [3, 4])
def test_a_run_stopped_within_an_epoch_continues_from_that_step(tmp_path, monkeypatch, capsys,
                                                                stop_after, after):
    """Stopped in epoch 2, of four steps: before its last step, and before its evaluation."""
    monkeypatch.chdir(tmp_path)
    line = options(epochs=3, cl_weight=1)
    assert run_script(line) == 0
    with stop_after(4 + after):
        assert run_script(line) == 0
    whole, stopped = runs(tmp_path)
    out = capsys.readouterr().out
    assert f"Stopped by the test after step {after} of 4 in epoch 2; to continue:" in words(out)
    assert f"--resume {stopped.relative_to(tmp_path)}" in out
    assert out.split("Stopped")[1] in (stopped / "log.txt").read_text()
    assert not (stopped / "model.torch").exists() and len(read_metrics(stopped)) == 1
    torch.manual_seed(99)
    assert run_script(["--resume", str(stopped)]) == 0
    assert f"Continuing after step {after} of 4 in epoch 2" in words(capsys.readouterr().out)
    assert_same(*weights_of(whole, stopped))
    assert_same_metrics(whole, stopped)


def test_the_weights_of_a_resumed_run_are_those_of_its_last_figures(tmp_path, monkeypatch, capsys,
                                                                    stop_after):
    """Stopped in epoch 3, it cannot end with epoch 2, whose figures are not of these weights."""
    monkeypatch.chdir(tmp_path)
    with stop_after(4 + 4 + 2):
        assert run_script(options(epochs=4, lr_schedule="cosine", lr=0.1)) == 0
    run, = runs(tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    for epochs in (1, 2):
        assert run_script(["--resume", str(run), "--epochs", str(epochs)]) == 2
        err = capsys.readouterr().err
        assert "is in epoch 3 already" in err and "3 or more" in err and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    assert run_script(["--resume", str(run), "--epochs", "3"]) == 0
    assert "Schedule now of 3 epochs, not of 4" in words(capsys.readouterr().out)
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert run_script(options(pretrained=str(run / "model.torch"))) == 0
    evaluated = float(capsys.readouterr().out.split("log p(x)")[1].split()[0])
    assert evaluated == pytest.approx(rows[-1]["test_log_p"], abs=2e-3)


def test_stopping_by_time_and_by_signal(request):
    assert Limits().reason is None and Limits(1).reason is None
    late = Limits(1)
    late.start -= 60
    assert "time limit of 1 minutes" in late.reason
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)       # nohup, which ignores it, or not
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    for name in SIGNALS:
        number = getattr(signal, name)
        with Limits() as limits:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            limits.can_stop = True
            for sent in (number, number, signal.SIGTERM):       # at once: one event
                os.kill(os.getpid(), sent)
            assert limits.reason == f"by {name}"
            limits.signalled -= SAME_EVENT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGUSR2)
    assert signal.getsignal(signal.SIGTERM) == handler
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Limits() as limits:
        os.kill(os.getpid(), signal.SIGHUP)
        assert limits.reason is None


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_run_interrupted_after_its_last_epoch_can_be_completed(tmp_path, monkeypatch, capsys):
    """Its weights are there before its pictures. Resuming a complete run draws these again."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("training.report.plot_run", interrupt)
        assert run_script(options(epochs=1)) == 130
    run, = runs(tmp_path)
    weights = (run / "model.torch").read_bytes()
    assert not (run / "samples.png").exists()
    for _ in range(2):
        assert run_script(["--resume", str(run)]) == 0
        assert (run / "model.torch").read_bytes() == weights
        assert (run / "samples.png").exists() and len(read_metrics(run)) == 1
        (run / "samples.png").unlink()
    assert_same(torch.load(run / "model.torch"), torch.load(run / "checkpoint.pt")["model"])


def test_a_failure_in_drawing_costs_pictures_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = RuntimeError("no ink")

    def fail(*args, **options):
        raise error
    monkeypatch.setattr("utils.figures.plot_samples", fail)
    assert run_script(options(epochs=2)) == 0
    run, = runs(tmp_path)
    out, err = capsys.readouterr()
    where = (run / "traceback.txt").relative_to(tmp_path)
    assert (f"Pictures failed (RuntimeError); the run is not affected. See {where}"
            in words((run / "log.txt").read_text()))
    assert "no ink" in (run / "traceback.txt").read_text() and "Test error" in out and not err
    assert (run / "model.torch").exists() and not (run / "samples.png").exists()
    error = Failed("Not finite: samples")
    assert run_script(["--resume", str(run)]) == 0
    assert "Pictures failed (Not finite: samples); the run is" in words(capsys.readouterr().out)
    assert not (run / "traceback.txt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, a disk that is full")
@pytest.mark.parametrize("victim", ["checkpoint.pt", "model.torch", "metrics.csv"])
def test_a_full_disk_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys, victim):
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=1)) == 0
    run, = runs(tmp_path)
    good = (run / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    (run / f"{victim}.partial").symlink_to("/dev/full")
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 1
    err = capsys.readouterr().err
    failed, = runs(tmp_path, "fails")
    assert err.startswith("train-flow-ssl.py: error: No space left on device: ")
    assert err.count("\n") == 1 and f"{victim}. The last good checkpoint is {failed}" in err
    assert "OSError" in (failed / "traceback.txt").read_text()
    if victim == "checkpoint.pt":
        assert (failed / "checkpoint.pt").read_bytes() == good
    assert not list(failed.glob("*.partial"))               # it would fill the disk
    assert run_script(["--resume", str(failed), "--epochs", "2"]) == 0
    assert len(read_metrics(run)) == 2 and (run / "model.torch").exists()


def test_a_longer_run_keeps_the_weights_of_the_shorter_one(tmp_path, monkeypatch, stop_after):
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=1)) == 0
    run, = runs(tmp_path)
    weights = (run / "model.torch").read_bytes()
    with stop_after(1 - 1):                     # one step: no batch initialises the ActNorms
        assert run_script(["--resume", str(run), "--epochs", "2"]) == 0
    assert not (run / "model.torch").exists()   # metrics.csv will be of other weights
    assert (run / "model-epoch1.torch").read_bytes() == weights
    assert run_script(["--resume", str(run)]) == 0
    assert (run / "model.torch").exists() and (run / "model-epoch1.torch").exists()


def test_sigterm_while_the_run_ends_does_not_cut_it_off(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr("training.report.plot_run", terminated)
    assert run_script(options(epochs=1)) == 0
    assert "Test error" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"cons_weight": 1, "ema": 0.9, "validation": 100}])
def test_training_in_bfloat16_on_a_cpu(tmp_path, monkeypatch, capsys, changes):
    """It follows float32, and a run continues with the same bits."""
    monkeypatch.chdir(tmp_path)
    for precision in ("fp32", "bf16"):
        line = options(epochs=3, lr=5e-3, cl_weight=1, precision=precision, **changes)
        assert run_script(line) == 0
        assert f", {precision}\n" in capsys.readouterr().out
    plain, low = map(read_metrics, runs(tmp_path))
    for key in ("train_loss", "val_log_p" if "ema" in changes else "test_log_p"):
        values = [[row[key] for row in rows] for rows in (plain, low)]
        progress = abs(values[0][-1] - values[0][0])
        assert progress > 1 and values[0] != values[1]
        assert np.abs(np.subtract(*values)).max() < 0.1 * progress
    shorter = options(epochs=2, lr=5e-3, cl_weight=1, precision="bf16", **changes)
    assert run_script(shorter) == 0
    stopped = runs(tmp_path)[2]
    assert run_script(["--resume", str(stopped), "--epochs", "3"]) == 0
    assert_same(*weights_of(*runs(tmp_path)[1:]))


def test_the_averaged_weights_of_a_checkpoint_can_be_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=2, ema=0.99, validation=100, lr=5e-3)) == 0
    run, = runs(tmp_path)
    row, evaluated = read_metrics(run)[-1], []
    for weights in ("last", "averaged"):
        capsys.readouterr()
        assert run_script(options(pretrained=str(run / "checkpoint.pt"), weights=weights,
                                  validation=100, test="false")) == 0
        out = capsys.readouterr().out
        assert "Validation set 100 examples" in out and "Test set" not in out
        evaluated.append(float(out.split("log p(x)")[1].split()[0]))
    assert evaluated == pytest.approx([row["val_log_p"], row["ema_val_log_p"]], abs=2e-3)
    assert abs(evaluated[0] - evaluated[1]) > 1
    plain = options(pretrained=str(run / "model.torch"), weights="averaged")
    assert run_script(plain) == 2
    assert "model.torch has no averaged weights" in capsys.readouterr().err


@pytest.mark.parametrize("where", [
    "training.report.announce", "utils.data.SemiSupervisedData.prepare",
    "training.report.MetricsLog", "training.checkpoint.CheckpointWriter.write"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch, capsys,
                                                                  where):
    monkeypatch.chdir(tmp_path)
    line = options(epochs=2, cons_weight=1, spread_labels=0.9)
    assert run_script(line) == 0
    with monkeypatch.context() as patched:
        patched.setattr(where, interrupt)
        assert run_script(line) == 130
    whole, stopped = runs(tmp_path)
    command = f"--resume {stopped.relative_to(tmp_path)}"
    assert command in capsys.readouterr().err and not (stopped / "checkpoint.pt").exists()
    (stopped / "checkpoint.pt.partial").write_text("of a killed process")
    torch.manual_seed(99)
    assert run_script(command.split()) == 0
    assert_same(*weights_of(whole, stopped))
    assert_same_metrics(whole, stopped)
    assert {path.name for path in whole.iterdir()} == {path.name for path in stopped.iterdir()}


def test_a_checkpoint_of_another_kind_of_device_gives_new_batches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=1)) == 0
    run, = runs(tmp_path)
    checkpoint = torch.load(run / "checkpoint.pt")
    checkpoint["generator"] = torch.zeros(16, dtype=torch.uint8)            # as long as a GPU's
    torch.save(checkpoint, run / "checkpoint.pt")
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 0
    assert "another kind of device" in capsys.readouterr().out
    assert len(read_metrics(run)) == 2


@pytest.mark.gpu
def test_training_and_resuming_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = options(epochs=3, lr_schedule="no", device="cuda", precision="fp32")
    assert run_script(line) == 0
    assert run_script([*line, "--epochs", "2"]) == 0
    whole, stopped = runs(tmp_path)
    assert run_script(["--resume", str(stopped), "--epochs", "3"]) == 0
    one, two = (torch.load(run / "checkpoint.pt", map_location="cpu") for run in (whole, stopped))
    assert torch.equal(one["generator"], two["generator"])
    assert one["optimizer"]["step"] == two["optimizer"]["step"]
    # Sums on a GPU depend on the order of its threads: of what the last epoch changed, a little.
    before = torch.load(stopped / "model-epoch2.torch", map_location="cpu")
    names = list(one["optimizer"]["exp_avg"])
    end, resumed, start = (torch.cat([state[key].flatten() for key in names])
                           for state in (one["model"], two["model"], before))
    assert (resumed - end).norm() < 0.05 * (end - start).norm()
    evaluation = ["--pretrained", str(whole / "model.torch"), "--device", "cpu"]
    assert run_script([*options(), *evaluation]) == 0
    rows = read_metrics(whole)
    assert rows[-1]["test_log_p"] > rows[0]["test_log_p"]


def test_a_run_starts_from_given_weights(tmp_path, monkeypatch):
    """A tiny learning rate leaves them as they are."""
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=2)) == 0
    first, = runs(tmp_path)
    given = {"initial_weights": first / "model.torch", "lr": 1e-30, "lr_schedule": "no"}
    assert run_script(options(epochs=1, seed=5, **given)) == 0
    _, second = runs(tmp_path)
    assert_same(*weights_of(first, second))
    (first / "model.torch").unlink()                    # a resumed run has its own
    assert run_script(["--resume", str(second), "--epochs", "2"]) == 0
    settings = ["--config", str(second / "params.yaml")]
    assert run_script([*settings, "--pretrained", str(second / "model.torch")]) == 0


def test_resume_takes_changes_that_keep_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(options(epochs=2, lr_schedule="no")) == 0
    run, = runs(tmp_path)
    assert run_script(["--resume", str(run), "--lr", "0.5"]) == 2
    assert "keeps its lr" in capsys.readouterr().err
    assert run_script(["--resume", str(run), *options(epochs=3, lr_schedule="no")]) == 0
    assert "epochs: 3" in (run / "params.yaml").read_text()
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2, 3]
    assert run_script(options(epochs=3, lr_schedule="no")) == 0
    assert_same(*weights_of(*runs(tmp_path)))


@pytest.mark.parametrize("what, train_bs, steps, damage", [
    ("loss", 64, 4, 1e30),              # of several steps, the next one has the non-finite loss
    ("weight", 200, 1, math.nan),       # of a single step, only the weights are not finite
])
def test_non_finite_values_end_the_run_and_keep_the_last_good_checkpoint(
        tmp_path, monkeypatch, capsys, what, train_bs, steps, damage):
    monkeypatch.chdir(tmp_path)

    def damaging(epoch, *rest):
        return damage if epoch == 2 else learning_rate(epoch, *rest)
    with monkeypatch.context() as patched:
        patched.setattr("training.optim.learning_rate", damaging)
        assert run_script(options(epochs=3, train_bs=train_bs)) == 1
    err = capsys.readouterr().err
    failed, = runs(tmp_path, "fails")
    assert not runs(tmp_path) and not runs(tmp_path, "index")
    assert f"{what} is not finite" in err and f"of {steps} in epoch 2" in err
    assert str(failed / "checkpoint.pt") in err and err.count("\n") == 1
    checkpoint = torch.load(failed / "checkpoint.pt")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert "utils.errors.Failed: " in (failed / "traceback.txt").read_text()
    _, script, *command = shlex.split(err.split("with a lower learning rate: ")[1])
    assert script == str(SCRIPT) and command[-2:] == ["--lr", "0.0001"]
    assert run_script(command) == 0
    assert run_script(["--resume", str(failed)]) == 0


@pytest.mark.parametrize("better", ["last", "averaged"])
def test_the_weights_with_the_higher_validation_likelihood_are_kept(tmp_path, monkeypatch, capsys,
                                                                    better):
    """Whatever their accuracy is; and the test set is evaluated with these."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def changed(*args):     # validation with the last weights, then the averaged ones; the test set
        log_p, accuracy = evaluate(*args)
        calls.append(log_p)
        higher = (len(calls) == 2) == (better == "averaged")
        return (log_p, accuracy) if len(calls) == 3 else (float(higher), float(not higher))
    monkeypatch.setattr("training.evaluation.evaluate", changed)
    line = options(epochs=1, ema=0.5, validation=100)
    assert run_script(line) == 0
    assert f"%, of the {better} weights" in words(capsys.readouterr().out)
    run, = runs(tmp_path)
    kept, checkpoint = torch.load(run / "model.torch"), torch.load(run / "checkpoint.pt")
    row, last = read_metrics(run)[-1], checkpoint["model"]
    assert len(calls) == 3 and row["test_log_p"] == pytest.approx(calls[2], rel=1e-6)
    monkeypatch.setattr("training.evaluation.evaluate", evaluate)
    assert run_script([*line, "--pretrained", str(run / "model.torch")]) == 0
    evaluated = float(capsys.readouterr().out.split("log p(x)")[1].split()[0])
    assert evaluated == pytest.approx(row["test_log_p"], abs=2e-3)
    assert (better == "last") == all(torch.equal(kept[key], last[key]) for key in kept)
    if better == "averaged":
        assert_same({key: kept[key] for key in checkpoint["average"]}, checkpoint["average"])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys, value):
    """After the last epoch, too, and it costs no checkpoint. So does --pretrained."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def broken(*args):                      # in the third call
        calls.append(1)
        log_p, logits = predict(*args)
        if len(calls) == 3:
            log_p[:7] = logits[4:10, 2] = value
        return log_p, logits
    with monkeypatch.context() as patched:
        patched.setattr("training.evaluation.predict", broken)
        assert run_script(options(epochs=3)) == 1
    out, err = capsys.readouterr()
    failed, = runs(tmp_path, "fails")
    message = "error: Not finite: log p(x) of 7 and log p(y | x) of 6 of the 360 examples"
    assert message in err and f"(test set, epoch 3). The last good checkpoint is {failed}" in err
    assert err.count("\n") == 1 and "Test error" not in out
    assert torch.load(failed / "checkpoint.pt")["epoch"] == 2
    assert [row["epoch"] for row in read_metrics(failed)] == [1, 2]
    assert not (failed / "model.torch").exists() and not (failed / "report.html").exists()
    assert run_script(["--resume", str(failed)]) == 0
    run, = runs(tmp_path)
    assert len(read_metrics(run)) == 3 and (run / "report.html").exists()
    capsys.readouterr()
    calls[:] = [1, 1]
    monkeypatch.setattr("training.assessment.predict", broken)
    assert run_script(options(pretrained=run / "model.torch")) == 1
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and "Test error" not in out


@pytest.mark.parametrize("broken, kept", [([0], "averaged"), ([1], "last"), ([0, 1], None)])
def test_of_last_and_averaged_weights_the_finite_ones_are_kept(tmp_path, monkeypatch, capsys,
                                                               broken, kept):
    """With a line that says so. Metrics, curves and report have no numbers of the others."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def changed(*args):     # validation with the last weights, then the averaged ones; the test set
        calls.append(1)
        log_p, logits = predict(*args)
        return (log_p / 0, logits) if len(calls) - 1 in broken else (log_p, logits)
    monkeypatch.setattr("training.evaluation.predict", changed)
    code = run_script(options(epochs=1, ema=0.5, validation=100, supervised=20))
    out, err = capsys.readouterr()
    of_last = "Not finite: log p(x) of 100 of the 100 examples (validation set, last weights of epo"
    if kept is None:
        assert code == 1 and of_last in err and not runs(tmp_path)
        return
    lost, prefix = ("last", "") if kept == "averaged" else ("averaged", "ema_")
    assert code == 0 and of_last.replace("last", lost) in words(out)
    run, = runs(tmp_path)
    row, = read_metrics(run)
    assert all(math.isnan(row[f"{prefix}val_{key}"]) for key in ("log_p", "acc", "bpd"))
    assert math.isfinite(row["test_acc"]) and average_is_better(row) == (kept == "averaged")
    report = (run / "report.html").read_text()
    assert not re.search(r"\b(nan|inf)\b", re.sub('src="[^"]*"', "", report))
    weights, checkpoint = torch.load(run / "model.torch"), torch.load(run / "checkpoint.pt")
    expected = checkpoint["average"] if kept == "averaged" else checkpoint["model"]
    assert_same({name: weights[name] for name in expected}, expected)


def test_broken_numbers_of_earlier_runs_are_not_read(tmp_path):
    """Earlier versions wrote them."""
    log = MetricsLog(tmp_path / "metrics.csv")
    log.append({"epoch": 1, "val_log_p": -1.0, "val_acc": 0.9, "val_bpd": 1.0})
    log.append({"epoch": 2, "val_log_p": -math.inf, "val_acc": 0.1, "val_bpd": math.inf,
                "ema_val_log_p": -2.0, "ema_val_acc": 0.9, "ema_val_bpd": 1.0})
    first, second = metrics.read_metrics(tmp_path / "metrics.csv")
    assert first["val_acc"] == 0.9 and math.isnan(second["val_acc"] + second["val_bpd"])
    assert names_of_kept([first, second]) == ["val", "ema_val"]
    assert names_of_kept([{**second, "ema_val_log_p": math.nan}, first]) == ["val", "val"]


def test_examples_of_classes_that_the_model_lacks():
    log_p, logits = torch.zeros(3), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="the examples have class 2, and the model has 2 classes"):
        summary(log_p, logits, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("changes, evaluated", [
    ({"validation": 0}, ["test", "test", "test"]),
    ({"validation": 100}, ["val", "val", "val", "test"]),
    ({"validation": 100, "ema": 0.5}, ["val", "val", "val", "val", "val", "val", "test"]),
    ({"validation": 100, "test": "false"}, ["val", "val", "val"])])
def test_with_validation_examples_the_test_set_is_evaluated_once(tmp_path, monkeypatch, capsys,
                                                                 changes, evaluated):
    monkeypatch.chdir(tmp_path)
    calls = []

    def recorded(infer, data, examples, *args):
        calls.append("test" if examples[0] is data.test_x else "val")
        assert examples[0] is (data.test_x if calls[-1] == "test" else data.val_x)
        return evaluate(infer, data, examples, *args)
    monkeypatch.setattr("training.evaluation.evaluate", recorded)
    for_report = []                             # passes over the test set for the report

    def again(infer, data, images, *args):
        for_report.append(images is data.test_x)
        return predict(infer, data, images, *args)
    monkeypatch.setattr("training.assessment.predict", again)
    assert run_script(options(epochs=3, **changes)) == 0
    assert calls == evaluated and for_report.count(True) == 0
    rows = read_metrics(runs(tmp_path)[0])
    for key in ("val", "ema_val", "test"):
        known = [math.isfinite(row[f"{key}_acc"]) for row in rows]
        assert known == [math.isfinite(row[f"{key}_bpd"]) for row in rows]
        assert known == {
            "val": [changes["validation"] > 0] * 3, "ema_val": ["ema" in changes] * 3,
            "test": [not changes["validation"]] * 2 + ["test" not in changes]}[key]
    name = "Validation" if "test" in changes else "Test"
    assert f"{name} error" in capsys.readouterr().out.split("report.html")[1]


def test_evaluation_is_exact_and_repeatable():
    data = load_tiny()
    model = build_model(TINY, data.shape, 10)
    data.test_x, data.test_y = data.test_x[:359], data.test_y[:359]     # the last batch is filled
    infer, sizes = Inference(Accelerated(model)), []

    def log_joint_of(x):
        sizes.append(len(x))
        return model.log_joint(x)
    infer.log_joint = log_joint_of

    def evaluate_with(seed):
        with torch.no_grad():
            return evaluate(infer, data, (data.test_x, data.test_y), 256, seed, Processes())
    one = evaluate_with(0)
    assert one == evaluate_with(0) and set(sizes) == {180}
    noise = torch.Generator().manual_seed(0)
    padded = torch.cat((data.test_x, data.test_x[-1:]))
    with torch.no_grad():
        log_joint = torch.cat([model.log_joint(data.dequantize(x, noise))
                               for x in padded.split(180)])[:-1]
    assert one[0] == pytest.approx(float(log_joint.logsumexp(1).mean()), rel=1e-5)
    assert one[1] == pytest.approx(float((log_joint.argmax(1) == data.test_y).float().mean()))
    assert one[0] != evaluate_with(1)[0]

    data.clf_noise = "train"    # what is classified has no noise, log p(x) is as before
    middle = (data.test_x + 0.5) / 17
    with torch.no_grad():
        expected = float((model.log_joint(middle).argmax(1) == data.test_y).float().mean())
    assert evaluate_with(0) == (one[0], pytest.approx(expected))
    assert evaluate_with(1) == (pytest.approx(one[0], abs=5), pytest.approx(expected))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["mnist-small.yaml", "mnist-glow.yaml"])
def test_a_run_on_mnist_end_to_end(tmp_path, monkeypatch, capsys, mnist_root, config):
    """A config as it is, with few images, stopped after a step and continued."""
    monkeypatch.chdir(tmp_path)
    full = load_data

    def smaller(settings, device):
        data = full(settings, device)
        data.test_x, data.test_y = data.test_x[:60], data.test_y[:60]
        data.val_x, data.val_y = data.val_x[:60], data.val_y[:60]
        return data
    monkeypatch.setattr("utils.datasets.load_data", smaller)
    line = ["--config", str(PROJECT / "configs" / config), "--device", "cpu",
            "--data_root", str(mnist_root), "--num_examples", "150", "--epochs", "1"]
    assert run_script([*line, "--time_limit", "0.0001"]) == 0
    run, = runs(tmp_path)
    assert "after step 1 of 3 in epoch 1" in capsys.readouterr().out
    assert run_script(["--resume", str(run), "--time_limit", "0"]) == 0
    assert re.search("Test error .*, of the", words(capsys.readouterr().out))
    row, = read_metrics(run)
    # A few steps away from the model that the Gaussian pixels make at the start: independent ones.
    assert all(1.8 < row[key] < 2.3 for key in ("test_bpd", "val_bpd", "ema_val_bpd"))
    assert 0 <= row["confident"] <= 1 and row["cl_loss"] > 0
    assert len((run / "labelled.txt").read_text().split()) == 100
    assert run_script([*line, "--pretrained", str(run / "checkpoint.pt")]) == 0
    evaluated = float(capsys.readouterr().out.split("log p(x)")[1].split()[0])
    assert evaluated == pytest.approx(row["test_log_p"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config, n_train, bits_at_the_start", [
    ("config.yaml", 60_000, (5, 9)),                                    # the uniform density has 8
    ("configs/mnist-marginal.yaml", 55_000, (1.6, 2.6))])               # independent pixels
def test_the_paper_s_network_trains_and_evaluates(tmp_path, monkeypatch, mnist_root, config,
                                                  n_train, bits_at_the_start):
    """On MNIST: two training steps of 32 images, and an evaluation of 40."""
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(["--config", str(PROJECT / config),
                                 "--data_root", str(mnist_root), "--device", "cpu",
                                 "--train_bs", "32", "--micro_bs", "16"])
    data, processes = load_data(settings), Processes()
    test = data.test_x, data.test_y = data.test_x[:40], data.test_y[:40]
    torch.manual_seed(0)
    model = build_model(settings, data.shape, data.n_classes, data.class_probs, data.grey_levels)
    generator = torch.Generator().manual_seed(0)
    model.initialize(data.sample_batch(256, generator).x, data.train_x)
    speed = choose_speed(settings, data.device, processes)
    accelerated = Accelerated(model, *speed)
    assert accelerated.micro_batch_size == 16 and len(data.train_x) == n_train
    step, optimizer = make_step(settings, model, **speed._asdict())
    infer = Inference(accelerated)
    start = {key: value.clone() for key, value in model.named_parameters()}
    log_p, _ = evaluate(infer, data, test, settings.test_bs, 0, processes)
    low, high = bits_at_the_start
    assert low < data.bits_per_dim(log_p) < high
    progress = Progress(2, settings, optimizer.parameters, processes, Limits())
    with progress:
        for _ in progress.steps():
            progress.add(step(*data.sample_batch(settings.train_bs, generator)))
    assert progress.sums["loss"].isfinite()
    assert 0 < progress.sums["labelled"] < 2 * settings.train_bs
    # Weights before a layer that is zero at the start have a gradient from the second step on.
    changed = {key: not torch.equal(value, start[key]) for key, value in model.named_parameters()}
    assert all(changed.values()), changed
    trained = evaluate(infer, data, test, settings.test_bs, 0, processes)
    assert math.isfinite(trained[0]) and trained[0] != log_p and 0 <= trained[1] <= 1
