"""The settings of a run: the table of options, and their values from YAML files and a command line.

The format is that of exman's `ExParser`. `SettingsParser` also refuses what exman would ignore.
"""

import argparse
import difflib
import itertools
import os
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import configargparse
import yaml

from models import MODEL_OPTIONS
from models.options import Option

from . import Settings
from .datasets import DATASETS
from .errors import BadInput, given_twice, names_of_options
from .examples import integers
from .files import PROJECT
from .runs import (PARAMS_FILE, RunParser, is_in_folder_of_runs, read_params, relative_to,
                   started_in)
from .terminal import NO_BREAK, say

SHIPPED = "shipped"     # the value of a bare --pretrained, instead of a file
NO_FILE = "\0"          # what argparse takes it from; no word of a command line has this character


def _name(text: str) -> str:
    # A config file's null would be read as no value.
    if (Path(text).name != text or len(os.fsencode(text)) > 100 or not text.isprintable()
            or text in ("null", "~")):
        raise argparse.ArgumentTypeError(
            f"must be a valid suffix of a directory name, of at most 100 bytes, not {text!r}")
    return text


def _supervised(text: str) -> int | str:
    try:
        numbers = integers(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("supervised ")) from None
    return numbers if isinstance(numbers, int) else ",".join(map(str, numbers))


def _path(text: str) -> str:
    try:
        valid = not set(os.fsencode(text)) & set(b"\0\r\n")
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"must be a path, not {text!r}")
    return os.path.expanduser(text)


def _path_from_anywhere(text: str) -> str:
    return os.path.abspath(_path(text)) if text else ""


def _weights(text: str) -> str:
    if text == NO_FILE:
        return SHIPPED
    return os.path.join(".", text) if text == SHIPPED else _path(text)      # a file of that name


# All options, in the groups and the order of config.yaml, whose comments explain them.
OPTION_GROUPS: dict[str, tuple[Option, ...]] = {
    "Run": (
        Option("name", _name, ""),
        Option("seed", int, 0, low=0),
    ),
    "Data": (
        Option("data", str, "mnist", choices=tuple(DATASETS)),
        Option("data_root", _path, "data", resumable=True),
        Option("image_size", int, 0, low=0, high=4096),
        Option("num_examples", int, -1, low=1, high=10**6, also=(-1,)),
        Option("data_seed", int, 0, low=0),
        Option("validation", int, 0, low=0, high=10**6),
        Option("test", bool, True, resumable=True),
        Option("supervised", _supervised, 100),
        Option("labelled", _path_from_anywhere, ""),
        Option("sup_sample_weight", float, 0.5, low=0, open_below=True, also=(-1,)),
    ),
    "Optimisation": (
        Option("optimizer", str, "adamax", choices=("adamax", "adam")),
        Option("lr", float, 1e-3, low=0, open_below=True),
        Option("lr_schedule", str, "linear", choices=("no", "linear", "cosine")),
        Option("warmup_steps", int, 0, low=0),
        Option("weight_decay", float, 1e-5, low=0),
        Option("epochs", int, 500, low=1, resumable=True),
        Option("train_bs", int, 256, low=2, high=2**16),
        Option("test_bs", int, 512, low=1),
        Option("ema", float, 0.0, low=0, high=1 - 1e-9),
        Option("log_each", int, 2, low=1, resumable=True),
    ),
    **MODEL_OPTIONS,
    "Loss": (
        Option("ssl_alg", str, "sgd", choices=("sgd", "em")),
        Option("sup_weight", float, 1.0, low=0, open_below=True),
        Option("cl_weight", float, 0.0, low=0),
    ),
    "Loss beyond the paper": (
        Option("cons_weight", float, 0.0, low=0),
        Option("target_weights", str, "last", choices=("last", "averaged")),
        Option("vat_weight", float, 0.0, low=0),
        Option("vat_eps", float, 2.0, low=0, open_below=True),
        Option("spread_labels", float, 0.0, low=0, high=1 - 1e-9),
        Option("clf_noise", str.lower, "true", choices=("true", "train", "false")),
        Option("aug_rotation", float, -1.0, low=0, high=180, also=(-1,)),
        Option("aug_scaling", float, -1.0, low=0, high=0.9, also=(-1,)),
        Option("aug_shift", float, -1.0, low=0, high=1000, also=(-1,)),
    ),
    "Evaluation": (
        Option("pretrained", _weights, ""),
        Option("weights", str, "last", choices=("last", "averaged"), resumable=True),
        Option("draws", int, 1, low=1, high=1000, resumable=True),
    ),
    "Where and how": (
        Option("initial_weights", _path_from_anywhere, ""),
        Option("resume", _path, "", resumable=True),
        Option("device", str, "auto", resumable=True),
        Option("threads", int, 0, low=0, high=4096, resumable=True),
        Option("time_limit", float, 0.0, low=0, resumable=True),
    ),
    "Speed": (
        Option("precision", str, "auto", choices=("auto", "fp32", "tf32", "bf16"), resumable=True),
        Option("compile", str, "auto", choices=("auto", "off", "on"), resumable=True),
        Option("cuda_graph", str, "auto", choices=("auto", "off", "on"), resumable=True),
        Option("micro_bs", int, 0, low=0, resumable=True),
    ),
}
OPTIONS = {option.name: option for group in OPTION_GROUPS.values() for option in group}
RESUMABLE = (*(name for name, option in OPTIONS.items() if option.resumable),
             "config_file", "git_dirty")
# What else argparse has to know, of these options and of exman's own.
ARGPARSE: dict[str, dict[str, Any]] = {
    "config_file": {"metavar": "FILE",
                    "help": "YAML file of settings; the command line overrides it"},
    "tmp": {"help": "put the run into tmp, and not into exman's index"},
    "git_dirty": {"help": argparse.SUPPRESS},           # only exman's git_assert_clean uses it
    "pretrained": {"metavar": "FILE", "nargs": "?", "const": NO_FILE},
    "initial_weights": {"metavar": "FILE"}, "labelled": {"metavar": "FILE"},
    "resume": {"metavar": "RUN_DIR"}}
UNUSED_PUBLISHED_KEYS = ("k", "hid_dim", "logits", "lr_gamma", "lr_steps", "lr_warmup", "sup_ohe",
                         "status")
# Options that earlier runs had, with the values that meant to do without them: the only ones that
# are still accepted.
GONE: dict[str, tuple[float | str, ...]] = {
    "clip_gn": (0,), "confidence": (0.95,),
    "ssl_nclasses": (-1,),      # or the data's number of classes
    "deterministic": ("false", "no", "off", 0)}
EXMAN_KEYS = ("root", "time", "id", "commit", "dirty")  # what exman adds to a run's params.yaml
# What other programs call our options.
COMMON_NAMES = {
    "seed": ("seed_everything", "random_seed", "manual_seed"),
    "data": ("dataset",), "data_root": ("data_dir", "data_path", "datadir", "root"),
    "supervised": ("n_labels", "num_labels", "n_labeled", "num_labeled", "labels"),
    "optimizer": ("opt", "optim"), "lr": ("learning_rate",), "lr_schedule": ("scheduler", "sched"),
    "warmup_steps": ("warmup", "num_warmup_steps"), "weight_decay": ("wd", "l2"),
    "epochs": ("num_epochs", "n_epochs", "max_epochs", "epoch"),
    "train_bs": ("batch_size", "bs", "train_batch_size"),
    "test_bs": ("eval_batch_size", "test_batch_size", "val_batch_size"),
    "ema": ("ema_decay",), "log_each": ("log_interval", "log_every", "eval_every"),
    "cons_weight": ("lambda_u", "unsup_weight"),
    "pretrained": ("checkpoint", "ckpt", "load", "eval", "evaluate"),
    "initial_weights": ("init_from", "finetune"), "resume": ("resume_from", "continue"),
    "device": ("gpu", "gpus", "cuda", "no_cuda", "accelerator"),
    "threads": ("num_threads", "n_threads"), "time_limit": ("max_time",),
    "precision": ("amp", "fp16", "bf16", "dtype"), "micro_bs": ("micro_batch_size",),
    "config": ("cfg", "config_file", "conf")}
EXTENDS = "extends"     # the key of a config file that names another one
LARGEST_FILE = 20_000   # of a config file, in characters: PyYAML reads as many in a second
LONGEST_MESSAGE, LONGEST_KEY, MOST_KEYS = 1000, 60, 5       # characters; of unknown settings


def read_settings(argv: Sequence[str] | None = None, fixed: Sequence[str] = ()
                  ) -> tuple["SettingsParser", argparse.Namespace]:
    """Parse a command line -> (parser, settings).

    settings is a namespace with every option. Nothing is written.

    fixed: options that the calling program sets; argv must not contain them.
    Raises BadInput if a value is wrong, by itself or beside others.
    """
    parser = SettingsParser()
    argv = sys.argv[1:] if argv is None else argv
    if both := sorted(set(names_of_options(argv)) & set(names_of_options(fixed))):
        raise BadInput(f"{both[0]} cannot be given here: {' '.join(fixed)} is set already")
    return parser, parser.read([*argv, *fixed])


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() in ("true", "yes", "on", "1")


def _converter(option: Option) -> Callable[[str], Any]:
    """The argparse type of an option: a function of its text, that checks the value."""
    def convert(text: str) -> Any:
        value = (_boolean if option.type is bool else option.type)(text)
        if problem := option.problem(value):
            raise argparse.ArgumentTypeError(problem)
        return value
    convert.__name__ = option.type.__name__     # argparse: "invalid int value: 'x'"
    return convert


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.lower()


class SettingsParser(RunParser):
    """The parser of all options. `read` gives the settings, `start_run` creates a run."""

    def __init__(self) -> None:
        """Raises BadInput as RunParser does."""
        super().__init__(
            prog="train-flow-ssl.py", allow_abbrev=False, add_config_file_help=False,
            add_env_var_help=False, conflict_handler="resolve",     # our `name` replaces exman's
            config_file_open_func=_open,
            description="Train or evaluate a semi-conditional normalizing flow; see config.yaml.")
        for title, options in OPTION_GROUPS.items():
            group = self.add_argument_group(title)
            for option in options:
                group.add_argument(
                    f"--{option.name}", type=_converter(option), default=option.default,
                    choices=option.choices or None,
                    metavar="true|false" if option.type is bool else None)
        for action in self._actions:
            vars(action).update(ARGPARSE.get(action.dest, {}))
        for key in UNUSED_PUBLISHED_KEYS:
            self.add_argument(f"--{key}", nargs="*", help=argparse.SUPPRESS)
        for key in GONE:
            self.add_argument(f"--{key}", nargs="?", const="true", type=_number_or_word,
                              help=argparse.SUPPRESS)
        self._config_file_parser = _ConfigFile(self)

    def format_help(self) -> str:
        """The text of --help, where the comments in config.yaml explain the options."""
        text = (PROJECT / "config.yaml").read_text("utf-8", "replace")
        explained = {name: " ".join(re.findall(r"# *(.*)", lines)).replace("%", "%%")
                     for name, lines in re.findall(r"^(\w+) *:(.*(?:\n +#.*)*)", text, re.M)}
        explained["resume"] = "continue the run in this directory"
        for action in self._actions:
            if action.dest in OPTIONS:
                action.help = f"{explained.get(action.dest, '')} (default: {action.default!r})"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raise BadInput, which of several processes only the main one prints."""
        line = " ".join(message.split())
        raise BadInput(line[:LONGEST_MESSAGE] + "..." * (len(line) > LONGEST_MESSAGE))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The settings that a command line and its config file give, checked. No run is created.

        Raises BadInput if a value is wrong, by itself or beside others.
        """
        argv = list(argv)
        # An empty value would mean: train, with the defaults, from random weights.
        for option in ("--pretrained", "--resume", "--config", "--initial_weights"):
            if f"{option}=" in argv or (option, "") in itertools.pairwise(argv):
                self.error(f"{option} has an empty value")
        if ("--labelled", "") in itertools.pairwise(argv):      # scripts say --labelled=
            self.error("--labelled has an empty value")
        # argparse would keep the last value, and ConfigArgParse read the last file only.
        if (twice := given_twice(argv)) == "--config":
            self.error(f"--config is given twice: write `{EXTENDS}: FILE` into one of the files")
        if twice:
            self.error(f"{twice} is given twice")
        s = self._parse(argv)
        if s.resume:
            s = self._parse_resumed(s.resume, argv)
        if s.pretrained not in ("", SHIPPED) and not os.path.exists(s.pretrained):
            self.error(f"no file {s.pretrained}")       # before any data are loaded
        if s.pretrained != SHIPPED and os.path.isdir(s.pretrained):
            s = self._parse_evaluated(s.pretrained, argv)
        if os.path.basename(s.config_file or "") == PARAMS_FILE and not (
                s.resume or "--data_root" in names_of_options(argv)):
            s.data_root = data_root_of_run(s.data_root, os.path.dirname(s.config_file))
        if os.path.isdir(s.initial_weights):
            s.initial_weights = str(weights_of_run(s.initial_weights))
        of_labels = [key for key in ("cl_weight", "cons_weight", "vat_weight", "spread_labels")
                     if vars(s)[key]]
        for is_wrong, message in (
                (not s.supervised and s.labelled,
                 "supervised 0 is for no labels, and labelled names some"),
                (not s.supervised and of_labels,
                 "without labels (supervised 0) the density alone is trained: set "
                 f"{', '.join(of_labels)} to 0"),
                (s.epochs == 1 and s.lr_schedule == "linear" and not s.pretrained,
                 "with lr_schedule linear the last epoch has learning rate zero, so a single one "
                 "would change nothing: use more epochs, or lr_schedule cosine or no"),
                (s.spread_labels and not s.cons_weight,
                 "spread_labels changes the targets of the consistency term: it needs cons_weight"),
                (s.vat_weight and s.model != "pyramid",
                 f"vat_weight is for model pyramid, not {s.model}"),
                (s.target_weights == "averaged" and not (s.cons_weight and s.ema),
                 "target_weights averaged is for the consistency term, and needs a moving average: "
                 "--cons_weight and --ema"),
                (not s.validation and not s.test,
                 "test false needs validation examples: --validation N"),
                (s.ema and not s.validation and not s.pretrained,
                 "ema needs validation examples, to choose between the last and the averaged "
                 "weights: --validation N"),
                (s.weights == "averaged" and not s.pretrained,
                 "weights averaged is for --pretrained RUN_DIR, or its checkpoint.pt")):
            if is_wrong:
                self.error(message)
        return s

    def _parse(self, argv: list[str]) -> argparse.Namespace:
        settings, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(_unknown_words(unknown))
        values = vars(settings)
        for key in OPTIONS:
            if values[key] in ([], "--"):   # what argparse makes of the value --: [] until 3.12
                self.error(f"{key} cannot be --")
        n_classes = len(DATASETS[settings.data].classes)
        for key, accepted in GONE.items():
            value = values.pop(key)
            if value in (None, *accepted) or settings.pretrained or (
                    key == "ssl_nclasses" and value == n_classes):
                continue
            shown = f"{value:g}" if isinstance(value, float) else value
            self.error(f"the option {key} does not exist any more: only {accepted[0]} is accepted, "
                       f"not {shown}")
        if unused := [key for key in UNUSED_PUBLISHED_KEYS if values.pop(key) is not None]:
            say("Ignored", f"because nothing uses them: {', '.join(unused)}")
        return settings

    def _parse_resumed(self, run_dir: str, argv: list[str]) -> argparse.Namespace:
        """The settings of the run in `run_dir` with the changes in `argv`.

        Raises BadInput for changes of settings that are not in RESUMABLE.
        """
        params = Path(run_dir) / PARAMS_FILE
        if not os.path.isfile(params):      # False where Path.is_file would raise
            raise BadInput(f"no run to resume in {run_dir}: it has no {params.name}")
        if not is_in_folder_of_runs(run_dir):
            raise BadInput(f"{run_dir} is not in a folder of runs: move it to {self.runs}")
        base = vars(self._parse(["--config", str(params)]))
        read_params(params)                 # its dates have to be right, too, before the run starts
        del base["config_file"]             # as a default, it would be read again
        base.update(data_root=data_root_of_run(base["data_root"], run_dir), time_limit=0.0)
        self.set_defaults(**base)
        settings = self._parse(argv)
        for key in {"precision", "threads"} - {name[2:] for name in names_of_options(argv)}:
            if getattr(settings, key) == OPTIONS[key].default:  # a config's: the run has chosen
                setattr(settings, key, base[key])
        changed = [key for key, value in vars(settings).items()
                   if key not in RESUMABLE and value != base[key]]
        if changed:
            raise BadInput(f"a resumed run keeps its {changed[0]} ({base[changed[0]]!r}, not "
                           f"{getattr(settings, changed[0])!r}): start a new run to change it")
        return settings

    def _parse_evaluated(self, run_dir: str, argv: list[str]) -> argparse.Namespace:
        """The settings in `argv`, or else of the run in `run_dir`, whose weights are evaluated.

        Raises BadInput if it is not the directory of a run, or has no weights.
        """
        params = Path(run_dir, PARAMS_FILE)
        if not params.is_file():
            self.error(f"{run_dir} is not the directory of a run: it has no {params.name}")
        if "--config" not in names_of_options(argv):
            argv = ["--config", str(params), *argv]
        settings = self._parse(argv)
        settings.pretrained = str(weights_of_run(run_dir, settings.weights == "averaged"))
        return settings


def data_root_of_run(data_root: str, run_dir: str) -> str:
    """The data_root in the params.yaml of a run as seen from here, unless there is nothing."""
    if not is_in_folder_of_runs(run_dir):
        return data_root
    seen = relative_to(data_root, started_in(run_dir), Path.cwd())
    return seen if Path(seen).exists() else data_root   # the run may have moved away from its data


def weights_of_run(run_dir: str, averaged: bool = False) -> Path:
    """The file with the weights of a run: model.torch, which a finished run has, or checkpoint.pt,
    which alone has averaged ones beside the last. Raises BadInput if there is none."""
    files = [Path(run_dir, name) for name in ("model.torch", "checkpoint.pt")][averaged:]
    if found := next((path for path in files if path.is_file()), None):
        return found
    raise BadInput(f"{run_dir} has no weights: there is no {' or '.join(f.name for f in files)}")


def differences(settings: Settings) -> str:
    """The settings that are not the defaults, in the order of config.yaml, in words."""
    values = vars(settings)
    forms: dict[type, Callable[[Any], str]] = {bool: lambda v: str(v).lower(), float: "{:g}".format}
    shown = [f"{name}{NO_BREAK}{forms.get(type(values[name]), str)(values[name])}"
             for name, option in OPTIONS.items()
             if values[name] != option.default and name != "resume"]
    return ", ".join(shown)


def _unknown_keys(keys: Sequence[str]) -> str:
    """The message for settings that do not exist, with the closest ones that do."""
    ours = {other: name for name, others in COMMON_NAMES.items() for other in (name, *others)}
    shown = []
    for key in (key[:LONGEST_KEY] for key in keys[:MOST_KEYS]):
        hyphens, plain = "--" * key.startswith("-"), key.lstrip("-").replace("-", "_").lower()
        names = [plain] if plain in ours else difflib.get_close_matches(
            plain, [*OPTIONS, "config", "tmp", *ours], 1, 0.6)
        close = [f" (did you mean {hyphens}{ours.get(name, name)}?)" for name in names]
        shown.append(key + "".join(close))
    more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
    return f"unknown setting{'s' * (len(keys) > 1)} {', '.join(shown)}{more}"


def _unknown_words(words: Sequence[str]) -> str:
    """The message for what argparse leaves of a command line: options, their values, others."""
    options = [word for word in words if word.startswith("-") and not word[1:2].isdigit()]
    messages = [_unknown_keys([word.partition("=")[0] for word in options])] if options else []
    for before, word in itertools.pairwise(["", *words]):
        if word in options or (before in options and "=" not in before):    # or the value of one
            continue
        meant = ""
        if os.path.isfile(os.path.join(word, PARAMS_FILE)):
            meant = f" (did you mean --resume {word}, or --pretrained {word}?)"
        elif word.endswith((".yaml", ".yml")) or os.path.isfile(word):
            meant = f" (did you mean --config {word}?)"
        messages.append(f"unexpected {word}{meant}")
    return "; ".join(messages)


def _open(path: str | Path) -> IO[str]:
    """Open a config file, which is UTF-8 whatever the locale."""
    return open(path, encoding="utf-8-sig")


class _StrictLoader(yaml.BaseLoader):
    """A loader that refuses a mapping with the same key twice, of which YAML's keeps the last, and
    tags, which it would ignore."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in (self.DEFAULT_SCALAR_TAG, self.DEFAULT_SEQUENCE_TAG,
                            self.DEFAULT_MAPPING_TAG):
            raise yaml.YAMLError(f"it has the tag {node.tag}")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        if twice := [key for key, n in counts.items() if n > 1]:
            raise yaml.YAMLError(f"it has {twice[0]} twice")
        return super().construct_mapping(node, deep)


class _ConfigFile(configargparse.YAMLConfigFileParser):
    """Reads a YAML mapping of known keys, each at most once, to scalars or lists.

    Each value is passed on as text to the type of its option, so that `no` is a word and `3e-4` a
    number. The key EXTENDS names another such file, relative to the folder of the first, whose
    values are taken where the first has none.
    """

    def __init__(self, parser: SettingsParser):
        super().__init__()
        self.parser = parser

    def parse(self, stream: IO[str], extending: Sequence[Path] = ()) -> dict[str, Any]:
        """The values in a file.

        extending: the files that extend it, directly or not.
        Raises BadInput if it is not such a mapping.
        """
        error = self.parser.error
        try:
            text = stream.read(LARGEST_FILE + 1)
            if len(text) > LARGEST_FILE:
                error(f"{stream.name} has more than {LARGEST_FILE} characters: no config file does")
            content = yaml.load(text, Loader=_StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
            error(f"{stream.name} is not YAML: {e}")
        if not content:
            error(f"{stream.name} has no settings")
        if not isinstance(content, dict):
            error(f"{stream.name} is not a YAML mapping of settings to values")
        known = [action.dest for action in self.parser._actions if action.dest != "help"]
        settings = {}
        if EXTENDS in content:
            settings = self._parse_extended(stream.name, content.pop(EXTENDS), extending)
        if unknown := [str(key) for key in content if key not in (*known, *EXMAN_KEYS)]:
            error(f"{stream.name}: {_unknown_keys(unknown)}")
        for key, value in content.items():
            if key in EXMAN_KEYS:
                continue
            values = value if key in UNUSED_PUBLISHED_KEYS and isinstance(value, list) else [value]
            if not all(isinstance(value, str) for value in values):
                error(f"{stream.name}: {key} takes one value, not {reprlib.repr(value)}")
            if value not in ("", "null", "~"):
                settings[key] = value
            elif key in OPTIONS and OPTIONS[key].default != "":
                error(f"{stream.name}: {key} has no value")
        return settings

    def _parse_extended(self, name: str, extended: Any,
                        extending: Sequence[Path]) -> dict[str, Any]:
        """The settings of the file that the one called `name` extends."""
        error = self.parser.error
        try:
            if not isinstance(extended, str) or not extended:
                raise argparse.ArgumentTypeError
            path = Path(name).parent / _path(extended)
            stream = _open(path)
        except argparse.ArgumentTypeError:
            error(f"{name}: {EXTENDS} takes the name of one file, not {reprlib.repr(extended)}")
        except OSError as e:
            error(f"{name}: cannot read {path}, which it {EXTENDS}: {e.strerror}")
        if path.resolve() in (chain := [*extending, Path(name).resolve()]):
            error(f"{name}: {EXTENDS} goes in a circle, back to {path}")
        with stream:
            return self.parse(stream, chain)
