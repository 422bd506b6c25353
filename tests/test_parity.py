"""Agreement with numbers of the published implementation, in float64 (tests/parity/README.md)."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.datasets.mnist import read_image_file

from models import build_model
from models.published import published_names
from training.checkpoint import load_weights
from training.objective import objective

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
    torch.save(reference_weights(case), tmp_path / f"{name}.torch")
    load_weights(model, tmp_path / f"{name}.torch")
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


def assert_parity(model, x, reference):
    z, ldj = model.encode(x)
    assert_close(z, reference.z, of_largest=True)
    assert_close(ldj, reference.log_det)
    assert_close(model.log_joint(x), reference.log_joint)
    assert_close(model.log_prob(x), reference.log_marginal)

    settings = SimpleNamespace(ssl_alg="sgd", sup_weight=1.0, cl_weight=0.0, cons_weight=0.0,
                               vat_weight=0.0)
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3, weight_decay=1e-5)
    y = torch.from_numpy(reference.train_y)
    for step, theirs in enumerate(reference.losses):
        loss = objective(model.log_joint(x), y, settings).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            assert_close(torch.stack(norms).norm(), reference.grad_norm)
        optimizer.step()
        assert_close(loss, theirs, 1e-3)


def test_points(tmp_path):
    assert_parity(*load_case("toy_moons", tmp_path))


@pytest.mark.parametrize("name", MNIST_CASES)
def test_images(name, tmp_path, images):
    model, _, reference = load_case(name, tmp_path)
    assert_parity(model, images, reference)


def test_data_dependent_initialisation(tmp_path, images):
    model, _, reference = load_case("mnist_full_data_init", tmp_path)
    model.initialize(images)
    z, ldj = model.encode(images)
    assert_close(z, reference.z, of_largest=True)
    assert_close(ldj, reference.log_det)


def test_decoded_images_are_mnist_s(images, mnist_root):
    pixels = read_image_file(str(mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"))[:8, None]
    assert torch.equal(images, (pixels + 0.5) / 256)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["toy_moons", *MNIST_CASES])
def test_on_a_gpu(name, tmp_path, images):
    model, x, reference = load_case(name, tmp_path)
    model, x = model.cuda(), (images if x is None else x).cuda()
    z, ldj = model.encode(x)
    assert_close(z, reference.z, of_largest=True)
    assert_close(ldj, reference.log_det)
    assert_close(model.log_joint(x), reference.log_joint)


@pytest.mark.parametrize("name", ["toy_moons", *MNIST_CASES])
def test_published_layout_is_ours_entry_by_entry(name):
    """Names and sizes of the published state dict, without masks, are those of our model."""
    case = json.loads((CASES / f"{name}.json").read_text())
    model = build_model_of(case)
    ours = model.state_dict()
    found = {}
    for key, theirs in published_names(model).items():
        if theirs.endswith(".vec"):
            found.update({f"{theirs}_{i}": ours[key][i].numel() for i in range(len(ours[key]))})
        else:
            found[theirs] = ours[key].numel()
    expected = {key.replace("module.", ""): int(np.prod(shape)) for key, shape in case["parameters"]
                if not key.endswith("_prior.mean")}
    assert found == expected
    assert set(ours) - set(published_names(model)) == {"log_p_y"}
