"""Bijections and flows: exact inverse, log-determinant of the true Jacobian, in float64."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load_tiny, randomize
from torch.nn import functional as F

from models import build_model
from models.bijections import (
    ActNorm,
    ChannelCoupling,
    CheckerboardCoupling,
    MultiScale,
    Split,
    Squeeze,
    split_size,
)
from models.checks import check_bijection
from models.conv1x1 import CONVS, invertible_conv
from models.marginal import EVEN_SHARE, LARGEST_SHARE, PSEUDO_COUNTS, MarginalGaussian
from models.networks import PointNetwork, resnet1x1, resnet3x3
from models.pixels import Logit
from models.pyramid import ConditionalPixels, ImageNetwork, SplitCoupling

B = 3
NORMAL = torch.distributions.Normal(0.0, 1.0)


@pytest.fixture(autouse=True)
def seeded(float64):
    torch.manual_seed(0)


def channel_coupling(network, c):
    return ChannelCoupling(network(c // 2, c, 8), network(c // 2, c, 8))


def multi_scale():
    return MultiScale((2, 4, 4), [Squeeze(), ActNorm(8), Split(), invertible_conv("full", 4, 2)])


def f_w(shape, **changes):
    settings = {"ssl_dim": -1, "l": 3, "ssl_model": "cond-shift", **changes}
    return build_model(settings, shape, 2, grey_levels=17).f_w


def conditional_flow_step():
    networks = (resnet1x1(3 + 10, 6, 8, 2) for _ in range(2))
    layers = ActNorm(6), invertible_conv("qr", 6, 2), ChannelCoupling(*networks)
    return MultiScale((6,), [torch.nn.Sequential(*layers)])


def alone(make, shape):
    """Makes a flow of one affine layer, which has its log-determinant there."""
    return lambda: MultiScale(shape, [make()])


def h_phi(**settings):
    return build_model({"model": "digits-masked", "ssl_dim": 6, **settings}, (1, 8, 8), 4).h_phi


def grey_images(n, shape, levels):
    """n images, two thirds of whose values are black; one pixel always is."""
    images = torch.randint(levels, (n, *shape))
    images[torch.rand(images.shape) < 2 / 3] = 0
    images[:, 0, 0, 0] = 0
    return images


def marginal_gaussian(shape=(2, 4, 4), levels=17):
    f = MarginalGaussian(shape, levels)
    f.fit(grey_images(50, shape, levels))
    return f


def conditional_pixels(shape=(1, 8, 8), levels=17, n_bins=6):
    def network(c_in, c_out, size):
        return resnet3x3(c_in, c_out, 8, 1, "zeros", size)
    f = ConditionalPixels(shape, levels, n_bins, network,
                          lambda c_in, size, n: ImageNetwork(c_in, size, n, 16, 1),
                          lambda n, n_out: resnet1x1(n, n_out, 8, 1), n_maps=2)
    f.fit(grey_images(50, shape, levels))
    return f


BIJECTIONS = {
    # name: (how to make it, shape of x)
    "logit": (Logit, (2, 4, 4)),
    "marginal": (marginal_gaussian, (2, 4, 4)),
    "conditional pixels": (conditional_pixels, (1, 8, 8)),
    "conditional pixels, oblong": (partial(conditional_pixels, (1, 4, 8)), (1, 4, 8)),
    "squeeze": (Squeeze, (3, 4, 6)),
    "actnorm": (alone(lambda: ActNorm(4), (4, 2, 3)), (4, 2, 3)),
    "actnorm of vectors": (alone(lambda: ActNorm(6), (6,)), (6,)),
    "checkerboard 0": (lambda: CheckerboardCoupling(resnet3x3(2, 4, 8, 2), (4, 4), 0), (2, 4, 4)),
    "checkerboard 1": (lambda: CheckerboardCoupling(resnet3x3(1, 2, 8, 2), (4, 6), 1), (1, 4, 6)),
    "channel": (partial(channel_coupling, partial(resnet3x3, n_blocks=2), 4), (4, 3, 3)),
    "channel of points": (partial(channel_coupling, PointNetwork, 2), (2, 1, 1)),
    **{f"conv {kind}": (alone(partial(invertible_conv, kind, 4, 3), (4, 2, 3)), (4, 2, 3))
       for kind in CONVS},
    **{f"conv {kind} of vectors": (alone(partial(invertible_conv, kind, 6, 2), (6,)), (6,))
       for kind in CONVS},
    "split coupling": (lambda: SplitCoupling(resnet1x1(2, 8, 8, 1), 2), (6,)),
    "multi-scale": (multi_scale, (2, 4, 4)),
    **{f"f_w {model}, {conv}": (partial(f_w, shape, model=model, conv=conv), shape)
       for model, shape in (("toy", (2, 1, 1)), ("digits-masked", (1, 8, 8))) for conv in CONVS},
    "f_w pyramid": (partial(f_w, (1, 8, 8), model="pyramid", width=8, n_blocks=1, ssl_dim=16),
                    (1, 8, 8)),
}
CONDITIONAL = {
    # name: (how to make it, type of the context: an embedding, or labels)
    "conditional flow step": (conditional_flow_step, torch.float64),
    **{f"h_phi cond-flow, {conv}": (
        partial(h_phi, ssl_l=2, ssl_k=2, ssl_hd=8, ssl_conv=conv), torch.long) for conv in CONVS},
    "h_phi cond-shift": (partial(h_phi, ssl_model="cond-shift"), torch.long),
    "h_phi cond-gmm": (partial(h_phi, ssl_model="cond-gmm"), torch.long),
}


class Wrong(torch.nn.Module):
    """z = 2 x of two dimensions, with a fault."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x):
        self.x = x
        ldj = x.new_full(x.shape[:1], 2 * math.log(2))
        z = 2 * x.roll(1, 0) if self.fault == "batch" else 2 * x
        return z, {"sign": -ldj, "NaN": ldj * math.nan, "mean": ldj.mean()}.get(self.fault, ldj)

    def inverse(self, z):
        if self.fault == "batch":
            return z.roll(-1, 0) / 2
        return {"state": self.x, "inverse": z / 2.1}.get(self.fault, z / 2)


@pytest.mark.parametrize("fault, message", [
    ("sign", "ldj is not that"), ("NaN", "ldj is not that"), ("mean", "ldj is not a tensor of"),
    ("inverse", "inverse.forward.x.. is not x"), ("state", "of one example is not its x"),
    ("batch", "of one example is not its")])
def test_the_check_finds_faults(fault, message):
    check_bijection(Wrong(""), torch.rand(B, 2))
    with pytest.raises(AssertionError, match=message):
        check_bijection(Wrong(fault), torch.rand(B, 2))
    with pytest.raises(ValueError, match="one or more examples in double precision"):
        check_bijection(Wrong(""), torch.rand(B, 2).float())


@pytest.mark.parametrize("make, shape", BIJECTIONS.values(), ids=BIJECTIONS)
def test_bijection(make, shape):
    check_bijection(randomize(make()), torch.rand(B, *shape))


@pytest.mark.parametrize("make, kind", CONDITIONAL.values(), ids=CONDITIONAL)
def test_conditional_bijection(make, kind):
    context = torch.randn(B, 10) if kind.is_floating_point else torch.tensor([0, 3, 1])
    f = randomize(make())
    x = torch.randn(B, 6)
    check_bijection(f, x, context)
    assert not torch.allclose(f(x, context)[0], f(x, context.flip(0))[0])    # the label matters


def test_paper_flow_inverts():
    f_w = randomize(build_model({}, (1, 28, 28), 10).f_w)
    x = torch.rand(2, 1, 28, 28)
    z, _ = f_w(x)
    assert z.shape == (2, 784)
    assert (f_w.inverse(z) - x).abs().max() < 1e-10


def test_inverse_needs_no_forward_pass():
    f, equal = (randomize(f_w((1, 8, 8), model="digits-masked")) for _ in range(2))
    x = torch.rand(B, 1, 8, 8)
    assert (equal.inverse(f(x)[0]) - x).abs().max() < 1e-10


def test_squeeze_order():
    x = torch.arange(2 * 2 * 2.0).view(1, 2, 2, 2)                          # value 4 c + 2 dy + dx
    assert Squeeze()(x)[0].flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]   # (dy, dx, c)


def test_checkerboard_masks():
    first, second = (CheckerboardCoupling(None, (3, 4), parity).mask[0, 0] for parity in (0, 1))
    assert first.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert torch.equal(first + second, torch.ones(3, 4))


def test_split_sizes():
    assert [split_size(c) for c in (4, 8, 196, 98, 6, 2)] == [2, 4, 98, 50, 4, 2]


def test_logit_is_the_formula():
    z, _ = Logit()(torch.tensor([[0.0, 0.25, 1.0]]))
    squashed = [0.025, 0.25 * 0.95 + 0.025, 0.975]
    assert z[0].tolist() == pytest.approx([math.log(p / (1 - p)) for p in squashed])


def test_marginal_gaussian_is_the_formula():
    """The distribution function of each pixel, interpolated between its values at grey levels."""
    f, x = marginal_gaussian(), torch.rand(20, 2, 4, 4)
    z, ldj = f(x)
    total = torch.zeros(20)
    for j, p in enumerate(f.p):
        values, gaussian = x.flatten(1)[:, j], z.flatten(1)[:, j]
        edges = torch.cat((torch.zeros(1), p.cumsum(0)))
        cdf = torch.from_numpy(np.interp(values, torch.arange(18) / 17, edges))
        torch.testing.assert_close(gaussian, NORMAL.icdf(cdf))
        total += (17 * p[(17 * values).long()]).log() - NORMAL.log_prob(gaussian)
    torch.testing.assert_close(ldj, total)


def test_marginal_densities_integrate_to_one():
    """phi(z) dz/dx of every pixel: a midpoint rule is exact for a piecewise constant density."""
    f = marginal_gaussian((1, 1, 3), 5)
    x = (torch.arange(500) + 0.5) / 500
    for j in range(3):
        x_j_varies = torch.full((500, 1, 1, 3), 0.5)
        x_j_varies[:, 0, 0, j] = x
        z, ldj = f(x_j_varies)
        others = [k for k in range(3) if k != j]
        fixed = (5 * f.p[others, 2]).log().sum() - NORMAL.log_prob(z[:, 0, 0, others]).sum(1)
        log_density = ldj - fixed + NORMAL.log_prob(z[:, 0, 0, j])
        assert log_density.exp().mean() == pytest.approx(1, abs=1e-12)


def test_marginal_gaussian_is_fitted_to_the_images():
    images = grey_images(2000, (1, 2, 2), 4)
    f = MarginalGaussian((1, 2, 2), 4)
    assert torch.equal(f.p, torch.full((4, 4), 1 / 4))
    f.fit(images)
    assert f.p.sum(1).tolist() == pytest.approx([1] * 4, abs=1e-12)
    assert f.p[0, 0] == LARGEST_SHARE and f.p[0].min() > 0.001  # no level is impossible
    counts = torch.stack([(images.flatten(1) == v).sum(0) for v in range(4)], 1)
    of_all = counts[:, 1:].sum(0) + 1
    prior = (1 - EVEN_SHARE) * of_all / of_all.sum() + EVEN_SHARE / 3
    for p, n in zip(f.p[1:], counts[1:]):
        assert p[0] == pytest.approx((n[0] + 1) / 2002)
        others = (n[1:] + 2000 * PSEUDO_COUNTS * prior) / (n[1:].sum() + 2000 * PSEUDO_COUNTS)
        torch.testing.assert_close(p[1:], (1 - p[0]) * others)
    z, _ = f((images + torch.rand(images.shape)) / 4)
    values = z.flatten(1)[:, 1:]            # the first pixel's probabilities are those of the cap
    assert values.mean(0).abs().max() < 0.1 and (values.std(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("make, n, dtype, tolerance", [
    (partial(MarginalGaussian, grey_levels=256), 1000, torch.float32, 1e-4),
    (partial(MarginalGaussian, grey_levels=256), 1000, torch.float64, 1e-10),
    (partial(conditional_pixels, levels=256, n_bins=32), 100, torch.float32, 0.02),
    (partial(conditional_pixels, levels=256, n_bins=32), 100, torch.float64, 1e-9)])
def test_the_grey_levels_of_mnist_are_resolved(mnist_root, make, n, dtype, tolerance):
    data = load_tiny(data="mnist", data_root=str(mnist_root), num_examples=-1)
    f = randomize(make(data.shape), scale=0.5).to(dtype)
    f.fit(data.train_x)
    assert f.p.max() == torch.tensor(LARGEST_SHARE, dtype=dtype)
    x = ((data.test_x[:n] + torch.rand(n, *data.shape)) / 256).to(dtype)
    z, ldj = f(x)
    assert z.dtype == ldj.dtype == dtype and z.isfinite().all() and ldj.isfinite().all()
    assert 256 * (f.inverse(z) - x).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginal_gaussian_is_finite_at_the_edges_of_grey_levels(dtype):
    f = marginal_gaussian().to(dtype)
    for v in range(18):
        x = torch.full((1, 2, 4, 4), v / 17, dtype=dtype)
        z, ldj = f(x)
        assert z.isfinite().all() and ldj.isfinite() and z.abs().max() < 10
        assert 17 * (f.inverse(z) - x).abs().max() < 1e-4
    for z, edge in ((-50, 0), (50, 1)):
        assert (f.inverse(torch.full((1, 2, 4, 4), z, dtype=dtype)) == edge).all()


@pytest.mark.parametrize("value", [-1e-6, 1 + 1e-6, math.nan])
def test_marginal_gaussian_refuses_what_is_no_image(value):
    x = torch.rand(3, 2, 4, 4)
    x[1, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"values outside \[0, 1\]"):
        marginal_gaussian()(x)


def test_conditional_pixels_are_the_formula():
    """Each pixel's F_j by a sum over all grey levels, from the networks' output."""
    f, x = randomize(conditional_pixels()), torch.rand(20, 1, 8, 8)
    z, ldj = f(x)
    n = f.group_sizes
    assert n == [4, 4, 4, 4, 16, 16, 16] and sorted(f.order.tolist()) == list(range(64))
    logits, context = torch.zeros(20, 6, 64), f._context(z[:, -16:])
    *others, last = f.order.split(n)
    for group, pixels in enumerate(others):
        logits[:, :, pixels] = f._logits(x, group, context)
    logits[:, :, last] = f._last_logits(x)
    assert all(logits[..., pixels].std() > 0.05 for pixels in f.order.split(n))
    p = f.p / f.p.sum(1, keepdim=True) * logits[:, f.bin_of].transpose(1, 2).exp()  # (20, 64, 17)
    p = p / p.sum(2, keepdim=True)
    v = 17 * x.flatten(1)
    level = v.long()[..., None]
    cdf = ((p.cumsum(2) - p).gather(2, level) + p.gather(2, level) * (v[..., None] - level))[..., 0]
    expected = NORMAL.icdf(cdf)
    expected_ldj = ((17 * p.gather(2, level)[..., 0]).log() - NORMAL.log_prob(expected)).sum(1)
    expected = expected[:, f.order]
    expected[:, -16:] += f.shift_of(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(ldj, expected_ldj)
    torch.testing.assert_close(f.last_group(x)[0] + f.shift_of(x), expected[:, -16:])


def test_conditional_pixels_depend_on_coarser_ones_and_z_f_only():
    """The Jacobian of x, as a function of z."""
    f, z = randomize(conditional_pixels()), torch.randn(1, 64)
    jacobian = torch.autograd.functional.jacobian(f.inverse, z)[0, 0].flatten(0, 1)[f.order, 0]
    group = torch.repeat_interleave(torch.arange(7), torch.tensor(f.group_sizes))
    assert (jacobian.diagonal() != 0).all()
    for k in range(7):
        on_group = [jacobian[group == k][:, group == other] for other in range(7)]
        if k < 6:
            assert (on_group[k] == on_group[k].diagonal().diag()).all()
            assert (on_group[6] != 0).any(1).all()                              # each pixel on z_f
        assert not any(on_group[later].any() for later in range(k + 1, 6))
        assert all(on_group[earlier].any() for earlier in range(max(3 * ((k - 1) // 3), 0), k))
    x = f.inverse(z).detach()
    of_z_f = torch.autograd.functional.jacobian(lambda x: f.last_group(x)[0][0], x).flatten(1)
    on_last = of_z_f[:, f.order[-16:]]
    assert (on_last == on_last.diagonal().diag()).all() and (on_last.diagonal() != 0).all()


def test_bins_of_grey_levels():
    """Black has a bin of its own; the others have adjacent levels and about equal shares."""
    levels = 40
    images = torch.randint(levels, (500, 1, 8, 8))
    images[images % 3 == 0] = 25                # a third of the values
    f = conditional_pixels((1, 8, 8), levels, 9)
    f.fit(images)
    bins = f.bin_of
    assert bins[0] == 0 and (bins[1:] > 0).all() and (bins.diff() >= 0).all()
    assert sorted(set(bins.tolist())) == list(range(int(bins.max()) + 1)) and bins.max() <= 8
    share = torch.zeros(9).index_add_(0, bins, f.p.mean(0)) / f.p.mean(0)[1:].sum()
    assert (bins == bins[25]).sum() <= 3        # the frequent level has hardly any company
    others = [b for b in range(1, int(bins.max()) + 1) if b != bins[25]]
    assert all(share[b] < 2 / 8 for b in others)
    many = conditional_pixels((1, 8, 8), 5, 32)
    assert many.bin_of.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditional_pixels_are_finite_where_a_network_is_certain(dtype):
    """Also of what it deems impossible, with finite gradients."""
    f = conditional_pixels().to(dtype)
    for sign in (-1, 1):
        for net in f.networks:
            net.last.bias.data = sign * 60 * (torch.arange(6, dtype=dtype) - 2.5)
        for v in (0, 1e-9, 0.3, 1):
            z, ldj = f(torch.full((2, 1, 8, 8), v, dtype=dtype))
            assert z.isfinite().all() and ldj.isfinite().all()
            f.zero_grad()
            (ldj - z.square().sum(1) / 2).sum().backward()
            assert all(p.grad.isfinite().all() for p in f.networks.parameters())


def test_kept_pixels_are_exact_and_the_inverse_is_finite_where_scales_vanish():
    net = torch.nn.Module()
    coupling = CheckerboardCoupling(net, (4, 4), 0).float()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float32)
    mask = coupling.mask.bool().expand_as(x)
    for where in (coupling.mask, 1 - coupling.mask):        # s is 0 at these pixels
        raw = -200 * where.expand_as(x)
        net.forward = lambda kept, raw=raw: torch.cat((raw, kept + 0.1), 1)
        z, ldj = coupling(x)
        back = coupling.inverse(z)
        assert z.isfinite().all() and ldj.isfinite().all() and back.isfinite().all()
        assert torch.equal(back[mask], x[mask])
    net.forward = lambda kept: torch.cat((kept, kept + 0.1), 1)
    torch.testing.assert_close(coupling.inverse(coupling(x)[0]), x)


@pytest.mark.parametrize("make", [marginal_gaussian, conditional_pixels])
def test_edges_of_grey_levels_are_the_same_in_float32_and_float64(make):
    f = make()
    shape = f.shape if make is conditional_pixels else (2, 4, 4)
    levels = torch.randint(17 + 1, (20, *shape))            # 0 and 1, too
    x = (levels / 17).float()
    z, ldj = f.float()(x)
    z64, ldj64 = f.double()(x.double())
    torch.testing.assert_close(z.double(), z64, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(ldj.double(), ldj64, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("images, message", [
    (torch.rand(5, 2, 4, 4), "images must be integers, not of type torch.float"),
    (torch.rand(5, 2, 4, 4) > 0.5, "images must be integers, not of type torch.bool"),
    (torch.zeros(5, 4, 4, 2, dtype=torch.long), r"images has shape .* .B, 2, 4, 4."),
    (torch.zeros(0, 2, 4, 4, dtype=torch.long), "fitted to the training images: give them"),
    (torch.full((5, 2, 4, 4), 17), "images have grey levels from 17 to 17, and must"),
    (torch.full((5, 2, 4, 4), -1), "from -1 to -1")])
def test_images_that_marginals_cannot_be_fitted_to(images, message):
    with pytest.raises(ValueError, match=message):
        MarginalGaussian((2, 4, 4), 17).fit(images)


def test_a_flow_refuses_another_shape():
    flow = multi_scale()
    for x in (torch.rand(3, 4, 4, 4), torch.rand(3, 2, 8, 8), torch.rand(2, 4, 4)):
        with pytest.raises(ValueError, match=r"x has shape .* and must have shape .B, 2, 4, 4."):
            flow(x)
    with pytest.raises(ValueError, match=r"z has shape .3, 31., and must have shape .B, 32."):
        flow.inverse(torch.rand(3, 31))


def test_actnorm_initialisation():
    act, x = ActNorm(3), 5 + 2 * torch.randn(16, 3, 4, 4)
    assert torch.equal(act(x), x)
    act.initialize(x)
    z = act(x)
    values = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3))
    torch.testing.assert_close(values.std(1), torch.ones(3), rtol=1e-5, atol=0)
    assert act.initialized
    with pytest.raises(ValueError, match="at least two values"):
        ActNorm(3).initialize(torch.randn(1, 3))
    for bad, message in ((x / 0, "all of them finite"), (x[:, :1], "must have shape .B, 3, 4, 4")):
        with pytest.raises(ValueError, match=message):
            ActNorm(3).initialize(bad)
    constant = ActNorm(3)
    constant.initialize(torch.full((16, 3, 4, 4), 0.5))
    torch.testing.assert_close(constant.logs.detach().exp(), torch.full((3,), 1e6))
    assert not constant(torch.full((2, 3, 4, 4), 0.5)).any()


def test_convolutions_at_start():
    x = torch.randn(2, 4, 3, 3)
    for kind, log_det in (("full", 0), ("hh", 0), ("qr", 4 * math.log(math.log(2))), ("qr-abs", 0)):
        conv = invertible_conv(kind, 4, 2)
        z, ldj = MultiScale((4, 3, 3), [conv])(x)
        assert ldj.tolist() == pytest.approx([9 * log_det] * 2, abs=1e-12)
        w = conv.matrix()
        scale = math.log(2) if kind == "qr" else 1                          # softplus(0)
        torch.testing.assert_close(w @ w.T, torch.eye(4) * scale ** 2)
        assert torch.equal(z.view_as(x), x) == (kind == "full")


def weak(kind, size):
    """A convolution of 3 channels in float32 whose smallest value, a singular one of `full`, a
    diagonal one of R, or the length of a v, has the given size."""
    conv = randomize(invertible_conv(kind, 3, 2))
    with torch.no_grad():
        if kind == "full":
            conv.W.copy_(torch.arange(1.0, 10).view(3, 3) + size * torch.eye(3))    # rank 2
        elif kind == "hh":
            conv.v[1] *= size
        else:
            conv.s[1] = size if kind == "qr-abs" or not size else math.log(math.expm1(size))
            conv.s[1] -= 1e4 * (kind == "qr" and not size)
    return conv.float()


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9, 1e-21, 0])
def test_convolutions_that_are_almost_singular(kind, size):
    """In float32 the numbers are those of float64, or there are none: an error, or not finite."""
    conv, x = weak(kind, size), torch.randn(5, 3, dtype=torch.float32)
    exact = copy.deepcopy(conv).double()
    (z, log_det), (exact_z, exact_log_det) = ((f(v), f.log_dets([f.log_det_weights()[None]]))
                                              for f, v in ((conv, x), (exact, x.double())))
    if not log_det.isfinite().all() or not z.isfinite().all():
        assert size < {"full": 1e-5, "hh": 1e-9}.get(kind, 1e-40)
        with pytest.raises(ValueError, match="convolution of 3 channels has no inverse: W is sing"):
            conv.inverse(x)
        return
    torch.testing.assert_close(z, exact_z.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, exact_log_det.float(), rtol=1e-5, atol=1e-5)
    try:
        inverse = conv.inverse(z)
    except ValueError:
        assert size == 1e-21
        return
    torch.testing.assert_close(inverse, exact.inverse(z.double()).float(), rtol=1e-5, atol=1e-5)


def test_householder_product_order():
    conv = invertible_conv("hh", 3, 2)
    h1, h2 = (torch.eye(3) - 2 * torch.outer(v, v) / v.dot(v) for v in conv.v)
    torch.testing.assert_close(conv.matrix(), h1 @ h2)


def test_networks_start_at_zero_and_are_the_formula():
    net = resnet3x3(2, 4, 8, 2)
    x = torch.randn(2, 2, 5, 5)
    assert not net(x).any() and not resnet1x1(6, 4, 8, 2)(torch.randn(3, 6)).any()
    net = randomize(net)

    def conv(layer, h):
        return F.conv2d(F.pad(h, (1, 1, 1, 1), mode="reflect"), layer.weight, layer.bias)
    h = conv(net.first, x)
    for block in net.blocks:
        h = h + conv(block.layer2, F.relu(conv(block.layer1, F.relu(h))))
    h = F.relu((h - net.norm.bias[:, None, None]) * net.norm.logs.exp()[:, None, None])
    torch.testing.assert_close(net(x), conv(net.last, h))
