"""Bad input: one line on stderr, exit code 2, and no run created."""

import io
import math

import filelock
import pytest
import torch
import torchvision
from conftest import PROJECT, TINY, options, run_script, runs

from models import build_model
from utils.metrics import read_metrics

CONFIGS = PROJECT / "configs"
POINTS = {"data": "moons", "model": "toy", "ssl_dim": -1, "ssl_l": 1}

CASES = {
    # name: (command line, what the line must say)
    "no config file": (["--config", "missing.yaml"], "missing.yaml"),
    "config is a folder": (["--config", "."], "config file"),
    "bad YAML": (["--config", "bad.yaml"], "bad.yaml is not YAML"),
    "YAML that is no mapping": (["--config", "list.yaml"], "not a YAML mapping"),
    "unknown key": (["--config", "unknown.yaml"], "unknown setting epoch: did you mean epochs?"),
    "key with several values": (["--config", "several.yaml"], "lr takes one value"),
    "a key twice": (["--config", "twice.yaml"], "twice.yaml is not YAML: it has lr twice"),
    "YAML that is too deep": (["--config", "deep.yaml"], "deep.yaml is not YAML"),
    "empty --pretrained": (options(pretrained=""), "--pretrained has an empty value"),
    "empty --resume": (["--resume="], "--resume has an empty value"),
    "resume with a name that is too long": (["--resume", 300 * "x"], "no run to resume"),
    "name of 400 bytes": (options(name=100 * "\N{GRINNING FACE}"), "--name"),
    "name with a line break": (options(name="a\nb"), "--name"),
    "data in a path that is too long": (options(data="mnist", data_root=300 * "x"), "no MNIST in"),
    "MNIST of an older torchvision": (options(data="mnist", data_root="older"),
                                      "raw lacks train-images-idx3-ubyte"),
    "a CPU with a number": (options(device="cpu:3"), "device must be"),
    "weights that are not finite": (options(pretrained="nan.torch"), "not finite: base_h.logsigma"),
    "complex weights": (options(pretrained="complex.torch"), "complex.torch holds no weights"),
    "sparse weights": (options(pretrained="sparse.torch"), "sparse.torch holds no weights"),
    "unknown option": (options(sup_wieght=2),
                       "unknown setting --sup_wieght: did you mean --sup_weight?"),
    "abbreviated option": (["--epoch", "3"], "did you mean --epochs?"),
    "stray word": (["config.yaml"], "unknown setting config.yaml"),
    "wrong type": (options(epochs="many"), "--epochs: invalid int value"),
    "fraction for a whole number": (options(train_bs=2.5), "--train_bs: invalid int value"),
    "wrong type in the file": (["--config", "type.yaml"], "--seed: invalid int value"),
    "wrong flag": (options(deterministic="perhaps"), "true or false"),
    "no epochs": (options(epochs=0), "--epochs: must be at least 1"),
    "negative lr": (options(lr=-1), "--lr: must be more than 0"),
    "zero lr": (options(lr=0), "--lr"),
    "lr not a number": (options(lr="nan"), "--lr"),
    "infinite lr": (options(lr="inf"), "--lr"),
    "batch of one": (options(train_bs=1), "--train_bs: must be at least 2"),
    "negative weight decay": (options(weight_decay=-1), "--weight_decay"),
    "negative cl_weight": (options(cl_weight=-1), "--cl_weight"),
    "zero sup_weight": (options(sup_weight=0), "--sup_weight"),
    "zero sup_sample_weight": (options(sup_sample_weight=0),
                               "--sup_sample_weight: must be more than 0 or -1"),
    "negative seed": (options(seed=-1), "--seed"),
    "warm-up longer than the run": (options(lr_schedule="hat", lr_warmup=5, epochs=5),
                                    "lr_warmup 5"),
    "name that is a path": (options(name="a/b"), "--name"),
    "more labels than examples": (options(supervised=201), "supervised"),
    "fewer labels than classes": (options(supervised=9), "supervised"),
    "more examples than there are": (options(num_examples=5000), "num_examples 5000"),
    "contradictory classes": (options(ssl_nclasses=3), "ssl_nclasses is 3"),
    "ssl_dim too large": (options(ssl_dim=66), "ssl_dim"),
    "ssl_dim odd": (options(ssl_dim=15), "ssl_dim must be an even number"),
    "ssl_dim too small to split": (options(ssl_dim=2), "ssl_l"),
    "zero ssl_dim": (options(ssl_dim=0), "--ssl_dim"),
    "unknown data": (options(data="cifar"), "--data: invalid choice"),
    "unknown model": (options(model="glow"), "--model: invalid choice"),
    "unknown conv": (options(conv="lu"), "--conv: invalid choice"),
    "points for an image model": (options(data="moons"), "digits-masked"),
    "images for the toy model": (options(model="toy"), "toy"),
    "no MNIST and no network": (options(data="mnist", data_root="nowhere"), "configs/digits.yaml"),
    "truncated data": (options(data="mnist", data_root="truncated"),
                       "train-images-idx3-ubyte is truncated"),
    "unknown device": (options(device="tpu"), "device must be"),
    "weights that are not there": (options(pretrained="missing.torch"), "no file missing.torch"),
    "weights that are no checkpoint": (options(pretrained="text.torch"),
                                       "text.torch is no checkpoint"),
    "weights that need code to load": (options(pretrained="code.torch"),
                                       "code.torch is no checkpoint"),
    "weights that are a tensor": (options(pretrained="tensor.torch"), "tensor.torch"),
    "weights of another architecture": (options(pretrained="other.torch"), "another architecture"),
    "initial weights of another": (options(initial_weights="other.torch"), "another architecture"),
    "no initial weights": (options(initial_weights="typo.torch"), "no file typo.torch"),
    "weights that do not ship": (
        ["--config", str(CONFIGS / "moons.yaml"), "--device", "cpu", "--pretrained"],
        "no weights ship for moons.yaml (there is no pretrained/moons.torch): train them (python "
        f"train-flow-ssl.py --config {CONFIGS / 'moons.yaml'})"),
    "weights under a wrong key": (options(pretrained="wrong.torch"),
                                  "wrong.torch holds no weights"),
    "weights without names": (options(pretrained="numbered.torch"),
                              "numbered.torch holds no weights"),
    "weights cut off": (options(pretrained="short.torch"), "short.torch is no checkpoint"),
    "seed too large": (options(seed=2**64), "--seed: must be at most"),
    "data_seed too large": (options(data_seed=2**31), "--data_seed: must be at most"),
    "number with 400 digits": (options(epochs="1" + 400 * "0"), "--epochs: must be at most"),
    "too many threads": (options(threads=2**40), "--threads: must be at most"),
    "name too long": (options(name=300 * "x"), "--name"),
    "no run to resume": (["--resume", "nowhere"], "nowhere"),
    "unknown precision": (options(precision="fp16"), "--precision: invalid choice"),
    "TF32 on a CPU": (options(precision="tf32"), "precision tf32"),
    "CUDA graph on a CPU": (options(cuda_graph="on"), "cuda_graph on needs a GPU"),
    "negative time limit": (options(time_limit=-1), "--time_limit: must be at least 0"),
    "negative cons_weight": (options(cons_weight=-1), "--cons_weight"),
    "consistency of points": (options(**POINTS, cons_weight=1), "cons_weight needs images"),
    "an average that never changes": (options(ema=1), "--ema: must be at most"),
    "an average without examples to judge it": (options(ema=0.9), "ema needs validation examples"),
    "nothing to evaluate": (options(test="false"), "test false needs validation examples"),
    "fewer validation examples than classes": (
        options(validation=9), "validation must be at least one for each of the 10 classes"),
    "all examples for validation": (options(validation=1430), "leave as many of the 1437"),
    "more examples than validation leaves": (
        options(validation=1300, num_examples=200), "more than the 137 training examples of digits "
        "beside the 1300 for validation"),
    "pixels of points": (options(**POINTS, pixels="marginal"), "pixels marginal is for images"),
    "pyramid of points": (options(**{**POINTS, "model": "pyramid"}), "needs images of one channel"),
    "pyramid with another z_f": (options(model="pyramid", ssl_dim=32), "needs ssl_dim 16"),
    "pyramid with another first layer": (options(model="pyramid", pixels="marginal"),
                                         "pixels marginal is for other models"),
    "pyramid with position_bias": (options(model="pyramid", position_bias="true"),
                                   "position_bias is for other models"),
    "unknown optimizer": (options(optimizer="sgd"), "--optimizer: invalid choice"),
    "position_bias of points": (options(**POINTS, position_bias="true"),
                                "position_bias is for images"),
    "points without noise": (options(**POINTS, clf_noise="false"), "clf_noise false is for images"),
    "priors without consistency": (options(spread_labels=0.5), "it needs cons_weight"),
    "priors from label spreading alone": (options(spread_labels=1, cons_weight=1),
                                          "--spread_labels: must be at most"),
    "adversarial training of another model": (options(vat_weight=1), "is for model pyramid"),
    "averaged targets without an average": (
        options(target_weights="averaged", cons_weight=1), "needs a moving average"),
    "averaged targets without consistency": (
        options(target_weights="averaged", ema=0.9, validation=100), "for the consistency term"),
    "negative warm-up": (options(warmup_steps=-1), "--warmup_steps"),
    "no draws": (options(draws=0), "--draws: must be at least 1"),
    "negative width": (options(width=-1), "--width"),
    "weights that do not ship for one's own config": (
        ["--config", "mine.yaml", "--pretrained"],
        "no weights ship for mine.yaml (there is no pretrained/mine.torch)"),
    "shipped weights for another model": (
        ["--config", str(CONFIGS / "digits.yaml"), "--model", "mnist-glow", "--device", "cpu",
         "--pretrained"], "digits.torch holds weights of another architecture"),
    "one epoch, at learning rate zero": (options(lr_schedule="linear", epochs=1),
                                         "a single one would change nothing"),
    "confidence of more than one": (options(confidence=1.5), "--confidence: must be at most"),
    "negative rotation": (options(aug_rotation=-2), "--aug_rotation: must be at least 0 or -1"),
    "averaged weights of a file that has none": (
        options(pretrained="other.torch", weights="averaged"), "has no averaged weights"),
    "averaged weights of no file": (options(weights="averaged"), "weights averaged is for"),
    "bfloat16 for points": (options(**POINTS, precision="bf16"), "precision bf16 is for images"),
    "negative micro_bs": (options(micro_bs=-1), "--micro_bs"),
}
CASES["no such GPU"] = (options(device="cuda:99"), "no device cuda:99")
if not torch.cuda.is_available():
    CASES["no GPU"] = (options(device="cuda"), "sees 0 GPUs")


def no_network(root, **kwargs):
    """MNIST on an offline machine; where an older torchvision's files lie it downloads nothing."""
    if not (root / "MNIST" / "processed").exists():
        raise RuntimeError("Error downloading")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the files that the cases name."""
    monkeypatch.chdir(tmp_path)
    mine = "".join(f"{key}: {value}\n" for key, value in TINY.items())
    for name, text in {"bad.yaml": "lr: [1\nepochs: }", "list.yaml": "- lr",
                       "unknown.yaml": "epoch: 3", "several.yaml": "lr: [1, 2]",
                       "type.yaml": "seed: 1.5", "mine.yaml": mine,
                       "twice.yaml": "lr: 1\nepochs: 3\nlr: 2",
                       "deep.yaml": "lr: " + 3000 * "[" + 3000 * "]",
                       "text.torch": "not weights"}.items():
        (tmp_path / name).write_text(text)
    torch.save({"model": print}, tmp_path / "code.torch")
    torch.save(torch.zeros(3), tmp_path / "tensor.torch")
    torch.save({"model": torch.zeros(3)}, tmp_path / "wrong.torch")
    torch.save({0: torch.zeros(3)}, tmp_path / "numbered.torch")
    (tmp_path / "short.torch").write_bytes(b"G")
    other = build_model({**TINY, "ssl_hd": 9}, (1, 8, 8), 10)
    torch.save(other.state_dict(), tmp_path / "other.torch")
    own = build_model(TINY, (1, 8, 8), 10).state_dict()
    for name, convert in {"nan": lambda v: v * math.nan, "complex": lambda v: v.cfloat(),
                          "sparse": lambda v: v.to_sparse()}.items():
        changed = {**own, "base_h.logsigma": convert(own["base_h.logsigma"])}
        torch.save(changed, tmp_path / f"{name}.torch")
    (tmp_path / "older" / "MNIST" / "processed").mkdir(parents=True)
    raw = tmp_path / "truncated" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    header = b"\x00\x00\x08\x03" + b"\x00\x00\xea\x60\x00\x00\x00\x1c\x00\x00\x00\x1c"
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(header)
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, folder, capsys):
    argv, message = CASES[name]
    assert run_script(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert err.startswith("train-flow-ssl.py: error: ")
    assert not any(runs(folder, kind) for kind in ("runs", "fails", "tmp", "index"))


@pytest.mark.parametrize("damage", [
    lambda text: text.replace(",", ";"), lambda text: text[:-20].rsplit(",", 5)[0] + "\n",
    lambda text: text.replace("epoch", "era"), lambda text: text.replace("1,", ",", 1),
    lambda text: "", lambda text: None])
def test_damaged_metrics_of_a_resumed_run(folder, capsys, damage):
    """Nothing changes: a new metrics.csv without the earlier rows would be a loss."""
    assert run_script(options(epochs=2)) == 0
    run, = runs(folder)
    text = damage((run / "metrics.csv").read_text())
    if text is None:
        (run / "metrics.csv").unlink()
    else:
        (run / "metrics.csv").write_text(text)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    assert run_script(["--resume", str(run)]) == 2
    assert "metrics.csv" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert runs(folder) == [run]
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_metrics_that_a_spreadsheet_saved(folder):
    assert run_script(options(epochs=1)) == 0
    run, = runs(folder)
    path = run / "metrics.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 0
    assert [row["epoch"] for row in read_metrics(path)] == [1, 2]


def test_a_run_that_another_process_trains(folder, capsys):
    assert run_script(options(epochs=1)) == 0
    run, = runs(folder)
    with filelock.FileLock(run / ".lock"):
        capsys.readouterr()
        assert run_script(["--resume", str(run), "--epochs", "2"]) == 2
        assert "another process trains the run" in capsys.readouterr().err
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 0
    assert not (run / ".lock").exists()


def test_a_folder_that_cannot_be_written(folder, capsys, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setattr("utils.settings.Path.cwd", lambda: folder / "file")
    assert run_script(options()) == 2
    assert "cannot create the folders of runs" in capsys.readouterr().err


def test_missing_mnist_names_folder_files_and_the_offline_config(folder, capsys):
    assert run_script(options(data="mnist", data_root="nowhere")) == 2
    err = capsys.readouterr().err
    assert "nowhere/MNIST/raw" in err and "t10k-labels-idx1-ubyte" in err and "--data_root" in err


def test_mismatched_weights_name_the_first_three(folder, capsys):
    assert run_script(options(pretrained="other.torch")) == 2
    err = capsys.readouterr().err
    assert "(9, 18) in the file and (8, 18) in the model" in err
    assert err.count(" in the file and ") == 3 and "more" in err


def test_damaged_checkpoint(folder, capsys):
    assert run_script(options(epochs=1, ema=0.5, validation=100)) == 0
    run, = runs(folder)
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    capsys.readouterr()
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    content = torch.load(io.BytesIO(whole))
    optimizer, average = content["optimizer"], content["average"]
    fewer = {name: value for name, value in average.items() if name != "base_h.logsigma"}
    older = {key: value for key, value in content.items() if key != "format"}
    for damaged, message in (
            (older, "has format 1, and this version reads format 4"),
            ({**content, "format": 3}, "has format 3"),
            ({**content, "sums": {"loss": torch.zeros(())}}, "is not a checkpoint of a run"),
            (content["model"], "is not a checkpoint of a run"),
            ({**content, "average": fewer}, "the optimiser's state does not fit"),
            ({**content, "average": {}}, "the optimiser's state does not fit"),
            ({**content, "optimizer": {**optimizer, "exp_inf": fewer}}, "does not fit"),
            ({**content, "optimizer": {"step": optimizer["step"]}}, "does not fit"),
            ({**content, "settings": {**content["settings"], "lr": 0.5}},
             "was trained with lr 0.5, and the run's params.yaml says 0.001")):
        torch.save(damaged, run / "checkpoint.pt")
        assert run_script(["--resume", str(run), "--epochs", "2"]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    (run / "checkpoint.pt").unlink()
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 2
    assert "checkpoint.pt" in capsys.readouterr().err


def test_what_the_environment_lacks(folder, monkeypatch, capsys):
    monkeypatch.setattr("training.speed.shutil.which", lambda name: None)
    assert run_script(options(compile="on")) == 2
    assert "needs a C++ compiler" in capsys.readouterr().err
    # As torchrun --nproc_per_node 3 sets them.
    torchrun = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0",
                "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with monkeypatch.context() as patched:
        for key, value in torchrun.items():
            patched.setenv(key, value)
        assert run_script(options(train_bs=64)) == 2
        assert "train_bs 64 is not a multiple of the 3 processes" in capsys.readouterr().err
    for wrong in ({"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "many"},
                  {**torchrun, "RANK": "3"}, {**torchrun, "LOCAL_RANK": "3"}):
        with monkeypatch.context() as patched:
            for key, value in wrong.items():
                patched.setenv(key, value)
            assert run_script(options()) == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and "start with torchrun, or unset them" in err
