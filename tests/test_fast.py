"""The step arranged for speed against the plain one: the same numbers, and nothing that waits for the device."""

import copy
import math
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, TINY, load_tiny, options, randomize
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import build_model
from models.bijections import ActNorm
from models.conv1x1 import CONVS, log_abs_det, over_channels
from models.fast import FastLogJoint, _TinyConv3x3
from models.networks import Conv3x3
from utils.checkpoint import CheckpointWriter, load_weights
from utils.processes import Processes
from utils.settings import read_settings
from utils.step import TrainingStep, arrange, scorer
from utils.stopping import Stopping

POINTS = {"model": "toy", "ssl_dim": 2, "ssl_l": 1, "ssl_k": 2, "ssl_hd": 8, "l": 3}
MODELS = {**{f"digits, {conv}": ({**TINY, "conv": conv, "ssl_conv": conv}, (1, 8, 8)) for conv in CONVS},
          "squeezed first": ({**TINY, "model": "mnist-small", "width": 8}, (1, 8, 8)),
          "digits, cond-shift": ({**TINY, "ssl_model": "cond-shift"}, (1, 8, 8)),
          "points": (POINTS, (2, 1, 1))}


def a_model(name="digits, full", device="cpu"):
    settings, shape = MODELS[name]
    model = randomize(build_model(settings, shape, 4)).to(device)
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    return model, x


def gradients(model, log_joint, x):
    model.zero_grad()
    out = log_joint(x)
    (-out.logsumexp(1).mean() + out[:, 0].mean()).backward()
    return out, [p.grad.clone() for p in model.parameters()]


def cosine(ours, theirs):
    ours, theirs = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (ours, theirs))
    return float(F.cosine_similarity(ours, theirs, dim=0))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MODELS)
def test_fast_log_joint_is_the_model_s(name):
    model, x = a_model(name)
    expected, expected_gradients = gradients(model, model.log_joint, x)
    fast = FastLogJoint(model)
    out, own_gradients = gradients(model, fast, x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-10)
    for own, theirs in zip(own_gradients, expected_gradients):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)
    assert set(map(id, fast.parameters())) == set(map(id, model.parameters()))
    with torch.no_grad():                                                     # they go on sharing them
        for p in model.parameters():
            p.mul_(0.9)
    torch.testing.assert_close(fast(x), model.log_joint(x), rtol=1e-12, atol=1e-10)


def test_the_part_of_the_weights_is_computed_apart():
    """Neither LU nor ActNorm's log-det is left in the pass: with other log-dets there, only the constant moves."""
    model, x = a_model()
    fast = FastLogJoint(model)
    constant = fast.weight_log_det(fast.weight_log_det.gather()).detach()
    expected = sum(m.logs.sum() * _pixels(name) for name, m in model.named_modules()
                   if isinstance(m, ActNorm) and ".norm" not in name)
    expected = expected + sum(torch.linalg.slogdet(p.double()).logabsdet * _pixels(name)
                              for name, p in model.named_parameters() if name.endswith(".W"))
    assert float(constant) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(fast.twin.log_joint(x) + constant, model.log_joint(x), rtol=1e-5, atol=1e-4)


def _pixels(name):
    """Of the digits model's bijections: 8 x 8 in the first level up to its squeeze, and so on."""
    if name.startswith("h_phi"):
        return 1
    level, place = int(name.split(".")[2]), int(name.split(".")[3])
    before_squeeze = place < (10 if level == 0 else 9)
    return {0: 64, 1: 16, 2: 4}[level] if before_squeeze else {0: 16, 1: 4, 2: 4}[level]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("threads", [None, 2])
def test_log_abs_det_and_its_gradient(threads):
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)       # after such a call PyTorch's own batched LU has given wrong numbers
    try:
        for n in (1, 2, 8, 98, 196):
            w = (torch.eye(n) + 0.5 / n ** 0.5 * torch.randn(4, n, n, generator=torch.Generator().manual_seed(n))).requires_grad_()
            expected = torch.stack([torch.linalg.slogdet(m).logabsdet for m in w])
            own = log_abs_det(w)
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
            weights = torch.arange(1.0, 5)
            theirs, = torch.autograd.grad(expected @ weights, w)
            ours, = torch.autograd.grad(own @ weights, w)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    finally:
        torch.set_num_threads(before)


def test_log_abs_det_of_float32_is_exact_to_float32():
    w = torch.eye(196) + 0.02 * torch.randn(1, 196, 196, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_abs_det(w), torch.linalg.slogdet(w.double()).logabsdet.float(), rtol=1e-7, atol=0)


def test_log_abs_det_of_matrices_that_have_none():
    w = torch.stack((torch.zeros(3, 3), torch.full((3, 3), math.nan))).requires_grad_()
    log_det = log_abs_det(w)
    assert log_det[0] == -math.inf and log_det[1].isnan()
    log_det.sum().backward()                                                  # no exception: the run says what happened
    assert not w.grad[1].isfinite().any()


@pytest.mark.usefixtures("float64")
def test_channels_at_every_pixel():
    for c in (1, 4, 16, 17):
        w, x = torch.randn(c, c), torch.randn(2, c, 3, 5)
        torch.testing.assert_close(over_channels(w, x), torch.einsum("oc,bchw->bohw", w, x))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("padding_mode", ["reflect", "zeros"])
@pytest.mark.parametrize("size", [(2, 2), (2, 3), (4, 4)])
def test_convolution_of_a_tiny_image(size, padding_mode):
    conv, x = Conv3x3(3, 5, padding_mode), torch.randn(4, 3, *size, requires_grad=True)
    expected, own = conv(x), _TinyConv3x3(conv, size)(x)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(own)
    for one, two in zip(*(torch.autograd.grad(out, (x, *conv.parameters()), g) for out in (own, expected))):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_bfloat16_in_the_networks_alone():
    """Fidelity on the shipped digits model: mean log p(x) within 0.01 %, the gradient's cosine above 0.999."""
    _, settings = read_settings(["--config", str(PROJECT / "configs" / "digits.yaml")])
    model = build_model(settings, (1, 8, 8), 10)
    load_weights(model, PROJECT / "pretrained" / "digits.torch")
    data = load_tiny()
    x = data.dequantize(data.test_x, torch.Generator().manual_seed(0))
    exact, exact_gradients = gradients(model, model.log_joint, x)
    fast, seen = FastLogJoint(model, "bf16"), {}
    for name, part in fast.twin.named_modules():
        part.register_forward_hook(lambda part, args, out, name=name: seen.update({name: out[0].dtype if isinstance(out, tuple) else out.dtype}))
    out, own_gradients = gradients(model, fast, x)
    assert out.dtype == torch.float32
    mean, exact_mean = (float(v.detach().logsumexp(1).mean()) for v in (out, exact))
    assert mean != exact_mean and mean == pytest.approx(exact_mean, rel=1e-4)
    assert cosine(own_gradients, exact_gradients) > 0.999
    low = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert low and all(".net" in name for name in low)
    assert all(seen[name] == torch.bfloat16 for name in seen if name.endswith((".first", ".last", ".layer1", ".layer2")))


def a_step(script, settings, model, pass_size, processes=None, **speed):
    speed = SimpleNamespace(**{"precision": "fp32", "compile": False, "cuda_graph": False, "micro_bs": pass_size, **speed})
    return TrainingStep(*arrange(model, speed), script.objective, settings, processes or Processes(), speed.cuda_graph)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("changes", [{}, {"cl_weight": 1, "clip_gn": 5, "sup_weight": 3}, {"ssl_alg": "em", "weight_decay": 0.1},
                                     {"cl_weight": 1, "cons_weight": 30}])
@pytest.mark.parametrize("pass_size", [7, 64])
def test_steps_move_the_weights_as_plain_ones_do(script, tmp_path, monkeypatch, pass_size, changes):
    """Against model.log_joint, the whole batch at once, and Adamax over the parameters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "SURE", 0.2)                                  # so that some rows of a random model are
    _, settings = read_settings(options(**changes))
    data, models, terms = load_tiny(), [], []
    for fast in (True, False):
        model = randomize(build_model(settings, data.shape, 10))
        generator = torch.Generator().manual_seed(0)
        if fast:
            step = a_step(script, settings, model, pass_size)
        else:
            optimizer = torch.optim.Adamax(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        for _ in range(3):
            x, y, *altered = data.draw(20, 0.5, generator, settings.cons_weight > 0)
            if fast:
                terms.append(step(x, y, *altered))
            else:
                expected = torch.stack(script.objective(model.log_joint(x), y, settings, y, *map(model.log_joint, altered)))
                assert (expected[4] > 0) == (settings.cons_weight > 0)
                torch.testing.assert_close(terms.pop(0), expected.detach(), rtol=1e-9, atol=1e-9)
                optimizer.zero_grad()
                expected[0].backward()
                if settings.clip_gn:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gn)
                optimizer.step()
        models.append(model.state_dict())
    assert list(models[0]) == list(models[1])
    for key, value in models[0].items():
        torch.testing.assert_close(value, models[1][key], rtol=1e-8, atol=1e-8, msg=key)


def test_parameters_in_the_vector_are_aligned(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(options())
    model = build_model({}, (1, 28, 28), 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step = a_step(script, settings, model, 64)
    assert all(p.storage_offset() * p.element_size() % 128 == 0 for p in step.parameters)
    assert {p.untyped_storage().data_ptr() for p in step.parameters} == {step.vector.untyped_storage().data_ptr()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scores_in_passes_are_the_whole_batch_s():
    model, x = a_model()
    torch.testing.assert_close(scorer(FastLogJoint(model), 4)(x), model.log_joint(x), rtol=1e-5, atol=1e-4)


def test_passes_suit_the_caches_of_a_cpu():
    model = build_model({}, (1, 28, 28), 10)
    speed = SimpleNamespace(precision="fp32", compile=False, micro_bs=0)
    log_joint, pass_size = arrange(model, speed)
    assert log_joint.largest == 64 * 28 * 28 * 4 and pass_size == 64
    assert arrange(model, SimpleNamespace(**{**vars(speed), "micro_bs": 10}))[1] == 10


def test_the_optimizer_s_state_survives(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(options())
    data = load_tiny()
    x, y = data.draw(20, 0.5, torch.Generator().manual_seed(0))
    model = randomize(build_model(settings, data.shape, 10))
    step = a_step(script, settings, model, 64)
    assert step.state_dict() == {}
    step(x, y)
    again = randomize(build_model(settings, data.shape, 10))
    second = a_step(script, settings, again, 64)
    again.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(step.state_dict()))
    for s in (step, second):
        s.lr.fill_(0.01)                                                      # of the steps to come
        s(x, y)
    assert torch.equal(step.vector, second.vector) and step.state_dict()["step"] == 2


def test_moving_average_of_the_weights(script, tmp_path, monkeypatch):
    """Against torch's AveragedModel of the same decay; seen only within its context, and part of the step's state."""
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(options(ema=0.7))
    data = load_tiny()
    model = randomize(build_model(settings, data.shape, 10))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    average.update_parameters(model)                                          # the first call copies
    step = a_step(script, settings, model, 64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step(*data.draw(20, 0.5, generator))
        average.update_parameters(model)
    own = copy.deepcopy(dict(model.named_parameters()))
    with step.averaged():
        for key, value in average.module.named_parameters():
            torch.testing.assert_close(model.get_parameter(key), value, msg=key)
            assert not torch.equal(value, own[key])
    assert all(torch.equal(p, own[key]) for key, p in model.named_parameters())
    second = a_step(script, settings, randomize(build_model(settings, data.shape, 10), seed=1), 64)
    second.load_state_dict(copy.deepcopy(step.state_dict()))
    assert torch.equal(second.average, step.average)


def test_nothing_is_read_back_between_log_lines(script, tmp_path, monkeypatch):
    """No .item() and the like in an epoch's steps, torch.optim's own on a CPU aside, and a fixed number at its end."""
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(options(clip_gn=10, cl_weight=1, cons_weight=1, ema=0.9, warmup_steps=4, lr_schedule="cosine"))
    data, reads = load_tiny(), []
    model = randomize(build_model(settings, data.shape, 10))
    step = a_step(script, settings, model, 64)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        real = getattr(torch.Tensor, name)

        def read(self, *args, real=real, name=name, **kwargs):
            callers = [Path(frame.filename) for frame in traceback.extract_stack()]
            if "optim" not in {path.parent.name for path in callers}:
                reads.append((name, callers[-2]))
            return real(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, read)
    counts = []
    for steps in (2, 9):
        reads.clear()
        progress = SimpleNamespace(epoch=0, step=0, sums=torch.zeros(len(script.TERMS)), seconds=0.0)
        generator = torch.Generator().manual_seed(0)
        assert script.train_epoch(step, data, settings, Processes(), Stopping(), generator, 1 / 3, steps, progress) is None
        counts.append(len(reads))
    assert counts[0] == counts[1] <= 3, reads


class Backend:
    """A backend of torch.compile that runs the graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("name, precision", [("digits, full", "fp32"), ("digits, full", "bf16"), ("digits, qr", "fp32"), ("points", "fp32")])
def test_compiled_parts_are_whole_graphs_that_equal_parts_share(monkeypatch, name, precision):
    """fullgraph: a graph break would raise. On the CPU, where bf16 is autocast's too."""
    torch._dynamo.reset()
    backend, compile_module = Backend(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options))
    model, x = a_model(name)
    parts = []
    fast = FastLogJoint(model, precision, compiled=True)
    for part in fast.twin.modules():
        if part._compiled_call_impl is not None:
            parts.append(part)
    plain, plain_gradients = gradients(model, FastLogJoint(model, precision), x)
    out, own_gradients = gradients(model, fast, x)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-4)
    assert cosine(own_gradients, plain_gradients) > 1 - 1e-6
    assert 0 < backend.graphs <= (len(parts) if name == "points" else 0.8 * len(parts))
    graphs = backend.graphs
    fast(x + 0.001)
    assert backend.graphs == graphs                                           # nothing is compiled again
    torch._dynamo.reset()


def test_a_compiled_run(script, tmp_path, monkeypatch, capsys):
    """By Inductor, as on a GPU: it trains, and ends where the plain run does."""
    monkeypatch.chdir(tmp_path)
    line = options(data="moons", epochs=2, num_examples=200, **{**POINTS, "ssl_k": 1, "l": 2})
    assert script.cli([*line, "--compile", "on"]) == 0
    assert ", compiled" in capsys.readouterr().out
    assert script.cli(line) == 0
    one, two = (torch.load(run / "model.torch") for run in sorted((tmp_path / "logs/exman-train-flow-ssl.py/runs").iterdir()))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_checkpoint_is_as_the_weights_were_and_its_errors_show(tmp_path):
    tensor = torch.ones(3)
    with CheckpointWriter(tmp_path / "c.pt") as writer:
        writer.write({"a": {"b": tensor}, "n": 1})
        tensor.zero_()                                                        # training goes on meanwhile
    assert torch.equal(torch.load(tmp_path / "c.pt")["a"]["b"], torch.ones(3))
    with pytest.raises(FileNotFoundError):
        with CheckpointWriter(tmp_path / "nowhere" / "c.pt") as writer:
            writer.write({"a": tensor})


# On a GPU: all of them by `python -m pytest -m gpu`.

MODES = {"fp32": ("fp32", False), "fp32, compiled": ("fp32", True), "tf32, compiled": ("tf32", True),
         "bf16": ("bf16", False), "bf16, compiled": ("bf16", True)}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_fidelity_on_a_gpu(mode, monkeypatch):
    """The digits model that ships: log p(x) within 0.01 % of plain float32's, the gradient's cosine above 0.999."""
    _, settings = read_settings(["--config", str(PROJECT / "configs" / "digits.yaml")])
    model = build_model(settings, (1, 8, 8), 10)
    load_weights(model, PROJECT / "pretrained" / "digits.torch")
    model = model.cuda()
    data = load_tiny()
    x = data.dequantize(data.test_x, torch.Generator().manual_seed(0)).cuda()
    precision, compiled = MODES[mode]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact, exact_gradients = gradients(model, model.log_joint, x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "fp32")
    out, own_gradients = gradients(model, FastLogJoint(model, precision, compiled), x)
    assert float(out.logsumexp(1).mean()) == pytest.approx(float(exact.logsumexp(1).mean()), rel=1e-4)
    assert cosine(own_gradients, exact_gradients) > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_fidelity_of_the_paper_s_model_on_a_gpu(compiled, monkeypatch):
    """bf16 against plain float32 on config.yaml's model, its last layers filled."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = build_model({}, (1, 28, 28), 10)
    x = torch.rand(64, 1, 28, 28) ** 4
    model.initialize(x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("last.weight"):
                p.normal_(0, 0.01)
    model, x = model.cuda(), x.cuda()
    exact, exact_gradients = gradients(model, model.log_joint, x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    out, own_gradients = gradients(model, FastLogJoint(model, "bf16", compiled), x)
    assert float(out.logsumexp(1).mean()) == pytest.approx(float(exact.logsumexp(1).mean()), rel=1e-4)
    assert cosine(own_gradients, exact_gradients) > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_are_the_plain_ones_on_a_gpu(script, tmp_path, monkeypatch, precision, compiled):
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(options(cl_weight=1, cons_weight=30, clip_gn=100, ema=0.7))
    data, results = load_tiny(), []
    for cuda_graph in (True, False):
        model = randomize(build_model(settings, data.shape, 10)).cuda()
        step = a_step(script, settings, model, 64, precision=precision, compile=compiled, cuda_graph=cuda_graph)
        generator, terms = torch.Generator().manual_seed(0), []
        for i in range(8):                                                    # warm-up, capture, replays
            step.lr.fill_(1e-3 / (i + 1))
            batch = data.draw(64, 0.5, generator, altered=True)
            terms.append(step(*[part.cuda() for part in batch]).clone())
        results.append((torch.stack(terms), torch.stack((step.vector.detach(), step.average)), step.state_dict()["step"]))
    (terms, vector, count), (plain_terms, plain_vector, _) = results
    assert count == 8
    torch.testing.assert_close(terms[:, :3], plain_terms[:, :3], rtol=1e-3, atol=1e-3)      # the others are counts
    assert float((vector - plain_vector).norm() / plain_vector.norm()) < 1e-3


@pytest.mark.gpu
def test_the_paper_s_step_is_captured_on_a_gpu(script, tmp_path, monkeypatch):
    """config.yaml's model, whose 1x1 convolutions are of six sizes, as the defaults run it."""
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(["--device", "cuda"])
    torch.manual_seed(0)
    model = build_model({}, (1, 28, 28), 10)
    x, y = torch.rand(32, 1, 28, 28) ** 4, torch.arange(32) % 11 - 1
    model.initialize(x)
    step = a_step(script, settings, model.cuda(), 32, precision="bf16", compile=True, cuda_graph=True)
    losses = [float(step(x.cuda(), y.cuda())[0]) for _ in range(8)]
    assert step.captured.graph is not None and all(map(math.isfinite, losses)) and len(set(losses)) == 8


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, settings = read_settings(options(cl_weight=1, clip_gn=100, ssl_alg="em", sup_weight=2, cons_weight=1, ema=0.9))
    data = script.load_data(settings, "cuda")
    for cuda_graph in (False, True):
        model = randomize(build_model(settings, data.shape, 10)).cuda()
        step = a_step(script, settings, model, 64, precision="bf16", cuda_graph=cuda_graph)
        generator = torch.Generator("cuda").manual_seed(0)
        for _ in range(5):                                                    # warm-up and capture may wait
            step(*data.draw(64, 0.5, generator, altered=True))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                step(*data.draw(64, 0.5, generator, altered=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_log_abs_det_on_a_gpu():
    for n in (1, 2, 4, 8, 98, 196):
        w = torch.eye(n) + 0.5 / n ** 0.5 * torch.randn(4, n, n, generator=torch.Generator().manual_seed(n))
        own = w.cuda().requires_grad_()
        log_abs_det(own).sum().backward()
        expected, inverse = (torch.stack(list(map(f, w.double()))).float()
                             for f in (lambda m: torch.linalg.slogdet(m).logabsdet, torch.linalg.inv))
        torch.testing.assert_close(log_abs_det(own).cpu(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own.grad.cpu(), inverse.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_captured_scores_on_a_gpu():
    model, x = a_model(device="cuda")
    score, exact = scorer(FastLogJoint(model), sys.maxsize, cuda_graph=True), model.log_joint
    for i in range(6):
        torch.testing.assert_close(score(x + 0.01 * i), exact(x + 0.01 * i).detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_loss_curve_lies_over_float32_s_on_a_gpu(script, tmp_path, monkeypatch, precision):
    monkeypatch.chdir(tmp_path)
    for p in ("fp32", precision):
        assert script.cli(options(epochs=12, lr=5e-3, device="cuda", precision=p, num_examples=-1, supervised=100)) == 0
    fast, plain = ([float(line.split(",")[1]) for line in (run / "metrics.csv").read_text().splitlines()[1:]]
                   for run in sorted((tmp_path / "logs/exman-train-flow-ssl.py/runs").iterdir(), reverse=True))
    assert max(abs(a - b) for a, b in zip(fast, plain)) < 0.05 * (plain[0] - plain[-1])
