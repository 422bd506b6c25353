"""From Python: torch.hub, the README's example, the notebook, what docs/extending.md adds."""

import csv
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import PROJECT, execute, options, run_script, runs, same
from nbclient import NotebookClient

NUMBER = r"\d[\d,]*\.\d+"
NOTEBOOK = PROJECT / "notebooks" / "tour.ipynb"
LEFT_OUT = ("logs", "data", "results", "pretrained", ".*", "__pycache__")     # of a copy
EXTENDING = (PROJECT / "docs" / "extending.md").read_text()
SECTIONS = re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", EXTENDING, re.MULTILINE)


def load(**arguments):
    return torch.hub.load(str(PROJECT), "scnf", source="local", **arguments)


def test_shipped_weights(tmp_path, monkeypatch):
    """Of digits, and of the paper's network; a folder of the value that means them is in no way."""
    monkeypatch.chdir(tmp_path)
    Path("shipped").mkdir()
    model = load(weights="digits")
    stored = torch.load(PROJECT / "pretrained" / "digits.torch")
    assert all(torch.equal(value, stored[key].to(value.dtype))
               for key, value in model.state_dict().items())
    assert not model.training and model.sample(torch.arange(10)).shape == (10, 1, 8, 8)
    assert load(weights="model").dim == 784
    assert not list(Path("shipped").iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_weights_of_a_run(tmp_path, monkeypatch):
    """Also if its images have gone."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(256, size=(120, 8, 8), dtype=np.uint8)
    y = np.arange(120) % 4
    np.savez("own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    own = {"data": "npz", "data_root": "own.npz", "num_examples": -1}
    assert run_script(options(epochs=1)) == run_script(options(epochs=1, **own)) == 0
    Path("own.npz").unlink()
    for run, n_classes in zip(runs(tmp_path), (10, 4)):
        model = load(weights=run)
        assert model.n_classes == n_classes
        assert same(model.state_dict(), torch.load(run / "model.torch"))
    (run / "data.yaml").write_text("shape: 3")
    with pytest.raises(ValueError, match="damaged: it lacks an entry"):
        load(weights=run)
    (run / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no data\.yaml"):
        load(weights=run)


def test_random_weights():
    torch.manual_seed(0)
    paper = load(weights=None)
    assert sum(p.numel() for p in paper.parameters()) == 15_875_447
    colour = load(weights=None, config="configs/mnist-glow.yaml", data_shape=(3, 16, 16),
                  n_classes=4, ssl_dim=-2, pixels="logit", width=8)
    assert (colour.dim, colour.ssl_dim, colour.n_classes) == (768, 192, 4)
    x = torch.rand(64, 3, 16, 16)
    colour.initialize(x)
    assert colour.log_prob(x).isfinite().all()


@pytest.mark.parametrize("arguments, message", [
    ({"weights": "nothing"}, "must be one of digits, mnist-best, .* not 'nothing'"),
    ({"weights": ["digits"]}, "directory of a run, or None, not"),
    ({"weights": None, "config": "configs/folder.yaml", "data_shape": (1, 8, 8)},
     "needs data_shape and n_classes"),
    ({"weights": "digits", "n_classes": 0}, "are for weights=None"),
    ({"config": "configs/moons.yaml"}, "are for weights=None"),
    ({"weights": None, "widht": 3}, "no option widht: conv, hh_factors"),
    ({"weights": None, "n_classes": 0}, "n_classes must be at least 1"),
    ({"weights": None, "config": "configs/nothing.yaml"}, "nothing.yaml"),
    ({"weights": None, "data_shape": (1, 9, 9)}, "multiples of 4")])
def test_weights_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


@pytest.mark.parametrize("file", [None, "/elsewhere/utils.py", str(PROJECT / "hubconf.py")])
def test_modules_of_other_projects(monkeypatch, file):
    other = types.ModuleType("utils")
    other.__file__ = file
    monkeypatch.setitem(sys.modules, "utils", other)
    with pytest.raises(ImportError, match=r"another module is called utils"):
        load()


def printed(notebook):
    """What each code cell of a notebook prints, which are not to fail."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


@pytest.mark.slow
def test_the_notebook(mnist_root, monkeypatch):
    """It runs from top to bottom, its stored numbers are right, and its ten lines of training reach
    the script's result, 3.67 +- 0.91 %."""
    monkeypatch.setenv("SCNF_DATA_ROOT", str(mnist_root.resolve()))
    notebook = nbformat.read(NOTEBOOK, 4)
    *stored, _ = printed(notebook)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=1800, resources=resources).execute()
    *found, trained = printed(notebook)
    for ours, theirs in zip(found, stored):
        assert re.sub(NUMBER, "N", ours) == re.sub(NUMBER, "N", theirs)
        numbers, expected = (list(map(float, re.findall(NUMBER, text))) for text in (ours, theirs))
        assert numbers == pytest.approx(expected, rel=0.01, abs=0.01)
    error, bits = map(float, re.findall(NUMBER, trained))
    assert error < 3.67 + 2 * 0.91 and bits < 2.1
    assert "3.67 ± 0.91" in notebook.cells[-1].source


def test_the_notebook_shows_what_it_draws():
    """Each output is stored, and none names a folder of the machine that ran it."""
    notebook = nbformat.read(NOTEBOOK, 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output.data["image/png"] for output in outputs if "data" in output]
    assert len(pictures) == 6 and all(pictures) and any(printed(notebook))
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text())


def apply(diff, root):
    """Apply a diff without line numbers: each part's old lines occur once in their file."""
    for file, parts in re.findall(r"^--- (\S+)\n((?:(?!--- ).*\n)*)", diff, re.MULTILINE):
        for part in parts.split("@@\n"):
            lines = part.splitlines(keepends=True)
            assert all(line[0] in " +-\n" for line in lines), part
            old, new = ("".join(line[1:] for line in lines if line[0] in kinds)
                        for kinds in (" -", " +"))
            text = (root / file).read_text()
            assert text.count(old) == 1, f"{file} has {text.count(old)} of\n{old}"
            (root / file).write_text(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.parametrize("title, section", SECTIONS, ids=[title for title, _ in SECTIONS])
def test_examples_of_extending_the_script(tmp_path, title, section):
    copy = tmp_path / "copy"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    diff = re.search(r"```diff\n(.*?)```", section, re.DOTALL)[1]
    apply(diff, copy)
    assert execute(copy, [sys.executable, "-m", "ruff", "check"]).returncode == 0
    for command in re.findall(r"^    (python .+)$", section, re.MULTILINE):
        done = execute(copy, [sys.executable, *shlex.split(command)[1:]])
        assert done.returncode == 0, done.stdout + done.stderr
    run, = runs(copy)
    *_, last = csv.DictReader((run / "metrics.csv").open())
    assert last["epoch"] == "2" and float(last["test_log_p"]) > -1e5
    if title == "A dataset":
        assert torch.load(run / "model.torch")["base_h.logsigma"].shape == (768,)
        assert "temple" in (run / "report.html").read_text()
    if title == "A term of the loss":
        assert float(last["ent_loss"]) > 0


def test_the_examples_are_all_there():
    assert [title for title, _ in SECTIONS] == ["A dataset", "A bijection", "A term of the loss"]
