"""Options, config files, the directories of runs, and how runs end."""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, TINY, execute, options, runs, words

from utils.datasets import DATASETS
from utils.errors import BadInput
from utils.runs import Run
from utils.settings import (GONE, OPTION_GROUPS, OPTIONS, UNUSED_PUBLISHED_KEYS, SettingsParser,
                            read_settings)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*argv):
    return read_settings(argv)[1]


def read_file(text, *argv):
    Path("c.yaml").write_text(text)
    return read("--config", "c.yaml", *argv)


def start(*argv, **changes):
    """A run of TINY with `changes`."""
    parser, settings = read_settings([*options(**changes), *argv])
    return parser.start_run(settings)


def fail(run):
    with pytest.raises(RuntimeError), run:
        raise RuntimeError("no")
    return run.run


def root(here):
    return here / "logs" / "exman-train-flow-ssl.py"


@pytest.mark.parametrize("text, argv, expected", [
    ("epochs: 7\nlr: 0.5\nconv: qr\n", ["--lr", "0.25"],
     {"epochs": 7, "lr": 0.25, "conv": "qr", "train_bs": 256}),
    ("lr: 3e-4\nlr_schedule: no\nweight_decay: 1e-05\nposition_bias: yes\nname: 007\n", [],
     {"lr": 3e-4, "lr_schedule": "no", "weight_decay": 1e-5, "position_bias": True, "name": "007"}),
    ("name:\npretrained: ''\nresume: null\ninitial_weights: ~\n", [],
     {"name": "", "pretrained": "", "resume": "", "initial_weights": ""})])
def test_values_of_the_command_line_of_a_file_and_by_default(text, argv, expected):
    """YAML's own types of the values do not matter."""
    settings = vars(read_file(text, *argv))
    assert {key: settings[key] for key in expected} == expected


def test_a_config_with_every_published_key_is_accepted(capsys):
    published = {
        "name": "", "seed": 0, "data": "mnist", "num_examples": -1, "data_seed": 0,
        "sup_sample_weight": 0.5, "lr": 1e-3, "epochs": 500, "train_bs": 256, "test_bs": 512,
        "lr_schedule": "linear", "log_each": 1, "pretrained": "", "weight_decay": 1e-5,
        "model": "mnist-masked", "conv": "full", "hh_factors": 2, "l": 2, "ssl_model": "cond-flow",
        "ssl_dim": 196, "ssl_l": 2, "ssl_k": 4, "ssl_hd": 256, "ssl_conv": "full", "ssl_hh": 2,
        "supervised": 100, "sup_weight": 1.0, "cl_weight": 0.0, "tmp": False, "git_dirty": False}
    others = {
        "clip_gn": 0.0, "lr_warmup": 10, "confidence": 0.95, "ssl_nclasses": -1,
        "deterministic": False, "root": "runs/000001-2019-05-01-00-00-00",
        "time": "2019-05-01T00:00:00", "id": 1, "k": 4, "hid_dim": [], "logits": False,
        "lr_gamma": 0.5, "lr_steps": [1, 2], "sup_ohe": True, "status": "x"}
    assert others.keys() > {*UNUSED_PUBLISHED_KEYS, *GONE}
    settings = vars(read_file(yaml.dump({**published, **others})))
    assert {key: settings[key] for key in published} == published
    assert not settings.keys() & others.keys()
    ignored = ", ".join(UNUSED_PUBLISHED_KEYS)
    assert words(capsys.readouterr().out) == f"Ignored because nothing uses them: {ignored}"


@pytest.mark.parametrize("key, value, accepted", [
    ("clip_gn", "100", "0"), ("confidence", "0.9", "0.95"),
    ("ssl_nclasses", "3", "-1"), ("deterministic", "true", "false"), ("clip_gn", "x", "0")])
def test_options_that_are_gone(key, value, accepted):
    message = f"the option {key} does not exist any more: only {accepted} is accepted, not {value}"
    with pytest.raises(BadInput, match=message):
        read(f"--{key}", value)
    with pytest.raises(BadInput, match=message):
        read_file(f"{key}: {value}")
    assert key in GONE and vars(read(f"--{key}", accepted)) == vars(read())
    read(f"--{key}", value, "--pretrained")     # evaluation does not depend on them


def test_the_number_of_classes_may_be_given():
    assert vars(read("--ssl_nclasses", "10")) == vars(read())
    with pytest.raises(BadInput, match="the option ssl_nclasses does not exist any more"):
        read("--ssl_nclasses", "10", "--data", "moons")


def test_config_yaml_is_the_paper_s_run_and_holds_the_table_of_options():
    """The same groups, keys and order, each default, and beside it all choices."""
    path = PROJECT / "config.yaml"
    settings = vars(read("--config", str(path)))
    assert {**settings, "config_file": None} == vars(read())
    assert settings.keys() - {"config_file", "tmp", "git_dirty"} == OPTIONS.keys()
    assert all(settings[name] == option.default for name, option in OPTIONS.items())
    _, *paragraphs = path.read_text().split("\n\n")
    assert len(paragraphs) == len(OPTION_GROUPS)
    shown = "".join(SettingsParser().format_help().split())
    for paragraph, (title, group) in zip(paragraphs, OPTION_GROUPS.items()):
        heading, *parts = re.split(r"^(\w+):", paragraph, flags=re.MULTILINE)
        assert heading == f"# {title}\n"
        assert parts[::2] == [option.name for option in group if option.name != "resume"]
        for name, text in zip(parts[::2], parts[1::2]):
            words = re.findall(r"[\w-]+", text.partition("#")[2])
            assert words and set(OPTIONS[name].choices) <= set(words), name
            explanation = "".join("".join(re.findall(r"#(.*)", text)).split())
            assert f"{explanation}(default:" in shown, name


@pytest.mark.parametrize("config", sorted((PROJECT / "configs").glob("**/*.yaml")),
                         ids=lambda path: path.name)
def test_shipped_configs_are_accepted(config):
    name = config.stem.replace("small", "mnist")
    data = read("--config", str(config)).data
    assert data in DATASETS and name.startswith(data)


def test_params_of_a_run_rerun_it():
    changes = {"name": "first", "lr": "3e-4"}
    params = start(**changes).run / "params.yaml"
    assert yaml.safe_load(params.read_text())["lr"] == 3e-4
    settings = vars(read(*options(**changes)))
    assert {**vars(read("--config", str(params))), "config_file": None} == settings


def test_directories_of_exman(here):
    read(*options())                                        # which creates nothing
    assert not any(here.iterdir())
    for tmp in ([], ["--tmp"]):
        run = start(*tmp, name="x").run
        assert run.parent == root(here) / ("tmp" if tmp else "runs")
        assert run.name.startswith("00000") and run.name.endswith("-x")
    folders = {path.name for path in root(here).iterdir()}
    assert folders >= {"runs", "index", "tmp", "marked", "fails"}
    assert [link.resolve() for link in runs(here, "index")] == [runs(here)[0] / "params.yaml"]


@pytest.mark.parametrize("end, kind", [
    (None, "runs"), (SystemExit(0), "runs"), (SystemExit(None), "runs"),
    (KeyboardInterrupt(), "runs"), (SystemExit(3), "fails"), (RuntimeError("no"), "fails")])
def test_how_a_run_ends(here, end, kind, capsys):
    run = start()
    with contextlib.nullcontext() if end is None else pytest.raises(type(end)), run:
        print("a line")
        if end is not None:
            raise end
    where = root(here) / kind / run.run.name
    assert run.run == where and (where / "log.txt").read_text() == "a line\n"
    assert (where / "traceback.txt").exists() == (kind == "fails")
    assert len(runs(here, "index")) == (kind == "runs")
    assert "Traceback" not in capsys.readouterr().out
    print("after")
    assert (where / "log.txt").read_text() == "a line\n"                    # stdout is restored


def test_a_lost_directory_hides_no_error():
    run = start()
    with pytest.raises(RuntimeError, match="the first"), run:
        shutil.rmtree(run.run)
        raise RuntimeError("the first")


def test_resume_reads_the_run_s_settings(here):
    run = start(epochs=9).run
    resumed = vars(read("--resume", str(run), "--threads", "2"))
    assert resumed["threads"] == 2 and resumed["resume"] == str(run)
    settings = vars(read(*options(epochs=9)))
    assert {key: resumed[key] for key in TINY} == {key: settings[key] for key in TINY}
    assert read("--resume", str(run), *options(epochs=9)).epochs == 9
    shutil.copytree(run, here / "elsewhere" / "runs" / run.name)
    for argv, message in (([run, "--train_bs", "32"], "keeps its train_bs"),
                          ([here], "no run to resume"),
                          ([here / "elsewhere" / "runs" / run.name], "not in a folder of runs")):
        with pytest.raises(BadInput, match=message):
            read("--resume", *map(str, argv))


@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_resumed_run_finds_its_data_from_another_folder(here, monkeypatch, is_absolute):
    """params.yaml keeps a relative data_root, which is one to the folder of the start."""
    (here / "images").mkdir()
    data_root = str(here / "images") if is_absolute else "images"
    run = start("--data_root", data_root).run

    def saved():
        return yaml.safe_load((run / "params.yaml").read_text())["data_root"]
    assert saved() == data_root
    (here / "latest").symlink_to(run)
    (here / "elsewhere" / "other").mkdir(parents=True)
    monkeypatch.chdir(here / "elsewhere")
    for path in (run, run, here / "latest"):        # from the second on what the first has saved
        resumed = read("--resume", str(path))
        assert Path(resumed.data_root).resolve() == here / "images"
        assert Run.resumed(resumed).run == run and saved() == data_root
    repeated = read("--config", str(run / "params.yaml"))
    assert Path(repeated.data_root).resolve() == here / "images"
    elsewhere = here / "a" / "b" / "c" / "params.yaml"          # in no folder of runs
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text("data_root: images")
    assert read("--config", str(elsewhere)).data_root == "images"
    resumed = read("--resume", str(run), "--data_root", "other")
    assert resumed.data_root == "other"
    Run.resumed(resumed)
    assert (here / saved()).resolve() == here / "elsewhere" / "other"


def test_a_time_limit_is_of_one_start(here):
    run = start("--time_limit", "5").run
    assert read("--resume", str(run)).time_limit == 0
    assert read("--resume", str(run), "--time_limit", "7").time_limit == 7


def test_the_directory_of_a_run_gives_its_weights_and_settings(here, monkeypatch):
    (here / "images").mkdir()
    run = start("--data_root", "images").run
    with pytest.raises(BadInput, match=r"no weights: there is no model\.torch or checkpoint\.pt"):
        read("--pretrained", str(run))
    (run / "checkpoint.pt").touch()
    assert read("--pretrained", str(run)).pretrained == str(run / "checkpoint.pt")
    (run / "model.torch").touch()
    monkeypatch.chdir(here / "images")
    found = read("--pretrained", str(run), "--test_bs", "7")
    assert found.pretrained == str(run / "model.torch") and found.test_bs == 7
    assert {key: getattr(found, key) for key in TINY if key != "test_bs"} == {
        key: value for key, value in TINY.items() if key != "test_bs"}
    assert Path(found.data_root).resolve() == here / "images"
    averaged = read("--pretrained", str(run), "--weights", "averaged")
    assert averaged.pretrained == str(run / "checkpoint.pt")
    given = read("--pretrained", str(run), *options(ssl_hd=64))     # without a config too
    assert (given.ssl_hd, given.model) == (64, TINY["model"])
    assert read("--initial_weights", str(run)).initial_weights == str(run / "model.torch")
    with pytest.raises(BadInput, match="is not the directory of a run: it has no params"):
        read("--pretrained", str(here))


@pytest.mark.parametrize("argv, kind", [([], "runs"), (["--tmp"], "tmp")])
def test_a_failed_run_goes_back_to_where_it_was(here, argv, kind):
    """A tmp run has no entry in the index; and nothing is overwritten."""
    failed = fail(start(*argv))
    resumed = read("--resume", str(failed), "--threads", "1")
    place = root(here) / kind / failed.name
    place.mkdir()
    with pytest.raises(BadInput, match="which exists"):
        Run.resumed(resumed)
    place.rmdir()
    again = Run.resumed(resumed)
    assert again.run == place and not runs(here, "fails")
    assert not (place / "traceback.txt").exists()
    params = [yaml.safe_load(link.read_text()) for link in runs(here, "index")]
    assert [run["threads"] for run in params] == ([1] if kind == "runs" else [])
    failed.mkdir()                                          # a copy, made by hand
    second = fail(again)
    assert second.parent == root(here) / "fails" and second != failed
    assert (second / "params.yaml").exists() and not any(failed.iterdir())


def test_the_command_that_resumes_is_quoted(here):
    word = shlex.split(start(name="a b; ls").resume_command)[-1]
    assert (here / word / "params.yaml").is_file()


def test_uncommitted_changes_that_are_not_utf8(here, monkeypatch):
    """They are kept in changes.diff byte by byte."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    repository = here / "repository"
    repository.mkdir()
    (repository / "f.txt").write_text("a\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    (repository / "f.txt").write_bytes(b"caf\xe9\n")
    monkeypatch.setattr("utils.runs.git_worktree", lambda: str(repository))
    assert b"+caf\xe9" in (start().run / "changes.diff").read_bytes()


def test_works_without_a_git_binary(here):
    code = ("from utils.settings import read_settings; parser, settings = read_settings([]); "
            "print(parser.start_run(settings).run)")
    done = execute(here, [sys.executable, "-c", code], PATH="", PYTHONPATH=str(PROJECT))
    assert done.returncode == 0, done.stderr
    assert str(root(here) / "runs") in done.stdout


def test_a_config_extends_another_one(here):
    (here / "sub").mkdir()
    (here / "base.yaml").write_text("lr: 0.5\nepochs: 7\nseed: 3\n")
    (here / "sub" / "middle.yaml").write_text("extends: ../base.yaml\nepochs: 8\n")
    (here / "sub" / "last.yaml").write_text("seed: 4\nextends: middle.yaml\n")
    settings = read("--config", str(here / "sub" / "last.yaml"), "--lr", "0.25")
    assert (settings.lr, settings.epochs, settings.seed) == (0.25, 8, 4)


@pytest.mark.parametrize("files, message", [
    ({"a.yaml": "extends: b.yaml"}, "cannot read b.yaml, which it extends: No such"),
    ({"a.yaml": "extends: a.yaml"}, "a.yaml: extends goes in a circle, back to a.yaml"),
    ({"a.yaml": "extends: b.yaml", "b.yaml": "extends: a.yaml"}, "b.yaml: extends goes in a c"),
    ({"a.yaml": "extends: [b.yaml]"}, "takes the name of one file"),
    ({"a.yaml": "extends:"}, "takes the name of one file"),
    ({"a.yaml": "extends: b.yaml", "b.yaml": "typo: 1"}, "b.yaml: unknown setting typo")])
def test_a_config_that_extends_nothing_good(files, message):
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(BadInput, match=message) as raised:
        read("--config", "a.yaml")
    assert "\n" not in str(raised.value)
