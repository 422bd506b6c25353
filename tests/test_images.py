"""Own images: folders of files and .npz files, what is read of them and what is refused."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import PROJECT, load_tiny, options, run_script, runs, words
from PIL import Image
from sklearn.datasets import load_digits

from experiments import obfuscation, pictures
from utils import images
from utils.data import Augmentation, SemiSupervisedData
from utils.errors import BadInput
from utils.metrics import read_metrics

CLASSES = ("eins", "null", "zwei & $x")      # alphabetically, with characters of HTML and TeX
DIGITS = load_digits()


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path):
    """8 x 8 digits: 8, 12 and 16 of three classes, 40 unlabelled, 5 of each class for the test."""
    root = tmp_path / "own"
    grey = (DIGITS.images * 15.9).astype(np.uint8)
    for name, digit, n in zip(CLASSES, (1, 0, 2), (8, 12, 16)):
        members = grey[DIGITS.target == digit]
        for i, image in enumerate(members[:n + 5]):
            write(root / ("train" if i < n else "test") / name / f"{i:03}.png", image)
    for i, image in enumerate(grey[-40:]):
        write(root / "train" / "unlabelled" / f"{i:03}.png", image)
    return root


def load(root, **changes):
    return load_tiny(**{"data": "folder", "data_root": str(root), "num_examples": -1,
                        "supervised": 6, **changes})


def test_a_run_on_a_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = options(data="folder", data_root=folder, num_examples=-1, supervised=9, epochs=2)
    assert run_script(line) == 0
    out = capsys.readouterr().out
    assert "9 labelled, 67 unlabelled, 15 test" in words(out)
    assert "0 eins, 1 null, 2 zwei & $x" in words(out.replace("\xa0", " "))
    run, = runs(tmp_path)
    page = (run / "report.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in ("eins", "null", "zwei &amp; $x"))
    assert (run / "samples.png").exists() and not (run / "traceback.txt").exists()
    assert run_script(["--pretrained", str(run)]) == 0
    assert run_script(["--config", str(PROJECT / "configs" / "folder.yaml"), "--data_root",
                       str(folder), "--epochs", "2", "--train_bs", "32", "--log_each", "1",
                       "--device", "cpu", "--tmp"]) == 0
    # Another method, or run, on the same labels.
    again = [*line, "--labelled", str(run / "labelled.txt"), "--data_seed", "5"]
    assert run_script(again) == 0
    _, second = runs(tmp_path)
    assert (second / "labelled.txt").read_text() == (run / "labelled.txt").read_text()
    assert read_metrics(second / "metrics.csv")[-1]["test_acc"] == pytest.approx(
        read_metrics(run / "metrics.csv")[-1]["test_acc"])


def test_labels_of_a_folder(folder):
    data = load(folder)
    assert data.classes == CLASSES and data.shape == (1, 8, 8)
    assert torch.bincount(data.train_y[data.labelled]).tolist() == [2, 2, 2]
    everything = load(folder, supervised=-1)
    assert torch.bincount(everything.train_y[everything.labelled]).tolist() == [8, 12, 16]
    assert len(everything.unlabelled) == 40
    assert torch.bincount(load(folder, supervised="1,5,2").train_y + 1).tolist() == [68, 1, 5, 2]
    held_out = load(folder, validation=18)
    assert torch.bincount(held_out.val_y).tolist() == [4, 6, 8] and len(held_out.train_x) == 58
    (folder / "train" / "unlabelled").rename(folder / "train" / "unlabeled")
    write(folder / "train" / ".cache" / "x.png", np.zeros((8, 8), np.uint8))
    density = load(folder, supervised=0)
    assert len(density.train_x) == 76
    assert not len(density.labelled) and density.n_classes == 3
    for image in (folder / "train" / "unlabeled").iterdir():
        image.unlink()
    assert not len(load(folder, supervised=-1).unlabelled)


def test_without_test_images(folder, tmp_path, monkeypatch, capsys):
    """A run on validation images alone; what needs test images says so."""
    monkeypatch.chdir(tmp_path)
    (folder / "test").rename(tmp_path / "away")
    line = options(data="folder", data_root=folder, num_examples=-1, epochs=1, validation=9,
                   supervised=6, test="false")
    assert run_script(line) == 0
    run, = runs(tmp_path)
    assert run_script(["--pretrained", str(run), "--test", "true"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run_script(["--pretrained", str(run)]) == 0
    assert "Validation error" in capsys.readouterr().out
    with pytest.raises(BadInput, match="this needs test images"):
        pictures.main(["redrawn", "--pretrained", str(run), "--save", "redrawn.png"])


def test_colours_in_test_images_alone(folder, tmp_path, monkeypatch):
    """Without these, a model of colour images gets grey ones in three channels."""
    monkeypatch.chdir(tmp_path)
    write(folder / "test" / "eins" / "colour.png",
          np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))
    assert run_script(options(data="folder", data_root=folder, num_examples=-1, epochs=1,
                              validation=9, supervised=6)) == 0
    run, = runs(tmp_path)
    assert run_script(["--pretrained", str(run), "--test", "false"]) == 0
    assert load(folder, test=False, validation=9).shape == (1, 8, 8)


def test_names_in_the_picture_of_latents():
    z = torch.randn(12, 4)
    names = ("_eins", "a$^$b", "x" * 40)
    figure = obfuscation.plot_latents({"z_f": z, "z_h": z}, torch.arange(12) % 3, 0, names)
    figure.canvas.draw()
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "0 _eins", "1 a$^$b", f"2 {'x' * 13}..."]
    assert not obfuscation.plot_latents({"z_f": z, "z_h": z}, torch.arange(12) % 3, 0,
                                        "012").legends


def test_a_density_of_a_folder(folder, tmp_path, monkeypatch):
    """A run without labels can be evaluated, resumed, and its latents probed with all labels."""
    monkeypatch.chdir(tmp_path)
    assert run_script(options(data="folder", data_root=folder, num_examples=-1, epochs=1,
                              supervised=0)) == 0
    run, = runs(tmp_path)
    assert run_script(["--pretrained", str(run)]) == 0
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 0
    _, data, _ = pictures.load(["--pretrained", str(run), "--supervised", "-1"])
    assert data.classes == CLASSES


@pytest.mark.parametrize("changes, message", [
    ({"supervised": 60}, "at most the 36 training examples with labels"),
    ({"supervised": "1,2"}, "has 2 numbers, and there are 3 classes: eins, null, zwei"),
    ({"supervised": "9,1,1"}, "have 8 of class eins, and 9 would be needed"),
    ({"validation": 35}, "leave as many of the 36 training examples with labels"),
    ({"labelled": "none.txt"}, "no file none.txt"),
    ({"image_size": 8, "data": "digits"}, "image_size is for data folder"),
    ({"data_root": "nowhere"}, "there is no folder nowhere/train")])
def test_settings_that_do_not_fit_a_folder(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        load(**{"root": folder, **changes})


@pytest.mark.parametrize("ids, message", [
    ("0 1 99", "has 99, which is not among"), ("0 0 9 62", "has 0 twice"),
    ("0 1 2", "no example of class null"), ("0 9 20 -1", "has -1, which"),
    ("0 9 62 50", "has 50, an example without a label"), ("0.5", "does not consist of indices"),
    ("", "no example of class eins")])
def test_wrong_files_of_labelled_examples(folder, tmp_path, ids, message):
    (tmp_path / "ids.txt").write_text("\n".join(ids.split()))
    with pytest.raises(BadInput, match=message):
        load(folder, labelled=str(tmp_path / "ids.txt"))


def broken(path):
    path.write_bytes(path.read_bytes()[:60])


def transparent(path):
    Image.fromarray(np.full((8, 8, 4), 100, np.uint8)).save(path)


def sixteen_bits(path):
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(path)


def sixteen_bit_colours(path):
    """Pillow cannot write them, and reads them as if they had 8 bits."""
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    rows = b"".join(b"\0" + bytes(8 * 6) for _ in range(8))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def larger(path):
    Image.new("L", (12, 8)).save(path)


def misplaced(path):
    path.rename(path.parent.parent / path.name)


def alone(path):
    """The only file of a class, in no image format."""
    (path.parent.parent / "vier").mkdir()
    (path.parent.parent / "vier" / "003.png.gif").write_bytes(path.read_bytes())


def unprintable(path):
    path.parent.rename(path.parent.parent / "003.png\n")


@pytest.mark.parametrize("damage, message", [
    (broken, "is not an image that can be read"), (transparent, "has transparent pixels"),
    (sixteen_bits, "more than 8 bits"), (sixteen_bit_colours, "more than 8 bits"),
    (larger, "has 12 x 8 pixels, and"), (misplaced, "is in no folder of a class"),
    (alone, "there are no images in"), (unprintable, "a class whose name cannot be shown")])
def test_images_that_are_refused(folder, damage, message):
    damage(folder / "train" / "null" / "003.png")
    with pytest.raises(BadInput, match=message) as error:
        load(folder)
    assert "003.png" in str(error.value) or damage is alone


@pytest.mark.parametrize("damage, message", [
    ("test/vier", "has a class vier"), ("test/unlabeled", "5 test examples have no label")])
def test_classes_of_test_images_alone(folder, damage, message):
    (folder / "test" / "eins").rename(folder / damage)
    with pytest.raises(BadInput, match=message):
        load(folder)


def test_one_class_is_for_density_alone(folder):
    for part in ("train", "test"):
        for name in CLASSES[1:]:
            (folder / part / name).rename(folder.parent / f"{part}{name[0]}")
    with pytest.raises(BadInput, match="have 1 class, and a classifier needs two"):
        load(folder)
    assert load(folder, supervised=0).n_classes == 1


@pytest.mark.parametrize("mode, channels", [("RGB", 1), ("P", 1), ("1", 1), ("RGBA", 1), ("LA", 1)])
def test_kinds_of_grey_images(folder, mode, channels):
    path = folder / "train" / "null" / "003.png"
    before = np.array(Image.open(path))
    Image.open(path).convert(mode).save(path)
    data = load(folder, supervised=-1)
    assert data.shape == (channels, 8, 8)
    if mode != "1":
        assert (data.train_x[8 + 3, 0].numpy() == before).all()


def test_colours_and_sizes(folder):
    write(folder / "train" / "null" / "003.png", np.random.default_rng(0).integers(
        256, size=(8, 8, 3), dtype=np.uint8))
    assert load(folder).shape == (3, 8, 8)
    larger(folder / "train" / "null" / "004.png")
    assert load(folder, image_size=16).shape == (3, 16, 16)


def test_the_cache(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "CACHE_SECONDS", -1)
    plain = load(folder, pretrained="x").train_x
    assert not (tmp_path / "logs").exists()
    load(folder)
    cache, = (tmp_path / "logs").rglob("*.npz")
    assert "Cache" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(images, "_read_all", None)
        assert torch.equal(load(folder).train_x, plain)
    path = folder / "train" / "null" / "003.png"
    write(path, np.zeros((8, 8), np.uint8))
    assert not torch.equal(load(folder).train_x, plain)
    assert list((tmp_path / "logs").rglob("*.npz")) == [cache]      # written anew
    cache.write_bytes(cache.read_bytes()[:-100])
    assert not load(folder).train_x[8 + 3].any()


def test_links_and_names_of_files(folder):
    expected = load(folder).train_x
    (folder / "train" / "null" / "self").symlink_to(".")
    os.rename(folder / "train" / "null" / "003.png",
              os.fsencode(folder / "train" / "null") + b"/003\xe9.png")
    assert torch.equal(load(folder).train_x, expected)


def test_a_run_whose_files_have_changed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load(folder)
    (tmp_path / "ids.txt").write_text("0 9 62")
    line = options(data="folder", data_root=folder, num_examples=-1, epochs=1)
    assert run_script([*line, "--labelled", "ids.txt"]) == 0
    run, = runs(tmp_path)
    (tmp_path / "ids.txt").unlink()             # the run has the same list
    assert run_script(["--pretrained", str(run)]) == 0
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 0
    (folder / "train" / "eins").rename(folder / "train" / "acht")
    (folder / "test" / "eins").rename(folder / "test" / "acht")
    capsys.readouterr()
    for argv in (["--pretrained", str(run)], ["--resume", str(run), "--epochs", "3"]):
        assert run_script(argv) == 2
        assert "data.yaml names other classes" in capsys.readouterr().err
    (folder / "train" / "acht").rename(folder / "train" / "eins")
    (folder / "test" / "acht").rename(folder / "test" / "eins")
    (run / "labelled.txt").write_text("0 9 61")
    (tmp_path / "ids.txt").write_text("0 9 62")
    assert run_script(["--resume", str(run), "--epochs", "3"]) == 2
    assert "labelled.txt lists other examples" in capsys.readouterr().err
    (run / "labelled.txt").write_text("0 9 62")
    again = [*line, "--labelled", str(run / "labelled.txt")]
    write(folder / "train" / CLASSES[2] / "zzz.png", np.zeros((8, 8), np.uint8))
    assert run_script(again) == 0                       # what comes later is no matter
    beside = tmp_path / "beside"                        # another program's file of that name
    beside.mkdir()
    (beside / "data.yaml").write_text("nc: 3")
    (beside / "labelled.txt").write_text("0 9 62")
    assert run_script([*line, "--labelled", str(beside / "labelled.txt")]) == 0
    write(folder / "train" / "eins" / "000a.png", np.zeros((8, 8), np.uint8))
    for argv in (again, ["--resume", str(run), "--epochs", "3"]):
        assert run_script(argv) == 2
        assert "labelled.txt is of other images" in capsys.readouterr().err


def arrays(**changes):
    y = np.arange(60) % 3
    x = np.random.default_rng(0).integers(256, size=(60, 8, 8), dtype=np.uint8)
    return {"x_train": x, "y_train": np.where(np.arange(60) < 30, y, -1), "x_test": x[:9],
            "y_test": y[:9], **changes}


@pytest.mark.parametrize("changes, shape", [
    ({}, (1, 8, 8)), ({"y_train": np.arange(60).astype(np.uint8) % 3}, (1, 8, 8)),
    ({"x_test": np.random.default_rng(1).integers(256, size=(9, 8, 8, 3), dtype=np.uint8)},
     (3, 8, 8)),
    ({f"x_{part}": np.random.default_rng(1).integers(256, size=(n, 8, 8, 3), dtype=np.uint8)
      for part, n in (("train", 60), ("test", 9))}, (3, 8, 8))])
def test_arrays(tmp_path, changes, shape):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    data = load(tmp_path / "own.npz", data="npz")
    assert data.shape == shape and data.classes == ("0", "1", "2") and len(data.labelled) == 6
    own = SemiSupervisedData.from_arrays(**arrays(**changes), supervised=6)
    assert vars(own).keys() == vars(data).keys()
    for name in ("train_x", "train_y", "test_x", "test_y", "labelled", "unlabelled"):
        assert torch.equal(getattr(own, name), getattr(data, name)), name


def test_own_arrays_with_options():
    data = SemiSupervisedData.from_arrays(**arrays(), supervised=(1, 2, 4), classes=tuple("abc"),
                                          augmentation=Augmentation(10, 0, 0))
    assert data.train_y[data.labelled].bincount().tolist() == [1, 2, 4] and data.classes[1] == "b"
    assert data.sample_batch(4, torch.Generator()).copies.shape == (4, 1, 8, 8)
    held_out = SemiSupervisedData.from_arrays(*list(arrays().values())[:2], validation=9)
    assert [len(x) for x in (held_out.train_x, held_out.val_x, held_out.test_x)] == [51, 9, 0]
    assert held_out.val_y.bincount().tolist() == [3, 3, 3] and len(held_out.labelled) == 21
    points = np.arange(24).reshape(12, 2)
    data = SemiSupervisedData.from_arrays(points, [0, 1, -1] * 4, points[:2], [0, 1],
                                          grey_levels=None)
    assert data.shape == (2, 1, 1) and data.train_x.dtype == torch.float32
    assert len(data.labelled) == 8


@pytest.mark.parametrize("form", [
    np.array, torch.tensor, np.asfortranarray, lambda x: x[..., ::-1][..., ::-1],
    lambda x: x.astype(x.dtype.newbyteorder(">"))])
def test_own_arrays_are_copied(form):
    """Of any form: what their owner does with them later is no matter."""
    own = {name: form(values) for name, values in arrays().items()}
    data = SemiSupervisedData.from_arrays(**own, supervised=np.int64(6))
    for values in own.values():
        values[:] = 0
    expected = arrays()
    assert np.array_equal(data.train_x[:, 0], expected["x_train"])
    assert np.array_equal(data.test_y, expected["y_test"]) and len(data.labelled) == 6


@pytest.mark.parametrize("changes, message", [
    ({"supervised": 2}, "at least one for each of the 3 classes"),
    ({"supervised": (1, -1, 2)}, "at least 1 of each class"),
    ({"supervised": ()}, "at least 1 of each class"),
    ({"supervised": True}, "must be an integer, or one for each class, not True"),
    ({"supervised": 6.0}, "must be an integer, or one for each class, not 6.0"),
    ({"supervised": "6,b"}, "must be an integer, or one for each class, not '6,b'"),
    ({"y_train": np.full(60, 2**64 - 1, np.uint64)}, "there is a class 18446744073709551615"),
    ({"x_train": [[1], [2, 3]]}, "x_train "),
    ({"augmentation": (1, 2, 3)}, "must be an Augmentation"),
    ({"augmentation": Augmentation(float("nan"), 0, 0)}, "rotation: must be .* not nan"),
    ({"augmentation": Augmentation(10, 5, 0)}, "scaling: must be at most 0.9"),
    ({"augmentation": Augmentation(10, 0, "a")}, "shift: must be of type float"),
    ({"sup_sample_weight": "a"}, "sup_sample_weight: must be of type float"),
    ({"spread_labels": 1}, "spread_labels: must be at most"),
    ({"seed": 1.5}, "seed: must be of type int"),
    ({"validation": (1, 2)}, "validation: must be of type int"),
    ({"validation": 28}, "validation must be at least one"),
    ({"y_test": None}, "x_test and y_test belong together"),
    ({"grey_levels": 256.5}, "grey_levels: must be of type int"),
    ({"supervised": (10, 10, 11)}, "have 10 of class 2, and 11 would be needed"),
    ({"y_test": [0, 1, -1] * 3}, "test_y has class -1"),
    ({"classes": ("a", "b")}, "labels of 3 classes, and names of 2"),
    ({"grey_levels": 17}, "must have them from 0 to 16"),
    ({"grey_levels": None}, "points must be numbers of shape .N, D.")])
def test_own_arrays_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SemiSupervisedData.from_arrays(**arrays(**changes))


@pytest.mark.parametrize("changes, message", [
    ({"x_train": np.zeros((60, 8, 8))}, "x_train has .* images must be uint8"),
    ({"x_train": np.zeros((60, 64), np.uint8)}, "has shape .60, 64."),
    ({"x_test": np.zeros((0, 8, 8), np.uint8)}, "x_test is empty"),
    ({"y_train": np.zeros(60)}, "labels must be integers"),
    ({"y_train": np.zeros(59, int)}, "labels must be integers of shape .60,."),
    ({"y_train": np.full(60, -2)}, "y_train has a label -2: labels are classes from 0"),
    ({"x_train": np.zeros((60, 3, 8, 8), np.uint8)}, "of shape .N, H, W. or .N, H, W, 3."),
    ({"y_train": np.full(60, 10**9)}, "there is a class 1000000000"),
    ({"x_test": np.zeros((9, 12, 12), np.uint8)}, "x_test has shape .9, 12, 12.: all must be of"),
    ({"y_train": np.array([None] * 60)}, "no .npz file that can be read")])
def test_arrays_that_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(BadInput, match=message):
        load(tmp_path / "own.npz", data="npz")
    if "npz" not in message:
        with pytest.raises(ValueError, match=message):
            SemiSupervisedData.from_arrays(**arrays(**changes))


def test_files_that_are_no_arrays(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "few.npz", x_train=np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    for name, message in (("one.npy", "no .npz file"), ("few.npz", "has no y_train"),
                          ("text.npz", "no .npz file"), ("none.npz", "no .npz file"),
                          (".", "no .npz file")):
        with pytest.raises(BadInput, match=message):
            load(tmp_path / name, data="npz")


@pytest.mark.parametrize("data, name, class_", [
    ("fashion-mnist", "FashionMNIST", "trousers"), ("kmnist", "KMNIST", "ki")])
def test_datasets_in_mnist_s_format(mnist_root, tmp_path, monkeypatch, data, name, class_):
    """With MNIST's images, of the same format."""
    def refuse(*args):
        raise BadInput("would download")
    (tmp_path / name).mkdir()
    (tmp_path / name / "raw").symlink_to((mnist_root / "MNIST" / "raw").resolve())
    loaded = load(tmp_path, data=data, supervised=20)
    assert loaded.classes[1] == class_ and len(loaded.train_x) == 60_000
    # Files of the same names and sizes, of another dataset.
    monkeypatch.setattr("utils.datasets._download_mnist", refuse)
    for root, other in ((mnist_root / "MNIST" / "raw", data), (tmp_path / name, "mnist")):
        with pytest.raises(BadInput, match="would download"):
            load(root, data=other)
