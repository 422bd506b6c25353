"""Bad input: one line on stderr, exit code 2, and no run created."""

import io
import math
from pathlib import Path

import filelock
import pytest
import torch
import torchvision
from conftest import POINTS, PROJECT, TINY, options, run_script, runs

from models import build_model
from utils.metrics import read_metrics

CONFIGS = PROJECT / "configs"

# What the line says after "--OPTION: ", and the options with values of which it says that.
WRONG_VALUES = {
    "invalid int value": [("epochs", "many"), ("train_bs", 2.5)],
    "must be true or false": [("position_bias", "perhaps")],
    "invalid choice": [("data", "cifar"), ("model", "glow"), ("conv", "lu"), ("precision", "fp16"),
                       ("optimizer", "sgd")],
    "must be at least 0": [
        ("seed", -1), ("weight_decay", -1), ("cl_weight", -1), ("cons_weight", -1), ("width", -1),
        ("warmup_steps", -1), ("micro_bs", -1), ("time_limit", -1)],
    "must be at least 0 or -1": [("aug_rotation", -2), ("supervised", -2)],
    "must be at least 1": [("epochs", 0), ("draws", 0)],
    "must be at least 2": [("train_bs", 1), ("ssl_dim", 0)],
    "must be more than 0": [("lr", -1), ("lr", 0), ("lr", "nan"), ("sup_weight", 0)],
    "must be more than 0 or -1": [("sup_sample_weight", 0)],
    "must be at most": [
        ("seed", 2**64), ("data_seed", 2**31), ("threads", 2**40), ("epochs", "1" + 400 * "0"),
        ("lr", "inf"), ("ema", 1), ("spread_labels", 1)],
    "must be a valid suffix of a directory name": [
        ("name", "a/b"), ("name", "a\nb"), ("name", 300 * "x"),
        ("name", 100 * "\N{GRINNING FACE}")],          # 400 bytes
}
MNIST, PYRAMID = {"data": "mnist"}, {"model": "pyramid"}
AVERAGED = {"target_weights": "averaged"}
CASES = [
    # (command line, or changes of TINY, and what the line must say)
    (["--config", "missing.yaml"], "missing.yaml"),
    (["--config", "."], "config file"),
    (["--config", "bad.yaml"], "bad.yaml is not YAML"),
    (["--config", "list.yaml"], "not a YAML mapping"),
    (["--config", "empty.yaml"], "empty.yaml has no settings"),
    (["--config", "no-value.yaml"], "no-value.yaml: lr has no value"),
    (["--config", "mine.yaml", "--config=several.yaml"],
     "--config is given twice: write `extends: FILE` into one of the files"),
    (["--lr", "1", "--epochs=2", "--lr=3"], "--lr is given twice"),
    (["--config="], "--config has an empty value"),
    (["--initial_weights", ""], "--initial_weights has an empty value"),
    (["--data_root=--"], "data_root cannot be --"),
    (["--config", "unknown.yaml"],
     "unknown settings epoch (did you mean epochs?), learning_rate (did you mean lr?)"),
    (["--config", "several.yaml"], "lr takes one value"),
    (["--config", "twice.yaml"], "twice.yaml is not YAML: it has lr twice"),
    (["--config", "deep.yaml"], "deep.yaml is not YAML"),
    (["--config", "type.yaml"], "--seed: invalid int value"),
    (["--epoch", "3"], "did you mean --epochs?"),
    (["config.yaml"], "unexpected config.yaml (did you mean --config config.yaml?)"),
    (["train"], "unexpected train"),
    ({"sup_wieght": 2}, "unknown setting --sup_wieght (did you mean --sup_weight?)"),
    (["--learning_rate", "1", "--batch-size=3", "--seed_everything", "4", "--qqq"],
     "unknown settings --learning_rate (did you mean --lr?), --batch-size (did you mean "
     "--train_bs?), --seed_everything (did you mean --seed?), --qqq"),
    (["c.yaml", "-epochs", "3", "--lr_", "-1", "d.yml"],
     "unknown settings -epochs (did you mean --epochs?), --lr_ (did you mean --lr?); unexpected "
     "c.yaml (did you mean --config c.yaml?); unexpected d.yml (did you mean --config d.yml?)"),
    (["--resume="], "--resume has an empty value"),
    (["--resume", 300 * "x"], "no run to resume"),
    (["--resume", "nowhere"], "nowhere"),
    ({"device": "tpu"}, "device must be"),
    ({"device": "cpu:3"}, "device must be"),
    ({"device": "cuda:99"}, "no device cuda:99"),
    ({"precision": "tf32"}, "precision tf32"),
    ({"cuda_graph": "on"}, "cuda_graph on needs a GPU"),

    ({**MNIST, "data_root": 300 * "x"}, "no MNIST in"),
    ({**MNIST, "data_root": "truncated"}, "train-images-idx3-ubyte is truncated"),
    ({"supervised": 201}, "supervised"),
    ({"supervised": 9}, "supervised"),
    ({"supervised": 0, "cl_weight": 1, "cons_weight": 1, "spread_labels": 0.5},
     "(supervised 0) the density alone is trained: set cl_weight, cons_weight, spread_labels to 0"),
    ({"num_examples": 5000}, "num_examples 5000"),
    ({"test": "false"}, "test false needs validation examples"),
    ({"validation": 9}, "validation must be at least one for each of the 10 classes"),
    ({"validation": 1430}, "leave as many of the 1437"),
    ({"validation": 1300}, "more than the 137 training examples of digits beside the 1300 for "
                           "validation"),

    ({"ssl_dim": 66}, "ssl_dim"),
    ({"data": "moons"}, "digits-masked"),
    ({**POINTS, **PYRAMID}, "needs images of one channel"),
    ({**PYRAMID, "ssl_dim": 32}, "needs ssl_dim 16"),
    ({**PYRAMID, "pixels": "marginal"}, "pixels marginal is for other models"),
    ({**PYRAMID, "position_bias": "true"}, "position_bias is for other models"),
    ({**POINTS, "pixels": "marginal"}, "pixels marginal is for images"),
    ({**POINTS, "position_bias": "true"}, "position_bias is for images"),
    ({**POINTS, "clf_noise": "false"}, "clf_noise false is for images"),
    ({**POINTS, "precision": "bf16"}, "precision bf16 is for images"),
    ({**POINTS, "cons_weight": 1}, "cons_weight needs images"),
    ({"spread_labels": 0.5}, "it needs cons_weight"),
    ({"vat_weight": 1}, "is for model pyramid"),
    ({"ema": 0.9}, "ema needs validation examples"),
    ({**AVERAGED, "cons_weight": 1}, "needs a moving average"),
    ({**AVERAGED, "ema": 0.9, "validation": 100}, "for the consistency term"),
    ({"lr_schedule": "linear", "epochs": 1}, "a single one would change nothing"),

    ({"pretrained": ""}, "--pretrained has an empty value"),
    ({"pretrained": "missing.torch"}, "no file missing.torch"),
    *(({"pretrained": f"{name}.torch"}, f"{name}.torch is no checkpoint")
      for name in ("text", "code", "short")),
    ({"pretrained": "tensor.torch"}, "tensor.torch holds a Tensor, not the mapping"),
    *(({"pretrained": f"{name}.torch"}, f"{name}.torch holds no weights")
      for name in ("wrong", "numbered", "complex", "sparse")),
    ({"pretrained": "lightning.torch"},
     "holds no weights: expected a mapping of names to tensors, such as its ['state_dict'] or "
     "['ema']['shadow']: save that alone"),
    ({"pretrained": "both.torch"}, "two entries for one weight, with and without module or _orig"),
    ({"pretrained": "large.torch"}, "not finite: base_h.logsigma"),
    ({"pretrained": "integers.torch"}, "has base_h.logsigma of type torch.int32, and the model of"),
    ({"pretrained": "prior.torch"}, "has a log_p_y that is not the logarithm of probabilities"),
    ({"pretrained": "part.torch", "weights": "averaged"}, "has averaged weights that lack f_w."),
    ({"pretrained": "odd.torch"}, "odd.torch holds no weights"),
    ({"pretrained": "nan.torch"}, "not finite: base_h.logsigma"),
    ({"pretrained": "other.torch", "weights": "averaged"}, "has no averaged weights"),
    ({"weights": "averaged"}, "weights averaged is for"),
    ({"initial_weights": "other.torch"}, "another architecture"),
    ({"initial_weights": "typo.torch"}, "typo.torch"),
    (["--config", "mine.yaml", "--pretrained"],
     "no weights ship for mine.yaml (there is no pretrained/mine.torch)"),
    (["--config", str(CONFIGS / "moons.yaml"), "--device", "cpu", "--pretrained"],
     "no weights ship for moons.yaml (there is no pretrained/moons.torch): train them (python "
     f"train-flow-ssl.py --config {CONFIGS / 'moons.yaml'})"),
    (["--config", str(CONFIGS / "digits.yaml"), "--model", "mnist-glow", "--device", "cpu",
      "--pretrained"], "digits.torch holds weights of another architecture"),
]
CASES += [({option: value}, f"--{option}: {text}")
          for text, values in WRONG_VALUES.items() for option, value in values]
if not torch.cuda.is_available():
    CASES.append(({"device": "cuda"}, "sees 0 GPUs"))


def no_network(root, **kwargs):
    """MNIST on an offline machine, which leaves empty folders."""
    Path(root, "MNIST", "raw").mkdir(parents=True)
    raise RuntimeError("Error downloading")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the files that the cases name."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"bad.yaml": "lr: [1\nepochs: }", "list.yaml": "- lr",
                       "unknown.yaml": "epoch: 3\nlearning_rate: 1", "several.yaml": "lr: [1, 2]",
                       "type.yaml": "seed: 1.5", "twice.yaml": "lr: 1\nepochs: 3\nlr: 2",
                       "empty.yaml": "# nothing", "no-value.yaml": "epochs: 2\nlr:",
                       "deep.yaml": "lr: " + 3000 * "[" + 3000 * "]",
                       "mine.yaml": "".join(f"{key}: {value}\n" for key, value in TINY.items()),
                       "text.torch": "not weights", "short.torch": "G"}.items():
        (tmp_path / name).write_text(text)
    weights = build_model(TINY, (1, 8, 8), 10).state_dict()
    logsigma = weights["base_h.logsigma"]
    for name, content in {
            "code": {"model": print}, "tensor": torch.zeros(3), "wrong": {"model": torch.zeros(3)},
            "numbered": {0: torch.zeros(3)},
            "other": build_model({**TINY, "ssl_hd": 9}, (1, 8, 8), 10).state_dict(),
            "nan": {**weights, "base_h.logsigma": logsigma * math.nan},
            "lightning": {"epoch": 3, "optimizers": {"state": {0: weights}},
                          "state_dict": weights, "ema": {"shadow": weights},
                          "lr_schedulers": []},
            "both": {**weights, "module.base_h.logsigma": logsigma},
            "large": {**weights, "base_h.logsigma": logsigma.double() + 1e300},
            "integers": {**weights, "base_h.logsigma": logsigma.int()},
            "prior": {**weights, "log_p_y": weights["log_p_y"] + 1},
            "part": {"model": weights, "average": {"base_h.logsigma": logsigma}},
            "odd": {"model": weights, "average": torch.zeros(3)},
            "complex": {**weights, "base_h.logsigma": logsigma.cfloat()},
            "sparse": {**weights, "base_h.logsigma": logsigma.to_sparse()}}.items():
        torch.save(content, tmp_path / f"{name}.torch")
    raw = tmp_path / "truncated" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    header = b"\x00\x00\x08\x03" + b"\x00\x00\xea\x60\x00\x00\x00\x1c\x00\x00\x00\x1c"
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(header)
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    return tmp_path


@pytest.fixture
def refusal(folder, capsys):
    """A function that runs the script, which must refuse its arguments -> what it says."""
    def refusal(argv):
        capsys.readouterr()
        assert run_script(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("train-flow-ssl.py: error: ") and err.count("\n") == 1
        return err
    return refusal


def trained(folder, **changes):
    """The directory of a run that has ended."""
    assert run_script(options(**changes)) == 0
    run, = runs(folder)
    return run


def files_in(run):
    return {path.name: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize("argv, message", CASES, ids=[message for _, message in CASES])
def test_bad_input(argv, message, folder, refusal):
    assert message in refusal(options(**argv) if isinstance(argv, dict) else argv)
    assert not any(runs(folder, kind) for kind in ("runs", "fails", "tmp", "index"))


@pytest.mark.parametrize("damage", [
    lambda text: text.replace(",", ";"), lambda text: text[:-20].rsplit(",", 5)[0] + "\n",
    lambda text: text.replace("epoch", "era"), lambda text: text.replace("1,", ",", 1),
    lambda text: "", lambda text: None, lambda text: text + text.splitlines()[-1] + "\n",
    lambda text: text.replace("\n1,", "\ninf,")])
def test_damaged_metrics_of_a_resumed_run(folder, refusal, damage):
    """Nothing changes: a new metrics.csv without the earlier rows would be a loss."""
    run = trained(folder, epochs=2)
    text = damage((run / "metrics.csv").read_text())
    (run / "metrics.csv").unlink()
    if text is not None:
        (run / "metrics.csv").write_text(text)
    before = files_in(run)
    assert "metrics.csv" in refusal(["--resume", str(run)])
    assert runs(folder) == [run] and files_in(run) == before


def test_metrics_that_a_spreadsheet_saved(folder):
    run = trained(folder, epochs=1)
    path = run / "metrics.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert run_script(["--resume", str(run), "--epochs", "2"]) == 0
    assert [row["epoch"] for row in read_metrics(path)] == [1, 2]


def test_a_run_that_another_process_trains(folder, refusal):
    run = trained(folder, epochs=1)
    resume = ["--resume", str(run), "--epochs", "2"]
    with filelock.FileLock(run / ".lock"):
        assert "another process trains the run" in refusal(resume)
    assert run_script(resume) == 0
    assert not (run / ".lock").exists()


def test_a_folder_that_cannot_be_written(folder, refusal):
    (folder / "logs").touch()
    assert "cannot create the folders of runs" in refusal(options())


def test_missing_mnist_names_folder_files_and_the_offline_config(refusal):
    err = refusal(options(data="mnist", data_root="nowhere"))
    for text in ("nowhere/MNIST/raw", "t10k-labels-idx1-ubyte", "--data_root",
                 "configs/digits.yaml"):
        assert text in err
    assert not Path("nowhere").exists()


def test_mismatched_weights_name_the_first_three(refusal):
    err = refusal(options(pretrained="other.torch"))
    assert "another architecture" in err
    assert "(9, 18) in the file and (8, 18) in the model" in err
    assert err.count(" in the file and ") == 3 and "more" in err


def test_damaged_checkpoint(folder, refusal):
    run = trained(folder, epochs=1, ema=0.5, validation=100)
    path, resume = run / "checkpoint.pt", ["--resume", str(run), "--epochs", "2"]
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert "is no checkpoint" in refusal(resume)
    content = torch.load(io.BytesIO(whole))
    optimizer, average = content["optimizer"], content["average"]
    fewer = {name: value for name, value in average.items() if name != "base_h.logsigma"}
    older = {key: value for key, value in content.items() if key != "format"}
    for damaged, message in (
            (older, "has format 1, and this version reads format 5"),
            ({**content, "format": 3}, "has format 3"),
            ({**content, "sums": {"loss": torch.zeros(())}}, "is not a checkpoint of a run"),
            (content["model"], "is not a checkpoint of a run"),
            ({**content, "average": fewer}, "the optimiser's state does not fit"),
            ({**content, "average": {}}, "the optimiser's state does not fit"),
            ({**content, "optimizer": {**optimizer, "exp_inf": fewer}}, "does not fit"),
            ({**content, "optimizer": {"step": optimizer["step"]}}, "does not fit"),
            ({**content, "settings": {**content["settings"], "lr": 0.5}},
             "was trained with lr 0.5, and the run's params.yaml says 0.001")):
        torch.save(damaged, path)
        assert message in refusal(resume)
    path.unlink()
    assert "checkpoint.pt" in refusal(resume)


def test_compilation_needs_a_compiler(refusal, monkeypatch):
    monkeypatch.setattr("training.device.shutil.which", lambda name: None)
    assert "needs a C++ compiler" in refusal(options(compile="on"))


TORCHRUN = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}     # as with --nproc_per_node 3


@pytest.mark.parametrize("environment, message", [
    (TORCHRUN, "train_bs 64 is not a multiple of the 3 processes"),
    *((wrong, "start with torchrun, or unset them") for wrong in (
        {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "many"},
        {**TORCHRUN, "RANK": "3"}, {**TORCHRUN, "LOCAL_RANK": "3"}))])
def test_the_environment_of_several_processes(refusal, monkeypatch, environment, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert message in refusal(options(train_bs=64))
