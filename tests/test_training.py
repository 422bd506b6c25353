"""The losses, the schedule, and what a run must keep to: hidden labels, resuming, failing."""

import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, load_tiny, options

from models import build_model
from utils.data import SemiSupervisedData
from utils.processes import Processes
from utils.settings import read_settings
from utils.stopping import Stopping

SGD = {"ssl_alg": "sgd", "sup_weight": 1.0, "cl_weight": 0.0, "cons_weight": 0.0}


def loss_and_gradient(script, log_joint, y, batch_y=None, altered=None, **changes):
    log_joint = log_joint.clone().requires_grad_()
    values = script.objective(log_joint, y, SimpleNamespace(**{**SGD, **changes}), batch_y, altered)
    values[0].backward()
    return [v.item() for v in values], log_joint.grad


@pytest.fixture
def batch(float64):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(6, 4, generator=generator), torch.tensor([2, -1, 0, -1, -1, 3])


def test_objective(script, batch):
    log_joint, y = batch
    (loss, elbo, cl_loss, _, _, correct, labelled), _ = loss_and_gradient(script, log_joint, y)
    rows = [float(log_joint[i, k]) if k >= 0 else math.log(sum(map(math.exp, log_joint[i]))) for i, k in enumerate(y)]
    assert elbo == pytest.approx(np.mean(rows)) and loss == pytest.approx(-elbo)
    expected = torch.nn.functional.cross_entropy(log_joint[y >= 0], y[y >= 0])
    assert cl_loss == pytest.approx(float(expected))
    assert labelled == 3 and correct == (log_joint.argmax(1) == y).sum()


def test_weights_of_the_objective(script, batch):
    log_joint, y = batch
    values, _ = loss_and_gradient(script, log_joint, y, sup_weight=4.0, cl_weight=0.5)
    own = [float(log_joint[i, k]) for i, k in enumerate(y) if k >= 0]
    hidden = log_joint[y < 0].logsumexp(1).tolist()
    assert values[1] == pytest.approx((4 * sum(own) + sum(hidden)) / (4 * 3 + 3))
    assert values[0] == pytest.approx(-values[1] + 0.5 * values[2])


def test_consistency(script, batch):
    """Sure unlabelled rows teach their altered images, without a gradient of their own; L_clf is of both images."""
    log_joint, y = batch
    log_joint = log_joint / 5
    log_joint[1, 2] += 20                                                     # of the unlabelled rows 1, 3, 4 one is sure
    log_joint[0, 1] += 20                                                     # and a labelled one, which does not count
    altered = log_joint.flip(1).clone().requires_grad_()
    plain, gradient = loss_and_gradient(script, log_joint, y, batch_y=y, altered=altered.detach())
    values, with_gradient = loss_and_gradient(script, log_joint, y, batch_y=y, altered=altered, cl_weight=2.0, cons_weight=5.0)
    surprise, own_surprise = -altered.detach().log_softmax(1), -log_joint.log_softmax(1)
    target = log_joint.softmax(1)
    assert values[4] == pytest.approx(1 / 3)
    assert values[3] == pytest.approx(float((target[1] * surprise[1]).sum() / 3))
    labelled = [0, 2, 5]
    assert values[2] == pytest.approx(float((own_surprise + surprise)[labelled, y[labelled]].mean() / 2))
    assert values[0] == pytest.approx(plain[0] + 2 * values[2] + 5 * values[3]) and values[1] == plain[1]
    unlabelled = [1, 3, 4]
    assert torch.equal(gradient[unlabelled], with_gradient[unlabelled])       # the likelihood's alone
    assert not torch.equal(gradient[labelled], with_gradient[labelled])
    assert altered.grad[[1, 0, 2, 5]].any(1).all() and not altered.grad[[3, 4]].any()


def test_consistency_of_parts_adds_up(script, batch):
    log_joint, y = batch
    log_joint, altered = 10 * log_joint, log_joint.flip(0)
    settings = SimpleNamespace(**{**SGD, "cl_weight": 2.0, "cons_weight": 5.0})
    whole = torch.stack(script.objective(log_joint, y, settings, y, altered))
    parts = sum(torch.stack(script.objective(log_joint[s], y[s], settings, y, altered[s])) for s in (slice(2), slice(2, 6)))
    torch.testing.assert_close(parts, whole)
    assert whole[3] > 0 and whole[4] > 0


def test_em_has_the_gradient_of_sgd_and_a_lower_value(script, batch):
    """grad logsumexp_y = sum_y q(y) grad log p(x, y) with q = p(y | x); the values differ by q's entropy."""
    log_joint, y = batch
    sgd, gradient = loss_and_gradient(script, log_joint, y)
    em, em_gradient = loss_and_gradient(script, log_joint, y, ssl_alg="em")
    torch.testing.assert_close(em_gradient, gradient)
    q = log_joint[y < 0].softmax(1)
    assert sgd[1] - em[1] == pytest.approx(float(-(q * q.log()).sum() / 6))


def test_batches_without_labels_or_without_unlabelled(script, batch):
    log_joint, _ = batch
    for y in (torch.full((6,), -1), torch.arange(6) % 4):
        values, gradient = loss_and_gradient(script, log_joint, y, cl_weight=1.0)
        assert np.isfinite(values).all() and gradient.isfinite().all()


def test_learning_rates(script):
    def rates(**settings):
        s = SimpleNamespace(**{"lr": 2.0, "epochs": 4, "lr_warmup": 2, "warmup_steps": 0, **settings})
        return [script.learning_rate(epoch, step, 2, s) for epoch in range(1, 5) for step in (1, 2)]
    assert rates(lr_schedule="no") == 8 * [2]
    assert rates(lr_schedule="linear") == [1.5, 1.5, 1, 1, 0.5, 0.5, 0, 0]
    assert rates(lr_schedule="hat") == [1, 1, 2, 2, 1, 1, 0, 0]
    assert rates(lr_schedule="no", warmup_steps=4) == [0.5, 1, 1.5, 2, 2, 2, 2, 2]
    assert rates(lr_schedule="linear", warmup_steps=4) == [0.375, 0.75, 0.75, 1, 0.5, 0.5, 0, 0]
    assert rates(lr_schedule="cosine") == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(8)])


def train_in(script, folder, data, **changes):
    """Train a fresh tiny model on `data` in `folder` -> its state dict."""
    folder.mkdir()
    _, settings = read_settings(options(epochs=2, **changes))
    torch.manual_seed(settings.seed)
    model = build_model(settings, data.shape, data.n_classes, data.class_probs)
    speed = script.choose_speed(settings, data.device, Processes())
    script.train(model, data, settings, speed, Processes(), Stopping(), folder)
    return model.state_dict()


def assert_same(state, other):
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_hidden_labels_never_influence_anything(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = load_tiny()
    true_y = torch.full_like(shown.train_y, 0)
    true_y[shown.labelled] = shown.train_y[shown.labelled]
    states = []
    for i, hidden in enumerate((0, 1)):                                       # two ways to label the rest
        y = true_y.clone()
        y[shown.unlabelled] = hidden + torch.arange(len(shown.unlabelled)) % 9
        data = SemiSupervisedData(shown.train_x, y, shown.test_x, shown.test_y, shown.labelled, shown.levels)
        states.append(train_in(script, tmp_path / str(i), data, cl_weight=1))
    assert_same(*states)
    y = true_y.clone()
    y[shown.labelled] = (y[shown.labelled] + 1) % 10                          # while a shown one does
    data = SemiSupervisedData(shown.train_x, y, shown.test_x, shown.test_y, shown.labelled, shown.levels)
    other = train_in(script, tmp_path / "other", data, cl_weight=1)
    assert not all(torch.equal(other[key], states[0][key]) for key in other)


def test_training_improves_the_density_and_the_labelled_accuracy(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.cli(options(epochs=12, lr=5e-3, cl_weight=1)) == 0
    rows = read_metrics(next((tmp_path / "logs/exman-train-flow-ssl.py/runs").iterdir()))
    assert rows[-1]["test_log_p"] > rows[0]["test_log_p"] + 10
    assert rows[-1]["labelled_acc"] > rows[0]["labelled_acc"] + 0.2
    assert [row["epoch"] for row in rows] == list(range(1, 13))


def read_metrics(run):
    header, *lines = (run / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines]


def figures(row):
    """What two runs of the same steps must agree in; NaN, which does not equal itself, as None."""
    return {key: None if math.isnan(value) else value for key, value in row.items() if key != "seconds"}


def runs(tmp_path, kind="runs"):
    return sorted((tmp_path / "logs" / "exman-train-flow-ssl.py" / kind).iterdir())


@pytest.mark.parametrize("changes", [
    {}, {"ema": 0.9, "cons_weight": 1, "lr_schedule": "cosine", "warmup_steps": 6}, {"data": "moons", "model": "toy", "ssl_dim": -1, "ssl_l": 1, "conv": "qr", "l": 3}])
def test_resumed_run_ends_as_one_never_stopped(script, tmp_path, monkeypatch, capsys, changes):
    monkeypatch.chdir(tmp_path)
    line = options(epochs=4, clip_gn=100, cl_weight=1, **changes)
    assert script.cli(line) == 0

    evaluate, calls, per_epoch = script.evaluate, [], 4 if "ema" in changes else 1

    def interrupted(*args):                                                   # in epoch 3, before its checkpoint
        calls.append(1)
        if len(calls) == 2 * per_epoch + 1:
            raise KeyboardInterrupt
        return evaluate(*args)
    monkeypatch.setattr(script, "evaluate", interrupted)
    assert script.cli(line) == 130
    whole, stopped = runs(tmp_path)
    assert f"--resume {stopped.relative_to(tmp_path)}" in capsys.readouterr().err
    assert not (stopped / "model.torch").exists() and not (stopped / "traceback.txt").exists()
    monkeypatch.setattr(script, "evaluate", evaluate)
    torch.manual_seed(99)                                                     # the checkpoint's states count
    assert script.cli(["--resume", str(stopped)]) == 0

    assert_same(*(torch.load(run / "model.torch") for run in (whole, stopped)))
    one, two = (torch.load(run / "checkpoint.pt") for run in (whole, stopped))
    assert torch.equal(one["generator"], two["generator"]) and one["epoch"] == two["epoch"] == 4
    assert set(one["optimizer"]) == {"step", "exp_avg", "exp_inf"} | ({"average"} if "ema" in changes else set())
    assert_same(one["optimizer"], two["optimizer"])
    for row, other in zip(read_metrics(whole), read_metrics(stopped), strict=True):
        assert figures(row) == figures(other)
    assert script.cli(["--resume", str(stopped)]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("after", [3, 4])
def test_a_run_stopped_within_an_epoch_goes_on_from_that_step(script, tmp_path, monkeypatch, capsys, after):
    """Stopped after a step in the midst of epoch 2 of four steps each, and at its end, before its evaluation."""
    monkeypatch.chdir(tmp_path)
    line = options(epochs=3, cl_weight=1)
    assert script.cli(line) == 0
    draws, draw = [], SemiSupervisedData.draw

    def counted(self, *args):
        draws.append(1)
        return draw(self, *args)

    class Deadline(Stopping):
        reason = property(lambda self: "by the test" if len(draws) >= 1 + 4 + after else None)    # one initialises
    with monkeypatch.context() as patched:
        patched.setattr(SemiSupervisedData, "draw", counted)
        patched.setattr(script, "Stopping", Deadline)
        assert script.cli(line) == 0
    whole, stopped = runs(tmp_path)
    out = capsys.readouterr().out
    assert f"Stopped by the test after step {after} of 4 in epoch 2; to go on: " in out
    assert f"--resume {stopped.relative_to(tmp_path)}" in out and out.split("Stopped")[1] in (stopped / "log.txt").read_text()
    assert not (stopped / "model.torch").exists() and len(read_metrics(stopped)) == 1
    torch.manual_seed(99)
    assert script.cli(["--resume", str(stopped)]) == 0
    assert f"Going on after step {after} of 4 in epoch 2" in capsys.readouterr().out
    assert_same(*(torch.load(run / "model.torch") for run in (whole, stopped)))
    for row, other in zip(read_metrics(whole), read_metrics(stopped), strict=True):
        assert figures(row) == figures(other)


def test_stopping_by_time_and_by_signal():
    assert Stopping().reason is None and Stopping(1).reason is None
    late = Stopping(1)
    late.began -= 60
    assert "time limit of 1 minutes" in late.reason
    before = signal.getsignal(signal.SIGTERM)
    with Stopping() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.reason == "by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_interrupted_after_its_last_epoch_can_be_completed(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = script.draw_figures

    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "draw_figures", interrupted)
    assert script.cli(options(epochs=1)) == 130
    run, = runs(tmp_path)
    assert not (run / "model.torch").exists()
    monkeypatch.setattr(script, "draw_figures", draw)
    assert script.cli(["--resume", str(run)]) == 0
    assert (run / "model.torch").exists() and (run / "samples.png").exists() and len(read_metrics(run)) == 1
    assert_same(torch.load(run / "model.torch"), torch.load(run / "checkpoint.pt")["model"])


def test_an_interrupt_before_the_first_checkpoint_promises_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "MetricsLog", interrupted)
    assert script.cli(options(epochs=1)) == 130
    assert "--resume" not in capsys.readouterr().err


def test_a_checkpoint_of_another_kind_of_device_gives_new_batches(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.cli(options(epochs=1)) == 0
    run, = runs(tmp_path)
    checkpoint = torch.load(run / "checkpoint.pt")
    checkpoint["generator"] = torch.zeros(16, dtype=torch.uint8)              # as long as a GPU's
    torch.save(checkpoint, run / "checkpoint.pt")
    assert script.cli(["--resume", str(run), "--epochs", "2"]) == 0
    assert "another kind of device" in capsys.readouterr().out
    assert len(read_metrics(run)) == 2


@pytest.mark.gpu
def test_training_and_resuming_on_a_gpu(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = options(epochs=3, lr_schedule="no", device="cuda", deterministic="true")
    assert script.cli(line) == 0
    assert script.cli([*line, "--epochs", "2"]) == 0
    whole, stopped = runs(tmp_path)
    assert script.cli(["--resume", str(stopped), "--epochs", "3"]) == 0
    torch.use_deterministic_algorithms(False)
    assert_same(*(torch.load(run / "model.torch", map_location="cpu") for run in (whole, stopped)))
    assert script.cli([*options(), "--pretrained", str(whole / "model.torch"), "--device", "cpu"]) == 0
    rows = read_metrics(whole)
    assert rows[-1]["test_log_p"] > rows[0]["test_log_p"]


def test_resume_takes_changes_that_keep_the_run(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.cli(options(epochs=2, lr_schedule="no")) == 0
    run, = runs(tmp_path)
    assert script.cli(["--resume", str(run), "--lr", "0.5"]) == 2
    assert "keeps its lr" in capsys.readouterr().err
    assert script.cli(["--resume", str(run), *options(epochs=3, lr_schedule="no")]) == 0
    assert "epochs: 3" in (run / "params.yaml").read_text()
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2, 3]
    assert script.cli(options(epochs=3, lr_schedule="no")) == 0
    assert_same(*(torch.load(r / "model.torch") for r in runs(tmp_path)))


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_non_finite_values_end_the_run_and_keep_the_last_good_checkpoint(script, tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    rate = script.learning_rate
    # In epoch 2: of several steps, the next one's loss shows the damage; of a single one, only the weights do.
    train_bs, steps, damage = {"loss": (64, 4, 1e30), "weight": (200, 1, math.nan)}[what]
    monkeypatch.setattr(script, "learning_rate", lambda epoch, *rest: damage if epoch == 2 else rate(epoch, *rest))
    assert script.cli(options(epochs=3, train_bs=train_bs)) == 1
    err = capsys.readouterr().err
    failed, = runs(tmp_path, "fails")
    assert not runs(tmp_path) and not runs(tmp_path, "index")
    assert f"{what} is not finite" in err and f"of {steps} in epoch 2" in err and str(failed / "checkpoint.pt") in err and err.count("\n") == 1
    checkpoint = torch.load(failed / "checkpoint.pt")
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert "TrainingFailed" in (failed / "traceback.txt").read_text()
    monkeypatch.setattr(script, "learning_rate", rate)
    assert script.cli(["--resume", str(failed)]) == 0


@pytest.mark.parametrize("better", ["last", "averaged"])
def test_the_weights_likelier_on_held_out_images_are_kept(script, tmp_path, monkeypatch, capsys, better):
    """Whatever they give on the test set."""
    monkeypatch.chdir(tmp_path)
    measure, calls = script.measure, []

    def measured(*args):                                                      # first of the last weights, then of the averaged
        calls.append(1)
        ahead = (len(calls) == 2) == (better == "averaged")
        return {**measure(*args), "held_out_log_p": float(ahead), "test_acc": float(not ahead)}
    monkeypatch.setattr(script, "measure", measured)
    assert script.cli(options(epochs=1, ema=0.5, lr_schedule="no")) == 0
    assert f"Test error of the {better} weights" in capsys.readouterr().out
    run, = runs(tmp_path)
    shipped, checkpoint = torch.load(run / "model.torch"), torch.load(run / "checkpoint.pt")
    assert (better == "last") == all(torch.equal(value, checkpoint["model"][key]) for key, value in shipped.items())
    if better == "averaged":
        average, key = checkpoint["optimizer"]["average"], "f_w.levels.0.1.W"
        assert shipped[key].numel() == 1 and float(shipped[key]) == float(average[0])


def test_evaluation_is_exact_and_repeatable(script):
    data = load_tiny()
    model = build_model(TINY, data.shape, 10)
    data.test_x, data.test_y = data.test_x[:359], data.test_y[:359]           # two batches, the last one filled up
    sizes = []

    def score(x):
        sizes.append(len(x))
        return model.log_joint(x)

    def evaluate(seed):
        with torch.no_grad():
            return script.evaluate(score, data, (data.test_x, data.test_y), 256, seed, Processes())
    one = evaluate(0)
    assert one == evaluate(0) and set(sizes) == {180}
    noise = torch.Generator().manual_seed(0)
    padded = torch.cat((data.test_x, data.test_x[-1:]))
    with torch.no_grad():
        log_joint = torch.cat([model.log_joint(data.dequantize(x, noise)) for x in padded.split(180)])[:-1]
    assert one[0] == pytest.approx(float(log_joint.logsumexp(1).mean()), rel=1e-5)
    assert one[1] == pytest.approx(float((log_joint.argmax(1) == data.test_y).float().mean()))
    assert one[0] != evaluate(1)[0]


def test_the_paper_s_run_takes_steps_and_evaluates(script, tmp_path, monkeypatch, mnist_root):
    """config.yaml on MNIST: two full training steps, and an evaluation of 300 images."""
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(["--config", f"{script.__file__[:-len('train-flow-ssl.py')]}config.yaml",
                                 "--data_root", str(mnist_root), "--device", "cpu"])
    data, alone = script.load_data(settings), Processes()
    data.test_x, data.test_y = data.test_x[:300], data.test_y[:300]
    torch.manual_seed(0)
    model = build_model(settings, data.shape, data.n_classes, data.class_probs)
    generator = torch.Generator().manual_seed(0)
    model.initialize(data.draw(settings.train_bs, 1 / 3, generator)[0])
    log_joint, pass_size = script.arrange(model, script.choose_speed(settings, data.device, alone))
    assert pass_size == 64
    step, score = script.TrainingStep(log_joint, pass_size, script.objective, settings, alone), script.scorer(log_joint, pass_size)
    start = {key: value.clone() for key, value in model.named_parameters()}
    test = data.test_x, data.test_y
    log_p, _ = script.evaluate(score, data, test, settings.test_bs, 0, alone)
    assert 5 < data.bits_per_dim(log_p) < 9                                   # 8: the uniform density
    progress = SimpleNamespace(epoch=0, step=0, sums=torch.zeros(len(script.TERMS)), seconds=0.0)
    assert script.train_epoch(step, data, settings, alone, Stopping(), generator, 1 / 3, 2, progress) is None
    loss, *_, labelled = progress.sums.tolist()
    assert math.isfinite(loss) and 0 < labelled < 2 * settings.train_bs
    # Behind a zero last layer the second step is the first to move a weight; then all have moved.
    assert not [key for key, value in model.named_parameters() if torch.equal(value, start[key])]
    trained = script.evaluate(score, data, test, settings.test_bs, 0, alone)
    assert math.isfinite(trained[0]) and trained[0] != log_p and 0 <= trained[1] <= 1
