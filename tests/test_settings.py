"""The parser over exman's: what a config file may say, the directories of runs, how runs end."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, TINY, options

from utils.errors import BadInput
from utils.settings import UNUSED_PUBLISHED_KEYS, Run, read_settings


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_file(text, *argv):
    with open("c.yaml", "w") as f:
        f.write(text)
    return read_settings(["--config", "c.yaml", *argv])[1]


def root(here):
    return here / "logs" / "exman-train-flow-ssl.py"


def test_command_line_overrides_the_file_and_the_file_the_defaults():
    settings = read_file("epochs: 7\nlr: 0.5\nconv: qr\n", "--lr", "0.25")
    assert (settings.epochs, settings.lr, settings.conv, settings.train_bs) == (7, 0.25, "qr", 256)


def test_numbers_and_words_to_which_yaml_gives_another_type():
    settings = read_file("lr: 3e-4\nlr_schedule: no\nweight_decay: 1e-05\n"
                         "deterministic: yes\nname: 007\n")
    assert settings.lr == 3e-4 and settings.weight_decay == 1e-5
    assert settings.lr_schedule == "no" and settings.deterministic is True
    assert settings.name == "007"


def test_empty_values_and_an_empty_file_are_the_defaults():
    assert vars(read_file("# nothing\n"))["epochs"] == 500
    settings = read_file("name:\npretrained: ''\nsupervised: null\nresume:\n")
    assert settings.supervised == 100
    assert settings.name == settings.pretrained == settings.resume == ""


def test_published_keys_that_nothing_uses(capsys):
    values = {"k": 4, "hid_dim": [], "logits": False, "lr_gamma": 0.5, "lr_steps": [1, 2],
              "sup_ohe": True, "status": "x"}
    assert tuple(values) == UNUSED_PUBLISHED_KEYS
    settings = read_file(yaml.dump({**values, "epochs": 3}))
    assert settings.epochs == 3 and not hasattr(settings, "lr_steps")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("Ignored") and "lr_steps" in out


def test_a_config_with_every_published_key_is_accepted():
    published = {
        "name": "", "seed": 0, "data": "mnist", "num_examples": -1, "data_seed": 0,
        "sup_sample_weight": 0.5, "lr": 1e-3, "epochs": 500, "train_bs": 256, "test_bs": 512,
        "lr_schedule": "linear", "lr_warmup": 10, "log_each": 1, "pretrained": "",
        "weight_decay": 1e-5, "clip_gn": 100.0, "model": "mnist-masked", "conv": "full",
        "hh_factors": 2, "l": 2, "ssl_model": "cond-flow", "ssl_dim": 196, "ssl_l": 2, "ssl_k": 4,
        "ssl_hd": 256, "ssl_conv": "full", "ssl_hh": 2, "ssl_nclasses": 10, "supervised": 100,
        "sup_weight": 1.0, "cl_weight": 0.0, "root": "runs/000001-2019-05-01-00-00-00",
        "time": "2019-05-01T00:00:00", "id": 1, "tmp": False, "git_dirty": False}
    settings = vars(read_file(yaml.dump(published)))
    given = {key: value for key, value in published.items() if key not in ("root", "time", "id")}
    assert {key: settings[key] for key in given} == given


def test_config_yaml_is_the_paper_s_run_and_lists_every_setting():
    path = PROJECT / "config.yaml"
    settings = vars(read_settings(["--config", str(path)])[1])
    defaults = vars(read_settings([])[1])
    assert {**settings, "config_file": None} == defaults
    keys = set(yaml.safe_load(path.read_text()))
    assert keys == set(defaults) - {"config_file", "tmp", "git_dirty", "resume"}


@pytest.mark.parametrize("config", sorted((PROJECT / "configs").glob("**/*.yaml")),
                         ids=lambda path: path.name)
def test_shipped_configs_are_accepted(config):
    settings = read_settings(["--config", str(config)])[1]
    name = config.stem.split("-")[0]
    assert settings.data == ("mnist" if name == "small" else name)


def test_params_of_a_run_rerun_it(here):
    parser, settings = read_settings(options(name="first", lr="3e-4"))
    run = parser.start_run(settings)
    params = run.run / "params.yaml"
    assert yaml.safe_load(params.read_text())["lr"] == 3e-4
    again = read_settings(["--config", str(params)])[1]
    assert {**vars(again), "config_file": None} == vars(settings)


def test_directories_of_exman(here):
    for tmp in ([], ["--tmp"]):
        parser, settings = read_settings([*options(name="x"), *tmp])
        run = parser.start_run(settings)
        assert run.run.parent == root(here) / ("tmp" if tmp else "runs")
        assert run.run.name.startswith("00000") and run.run.name.endswith("-x")
    folders = {path.name for path in root(here).iterdir()}
    assert folders >= {"runs", "index", "tmp", "marked", "fails"}
    link, = (root(here) / "index").iterdir()
    assert link.resolve() == next((root(here) / "runs").iterdir()) / "params.yaml"


def test_reading_settings_creates_no_run(here):
    read_settings(options())
    assert not any((root(here) / "runs").iterdir())


@pytest.mark.parametrize("end, kind", [
    (None, "runs"), (SystemExit(0), "runs"), (SystemExit(None), "runs"),
    (KeyboardInterrupt(), "runs"), (SystemExit(3), "fails"), (RuntimeError("no"), "fails")])
def test_how_a_run_ends(here, end, kind, capsys):
    parser, settings = read_settings(options())
    run = parser.start_run(settings)
    if end is None:
        with run:
            print("a line")
    else:
        with pytest.raises(type(end)):
            with run:
                print("a line")
                raise end
    where = root(here) / kind / run.run.name
    assert run.run == where and (where / "log.txt").read_text() == "a line\n"
    assert (where / "traceback.txt").exists() == (kind == "fails")
    assert any((root(here) / "index").iterdir()) == (kind == "runs")
    assert "Traceback" not in capsys.readouterr().out
    print("after")
    assert (where / "log.txt").read_text() == "a line\n"                    # stdout is restored


def test_resume_reads_the_run_s_settings(here):
    parser, settings = read_settings(options(epochs=9))
    run = parser.start_run(settings).run
    resumed = read_settings(["--resume", str(run), "--threads", "2"])[1]
    assert resumed.threads == 2 and resumed.resume == str(run)
    assert {key: vars(resumed)[key] for key in TINY} == {key: vars(settings)[key] for key in TINY}
    assert read_settings(["--resume", str(run), *options(epochs=9)])[1].epochs == 9
    with pytest.raises(BadInput, match="keeps its train_bs"):
        read_settings(["--resume", str(run), "--train_bs", "32"])
    with pytest.raises(BadInput, match="no run to resume"):
        read_settings(["--resume", str(here)])
    shutil.copytree(run, here / "elsewhere" / "runs" / run.name)
    with pytest.raises(BadInput, match="not in a folder of runs"):
        read_settings(["--resume", str(here / "elsewhere" / "runs" / run.name)])


@pytest.mark.parametrize("given", ["images", "absolute"])
def test_a_resumed_run_finds_its_data_from_another_folder(here, monkeypatch, given):
    """params.yaml keeps a relative data_root, which is one to the folder of the start."""
    (here / "images").mkdir()
    data_root = str(here / "images") if given == "absolute" else given
    parser, settings = read_settings([*options(), "--data_root", data_root])
    run = parser.start_run(settings).run

    def saved():
        return yaml.safe_load((run / "params.yaml").read_text())["data_root"]
    assert saved() == data_root
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    for _ in range(2):                      # the second time from what the first has saved
        _, resumed = read_settings(["--resume", str(run)])
        assert Path(resumed.data_root).resolve() == here / "images"
        assert Run.resumed(resumed).run == run and saved() == data_root
    (here / "latest").symlink_to(run)
    _, resumed = read_settings(["--resume", str(here / "latest")])
    assert Path(resumed.data_root).resolve() == here / "images"
    Run.resumed(resumed)
    assert saved() == data_root
    (here / "elsewhere" / "other").mkdir()
    _, resumed = read_settings(["--resume", str(run), "--data_root", "other"])
    assert resumed.data_root == "other"
    Run.resumed(resumed)
    assert (here / saved()).resolve() == here / "elsewhere" / "other"


def test_a_failed_run_goes_back_to_runs_when_resumed(here):
    parser, settings = read_settings(options())
    run = parser.start_run(settings)
    with pytest.raises(RuntimeError):
        with run:
            raise RuntimeError("no")
    _, resumed = read_settings(["--resume", str(run.run), "--threads", "1"])
    again = Run.resumed(resumed)
    assert again.run.parent == root(here) / "runs" and not any((root(here) / "fails").iterdir())
    assert not (again.run / "traceback.txt").exists()
    link, = (root(here) / "index").iterdir()
    assert yaml.safe_load(link.read_text())["threads"] == 1


def test_a_failed_run_goes_back_to_where_it_was(here):
    """A tmp run to tmp, without an entry in the index; and nothing is overwritten."""
    parser, settings = read_settings([*options(), "--tmp"])
    run = parser.start_run(settings)
    with pytest.raises(RuntimeError):
        with run:
            raise RuntimeError("no")
    failed = run.run
    _, resumed = read_settings(["--resume", str(failed)])
    place = root(here) / "tmp" / failed.name
    place.mkdir()
    with pytest.raises(BadInput, match="which exists"):
        Run.resumed(resumed)
    place.rmdir()
    again = Run.resumed(resumed)
    assert again.run == place and not any((root(here) / "index").iterdir())
    failed.mkdir()                                          # a copy, made by hand
    with pytest.raises(RuntimeError):
        with again:
            raise RuntimeError("again")
    assert again.run.parent == root(here) / "fails" and again.run != failed
    assert (again.run / "params.yaml").exists() and not any(failed.iterdir())


def test_a_closed_pipe_is_no_failure_and_a_lost_directory_hides_none(here):
    parser, settings = read_settings(options())
    run = parser.start_run(settings)
    with pytest.raises(BrokenPipeError):
        with run:
            raise BrokenPipeError
    assert run.run.parent == root(here) / "runs"
    lost = parser.start_run(settings)
    with pytest.raises(RuntimeError, match="the first"):
        with lost:
            shutil.rmtree(lost.run)
            raise RuntimeError("the first")


def test_the_command_that_resumes_is_quoted(here):
    parser, settings = read_settings(options(name="a b; ls"))
    word = shlex.split(parser.start_run(settings).resume_command)[-1]
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
    monkeypatch.setattr("utils.settings._git_worktree", lambda: str(repository))
    parser, settings = read_settings(options())
    run = parser.start_run(settings)
    assert b"+caf\xe9" in (run.run / "changes.diff").read_bytes()


def test_works_without_a_git_binary(here):
    code = ("from utils.settings import read_settings; parser, settings = read_settings([]); "
            "print(parser.start_run(settings).run)")
    environment = {**os.environ, "PATH": "", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([shutil.which(sys.executable), "-c", code], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(root(here) / "runs") in done.stdout


def test_a_config_extends_another_one(tmp_path, here):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("lr: 0.5\nepochs: 7\nseed: 3\n")
    (tmp_path / "sub" / "middle.yaml").write_text("extends: ../base.yaml\nepochs: 8\n")
    (tmp_path / "sub" / "last.yaml").write_text("seed: 4\nextends: middle.yaml\n")
    settings = read_settings(["--config", str(tmp_path / "sub" / "last.yaml"), "--lr", "0.25"])[1]
    assert (settings.lr, settings.epochs, settings.seed) == (0.25, 8, 4)


@pytest.mark.parametrize("files, message", [
    ({"a.yaml": "extends: b.yaml"}, "cannot read b.yaml, which it extends: No such"),
    ({"a.yaml": "extends: a.yaml"}, "a.yaml: extends goes in a circle, back to a.yaml"),
    ({"a.yaml": "extends: b.yaml", "b.yaml": "extends: a.yaml"}, "b.yaml: extends goes in a c"),
    ({"a.yaml": "extends: [b.yaml]"}, "takes the name of one file"),
    ({"a.yaml": "extends:"}, "takes the name of one file"),
    ({"a.yaml": "extends: b.yaml", "b.yaml": "typo: 1"}, "b.yaml: unknown setting typo")])
def test_a_config_that_extends_nothing_good(here, files, message):
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(BadInput, match=message) as raised:
        read_settings(["--config", "a.yaml"])
    assert "\n" not in str(raised.value)
