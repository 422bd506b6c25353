"""Damaged and hostile files, and random settings: an error of one line, or the right numbers."""

import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (PROJECT, new_model, options, outcome, outcomes, run_script, runs,
                      same, weights_in)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.checkpoint import load_checkpoint, load_file, load_weights
from training.device import torch_errors_as_failed
from utils.errors import BadInput, Failed
from utils.runs import read_params
from utils.settings import (GONE, LARGEST_FILE, OPTIONS, UNUSED_PUBLISHED_KEYS, SettingsParser,
                            read_settings)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run that has ended, and the bytes of its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_script(options(epochs=1, ema=0.5, validation=100)) == 0
    run, = runs(folder)
    return run, (run / "checkpoint.pt").read_bytes()


@pytest.fixture
def checkpoint(trained):
    """The path of a checkpoint, and a function that reads it as --resume does."""
    run, whole = trained
    path, resumed = run / "checkpoint.pt", read_settings(["--resume", str(run), "--epochs", "3"])[1]
    path.write_bytes(whole)
    model = new_model()
    yield path, lambda path: load_checkpoint(path, model, resumed)
    path.write_bytes(whole)


def test_random_damages_of_weights(trained):
    counts = outcomes(trained[0] / "model.torch", weights_in, 60)
    assert counts["different"] == 0 and counts["error"] > 40


def test_random_damages_of_a_checkpoint(checkpoint):
    counts = outcomes(*checkpoint, 60)
    assert counts["different"] == 0 and counts["error"] > 40


def test_every_bit_of_the_directory_of_a_zip_file(tmp_path):
    """torch.load takes from it, for example, that an entry is a folder, and reads nothing then."""
    path = tmp_path / "a.torch"
    torch.save({"a": torch.randn(3), "n": 12345}, path)
    whole, expected = path.read_bytes(), load_file(path)
    counts = Counter()
    for i in range(whole.index(b"PK\1\2"), len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[i] ^= 1 << bit
            counts[outcome(path, data, load_file, expected)] += 1
    assert counts["different"] == 0 and counts["error"] > 1000 and counts["right"] > 1000


class Call:
    """What a pickle stores as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Storage(tuple):
    """What a pickle stores as a reference to numbers outside."""


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Storage) else None


def pickled(content):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def claiming(numbers, shape, stride, legacy=False):
    """A file with a float32 tensor of which it holds four numbers, and claims `numbers`."""
    key = Storage(("storage", torch.FloatStorage, "0", "cpu", numbers, *(None,) * legacy))
    content = pickled({"a": Call(torch._utils._rebuild_tensor_v2, key, 0, shape, stride, False,
                                 OrderedDict())})
    if legacy:
        head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        return b"".join((*map(pickled, head), content, pickled(["0"]), struct.pack("<q", numbers),
                         bytes(16)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as f:
        for name, data in {"data.pkl": content, "data/0": bytes(16), "version": b"3\n"}.items():
            f.writestr(f"archive/{name}", data)
    return buffer.getvalue()


TERABYTE = 10**12 // 4      # numbers
LOADS = """
import resource, sys
from models import build_model
from training.checkpoint import load_weights
from utils.errors import BadInput
model = build_model({}, (1, 28, 28), 10)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sys.argv[1:]:
    try:
        load_weights(model, path)
    except BadInput as error:
        print(error)
"""


def test_tensors_of_a_terabyte_are_refused_without_the_memory(tmp_path):
    """Of the process, whose address space may grow by 256 MiB. The file with four numbers is one
    that the others differ from in what they claim."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    claims = {"four": (4, (4,), (1,)), "long": (TERABYTE, (TERABYTE,), (1,)),
              "shape": (4, (TERABYTE,), (1,)), "expanded": (4, (TERABYTE,), (0,))}
    paths = []
    for legacy in (False, True):
        for name, claim in claims.items():
            paths.append(tmp_path / f"{name}{'-legacy' * legacy}.torch")
            paths[-1].write_bytes(claiming(*claim, legacy))
    bomb = tmp_path / "bomb.torch"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr("archive/data.pkl", bytes(2**30))
    done = subprocess.run([sys.executable, "-c", LOADS, *map(str, paths), str(bomb)], cwd=PROJECT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    for path, line in zip([*paths, bomb], lines):
        other = "another architecture" in line      # all that PyTorch 2.7 says of a long one
        if "four" in path.name:
            assert other
        else:
            assert "is no checkpoint" in line or "holds no weights" in line or (
                other and "long" in path.name), line


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_with_code(tmp_path, legacy):
    path = tmp_path / "code.torch"
    torch.save({"a": Call(os.mkdir, "ran")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match="is no checkpoint"):
        load_weights(new_model(), path)
    assert not Path("ran").exists()


def test_files_of_earlier_versions_of_pytorch(tmp_path):
    model = new_model()
    with torch.no_grad():
        model.base_h.logsigma.uniform_()
    torch.save(model.state_dict(), tmp_path / "old.torch", _use_new_zipfile_serialization=False)
    assert same(weights_in(tmp_path / "old.torch"), dict(model.state_dict()))


def nested(n):
    """Mappings within mappings, which as a tree would be 2^n."""
    content = {}
    for _ in range(n):
        content = {"a": content, "b": content}
    return content


def test_other_contents_of_weights(tmp_path):
    loop = {}
    loop["itself"] = loop
    with warnings.catch_warnings(action="ignore"):      # nested tensors are a prototype
        ragged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for content in (nested(100), loop, {"a": ragged}, {"a": torch.zeros(3, device="meta")},
                    {"a." * 100_000: torch.zeros(1)}):
        torch.save(content, tmp_path / "a.torch")
        message = "holds no weights"
        if "a" in content and content["a"] is ragged:       # PyTorch 2.15 refuses it itself
            message += "|is no checkpoint"
        with pytest.raises(BadInput, match=message):
            load_weights(new_model(), tmp_path / "a.torch")
    (tmp_path / "a.torch").unlink()
    os.mkfifo(tmp_path / "a.torch")
    with pytest.raises(BadInput, match="no file"):
        load_weights(new_model(), tmp_path / "a.torch")


@pytest.mark.parametrize("message, changes", {
    "not finite: base_h.logsigma": {"model": {"base_h.logsigma": torch.full((16,), torch.nan)}},
    "not finite: base_aux.logsigma": {
        "average": {"base_aux.logsigma": torch.full((48,), torch.inf)}},
    "not finite: exp_inf of base_h.logsigma": {
        "optimizer": {"exp_inf": {"base_h.logsigma": torch.full((16,), torch.inf)}}},
    "not finite: loss": {"step": 1, "sums": {"loss": torch.tensor(torch.nan)}},
    "the optimiser's state does not fit": {"optimizer": {"step": 3}},
    "is not a checkpoint of a run": (
        {"epoch": -1}, {"epoch": "1"}, {"step": -1}, {"step": torch.zeros(2)},
        {"seconds": torch.nan}, {"format": torch.zeros(2)}, {"generator": torch.zeros(3)},
        {"settings": {"lr": torch.zeros(2)}}, {"settings": {"lr": [1]}}, {"rng": [1]}),
    "is damaged: it has no states": (
        {"rng": {"python": (3, (1, 2), None)}}, {"rng": {"numpy": ("MT19937", [1, 2], 3, 0, 0.0)}},
        {"rng": {"numpy": ("MT19937", [2**40] * 624, 3, 0, 0.0)}}, {"rng": {"numpy": (1,)}},
        {"rng": {"torch": torch.zeros(3)}}, {"rng": {"cuda": 5}}),
    "was trained with lr 'xxxxx.{,30}xxxxx', and": {"settings": {"lr": "x" * 10**6}},
}.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_states_of_a_checkpoint_that_do_not_fit(checkpoint, message, changes):
    path, load = checkpoint
    content, state = torch.load(path), torch.get_rng_state()

    def changed(content, change):
        return {**content, **{key: changed(content[key], value) if key in content and isinstance(
            value, dict) else value for key, value in change.items()}}
    for change in changes if isinstance(changes, tuple) else (changes,):
        torch.save(changed(content, change), path)
        with pytest.raises(BadInput, match=message):
            load(path)
    assert same(state, torch.get_rng_state())


def test_a_date_that_is_none_in_params_yaml(trained):
    run, _ = trained
    text = (run / "params.yaml").read_text()
    (run / "params.yaml").write_text(text + "\n")
    assert read_params(run / "params.yaml")["epochs"] == 1
    for damaged in (text.replace("lr: 0.001", "lr: 2020-13-45"), "- lr"):
        (run / "params.yaml").write_text(damaged)
        with pytest.raises(BadInput, match="is damaged"):
            read_params(run / "params.yaml")
    time = next(line for line in text.splitlines() if line.startswith("time:"))
    (run / "params.yaml").write_text(text.replace(time, "time: 2020-13-45"))
    with pytest.raises(BadInput, match="month must be in"):
        read_settings(["--resume", str(run)])
    (run / "params.yaml").write_text(text)


ALIASES = "".join(f", &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))


@pytest.mark.parametrize("content, message", [
    ("lr: !!python/object/apply:os.mkdir [ran]", "it has the tag tag:yaml.org,2002:python/object"),
    ("lr: !foo 3", "it has the tag !foo"), ("!!set {lr}", "it has the tag"),
    (f"lr: [&a0 [x]{ALIASES}]", "lr takes one value, not [['x'], [["),
    (f"k: [&a0 [x]{ALIASES}]", "k takes one value, not [['x'], [["),
    ("lr: &a [*a]", "recursive"), ("? [lr]\n: 3", "unhashable key"),
    ("lr: 1\n'lr': 2", "it has lr twice"), ("lr: 1\0", "special characters"),
    ("? " + "a" * 5000 + "\n: 1", "unknown setting aaa"), ("seed: " + "9" * 5000, "invalid int"),
    ("".join(f"a{i}: 1\n" for i in range(2000)), "unknown settings a0, a1, a2, a3, a4 and 1995"),
    ("lr: " + "[" * (LARGEST_FILE - 4), "recursion"), ("{" * (LARGEST_FILE), "recursion"),
    ("lr: " + "[" * 10**7, "has more than"), ("- a\n" * 10**6, "has more than"),
    ("extends: '\\0'", "cannot read"), ('extends: "\\0"', "takes the name of one file"),
    ("lr: 1".encode("utf-16"), "is not YAML"), ("name: é".encode("latin-1"), "is not YAML")],
    ids=lambda value: value[:20] if isinstance(value, str) else "bytes")
def test_hostile_config_files(content, message):
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as error:
        read_settings(["--config", "c.yaml"])
    assert message in str(error.value) and len(str(error.value)) < 1100
    assert not Path("ran").exists()


def test_config_files_that_are_none():
    """A shell's <(command) is a pipe."""
    with pytest.raises(BadInput, match="/dev/zero has more than 20000 characters"):
        read_settings(["--config", "/dev/zero"])
    reader, writer = os.pipe()
    os.write(writer, b"lr: 0.5")
    os.close(writer)
    assert read_settings(["--config", f"/dev/fd/{reader}"])[1].lr == 0.5
    os.close(reader)


def test_a_config_file_with_a_byte_order_mark():
    Path("c.yaml").write_text("lr: 0.5", encoding="utf-8-sig")
    assert read_settings(["--config", "c.yaml"])[1].lr == 0.5


NAMES = [*OPTIONS, "config", "tmp", "git-dirty", *GONE, *UNUSED_PUBLISHED_KEYS, "", "lr=", "epoch"]
TEXTS = (st.integers().map(str) | st.floats().map(str) | st.text(max_size=20) | st.sampled_from([
    "", "--", "-", "nan", "-inf", "1e999", "9" * 5000, "@file", "null", "~", "true", "=", "\0",
    "\ud800", "\udcff", "x" * 9000, "[1, 2]", "cuda:0", "--lr", "٣", "1_0", "c.yaml"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3))
OPTION = st.sampled_from(NAMES).map("--{}".format)
WORDS = st.tuples(st.builds("{}={}".format, OPTION, TEXTS)) | st.tuples(OPTION, TEXTS) | st.tuples(
    TEXTS)
no_health_check = settings(suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def parser(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("parser"))
        return SettingsParser()


def read_or_refuse(parser, argv):
    """Read a command line. It may be refused, in one line of limited length, or ask for help."""
    try:
        parser.read(argv)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) < 1100
    except SystemExit as end:
        assert end.code == 0 and "-h" in "".join(argv)


@settings(no_health_check, max_examples=1000)
@given(st.lists(WORDS, max_size=3))
def test_random_command_lines(parser, words):
    read_or_refuse(parser, [*itertools.chain(*words)])


@settings(no_health_check, max_examples=500)
@given(st.dictionaries(st.sampled_from([*NAMES, "extends", "time", "config_file"]) | TEXTS, VALUES,
                       max_size=3))
def test_random_config_files(parser, content):
    Path("c.yaml").write_text(yaml.dump(content), encoding="utf-8", errors="surrogatepass")
    read_or_refuse(parser, ["--config", "c.yaml"])


@settings(no_health_check, max_examples=500)
@given(st.text("lr:k-? \n[]{},&*!|>'\"#%@`1a~<=.\t\\", max_size=40) | st.binary(max_size=40))
def test_random_bytes_as_config_files(parser, content):
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    read_or_refuse(parser, ["--config", "c.yaml"])


@pytest.mark.parametrize("name", ["width", "n_blocks", "hh_factors", "l", "ssl_l", "ssl_k",
                                  "ssl_hd", "ssl_hh", "num_examples", "validation", "train_bs"])
def test_sizes_that_no_memory_holds(name):
    with pytest.raises(BadInput, match=f"--{name}: must be at most"):
        read_settings([f"--{name}", str(10**9)])


def test_too_little_memory():
    for allocate in (lambda: torch.empty(10**15), lambda: bytearray(10**15)):
        with pytest.raises(Failed, match="memory is too small"), torch_errors_as_failed():
            allocate()
    with pytest.raises(RuntimeError, match="must match"), torch_errors_as_failed():
        torch.zeros(2) + torch.zeros(3)


def plausible(option):
    """Some values of an option, such that a tiny run with them takes a second."""
    if option.low is None:
        return option.choices or ("true", "false")
    ends = [option.low, *option.also, *([option.high] if option.type is float else [])]
    return [*ends, option.default, 1, 2, 3, 0.5, 1e-30, 1e30] if option.type is float else [
        *ends, option.low + 1, option.low + 2, 10, 16, 50]


LONG = {"epochs", "time_limit", "compile", "device", "name", "data_root", "pretrained", "resume",
        "initial_weights", "data"}      # or not of numbers and words
PAIRS = [(name, value) for name, option in OPTIONS.items() if name not in LONG
         for value in plausible(option)] + [
    ("data", "moons"), ("data", "circles"), ("device", "cuda:9"), ("name", "é"), ("epochs", 2)]


@pytest.mark.slow
@settings(no_health_check, max_examples=40)
@given(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=4).map(dict))
def test_random_runs_of_one_step(capsys, changes):
    capsys.readouterr()
    code = run_script(options(**{"epochs": 3, "threads": 1, "time_limit": 1e-9, **changes}))
    err = capsys.readouterr().err
    assert code in (0, 1, 2) and err.count("\n") == (code > 0), err
