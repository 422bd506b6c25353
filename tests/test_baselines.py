"""The comparison with other methods: the bounds of M1+M2, FixMatch's terms, the command."""

import json
import math
import sys

import pytest
import torch
from conftest import PROJECT, load_tiny, options, run_script, runs
from PIL import Image
from torch.distributions import Binomial, Categorical, Normal, kl_divergence
from torch.nn import functional as F

from experiments import baselines, fixmatch, m1_m2, progress
from experiments.fixmatch import cut_out, fit_fixmatch, pseudo_labels, unlabelled_loss
from experiments.m1_m2 import M1, M2, fit_m1_m2
from utils.errors import BadInput, run_command
from utils.metrics import read_metrics


@pytest.fixture
def quick(monkeypatch):
    """The networks are small, and train in about a second."""
    monkeypatch.setattr(m1_m2, "SMALL", m1_m2.SMALL._replace(
        n_latent1=10, width1=64, steps1=300, n_latent2=5, width2=32, steps2=100, batch_size=64,
        lr=5e-3, alpha=10))
    monkeypatch.setattr(fixmatch, "SMALL", fixmatch.SMALL._replace(
        width=8, steps=80, n_labelled=20, n_unlabelled=20, ema=0.9))


def gaussian(mean_and_log_var):
    """The factors of a diagonal Gaussian, from the output of a network."""
    mean, log_var = mean_and_log_var.chunk(2, -1)
    return Normal(mean, (log_var / 2).exp())


def small_m2():
    """An M2 whose latents z2 have one dimension, and three latents z1."""
    torch.manual_seed(0)
    m2 = M2(n_latent1=2, n_latent2=1, width=8, prior=torch.tensor([0.5, 0.3, 0.2]).double())
    return m2, torch.randn(3, 2)


def log_joint_by_integration(m2, z1):
    """log p(z1, y) of every class, (B, K): the integral over z2 as a sum over a fine grid."""
    z2 = torch.linspace(-8, 8, 4001)[:, None]
    values = []
    for y in range(3):
        one_hot = F.one_hot(torch.tensor(y), 3).double().expand(len(z2), 3)
        p_z1 = gaussian(m2.decoder(torch.cat((one_hot, z2), 1)))
        log_p = p_z1.log_prob(z1[:, None]).sum(2) + Normal(0, 1).log_prob(z2[:, 0])
        values.append(log_p.logsumexp(1) + math.log(16 / 4000) + m2.log_prior[y])
    return torch.stack(values, 1)


@torch.no_grad()
def test_the_bound_of_a_labelled_latent_is_its_definition(float64):
    """Averaged over the noise it is E_q [log p(z1, y, z2) - log q(z2 | y, z1)], term by term.

    It is at most log p(z1, y), from which it differs by KL(q(z2 | y, z1) || p(z2 | y, z1)).
    """
    m2, z1 = small_m2()
    y, n = torch.tensor([0, 2, 1]), 20_000
    one_hot = F.one_hot(y, 3).double()
    q = gaussian(m2.encoder(torch.cat((one_hot, z1), 1)))
    noise = torch.randn(n, 3, 1)
    z2 = q.mean + q.stddev * noise
    p_z1 = gaussian(m2.decoder(torch.cat((one_hot.expand(n, 3, 3), z2), 2)))
    terms = (p_z1.log_prob(z1).sum(2) + Categorical(torch.tensor([0.5, 0.3, 0.2])).log_prob(y)
             + (Normal(0, 1).log_prob(z2) - q.log_prob(z2)).sum(2))
    bound = torch.stack([m2.labelled_bound(z1, y, noise[i]) for i in range(2000)])
    assert torch.allclose(bound.mean(0), terms.mean(0), atol=0.05)
    exact = (p_z1.log_prob(z1).sum(2)[:2000] + m2.log_prior[y]
             - kl_divergence(q, Normal(0., 1.)).sum(1))
    assert torch.allclose(bound, exact)
    assert (terms.mean(0) < log_joint_by_integration(m2, z1)[torch.arange(3), y]).all()


@torch.no_grad()
def test_the_bound_of_an_unlabelled_latent_sums_over_the_classes(float64):
    m2, z1 = small_m2()
    noise = torch.randn(3, 3, 1)
    q = m2.classifier(z1).softmax(1)
    expected = torch.zeros(3)
    for row in range(3):
        for y in range(3):
            bound = m2.labelled_bound(z1[row:row + 1], torch.tensor([y]), noise[y, row:row + 1])
            expected[row] += q[row, y] * (bound[0] - q[row, y].log())
    assert torch.allclose(m2.unlabelled_bound(z1, noise), expected)
    mean = torch.stack([m2.unlabelled_bound(z1, torch.randn(3, 3, 1)) for _ in range(2000)]).mean(0)
    assert (mean < log_joint_by_integration(m2, z1).logsumexp(1)).all()


@torch.no_grad()
def test_the_bound_of_an_image(float64):
    """Given z1: binomial counts, and for one trial the mean over all black-and-white versions."""
    torch.manual_seed(0)
    x, noise = torch.tensor([[0.25, 0.75]]), torch.randn(1, 3)
    for n_trials in (1, 4):
        m1 = M1(2, 3, 8, n_trials)
        q = gaussian(m1.encoder(x))
        f = m1.decoder(q.mean + q.stddev * noise).sigmoid()[0]
        if n_trials == 4:
            log_p = Binomial(4, f).log_prob(4 * x[0]).sum() - 2 * math.log(math.comb(4, 1))
        else:
            log_p = sum(abs(1 - i - x[0, 0]) * abs(1 - j - x[0, 1])
                        * (abs(1 - i - f[0]) * abs(1 - j - f[1])).log()
                        for i in (0, 1) for j in (0, 1))
        expected = log_p - kl_divergence(q, Normal(0., 1.)).sum()
        assert torch.allclose(m1.bound(x, noise)[0], expected)


def test_pseudo_labels_count_from_the_threshold_on():
    probabilities = torch.tensor([[0.96, 0.02, 0.02], [0.03, 0.94, 0.03], [0.01, 0.01, 0.98]])
    y, counts = pseudo_labels(probabilities.log())
    assert y.tolist() == [0, 1, 2] and counts.tolist() == [1, 0, 1]


def test_the_unlabelled_loss_of_fixmatch():
    """Rows that do not count are in the mean's denominator; the weak view has no gradient."""
    of_weak = torch.tensor([[0.96, 0.04], [0.5, 0.5]]).log().requires_grad_()
    of_strong = torch.tensor([[0.3, 0.7], [0.2, 0.8]]).log().requires_grad_()
    loss = unlabelled_loss(of_weak, of_strong)
    assert loss.item() == pytest.approx(-math.log(0.3) / 2)
    loss.backward()
    assert of_weak.grad is None
    assert (of_strong.grad[0] != 0).all() and (of_strong.grad[1] == 0).all()


def test_each_image_loses_one_square():
    images = torch.full((200, 1, 6, 5), 7, dtype=torch.uint8)
    black = cut_out(images, 2, torch.Generator().manual_seed(0)) == 0
    assert (black.flatten(1).sum(1) == 4).all()
    assert (black.any(3).sum(2) == 2).all() and (black.any(2).sum(2) == 2).all()
    assert black.any(0).all()                                   # it can be everywhere


@pytest.mark.parametrize("fit", [fit_m1_m2, fit_fixmatch])
def test_networks_learn_from_what_is_shown(fit, quick):
    """Better than chance, the same again with the same seed, and blind to hidden labels.

    These are not stored; of a SemiSupervisedData in which they were, nothing would change.
    """
    data = load_tiny(num_examples=500, supervised=50)
    assert (data.train_y[data.unlabelled] == -1).all()
    predicted = fit(data, 0)(data.test_x)
    assert predicted.shape == data.test_y.shape
    assert (predicted == data.test_y).float().mean() > 0.3                  # chance: 0.1
    data.train_y[data.unlabelled] = 3
    assert torch.equal(fit(data, 0)(data.test_x), predicted)


@pytest.mark.parametrize("fit", [fit_m1_m2, fit_fixmatch])
def test_networks_do_without_unlabelled_images(fit, quick):
    data = load_tiny(num_examples=300, supervised=-1)
    assert (fit(data, 0)(data.test_x) == data.test_y).float().mean() > 0.3


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """A function that runs the command in tmp_path -> its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["baselines.py", *argv])
        try:
            run_command(baselines.main)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return run


CHEAP = ["knn1", "svm", "self-training", "propagation", "spreading-knn", "spreading-rbf"]


def test_the_table_and_the_file(compare, tmp_path):
    code, out, err = compare(*options(num_examples=400, supervised=60, validation=100),
                             "--seeds", "3", "4", "--methods", *CHEAP, "--save", "all.json")
    assert code == 0, err
    assert err.count("\n") == 2 * len(CHEAP)            # the progress
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["seeds"] == [3, 4] and list(report["methods"]) == CHEAP
    assert (report["labelled"], report["validation"], report["test"]) == (60, 100, 360)
    for method in report["methods"].values():
        line = next(line for line in out.splitlines() if line.startswith(method["title"]))
        errors = [run["test_error"] for run in method["runs"]]
        assert [run["seed"] for run in method["runs"]] == [3, 4]
        assert max(errors) < 40                                             # chance: 90
        assert method["mean_test_error"] == pytest.approx(sum(errors) / 2, abs=1e-3)
        assert line[len(method["title"]):].split()[:3] == [
            f"{error:.2f}" for error in (*errors, method["mean_test_error"])]
        grid = math.prod(len(values) for values in method["grid"].values())
        assert all(run["settings_tried"] == grid and run["settings"].keys() == method["grid"].keys()
                   for run in method["runs"])
    used = [method["unlabelled_used"] for method in report["methods"].values()]
    assert used == [0, 0, *4 * [report["unlabelled"]]]


def test_label_spreading_along_edges_classifies_new_images(compare, tmp_path):
    line = options(num_examples=-1, supervised=100, validation=100)
    code, out, err = compare(*line, "--seeds", "3", "--methods", "spreading-edges", "spreading-knn",
                             "--save", "all.json")
    assert code == 0, err
    edges, pixels = json.loads((tmp_path / "all.json").read_text())["methods"].values()
    assert edges["mean_test_error"] < 3 < pixels["mean_test_error"]
    assert edges["mean_validation_error"] < 5 and edges["runs"][0]["settings_tried"] == 0
    assert "     fixed\n" in out and edges["grid"] is None


def test_points_leave_out_what_is_for_images(compare):
    code, out, err = compare("--config", str(PROJECT / "configs" / "moons.yaml"), "--seeds", "0",
                             "--methods", "knn1", "spreading-knn", "fixmatch")
    assert code == 0 and "fixmatch is left out: it is for images" in err
    assert "1-nearest neighbour" in out and "FixMatch" not in out


@pytest.mark.parametrize("argv, message", [
    (["--methods", "svmm"], "svmm"),
    (["--seeds", "-1"], "--seed"),
    (["--save", "nowhere/all.json"], "nowhere"),
    (["--sup_wieght", "2"], "did you mean --sup_weight?"),
    ([*options(data="moons", model="toy"), "--methods", "m1m2", "fixmatch"], "none of the methods"),
    (options(supervised=0), "none of the methods"),
])
def test_bad_input_is_one_line(argv, message, compare, tmp_path):
    code, _, err = compare(*argv)
    lines = [line for line in err.splitlines() if "is left out" not in line]
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.glob("*.json"))


def assert_is_picture(path):
    with Image.open(path) as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(2**20)) > 10


def test_the_picture_of_recipes_against_minutes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        assert run_script(options(epochs=3, num_examples=200, validation=100, seed=seed,
                                  ema=0.5, log_each=1)) == 0
    assert run_script(options(epochs=1, num_examples=200)) == 0
    first, second, tested = runs(tmp_path)
    rows = read_metrics(first / "metrics.csv")
    minutes = min(row["seconds"] for row in rows) / 60
    curve = progress.progress(first, "validation")
    assert curve["minutes"] == pytest.approx([minutes, 2 * minutes, 3 * minutes])
    for row, error, bits in zip(rows, curve["error"], curve["bits"]):
        better = "ema_val" if row["ema_val_log_p"] > row["val_log_p"] else "val"
        assert error == pytest.approx(100 * (1 - row[f"{better}_acc"]))
        assert bits == row[f"{better}_bpd"]
    assert progress.progress(first, "validation", 30)["minutes"] == [0.5, 1, 1.5]
    stages = [progress.progress(tested, "test", s) for s in (30, 60)]
    progress.chain(stages)
    assert stages[0]["minutes"] == [0.5] and stages[1]["minutes"] == [0.5, 1.5]
    error = 100 * (1 - read_metrics(tested / "metrics.csv")[0]["test_acc"])
    assert stages[1]["error"] == pytest.approx([error, error])
    first, second, tested = map(str, (first, second, tested))
    for argv in (["--runs", "one", first, "--runs", "two", second, first, "--paper", "10", "2"],
                 ["--test", "--chain", "--runs", "first", tested, "--runs", "second", tested]):
        progress.main([*argv, "--save", "progress.png"])
        assert_is_picture(tmp_path / "progress.png")
    for argv, message in ((["--runs", "label", tested], "evaluated on validation images"),
                          (["--runs", "label", "."], "evaluated on validation images"),
                          (["--test", "--runs", "label", first], "evaluated on test images"),
                          (["--chain", "--runs", "a", first, second], "label and one RUN_DIR,"),
                          (["--runs", "label"], "a label and one RUN_DIR or more"),
                          (["--runs", "one", first, "--epoch_seconds", "3", "4"], "needs 1 pos"),
                          (["--runs", "one", first, "--epoch_seconds", "0"], "needs 1 pos")):
        with pytest.raises(BadInput, match=message):
            progress.main([*argv, "--save", "none.png"])
    assert not (tmp_path / "none.png").exists()
