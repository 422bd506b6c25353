"""Every bijection, and every flow of them: exact inverse, log-det of the true Jacobian, in float64."""

import math

import pytest
import torch
from conftest import randomize
from torch.nn import functional as F

from models import build_model
from models.bijections import (ActNorm, ChannelCoupling, CheckerboardCoupling, ConditionalStep, Logit,
                               MultiScale, Squeeze, split_size)
from models.conv1x1 import CONVS, invertible_conv
from models.networks import _reflect_pad_by_slices, reflect_pad, resnet1x1, resnet3x3, toy_network

pytestmark = pytest.mark.usefixtures("float64")
B = 3

BIJECTIONS = {
    "logit": (Logit, (2, 4, 4)),
    "squeeze": (Squeeze, (3, 4, 6)),
    "actnorm": (lambda: ActNorm(4), (4, 2, 3)),
    "actnorm of vectors": (lambda: ActNorm(6), (6,)),
    "checkerboard 0": (lambda: CheckerboardCoupling(resnet3x3(2, 4, 8, 2), (4, 4), 0), (2, 4, 4)),
    "checkerboard 1": (lambda: CheckerboardCoupling(resnet3x3(1, 2, 8, 2), (4, 6), 1), (1, 4, 6)),
    "channel": (lambda: ChannelCoupling(resnet3x3(2, 4, 8, 2), resnet3x3(2, 4, 8, 2)), (4, 3, 3)),
    "channel of points": (lambda: ChannelCoupling(toy_network(1, 2, 8), toy_network(1, 2, 8)), (2, 1, 1)),
    **{f"conv {kind}": (lambda kind=kind: invertible_conv(kind, 4, 3), (4, 2, 3)) for kind in CONVS},
    **{f"conv {kind} of vectors": (lambda kind=kind: invertible_conv(kind, 6, 2), (6,)) for kind in CONVS},
    "multi-scale": (lambda: MultiScale([[Squeeze(), ActNorm(8)], [invertible_conv("full", 4, 2)]], (2, 4, 4)), (2, 4, 4)),
    **{f"f_w {model}, {conv}": (lambda model=model, conv=conv, shape=shape: build_model(
        {"model": model, "conv": conv, "ssl_dim": -1, "l": 3, "ssl_model": "cond-shift"}, shape, 2).f_w, shape)
       for model, shape in (("toy", (2, 1, 1)), ("digits-masked", (1, 8, 8))) for conv in CONVS},
}
CONDITIONAL = {
    "conditional step": (lambda: ConditionalStep(ActNorm(6), invertible_conv("qr", 6, 2), ChannelCoupling(
        resnet1x1(3 + 10, 6, 8, 2), resnet1x1(3 + 10, 6, 8, 2))), torch.float64),
    **{f"h_phi cond-flow, {conv}": (lambda conv=conv: build_model(
        {"model": "digits-masked", "ssl_dim": 6, "ssl_l": 2, "ssl_k": 2, "ssl_hd": 8, "ssl_conv": conv},
        (1, 8, 8), 4).h_phi, torch.long) for conv in CONVS},
    "h_phi cond-shift": (lambda: build_model(
        {"model": "digits-masked", "ssl_dim": 6, "ssl_model": "cond-shift"}, (1, 8, 8), 4).h_phi, torch.long),
}


def assert_bijection(f, x, *context):
    """inverse(forward(x)) = x, forward(inverse(z)) = z, and ldj is slogdet of the autograd Jacobian."""
    z, ldj = f(x, *context)
    assert ldj.shape == (B,)
    assert (f.inverse(z, *context) - x).abs().max() < 1e-10
    assert (f(f.inverse(z, *context), *context)[0] - z).abs().max() < 1e-9
    for i in range(B):
        own = tuple(c[i:i + 1] for c in context)
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v, *own)[0], x[i:i + 1])
        expected = torch.linalg.slogdet(jacobian.view(x[i].numel(), -1)).logabsdet
        torch.testing.assert_close(ldj[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_bijection(name):
    torch.manual_seed(0)
    make, shape = BIJECTIONS[name]
    assert_bijection(randomize(make()), torch.rand(B, *shape))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_bijection(name):
    torch.manual_seed(0)
    make, kind = CONDITIONAL[name]
    context = torch.randn(B, 10) if kind.is_floating_point else torch.tensor([0, 3, 1])
    f = randomize(make())
    x = torch.randn(B, 6)
    assert_bijection(f, x, context)
    assert not torch.allclose(f(x, context)[0], f(x, context.flip(0))[0])     # the label matters


def test_paper_flow_inverts():
    torch.manual_seed(0)
    f_w = randomize(build_model({}, (1, 28, 28), 10).f_w)
    x = torch.rand(2, 1, 28, 28)
    z, _ = f_w(x)
    assert z.shape == (2, 784)
    assert (f_w.inverse(z) - x).abs().max() < 1e-10


def test_inverse_needs_no_forward_pass():
    one, two = (randomize(build_model({"model": "digits-masked", "ssl_dim": 16}, (1, 8, 8), 10).f_w) for _ in range(2))
    x = torch.rand(B, 1, 8, 8)
    assert (two.inverse(one(x)[0]) - x).abs().max() < 1e-10


def test_squeeze_order():
    x = torch.arange(2 * 2 * 2.0).view(1, 2, 2, 2)                            # value 4 c + 2 dy + dx
    assert Squeeze()(x)[0].flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]     # (dy, dx, c), c fastest


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


def test_actnorm_initialisation():
    torch.manual_seed(0)
    act, x = ActNorm(3), 5 + 2 * torch.randn(16, 3, 4, 4)
    assert torch.equal(act(x)[0], x)
    act.initialize(x)
    z, _ = act(x)
    values = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3))
    torch.testing.assert_close(values.std(1), torch.ones(3), rtol=1e-5, atol=0)
    assert act.initialized
    with pytest.raises(ValueError, match="at least two values"):
        ActNorm(3).initialize(torch.randn(1, 3))


def test_convolutions_at_start():
    x = torch.randn(2, 4, 3, 3)
    z, ldj = invertible_conv("full", 4, 2)(x)
    assert torch.equal(z, x) and not ldj.any()
    q, ldj = invertible_conv("hh", 4, 2).matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(4))
    assert ldj == 0
    w, ldj = invertible_conv("qr", 4, 2).matrix()
    torch.testing.assert_close(w @ w.T, torch.eye(4) * math.log(2) ** 2)      # softplus(0)
    w, ldj = invertible_conv("qr-abs", 4, 2).matrix()
    torch.testing.assert_close(w @ w.T, torch.eye(4))


def test_householder_product_order():
    conv = invertible_conv("hh", 3, 2)
    h1, h2 = (torch.eye(3) - 2 * torch.outer(v, v) / v.dot(v) for v in conv.v)
    torch.testing.assert_close(conv.matrix()[0], h1 @ h2)


def test_both_ways_to_pad_agree():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    one, two = reflect_pad(x), _reflect_pad_by_slices(x)
    assert torch.equal(one, two)
    weights = torch.randn_like(one)
    torch.testing.assert_close(*(torch.autograd.grad((v * weights).sum(), x)[0] for v in (one, two)))


def test_networks_start_at_zero_and_are_the_formula():
    net = resnet3x3(2, 4, 8, 2)
    x = torch.randn(2, 2, 5, 5)
    assert not net(x).any()
    net = randomize(net)

    def conv(layer, h):
        return F.conv2d(F.pad(h, (1, 1, 1, 1), mode="reflect"), layer.weight, layer.bias)
    h = conv(net.first, x)
    for block in net.blocks:
        h = h + conv(block.layer2, F.relu(conv(block.layer1, F.relu(h))))
    h = F.relu((h - net.norm.bias[:, None, None]) * net.norm.logs.exp()[:, None, None])
    torch.testing.assert_close(net(x), conv(net.last, h))
