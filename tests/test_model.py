"""The semi-conditional flow as a density: log_joint, posterior, samples, initialisation."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, execute, randomize
from torch.nn import functional as F

from models import SemiConditionalFlow, build_model, h_phi
from models.bijections import ActNorm
from models.checks import check_values
from models.scnf import DiagonalGaussian
from training.speed import Accelerated

SMALL = {"model": "digits-masked", "ssl_dim": 16, "ssl_l": 2, "ssl_k": 2, "ssl_hd": 16}
TOY = {"model": "toy", "l": 3, "ssl_dim": -1, "ssl_l": 1, "ssl_k": 2, "ssl_hd": 16}


def small(scale=1.0, **changes):
    return randomize(build_model({**SMALL, **changes}, (1, 8, 8), 10), scale=scale)


@pytest.mark.parametrize("ssl_model", ["cond-flow", "cond-shift", "cond-gmm"])
@pytest.mark.parametrize("conv", ["full", "qr", "qr-abs", "hh"])
def test_log_joint_and_posterior_are_the_equation_class_by_class(float64, ssl_model, conv):
    probs = torch.arange(1.0, 11)
    settings = {**SMALL, "ssl_model": ssl_model, "conv": conv, "ssl_conv": conv}
    model = randomize(build_model(settings, (1, 8, 8), 10, probs))
    x = torch.rand(4, 1, 8, 8)
    z, ldj = model.encode(x)
    z_aux, z_f = z[:, :-16], z[:, -16:]

    def log_normal(v, base):
        return torch.distributions.Normal(0, F.softplus(base.logsigma)).log_prob(v).sum(1)
    for y in range(10):
        z_h, ldj_h = model.h_phi(z_f, torch.full((4,), y))
        expected = (ldj + log_normal(z_aux, model.base_aux) + ldj_h + log_normal(z_h, model.base_h)
                    + math.log(probs[y] / probs.sum()))
        torch.testing.assert_close(model.log_joint(x)[:, y], expected)
    torch.testing.assert_close(model.log_prob(x), model.log_joint(x).exp().sum(1).log())
    posterior = model.posterior(x)          # from h_phi alone
    torch.testing.assert_close(posterior, model.log_joint(x).softmax(1))
    assert (posterior - probs / probs.sum()).std(1).min() > 1e-6            # it is not the prior


def test_many_classes_a_few_at_a_time(float64, monkeypatch):
    """The same numbers and gradients as all at once."""
    model = randomize(build_model(SMALL, (1, 8, 8), 30))
    x = torch.rand(4, 1, 8, 8)

    def value_and_gradient():
        value = model.log_prob(x)
        return value, *torch.autograd.grad(value.sum(), list(model.parameters()))
    passes = []
    model.h_phi.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    expected = value_and_gradient()
    assert passes == [120]
    monkeypatch.setattr(h_phi, "MOST_ROWS", 50)
    torch.testing.assert_close(value_and_gradient(), expected)
    assert passes[:4] == [120, 48, 48, 24] and sum(passes) == 360      # again, for the gradient
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(x), expected[0])
    new = build_model(SMALL, (1, 8, 8), 30)
    new.h_phi.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    new.initialize(x)
    assert passes[-1] == 120            # the ActNorms see all classes at once


def test_mixtures_keep_the_precision():
    """In float32, of latents far from the means and near them; also where float32 overflows."""
    torch.manual_seed(0)
    mu, sigma = torch.randn(5, 196), torch.rand(5, 196) + 0.01
    for scale in (0, 1, 1e4):
        z = mu[:3] + scale * torch.randn(3, 196)
        exact = torch.distributions.Normal(mu.double(), sigma.double()).log_prob(
            z.double()[:, None]).sum(2)
        torch.testing.assert_close(h_phi.log_gaussians(z, mu, sigma).double(), exact, rtol=2e-7,
                                   atol=1e-5)
    z[0, 0], z[1, 0] = torch.inf, torch.nan
    found = h_phi.log_gaussians(z, mu, sigma)
    assert (found[0] == -torch.inf).all() and found[1].isnan().all() and found[2].isfinite().all()


def test_one_pass_of_f_w_for_a_batch():
    model, passes = small(), []
    model.f_w.register_forward_hook(lambda *_: passes.append(1))
    model.log_joint(torch.rand(4, 1, 8, 8))
    assert len(passes) == 1


def on_grid(log_density):
    """A log-density of points (N, 2, 1, 1) on a grid over the part of the plane that has the mass,
    and the area of a cell."""
    side = torch.linspace(-16, 16, 513)
    points = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(-1, 2, 1, 1)
    values = torch.cat([log_density(part) for part in points.split(20_000)])
    return values, (side[1] - side[0]) ** 2


@torch.no_grad()
def test_density_of_points_integrates_to_one(float64):
    torch.manual_seed(0)
    model = randomize(build_model(TOY, (2, 1, 1), 2, [0.3, 0.7]))
    log_p, area = on_grid(model.log_prob)
    assert float(log_p.exp().sum() * area) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("ssl_model", ["cond-flow", "cond-shift", "cond-gmm"])
@torch.no_grad()
def test_samples_follow_the_density(float64, ssl_model):
    """The mean of log p(x | y) over samples is its integral on a grid, up to Monte Carlo error."""
    torch.manual_seed(0)
    model = randomize(build_model({**TOY, "ssl_model": ssl_model}, (2, 1, 1), 2))

    def log_p_of_class_1(x):
        return model.log_joint(x)[:, 1] + math.log(2)
    log_p, area = on_grid(log_p_of_class_1)
    n = 20_000
    of_sample = log_p_of_class_1(model.sample(torch.ones(n, dtype=torch.long)))
    difference = of_sample.mean() - (log_p.exp() * log_p).sum() * area
    assert abs(difference) < 5 * of_sample.std() / n ** 0.5


def test_samples_are_clamped_images_and_noise_fixes_them():
    model = small(scale=0.3)
    y = torch.arange(10)
    eps = torch.randn(1, 64).expand(10, -1)
    x = model.sample(y, eps)
    assert x.shape == (10, 1, 8, 8) and x.dtype == torch.float32
    model.image = False
    as_they_are = model.sample(y, eps)      # the inverse of the logit has values in [-0.026, 1.026]
    model.image = True
    assert as_they_are.min() < 0 and as_they_are.max() > 1
    assert torch.equal(x, as_they_are.clamp(0, 1)) and x.min() == 0 and x.max() == 1
    assert torch.equal(x, model.sample(y, eps))
    assert not torch.equal(x[0], x[1])                          # the same noise, another class
    assert not torch.equal(model.sample(y), model.sample(y))


@pytest.mark.parametrize("ssl_model", ["cond-flow", "cond-shift", "cond-gmm"])
def test_sample_is_the_inverse_of_the_density_s_path(float64, ssl_model):
    model = small(scale=0.3, ssl_model=ssl_model)
    model.image = False                                         # samples are not clamped
    y, eps = torch.arange(10), 0.3 * torch.randn(10, 64)
    z_aux, z_f = model.split_latent(model.encode(model.sample(y, eps))[0])
    torch.testing.assert_close(z_aux, eps[:, :48] * model.base_aux.sigma)
    torch.testing.assert_close(model.h_phi(z_f, y)[0], eps[:, 48:] * model.base_h.sigma)


def test_float32_agrees_with_float64():
    torch.manual_seed(0)
    model = build_model(SMALL, (1, 8, 8), 10)
    x = torch.rand(32, 1, 8, 8)
    model.initialize(x)
    log_p = model.log_prob(x)
    assert log_p.dtype == torch.float32
    in_float64 = model.double().log_prob(x.double())
    torch.testing.assert_close(log_p.double(), in_float64, rtol=1e-5, atol=1e-3)


def test_initialize_normalises_what_every_actnorm_sees(float64):
    """In the order of the forward pass; those of h_phi see every sample with every label."""
    model, x = build_model(SMALL, (1, 8, 8), 10), torch.rand(64, 1, 8, 8)
    names = {m: name for name, m in model.named_modules() if isinstance(m, ActNorm)}
    inputs, outputs = {}, {}

    def record(act, args, out):
        out = out[0] if isinstance(out, tuple) else out
        for values, of in ((args[0], inputs), (out, outputs)):  # (C, values); a ReLU changes `out`
            of[act] = values.detach().clone().transpose(0, 1).flatten(1)
    for act in names:
        act.register_forward_hook(record)
    assert not any(act.initialized for act in names)
    model.initialize(x)
    assert all(act.initialized for act in names)
    model.log_joint(x)                      # with all of them initialised
    assert set(inputs) == set(names)
    for act, values in inputs.items():
        torch.testing.assert_close(act.bias.detach(), values.mean(1), msg=names[act])
        scale = 1 / (values.std(1) + 1e-6)
        torch.testing.assert_close(act.logs.detach().exp(), scale, msg=names[act])
        zeros, ones = torch.zeros(len(values)), torch.ones(len(values))
        torch.testing.assert_close(outputs[act].mean(1), zeros, rtol=0, atol=1e-7)
        torch.testing.assert_close(outputs[act].std(1), ones, rtol=0, atol=1e-2)
        if names[act].startswith("h_phi"):
            assert values.shape[1] == 64 * 10


def test_initialize_sets_every_actnorm_once():
    model = build_model(SMALL, (1, 8, 8), 10)
    model.initialize(torch.rand(64, 1, 8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.initialize(torch.rand(64, 1, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = build_model(SMALL, (1, 8, 8), 10)
    again.load_state_dict(before)
    assert all(m.initialized for m in again.modules() if isinstance(m, ActNorm))


@pytest.mark.parametrize("x", [torch.rand(n, 1, 8, 8)[:1].expand(m, -1, -1, -1)
                               for n, m in ((1, 1), (1, 64), (0, 0))])
def test_initialize_needs_two_different_examples(x):
    """h_phi sees each of them with every label: many rows, all equal."""
    model = build_model(SMALL, (1, 8, 8), 10)
    with pytest.raises(ValueError, match=f"two different examples at least, not from {len(x)}"):
        model.initialize(x)
    assert not any(m.initialized for m in model.modules() if isinstance(m, ActNorm))
    model.initialize(torch.rand(2, 1, 8, 8))
    assert model.log_prob(torch.rand(4, 1, 8, 8)).isfinite().all()


MODELS = {"logit": (SMALL, (1, 8, 8)), "marginal": ({**SMALL, "pixels": "marginal"}, (1, 8, 8)),
          "pyramid": ({**SMALL, "model": "pyramid"}, (1, 8, 8)), "points": (TOY, (2, 1, 1))}
OF_X = ("encode", "log_joint", "log_prob", "posterior", "logits", "initialize")


def model_of(kind):
    settings, shape = MODELS[kind]
    return build_model(settings, shape, 10, grey_levels=17).eval(), torch.rand(4, *shape)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", OF_X)
def test_x_of_another_kind(kind, method):
    model, x = model_of(kind)
    c, h, w = model.data_shape
    shape = r"and must have shape .B, " + f"{c}, {h}, {w}"
    wrong = [(x.expand(-1, 3 * c, -1, -1) if c == 1 else torch.rand(4, 3, 1, 1), shape),
             (torch.rand(4, c, h, w + 4), shape), (torch.rand(4, c, h + 4, w), shape),
             (x[0], shape), (x.flatten(1), shape), (x.tolist(), "x is a list, and must be a"),
             (x.numpy(), "x is a ndarray, and must be a tensor"),
             (x.double(), "is of type torch.float64, and"),
             ((16 * x).to(torch.uint8), "is of type torch.uint8, and must be of torch.float32"),
             (torch.where(x > 0.5, torch.nan, x), r"x has values that are NaN, \d+ of \d+, and"),
             (torch.where(x > 0.5, torch.inf, x), "to inf, and must be")]
    if model.image:
        wrong += [(255 * x, r"and must be in \[0, 1\]"),
                  ((x - 0.13) / 0.31, r"x has values from -0\.\d+ to [12]\.\d+, and must be in")]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(bad)


@pytest.mark.parametrize("kind", MODELS)
def test_latents_and_noise_of_another_kind(kind):
    model, x = model_of(kind)
    z, y = model.encode(x)[0], torch.arange(4)
    for call in (model.decode, model.split_latent, lambda z: model.sample(y, z)):
        for bad in (z[:, :-1], z[0], x):
            with pytest.raises(ValueError, match=f"and must have shape .B, {model.dim}"):
                call(bad)
    for call in (model.decode, lambda z: model.sample(y, z)):
        for bad, message in ((z.double(), "float64"), (z / 0, "and must be finite")):
            with pytest.raises(ValueError, match=message):
                call(bad)
    with pytest.raises(ValueError, match=f"z_f has shape .*must have shape .B, {model.ssl_dim}"):
        model.log_zf_joint(z[:, :1])
    for call in (model.split_latent, lambda z: model.log_zf_joint(model.split_latent(z)[1])):
        with pytest.raises(ValueError, match=r"is of type torch.int64, and must be of"):
            call(z.long())
    none = torch.arange(0)
    assert model.decode(z[:0]).shape == model.sample(none).shape == (0, *model.data_shape)
    assert model.log_joint(x[:0]).shape == (0, 10)


def test_images_that_are_not_dequantised_are_warned_of():
    model, x = model_of("marginal")
    for bad in (torch.zeros(2, 1, 8, 8), (x > 0.9).float(), (x - 0.6).clamp(min=0)):
        with pytest.warns(UserWarning, match="most values of x are 0 or 1: log p"):
            model.log_prob(bad)
    model.log_prob(torch.where(x < 0.3, 0.0, x))        # a warning would be an error


def test_warnings_of_the_project_are_errors(tmp_path):
    """In the tests, and in the commands that they start."""
    with pytest.raises(UserWarning, match="most values of x are 0 or 1"):
        check_values("x", torch.zeros(2), torch.ones(2), is_image=True)
    code = ("import torch; from models.checks import check_values\n"
            "check_values('x', torch.zeros(2), torch.ones(2), is_image=True)")
    done = execute(tmp_path, [sys.executable, "-c", code], PYTHONPATH=str(PROJECT))
    assert done.returncode == 1 and "UserWarning: most values of x are 0 or 1" in done.stderr


@pytest.mark.parametrize("ssl_model", ["cond-flow", "cond-shift", "cond-gmm"])
def test_labels_that_the_model_does_not_have(ssl_model):
    model = small(ssl_model=ssl_model)
    z_f = torch.randn(2, 16)
    for y, message in (
            (torch.tensor([0, 10]), "labels are from 0 to 10, and must be from 0 to 9"),
            (torch.tensor([-1, 3]), "labels are from -1 to 3"),
            ([0, 1], "y is a list, and must be a tensor"),
            (torch.tensor([0.0, 1.0]), "must be integers"), (torch.tensor([True, False]), "bool"),
            (torch.eye(10, dtype=torch.long)[:2], "must be integers of shape .B,")):
        for call in (model.sample, lambda y: model.h_phi(z_f, y),
                     lambda y: model.h_phi.inverse(z_f, y)):
            with pytest.raises(ValueError, match=message):
                call(y)
    assert model.sample(torch.tensor([0, 9], dtype=torch.int32)).shape == (2, 1, 8, 8)
    y = torch.tensor([3])
    for call in (lambda: model.sample(y, torch.randn(4, 64)), lambda: model.h_phi(z_f, y),
                 lambda: model.h_phi.inverse(z_f, y)):
        with pytest.raises(ValueError, match=r"there are 1 labels for \d rows"):
            call()
    for call in (model.h_phi, model.h_phi.inverse):
        with pytest.raises(ValueError, match=r"has shape .2, 1., and must have shape .B, 16."):
            call(z_f[:, :1], torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", MODELS)
def test_wrong_arguments_are_refused_by_compiled_methods(kind):
    model, x = model_of(kind)
    for method, argument, wrong in (
            ("log_prob", x, (x / 0, torch.rand(4, 3, 8, 8), x.double())),
            ("sample", torch.arange(4), (torch.tensor([10]), torch.tensor([0.5])))):
        compiled = torch.compile(getattr(model, method), backend="eager")
        for bad in wrong:
            with pytest.raises(ValueError, match=r"and must (be|have)"):
                compiled(bad)
        assert compiled(argument).shape[0] == 4
    torch._dynamo.reset()
    if kind in ("logit", "points"):     # those of the paper
        model.checks_values = False
        whole = torch.compile(model.log_prob, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(x), model.log_prob(x))


def test_values_are_not_checked_in_training():
    model = small()
    x = torch.rand(4, 1, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    assert Accelerated(model).log_joint(x).isnan().any()
    for checks in (True, False):
        model.checks_values = checks
        with pytest.raises(ValueError, match="x has shape"):
            Accelerated(model).log_joint(torch.rand(4, 3, 8, 8))
        assert model.checks_values == checks


def test_more_than_ten_classes_start_apart(float64):
    """Up to ten classes start at one-hot rows, as published."""
    for k in (7, 10, 12):
        embedding = build_model(SMALL, (1, 8, 8), k).h_phi.embedding.weight.detach()
        assert torch.equal(embedding[:10], torch.eye(k, 10)[:10])
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(k))
        assert torch.cdist(embedding, embedding).add(3 * torch.eye(k)).min() > 0.2
    model = randomize(build_model(SMALL, (1, 8, 8), 12), scale=0.3)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(Accelerated(model).log_joint(x), model.log_joint(x))
    assert model.posterior(x).shape == (4, 12) and model.sample(torch.arange(12)).shape[0] == 12


def test_paper_model_has_the_paper_s_size():
    model = build_model({}, (1, 28, 28), 10)
    f_w, h_phi = (sum(p.numel() for p in part.parameters()) for part in (model.f_w, model.h_phi))
    assert round(f_w / 1e6, 2) == 6.30 and round(h_phi / 1e6, 2) == 9.57
    assert model.split_latent(torch.zeros(1, 784))[1].shape == (1, 196)


def test_base_starts_at_softplus_of_zero():
    base = DiagonalGaussian(3)
    expected = torch.distributions.Normal(0, math.log(2)).log_prob(torch.ones(2, 3)).sum(1)
    torch.testing.assert_close(base.log_prob(torch.ones(2, 3)), expected)


def test_settings_may_be_a_mapping_or_a_namespace():
    states = []
    for settings in (SMALL, SimpleNamespace(**SMALL, seed=1)):
        torch.manual_seed(0)
        model = build_model(settings, (1, 8, 8), n_classes=10)
        assert isinstance(model, SemiConditionalFlow)
        states.append(model.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize("changes, shape, message", [
    ({"ssl_dim": 66}, (1, 8, 8), "ssl_dim"), ({"ssl_dim": 15}, (1, 8, 8), "even"),
    ({"ssl_dim": 2, "ssl_l": 2}, (1, 8, 8), "ssl_l"), ({"ssl_dim": 0}, (1, 8, 8), "ssl_dim"),
    ({"model": "toy"}, (1, 8, 8), "toy"), ({}, (2, 1, 1), "sides"),
    ({}, (1, 10, 10), "multiples of 4"), ({"conv": "lu"}, (1, 8, 8), "conv: invalid choice"),
    ({"ssl_k": 0}, (1, 8, 8), "ssl_k"),
    ({"position_bias": "false"}, (1, 8, 8), "position_bias: must be of type bool, not 'false'"),
    ({"ssl_k": 1.5}, (1, 8, 8), "ssl_k: must be of type int, not 1.5"),
    ({"ssl_l": True}, (1, 8, 8), "ssl_l: must be of type int, not True"),
    ({"ssl_std": "1"}, (1, 8, 8), "ssl_std: must be of type float, not '1'"),
    ({}, (8, 8), r"data_shape must be .C, H, W., not .8, 8."),
    ({}, (1, 0, 8), "a side of data_shape must be at least 1"),
])
def test_settings_that_do_not_fit(changes, shape, message):
    with pytest.raises(ValueError, match=message):
        build_model({**SMALL, **changes}, shape, 10)


@pytest.mark.parametrize("n_classes, grey_levels, message", [
    (0, 17, "n_classes must be at least 1"), (2.0, 17, "n_classes must be of type int"),
    (10, 1, "grey_levels must be at least 2"), (10, 17.0, "grey_levels must be of type int")])
def test_numbers_of_classes_and_grey_levels_that_do_not_fit(n_classes, grey_levels, message):
    with pytest.raises(ValueError, match=message):
        build_model(SMALL, (1, 8, 8), n_classes, grey_levels=grey_levels)


@pytest.mark.parametrize("probs", [[0.5] * 3, [0.0] + [0.1] * 9, [math.inf] + [0.1] * 9,
                                   [1e308] * 10])
def test_class_probs_that_do_not_fit(probs):
    with pytest.raises(ValueError, match="class_probs"):
        build_model(SMALL, (1, 8, 8), 10, probs)


def test_pixels_marginal_needs_the_grey_levels_and_the_training_images():
    settings = {**SMALL, "pixels": "marginal"}
    with pytest.raises(ValueError, match="needs the number of grey levels"):
        build_model(settings, (1, 8, 8), 10)
    model = build_model(settings, (1, 8, 8), 10, grey_levels=17)
    x = torch.rand(64, 1, 8, 8)
    with pytest.raises(ValueError, match="fitted to the training images"):
        model.initialize(x)
    images = (17 * x).to(torch.uint8)
    model.initialize(x, images)
    again = build_model(settings, (1, 8, 8), 10, grey_levels=17)
    again.load_state_dict(model.state_dict())               # the marginals are among the weights
    again.initialize(x, 16 - images)                        # which are not fitted again
    assert torch.equal(again.log_joint(x), model.log_joint(x))
    assert not torch.allclose(again.encode(x)[0], build_model(
        settings, (1, 8, 8), 10, grey_levels=17).encode(x)[0])
    samples = again.sample(torch.arange(10))
    assert samples.min() >= 0 and samples.max() <= 1
