"""What a trained model shows: obfuscation.py, samples.py, pictures.py, utils/figures.py."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import PROJECT, load_tiny, options, randomize, run_script, runs
from PIL import Image

from experiments import obfuscation, pictures, samples
from models import build_model
from utils import figures
from utils.errors import BadInput, Failed
from utils.metrics import read_metrics

SHIPPED = ["--config", str(PROJECT / "configs" / "digits.yaml"), "--pretrained", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model():
    options = {"model": "digits-masked", "ssl_dim": 16, "ssl_l": 1, "ssl_k": 1, "ssl_hd": 8}
    return randomize(build_model(options, (1, 8, 8), 10), scale=0.3).double()


@pytest.fixture
def drawn(monkeypatch):
    """The images that a picture shows, (rows, columns, C, H, W)."""
    shown = []
    draw = figures.draw_grid
    monkeypatch.setattr(figures, "draw_grid", lambda x, title: shown.append(x) or draw(x, title))
    return shown


def title_of(figure):
    return figure.axes[0].get_title()


def test_redrawn_with_its_own_label_an_image_stays_what_it_is(model, drawn):
    x, y = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([3, 0, 9, 3])
    figure = figures.plot_redrawn(model, x, y)
    (grid,) = drawn
    assert grid.shape == (4, 11, 1, 8, 8)
    torch.testing.assert_close(grid[:, 0], x.float())
    own = grid[torch.arange(4), 1 + y]
    torch.testing.assert_close(own, x.float(), atol=1e-5, rtol=0)
    change = (grid[:, 1:] - own[:, None]).abs().flatten(2).amax(2)              # (4, K)
    assert ((change > 1e-4).sum(1) == 9).all()                                  # other classes
    assert title_of(figure) == "Images re-drawn as every class, with their z_aux and z_h"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "image", *"0123456789"]


def test_an_interpolation_goes_from_one_image_to_the_other(model, drawn):
    x, other = torch.rand(2, 3, 1, 8, 8, dtype=torch.float64)
    y = torch.tensor([1, 5, 7])
    figures.plot_interpolation(model, x, other, y, steps=5)
    (grid,) = drawn
    assert grid.shape == (3, 5, 1, 8, 8)
    torch.testing.assert_close(grid[:, 0], x.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(grid[:, -1], other.float(), atol=1e-5, rtol=0)
    # Equal steps of the latent: the middle one is the mean of the ends.
    z = [model.split_latent(model.encode(images.double())[0])
         for images in (x, grid[:, 2], other)]
    torch.testing.assert_close(z[1][0], (z[0][0] + z[2][0]) / 2, atol=1e-3, rtol=1e-3)


def test_temperature_zero_has_one_sample_per_class(model, drawn):
    figure = figures.plot_samples(model.float(), 0, temperature=0.0)
    (grid,) = drawn
    assert title_of(figure) == "Samples from p(x | y), temperature 0"
    assert torch.equal(grid, grid[:1].expand_as(grid))
    assert not torch.equal(grid[0, 0], grid[0, 1])


@pytest.mark.parametrize("length", [10, 56])
def test_the_legend_of_seven_runs_is_inside_the_picture(length):
    rows = read_metrics(PROJECT / "results" / "digits" / "seed0" / "metrics.csv")
    figure = figures.plot_curves_of_runs({str(i) * length: rows for i in range(7)})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, panel = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.x1 and box.y0 >= 0 and box.y1 < panel.y0
    assert panel.height > 200


def test_the_curves_of_runs_without_labels_have_no_panel_of_errors():
    rows = read_metrics(PROJECT / "results" / "digits" / "seed0" / "metrics.csv")
    unlabelled = [{key: math.nan if key.endswith("acc") else value for key, value in row.items()}
                  for row in rows]
    for runs_, panels in (({"a": rows, "b": unlabelled}, 3), ({"b": unlabelled}, 2)):
        assert len(figures.plot_curves_of_runs(runs_).axes) == panels


@pytest.mark.parametrize("command", ["samples", "redrawn", "interpolation", "mistakes"])
def test_pictures_of_the_shipped_model(command, tmp_path):
    pictures.main([command, "--save", "picture.png", *SHIPPED])
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 400 and len(picture.convert("L").getcolors(2**16)) > 30


def test_pictures_of_points_and_of_runs(tmp_path):
    for seed in (0, 1):
        assert run_script(options(data="moons", model="toy", l=2, ssl_dim=-1, ssl_l=1, ssl_k=1,
                                  supervised=10, epochs=2, seed=seed)) == 0
    first, second = runs(tmp_path)
    weights = ["--config", str(first / "params.yaml"), "--pretrained", str(first / "model.torch")]
    pictures.main(["latent", "--save", "latent.png", "--pretrained", str(first)])
    pictures.main(["density", "--save", "density.png", "--pretrained", str(first)])
    pictures.main(["curves", str(first), str(second), "--save", "curves.png"])
    assert (tmp_path / "density.png").read_bytes() == (first / "density.png").read_bytes()
    for name in ("latent.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 700 and len(picture.convert("RGB").getcolors(2**20)) > 10
    (tmp_path / "folder.png").mkdir()
    for argv, message in ((["redrawn", "--save", "x.png", *weights], "redrawn is for images"),
                          (["latent", "--save", "x.png", *SHIPPED], "latent is for points in"),
                          (["samples", "--save", "x.png"], "name the weights"),
                          (["samples", "--save", "no/x.png", *SHIPPED], "no folder no"),
                          (["samples", "--save", "folder.png", *SHIPPED], "not a file that could"),
                          (["curves", str(first), str(PROJECT / "results" / "digits" / "seed0"),
                            "--save", "x.png"], "no likelihood in common"),
                          (["samples", "--temperature", "-1", "--save", "x.png", *SHIPPED],
                           "--temperature must"),
                          (["curves", str(tmp_path), "--save", "x.png"], "not the directory of a"),
                          (["latent", "--save", "x.txt", *weights], "x.txt must end in .png"),
                          (["curves", str(first), "--typo", "--save", "x.png"], "option --typo")):
        with pytest.raises(BadInput, match=message):
            pictures.main(argv)
    assert not (tmp_path / "x.png").exists()


def test_what_the_parts_of_the_latent_space_know(tmp_path, monkeypatch):
    """The shipped model of digits, and fewer epochs of the classifier."""
    monkeypatch.setattr(obfuscation, "EPOCHS", 20)
    obfuscation.main([*SHIPPED, "--json", "a.json", "--save", "a.npz", "--picture", "a.png"])
    report = json.loads((tmp_path / "a.json").read_text())
    parts = report["parts"]
    assert list(parts) == ["z_f", "z_h"] and report["chance"] == pytest.approx(37 / 360)
    assert parts["z_f"]["linear"] > 0.9 and parts["z_f"]["classifier"] > 0.9
    assert parts["z_h"]["linear"] < 0.25 and parts["z_h"]["classifier"] < 0.5
    saved = np.load(tmp_path / "a.npz")
    assert saved["train_z_f"].shape == saved["train_z_h"].shape == (1294, 64)
    assert saved["test_z_aux"].shape == (360, 0) and set(saved["train_y"]) == set(range(10))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 10
    with pytest.raises(BadInput, match="name the weights"):
        obfuscation.main(SHIPPED[:2])
    with pytest.raises(BadInput, match="no folder no"):
        obfuscation.main([*SHIPPED, "--save", "no/a.npz"])


@pytest.mark.slow
def test_a_cnn_recognises_typical_samples(tmp_path):
    """Of the shipped model of digits, and not those of a far too high temperature."""
    samples.main([*SHIPPED, "--samples", "100", "--json", "a.json", "--temperatures", "0.5", "10"])
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["samples"] == 100 and report["test_accuracy"] > 0.95
    assert set(report["inversion_error"]) == {"test", "0.5"}        # none at 10 is finite
    assert max(report["inversion_error"].values()) < 1e-4
    assert report["sample_accuracy"]["0.5"] > 0.9 and report["sample_accuracy"]["10"] < 0.6
    for argv, message in ((["--samples", "9"], "at least one for each of the 10 classes"),
                          (["--temperatures", "-1"], "--temperatures must be from 0"),
                          (["--json", "no/a.json"], "no folder no")):
        with pytest.raises(BadInput, match=message):
            samples.main([*SHIPPED, *argv])


def test_a_sample_that_is_not_finite_is_not_recognised(monkeypatch, capsys):
    """Each sample is black, class 0 to this classifier; that of class 0 is not finite."""
    model, data, settings = pictures.load(SHIPPED)
    monkeypatch.setattr(samples, "load", lambda *_: (model, data, settings))
    monkeypatch.setattr(samples, "fit_fixmatch", lambda *_: lambda images: (
        images.flatten(1).any(1).long()))
    model.sample = lambda y, eps: torch.where(y == 0, torch.nan, 0.0)[:, None, None, None].expand(
        len(y), 1, 8, 8)
    samples.main(["--samples", "10", "--temperatures", "1"])
    model.encode, model.f_w.inverse = lambda x: (x, None), lambda z: z + 0.25
    samples.main(["--samples", "10", "--temperatures", "1"])
    out = capsys.readouterr().out
    assert out.endswith("0.0% of 10 samples recognised, 1 not finite\n")       # and no such error
    assert "10 test images: inversion error 2.5e-01\n" in out


def test_pictures_leave_out_what_is_not_finite(model, drawn):
    """An image is left out as a whole, its place is grey, and the title says how many are."""
    decode = model.f_w.inverse
    broken = torch.tensor([3, 70])

    def overflowing(z):
        x = decode(z)
        x[broken, 0, 1, 2] = torch.tensor([torch.nan, torch.inf], dtype=x.dtype)
        return x
    model.f_w.inverse = overflowing
    x, y = torch.rand(10, 1, 8, 8, dtype=torch.float64), torch.arange(10)
    assert "\n2 of 100 left out: not finite" in title_of(figures.draw_grid(
        model.sample(y.repeat(10)).unflatten(0, (10, 10)).float(), "x")[0])
    figure = figures.plot_redrawn(model, x, y)
    assert title_of(figure).endswith("z_h\n2 of 110 left out: not finite")
    pixels = np.asarray(figure.axes[0].images[0].get_array())
    row, column = 7, 1                      # image 70 of the grid without the first column
    place = pixels[row * 9 + 1:row * 9 + 9, column * 9 + 1:column * 9 + 9]
    assert (place == 0.5).all() and (pixels != 0.5).any()


def test_points_that_are_not_finite_are_counted(monkeypatch):
    model = randomize(build_model({"model": "toy", "l": 2, "ssl_dim": -1, "ssl_l": 1, "ssl_k": 1,
                                   "ssl_hd": 8}, (2, 1, 1), 2), scale=0.3)
    sample = model.sample
    model.sample = lambda y, eps: torch.where((torch.arange(len(y)) < 4)[:, None, None, None],
                                              torch.nan, sample(y, eps))
    titles = [axes.get_title() for axes in figures.plot_samples(model, 0).axes]
    assert titles == [f"Samples from p(x | y = {k})\n2 of 1000 left out: not finite"
                      for k in (0, 1)]
    data, encode = load_tiny(data="moons", num_examples=-1), model.encode
    x, y = data.test_x, data.test_y
    for far, broken in ((0.9, True), (-9, False)):          # to the right of it, z is not finite
        monkeypatch.setattr(model, "encode", lambda x, far=far: tuple(
            part.where((x[:, 0, 0] < far).view(-1, *[1] * (part.dim() - 1)), torch.nan)
            for part in encode(x)))
        n = int((x[:, 0, 0, 0] >= far).sum())
        titles = [axes.get_title() for axes in figures.plot_latent_space(model, x, y).axes]
        assert all(title.endswith(f"\n{n} of 1000 left out: not finite") for title in titles)
        if broken:
            title = title_of(figures.plot_density(model, data, 20))
            assert re.search(r"points\n\d+ of 400 left out: not finite", title)
        else:
            with pytest.raises(Failed, match=r"Not finite: .* of all points of the picture"):
                figures.plot_density(model, data, 20)


@torch.no_grad()
def test_latents_are_those_of_the_model(model):
    data = load_tiny()
    x, y = data.middle_of_levels(data.test_x[:20]).double(), data.test_y[:20]
    z = obfuscation.latents(model, x, y, 7)
    assert z["z_aux"].shape == (20, 48)
    both = torch.cat((z["z_aux"], model.h_phi.inverse(z["z_h"], y)), 1)
    torch.testing.assert_close(model.decode(both), x)
