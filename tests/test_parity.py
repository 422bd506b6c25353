"""Agreement with numbers of the published implementation, in float64 (tests/parity/README.md)."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import options, randomize, run_script
from torch.optim.swa_utils import AveragedModel
from torchvision.datasets.mnist import read_image_file

from models import build_model
from models.bijections import ActNorm
from models.published import published_names
from training.checkpoint import load_weights
from training.objective import objective
from utils.errors import BadInput

CASES = Path(__file__).parent / "parity"
MNIST_CASES = ("mnist_full", "mnist_qr", "mnist_householder_gmm")
pytestmark = pytest.mark.usefixtures("float64")


def reference_weights(case):
    """The weights of a case: each array is a function of its name and shape."""
    shapes = dict(case["parameters"])
    scales = {"logs": 0.1, "s_factor": 0.1, "logsigma": 0.1}

    def array(name, shape):
        leaf = name.split(".")[-1]
        if leaf == "requires_init":
            return np.full(shape, float(case["needs_init"]))
        if leaf == "mean":
            return np.zeros(shape)
        seed = zlib.crc32((case["salt"] + name).encode())
        noise = np.random.RandomState(seed).standard_normal(tuple(shape))
        if leaf == "W":
            return np.eye(shape[0]) + 0.2 / np.sqrt(shape[0]) * noise
        if leaf == "r":
            return 0.3 / np.sqrt(shape[0]) * noise
        if leaf.startswith("vec_"):
            return noise / np.linalg.norm(noise)
        if leaf == "logs" or (leaf == "bias" and name[:-4] + "logs" in shapes):
            return 0.0 * noise if case["needs_init"] else 0.1 * noise
        if name.endswith("embeddings.weight"):
            return np.eye(*shape) + 0.1 * noise
        if leaf == "weight" and len(shape) == 4:
            return (0.1 if last_of_its_net(name) else 0.7) / np.sqrt(np.prod(shape[1:])) * noise
        return scales.get(leaf, 0.05 if leaf == "bias" else 0.1) * noise

    def last_of_its_net(name):
        net, position = name.split(".")[:-2], name.split(".")[-2]
        paths = [other.split(".") for other in shapes]
        positions = [path[len(net)] for path in paths if path[:len(net)] == net]
        return int(position) == max(int(p) for p in positions if p.isdigit())

    return {name: torch.from_numpy(np.asarray(array(name, shape)))
            for name, shape in case["parameters"]}


def build_model_of(case):
    settings = case["settings"]
    return build_model(settings, settings.get("shape", (1, 28, 28)),
                       settings.get("ssl_nclasses", 10))


def load_case(name, tmp_path):
    """-> model with the case's weights, x (None: MNIST's test images), the reference arrays."""
    case = json.loads((CASES / f"{name}.json").read_text())
    reference = SimpleNamespace(**np.load(CASES / f"{name}.npz"))
    model = build_model_of(case)
    mask = {"flow.module.modules_.2.mask": torch.ones(1, 1, 8, 8)}          # theirs have some, too
    torch.save({**reference_weights(case), **mask}, tmp_path / f"{name}.torch")
    load_weights(model, tmp_path / f"{name}.torch")
    for act in (module for module in model.modules() if isinstance(module, ActNorm)):
        assert act.initialized != case["needs_init"]
    x = None if case["test_images"] else torch.from_numpy(reference.x)
    return model, x, reference


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """MNIST's first 8 test images, x = (pixel + 0.5) / 256, which all MNIST cases use.

    They are decoded from the reference z of `mnist_full`. The inverse of a flow other than the
    reference's would not give whole grey levels.
    """
    torch.set_default_dtype(torch.float64)
    model, _, reference = load_case("mnist_full", tmp_path_factory.mktemp("images"))
    with torch.no_grad():
        grey_levels = model.decode(torch.from_numpy(reference.z)) * 256 - 0.5
    torch.set_default_dtype(torch.float32)
    assert (grey_levels - grey_levels.round()).abs().max() < 1e-6
    assert grey_levels.round().min() == 0 and grey_levels.round().max() == 255
    return (grey_levels.round() + 0.5) / 256


def assert_close(ours, theirs, rtol=1e-6, of_largest=False):
    """The error is less than `rtol`, relative to each number or to the largest of them."""
    scale = np.abs(theirs).max() if of_largest else np.abs(theirs)
    np.testing.assert_array_less(np.abs(ours.detach().cpu().numpy() - theirs) / scale, rtol)


def assert_same_latents(model, x, reference):
    z, ldj = model.encode(x)
    assert_close(z, reference.z, of_largest=True)
    assert_close(ldj, reference.log_det)


def assert_parity(model, x, reference):
    assert_same_latents(model, x, reference)
    assert_close(model.log_joint(x), reference.log_joint)
    assert_close(model.log_prob(x), reference.log_marginal)

    settings = SimpleNamespace(ssl_alg="sgd", sup_weight=1.0, cl_weight=0.0)
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3, weight_decay=1e-5)
    y = torch.from_numpy(reference.train_y)
    for step, theirs in enumerate(reference.losses):
        loss = objective(model.log_joint(x), y, y, settings)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            assert_close(torch.stack(norms).norm(), reference.grad_norm)
        optimizer.step()
        assert_close(loss, theirs, 1e-3)


def test_points(tmp_path):
    assert_parity(*load_case("toy_moons", tmp_path))


def test_the_script_evaluates_published_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load_case("toy_moons", tmp_path)
    settings = {"data": "moons", "model": "toy", "l": 5, "ssl_dim": -1, "ssl_l": 1, "ssl_k": 2,
                "ssl_hd": 16}
    assert run_script(options(**settings, pretrained="toy_moons.torch")) == 0
    assert "Test error" in capsys.readouterr().out


SMALL = {"model": "digits-masked", "ssl_dim": 16, "ssl_l": 1, "ssl_k": 1, "ssl_hd": 8}


def assert_loads(path, state):
    model = build_model(SMALL, (1, 8, 8), 10)
    load_weights(model, path)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("wrap", [
    lambda key: f"module.{key}", lambda key: f"_orig_mod.{key}", lambda key: f"model.{key}",
    lambda key: f"module._orig_mod.{key}", lambda key: f"_orig_mod.module.net.{key}",
    lambda key: key.replace("f_w.", "f_w._orig_mod.").replace("flow.", "flow.module._orig_mod.")])
@pytest.mark.parametrize("layout", ["ours", "published"])
def test_weights_under_the_names_that_wrappers_give_them(wrap, layout, tmp_path):
    model = randomize(build_model(SMALL, (1, 8, 8), 10))
    state, names = model.state_dict(), published_names(model)
    if layout == "ours":
        names = {key: key for key in state}
    torch.save({wrap(name): state[key] for key, name in names.items()}, tmp_path / "wrapped.torch")
    assert_loads(tmp_path / "wrapped.torch", state)


def test_weights_that_pytorch_s_wrappers_save(tmp_path):
    model = randomize(build_model(SMALL, (1, 8, 8), 10))
    for wrapper in (torch.compile(model), torch.nn.DataParallel(torch.compile(model)),
                    AveragedModel(model)):
        torch.save(wrapper.state_dict(), tmp_path / "wrapped.torch")
        assert_loads(tmp_path / "wrapped.torch", model.state_dict())


def test_published_weights_do_not_fit_a_model_with_position_biases(tmp_path):
    model = build_model(SMALL, (1, 8, 8), 10)
    state, path = model.state_dict(), tmp_path / "published.torch"
    torch.save({theirs: state[key] for key, theirs in published_names(model).items()}, path)
    load_weights(model, path)
    with pytest.raises(BadInput, match="is missing"):
        load_weights(build_model({**SMALL, "position_bias": True}, (1, 8, 8), 10), path)


@pytest.mark.parametrize("name", MNIST_CASES)
def test_images(name, tmp_path, images):
    model, _, reference = load_case(name, tmp_path)
    assert_parity(model, images, reference)


def test_data_dependent_initialisation(tmp_path, images):
    model, _, reference = load_case("mnist_full_data_init", tmp_path)
    model.initialize(images)
    assert_same_latents(model, images, reference)


def test_decoded_images_are_mnist_s(images, mnist_root):
    pixels = read_image_file(str(mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"))[:8, None]
    assert torch.equal(images, (pixels + 0.5) / 256)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["toy_moons", *MNIST_CASES])
def test_on_a_gpu(name, tmp_path, images):
    model, x, reference = load_case(name, tmp_path)
    model, x = model.cuda(), (images if x is None else x).cuda()
    assert_same_latents(model, x, reference)
    assert_close(model.log_joint(x), reference.log_joint)


@pytest.mark.parametrize("name", ["toy_moons", *MNIST_CASES])
def test_published_layout_is_ours_entry_by_entry(name):
    """Names and sizes of the published state dict, without masks, are those of our model."""
    case = json.loads((CASES / f"{name}.json").read_text())
    model = build_model_of(case)
    ours, found = model.state_dict(), {}
    for key, theirs in published_names(model).items():
        if theirs.endswith(".vec"):
            found.update({f"{theirs}_{i}": vector for i, vector in enumerate(ours[key])})
        else:
            found[theirs] = ours[key]
    expected = {key.replace("module.", ""): int(np.prod(shape)) for key, shape in case["parameters"]
                if not key.endswith("_prior.mean")}
    assert {key: value.numel() for key, value in found.items()} == expected
    assert set(ours) - set(published_names(model)) == {"log_p_y"}
