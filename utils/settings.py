"""The settings of a run: a YAML file and the command line, read by exman's parser.

`ExParser` decides the format of the options and where runs are stored. `SettingsParser` is a thin
layer over it: it refuses what exman ignores silently, and creates the run's directory only after
everything has been checked.
"""

import argparse
import contextlib
import difflib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

# exman imports GitPython, which without this refuses to import where there is no git binary.
os.environ["GIT_PYTHON_REFRESH"] = "quiet"

import configargparse
import exman.parser
import filelock
import yaml
from exman import ExParser

from models import MODEL_CHOICES, MODEL_OPTIONS

from .data import DATASETS
from .errors import BadInput
from .files import PROJECT, atomic_write

UNUSED_PUBLISHED_KEYS = ("k", "hid_dim", "logits", "lr_gamma", "lr_steps", "sup_ohe", "status")
EXTENDS = "extends"     # the key of a config file that names another one
EXMAN_KEYS = ("root", "time", "id", "commit", "dirty")  # what exman adds to a run's params.yaml
RESUMABLE = ("device", "threads", "data_root", "log_each", "epochs", "deterministic", "precision",
             "compile", "cuda_graph", "micro_bs", "time_limit", "config_file", "resume",
             "git_dirty", "draws", "weights", "test")
TRACEBACK_FILE, LOCK_FILE = "traceback.txt", ".lock"
SHIPPED = "shipped"  # the value of a bare --pretrained


def read_settings(argv: Sequence[str] | None = None) -> tuple["SettingsParser", argparse.Namespace]:
    """Parse the command line `argv` (sys.argv[1:] if None) -> (parser, settings).

    settings: a namespace with every option. Nothing is written except exman's empty folders. A
    value that is wrong, by itself or beside others, raises BadInput.
    """
    root = Path.cwd() / "logs" / "exman-train-flow-ssl.py"
    try:
        parser = SettingsParser(
            prog="train-flow-ssl.py", root=root, git=_git_worktree(),
            description="Train or evaluate a semi-conditional normalizing flow.")
    except OSError as e:
        raise BadInput(f"cannot create the folders of runs in {root}: {e.strerror}") from None
    return parser, parser.read(argv)


def _number(kind: type, low: float, high: float, *, open_below: bool = False,
            also: tuple[float, ...] = ()) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` from `low` to `high`, or one of `also`.

    With `open_below`, it has to be more than `low`.
    """
    def convert(text: str) -> Any:
        value = kind(text)
        if value not in also and not (low < value <= high if open_below else low <= value <= high):
            bound = (f"at most {high}" if value > high else
                     f"more than {low}" if open_below else f"at least {low}")
            others = "".join(f" or {v}" for v in also)
            raise argparse.ArgumentTypeError(f"must be {bound}{others}, not {text}")
        return value
    convert.__name__ = kind.__name__  # argparse: "invalid int value: 'x'"
    return convert


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() in ("true", "yes", "on", "1")


def _name(text: str) -> str:
    # A config file's null would be read as no value.
    if (Path(text).name != text or len(os.fsencode(text)) > 100 or not text.isprintable()
            or text in ("null", "~")):
        raise argparse.ArgumentTypeError(
            f"must be a valid suffix of a directory name, of at most 100 bytes, not {text!r}")
    return text


def _add_options(parser: argparse.ArgumentParser) -> None:
    def add(name: str, kind: Callable[[str], Any], default: Any, help: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", type=kind, default=default,
                            help=f"{help} (default: {default!r})", **more)

    large = 2**31 - 1
    seed, whole, positive = _number(int, 0, large), _number(int, 0, large), _number(int, 1, large)
    at_least_zero, above_zero = _number(float, 0, 1e30), _number(float, 0, 1e30, open_below=True)
    add("seed", seed, 0, "seed of the initial weights, the batches and the dequantisation noise")

    add("data", str, "mnist", "dataset", choices=tuple(DATASETS))
    add("data_root", str, "data", "folder that contains, or will contain, MNIST/raw")
    add("num_examples", _number(int, 1, large, also=(-1,)), -1,
        "training examples to use; -1: all (1000 points of moons and circles)")
    add("data_seed", seed, 0,
        "seed that selects the labelled examples, num_examples, and the points of moons and "
        "circles")
    add("validation", whole, 0,
        "training examples that are set aside, always the same ones, to choose settings and "
        "weights by; the test set is then evaluated after the last epoch only")
    add("test", _boolean, True,
        "evaluate the test set; false: while settings are chosen by the validation examples",
        metavar="true|false")
    add("supervised", _number(int, 1, large, also=(-1,)), 100, "labelled examples; -1: all")
    add("sup_sample_weight", _number(float, 0, 1e30, open_below=True, also=(-1,)), 0.5,
        "w: a row of a batch is labelled with probability w / (1 + w); -1: the share of labelled "
        "examples")

    add("optimizer", str, "adamax", "optimiser", choices=("adamax", "adam"))
    add("lr", above_zero, 1e-3, "learning rate")
    add("epochs", positive, 500, "epochs of ceil(training examples / train_bs) training steps")
    add("train_bs", _number(int, 2, large), 256, "batch size in training")
    add("test_bs", positive, 512, "batch size in evaluation")
    add("lr_schedule", str, "linear",
        "no: constant; linear: to zero, per epoch; hat: linear warm-up over lr_warmup epochs, then "
        "linear to zero; cosine: to zero, per training step",
        choices=("no", "linear", "hat", "cosine"))
    add("lr_warmup", whole, 0, "warm-up epochs of lr_schedule hat")
    add("warmup_steps", whole, 0, "training steps of linear warm-up, on top of any lr_schedule")
    add("weight_decay", at_least_zero, 1e-5, "L2 penalty")
    add("clip_gn", at_least_zero, 0.0, "clip the gradient to this norm; 0: no clipping")
    add("ema", _number(float, 0, 1 - 1e-9), 0.0,
        "decay of an exponential moving average of the weights; the run keeps it, or the last "
        "weights, whichever has the higher validation likelihood; 0: none")
    add("log_each", positive, 2, "epochs between evaluations, log lines and checkpoints")

    for name, kind, text in (
            ("model", str, "architecture of f_w"),
            ("pixels", str,
             "its first layer, for images: logit, or marginal: each pixel's values are transformed "
             "to a Gaussian by their distribution in the training images"),
            ("width", whole,
             "channels of the networks of f_w, except toy's; 0: the model's default"),
            ("n_blocks", whole, "residual blocks of these networks; 0: the model's default"),
            ("position_bias", _boolean, "give them a learned bias per pixel (true or false)"),
            ("conv", str, "invertible 1x1 convolutions of f_w"),
            ("hh_factors", positive, "Householder reflections of conv qr, qr-abs and hh"),
            ("l", positive, "flow steps of model toy"),
            ("ssl_model", str, "h_phi: cond-flow (SCNF-GLOW), cond-shift (SCNF-GMM), or cond-gmm, "
             "SCNF-GMM with a diagonal covariance of each class"),
            ("ssl_dim", _number(int, 2, large, also=(-1,)),
             "dimensions of z_f, an even number; -1: all of z"),
            ("ssl_l", positive, "levels of cond-flow"),
            ("ssl_k", positive, "flow steps per level of cond-flow"),
            ("ssl_hd", positive, "width of the networks of cond-flow"),
            ("ssl_std", above_zero,
             "standard deviation of the means of cond-shift and cond-gmm at the start"),
            ("ssl_conv", str, "invertible 1x1 convolutions of h_phi"),
            ("ssl_hh", positive, "Householder reflections of ssl_conv qr, qr-abs and hh")):
        add(name, kind, MODEL_OPTIONS[name], text, choices=MODEL_CHOICES.get(name))
    add("ssl_nclasses", _number(int, 2, large, also=(-1,)), -1, "number of classes; -1: the data's")

    add("ssl_alg", str, "sgd",
        "likelihood of unlabelled images: sgd: log p(x); em: E_q log p(x, y), q = p(y | x) without "
        "gradient", choices=("sgd", "em"))
    add("sup_weight", above_zero, 1.0,
        "weight of log p(x, y) of a labelled row relative to log p(x) of an unlabelled one; the "
        "weights of a batch are normalised")
    add("cl_weight", at_least_zero, 0.0,
        "weight of L_clf, the cross-entropy of p(y | x) on labelled rows")
    add("cons_weight", at_least_zero, 0.0,
        "weight of the consistency term: a confident p(y | x) of an unlabelled image is the target "
        "for its augmented copy; L_clf is then averaged over an image and its copy")
    add("target_weights", str, "last",
        "which weights give that p(y | x): the last ones or, if ema is positive, their moving "
        "average", choices=("last", "averaged"))
    add("confidence", _number(float, 0, 1), 0.95,
        "confidence threshold: p(y | x) is confident if its largest value exceeds it")
    add("vat_weight", at_least_zero, 0.0,
        "weight of virtual adversarial training, in model pyramid: p(y | x) should not depend on "
        "small changes of the image, not even on those that change it most")
    add("vat_eps", above_zero, 2.0,
        "length of these changes: Euclidean norm over the pixels, of which white is 1")
    add("spread_labels", _number(float, 0, 1 - 1e-9), 0.0,
        "w: the targets of the consistency term have the prior w s(y) + (1 - w) p(y), where s is "
        "from label spreading over the training images; 0: p(y)")
    add("clf_noise", str.lower, "true",
        "classify images with dequantisation noise; train: in training only: the targets of the "
        "consistency term, and the images whose error is measured, have values in the middle of "
        "their grey levels; false: augmented copies, and the images whose error is measured, have "
        "them", choices=("true", "train", "false"))
    for name, kind, text in (("rotation", _number(float, 0, 180, also=(-1,)), "rotation, degrees"),
                             ("scaling", _number(float, 0, 0.9, also=(-1,)),
                              "change of size, as a share of it"),
                             ("shift", _number(float, 0, 1000, also=(-1,)), "translation, pixels")):
        add(f"aug_{name}", kind, -1.0, f"largest {text}, of an augmented copy; -1: the data's")

    add("pretrained", str, "",
        "evaluate the weights in FILE and stop; without FILE, those shipped for the config",
        nargs="?", const=SHIPPED, metavar="FILE")
    add("draws", _number(int, 1, 1000), 1,
        "samples of the dequantisation noise over which --pretrained averages")
    add("weights", str, "last",
        "which weights --pretrained evaluates if FILE is the checkpoint.pt of a run with ema",
        choices=("last", "averaged"))
    add("initial_weights", str, "", "start from the weights in FILE, not from random ones",
        metavar="FILE")
    add("resume", str, "", "continue the run in this directory", metavar="RUN_DIR")
    add("device", str, "auto", "auto, cpu, cuda or cuda:N; auto: cuda if available")
    add("threads", _number(int, 0, 4096), 0, "CPU threads; 0: PyTorch's choice")
    add("precision", str, "auto",
        "precision of the couplings' networks; tf32: of their convolutions, on a GPU; auto: bf16 "
        "for images on a GPU that supports it, else fp32", choices=("auto", "fp32", "tf32", "bf16"))
    add("compile", str, "auto", "torch.compile for training and evaluation; auto: on a GPU",
        choices=("auto", "off", "on"))
    add("cuda_graph", str, "auto",
        "run a training step as one CUDA graph; auto: on a GPU, with one process",
        choices=("auto", "off", "on"))
    add("micro_bs", whole, 0,
        "micro-batch size: a training step accumulates gradients over micro-batches of so many "
        "rows; 0: chosen to save memory on a CPU, on a GPU the whole batch")
    add("time_limit", at_least_zero, 0.0,
        "minutes after which to stop with a checkpoint; 0: no limit")
    add("deterministic", _boolean, False, "use deterministic algorithms only",
        nargs="?", const=True, metavar="true|false")
    for name in UNUSED_PUBLISHED_KEYS:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)


class SettingsParser(ExParser):
    """ExParser with our options.

    `read` checks the settings, `start_run` creates the run's directory.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, add_config_file_help=False, add_env_var_help=False,
                         **kwargs)
        for action in self._actions:
            if action.dest == "name":  # an option of exman's own
                action.type, action.default = _name, ""
                action.help = "suffix of the run directory's name"
            elif action.dest == "config_file":
                action.metavar = "FILE"
                action.help = "YAML file of settings; the command line overrides it"
            elif action.dest == "tmp":
                action.help = "put the run into tmp, and not into exman's index"
            elif action.dest == "git_dirty":
                action.help = argparse.SUPPRESS             # it would matter to git_assert_clean
        _add_options(self)
        self._config_file_parser = _ConfigFile(self)
        self._checked: argparse.Namespace | None = None

    def error(self, message: str) -> NoReturn:
        """Raise BadInput, which of several processes only the main one prints."""
        raise BadInput(" ".join(message.split()))

    def read(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The settings that `argv` and its config file give, each checked by itself.

        No run is created.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        for option in ("--pretrained", "--resume"):     # an empty value would mean: train
            if f"{option}=" in argv or (option, "") in itertools.pairwise(argv):
                self.error(f"{option} has an empty value")
        settings = self._parse(argv)
        if settings.resume:
            settings = self._settings_to_resume(settings.resume, argv)
        if settings.lr_schedule == "hat" and settings.lr_warmup >= settings.epochs:
            self.error(f"lr_warmup {settings.lr_warmup} must be less than "
                       f"the {settings.epochs} epochs")
        if (settings.epochs == 1 and settings.lr_schedule in ("linear", "hat")
                and not settings.pretrained):
            self.error(f"with lr_schedule {settings.lr_schedule} the last epoch has learning rate "
                       "zero, so a single one would change nothing: use more epochs, or "
                       "lr_schedule cosine or no")
        if settings.spread_labels and not settings.cons_weight:
            self.error("spread_labels changes the targets of the consistency term: it needs "
                       "cons_weight")
        if settings.vat_weight and settings.model != "pyramid":
            self.error(f"vat_weight is for model pyramid, not {settings.model}")
        if settings.target_weights == "averaged" and not (settings.cons_weight and settings.ema):
            self.error("target_weights averaged is for the consistency term, and needs a moving "
                       "average: --cons_weight and --ema")
        if not settings.validation and not settings.test:
            self.error("test false needs validation examples: --validation N")
        if settings.ema and not settings.validation and not settings.pretrained:
            self.error("ema needs validation examples, to choose between the last and the averaged "
                       "weights: --validation N")
        if settings.weights == "averaged" and not settings.pretrained:
            self.error("weights averaged is for --pretrained RUN_DIR/checkpoint.pt")
        return settings

    def _parse(self, argv: list[str]) -> argparse.Namespace:
        settings, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(self.unknown_key(unknown[0].split("=")[0], known))
        unused = [key for key in UNUSED_PUBLISHED_KEYS if getattr(settings, key) is not None]
        for key in UNUSED_PUBLISHED_KEYS:
            delattr(settings, key)
        if unused:
            print(f"Ignored, because nothing uses them: {', '.join(unused)}")
        return settings

    def _settings_to_resume(self, run_dir: str, argv: list[str]) -> argparse.Namespace:
        """The settings of the run in `run_dir` with the changes in `argv`.

        Raises BadInput for changes of settings that are not in RESUMABLE.
        """
        params = Path(run_dir) / exman.parser.PARAMS_FILE
        if not os.path.isfile(params):      # False where Path.is_file would raise
            raise BadInput(f"no run to resume in {run_dir}: it has no {params.name}")
        root = Path(run_dir).resolve().parent.parent
        if not all((root / folder).is_dir() for folder in self.RESERVED_DIRECTORIES):
            raise BadInput(f"{run_dir} is not in a folder of runs: move it to {self.runs}")
        base = vars(self._parse(["--config", str(params)]))
        del base["config_file"]             # as a default, it would be read again
        data_root = _relative_to(base["data_root"], _started_in(run_dir), Path.cwd())
        if Path(data_root).exists():            # else the run has moved away from its data
            base["data_root"] = data_root
        self.set_defaults(**base)
        settings = self._parse(argv)
        changed = [key for key, value in vars(settings).items()
                   if key not in RESUMABLE and value != base[key]]
        if changed:
            raise BadInput(f"a resumed run keeps its {changed[0]} ({base[changed[0]]!r}, not "
                           f"{getattr(settings, changed[0])!r}): start a new run to change it")
        return settings

    @staticmethod
    def unknown_key(key: str, known: list[str]) -> str:
        """The message for a setting that does not exist, with the closest one that does."""
        close = difflib.get_close_matches(key, known, 1, 0.5)
        return f"unknown setting {key}" + (f": did you mean {close[0]}?" if close else "")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        """As ArgumentParser's; within `start_run`, the settings that have been checked."""
        if self._checked is not None:
            return self._checked, []
        return super().parse_known_args(*args, **kwargs)

    def start_run(self, settings: argparse.Namespace) -> "Run":
        """Let exman create the directory of a run, with `settings` in its params.yaml.

        exman does this within `parse_args`. The settings have been read, and checked against data
        and model, by then, so they take the place of what it would parse.
        """
        self._checked = argparse.Namespace(**vars(settings))
        try:
            return Run(self.root, super().parse_args().root)
        finally:
            self._checked = None

    def dump_git_diff(self, diff_file: Path) -> None:
        """Write the uncommitted changes. They may have bytes that are not UTF-8."""
        diff_file.write_text(self.repo.git.diff(self.repo.head), errors="surrogateescape")


class _WithoutDuplicates(yaml.BaseLoader):
    """A loader that refuses a mapping with the same key twice, of which YAML's keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i] and isinstance(key, str)]
        if twice:
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

    def parse(self, stream: IO[str]) -> dict[str, Any]:
        return self._parse(stream, [])

    def _parse(self, stream: IO[str], extending: list[Path]) -> dict[str, Any]:
        """extending: the files that extend this one, directly or not."""
        error = configargparse.ConfigFileParserException
        try:
            content = yaml.load(stream, Loader=_WithoutDuplicates)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
            raise error(f"{stream.name} is not YAML: {e}") from None
        if content in (None, ""):           # all settings have their defaults
            return {}
        if not isinstance(content, dict):
            raise error(f"{stream.name} is not a YAML mapping of settings to values")
        known = [action.dest for action in self.parser._actions if action.dest != "help"]
        settings = {}
        if EXTENDS in content:
            settings = self._parse_extended(stream.name, content.pop(EXTENDS), extending)
        for key, value in content.items():
            if key in EXMAN_KEYS:
                continue
            if key not in known:
                raise error(f"{stream.name}: {self.parser.unknown_key(str(key), known)}")
            if isinstance(value, dict) or (
                    isinstance(value, list) and key not in UNUSED_PUBLISHED_KEYS):
                raise error(f"{stream.name}: {key} takes one value, not {value}")
            if value not in ("", "null", "~"):
                settings[key] = value
        return settings

    def _parse_extended(self, name: str, extended: Any, extending: list[Path]) -> dict[str, Any]:
        """The settings of the file that the one called `name` extends."""
        error = configargparse.ConfigFileParserException
        if not isinstance(extended, str) or not extended:
            raise error(f"{name}: {EXTENDS} takes the name of one file, not {extended}")
        path, own = Path(name).parent / extended, Path(name).resolve()
        if path.resolve() in (chain := [*extending, own]):
            raise error(f"{name}: {EXTENDS} goes in a circle, back to {path}")
        try:
            with open(path) as stream:
                return self._parse(stream, chain)
        except OSError as e:
            raise error(f"{name}: cannot read {path}, which it {EXTENDS}: {e.strerror}") from None


class Run(exman.parser.SafeExperiment):
    """The directory of a run, as a context: what is printed also goes to its log.txt.

    An error moves the directory to `fails`, with the traceback; an interrupt, a closed pipe or an
    exit with code 0 leaves it where it is. `run` is its path. A lock keeps other processes out of
    it until the end of the context, or of the process: BadInput is raised if there is one already.
    """

    run: Path

    def __init__(self, root: Path, run: Path):
        super().__init__(root, run)
        self.lock_of_run = filelock.FileLock(run / LOCK_FILE)
        try:
            self.lock_of_run.acquire(blocking=False)
        except filelock.Timeout:
            raise BadInput(f"another process trains the run in {run}") from None

    @property
    def symlink(self) -> Path:
        """Its entry in exman's index, which only runs in `runs` have."""
        return self.index / exman.parser.yaml_file(self.run.name)

    @property
    def resume_command(self) -> str:
        """The command line that continues the run."""
        return f"python {sys.argv[0]} --resume {shlex.quote(os.path.relpath(self.run))}"

    @classmethod
    def resumed(cls, settings: argparse.Namespace) -> "Run":
        """The run in settings.resume, moved back to `runs`, or `tmp`, if it had failed.

        Its params.yaml is updated to `settings`. Raises BadInput if the place is taken.
        """
        directory = Path(settings.resume).resolve()
        run = cls(directory.parent.parent, directory)
        if directory.parent == run.fails:
            place = (run.tmp if settings.tmp else run.runs) / directory.name
            if place.exists():
                raise BadInput(f"{directory} cannot go back to {place}, which exists: remove one")
            run.run = directory.rename(place)
            (run.run / TRACEBACK_FILE).unlink(missing_ok=True)
            if not settings.tmp:
                run.symlink.unlink(missing_ok=True)
                run.symlink.symlink_to(Path("..", "runs", place.name, exman.parser.PARAMS_FILE))
        path = run.run / exman.parser.PARAMS_FILE
        params = yaml.safe_load(path.read_text())
        params.update({key: value for key, value in vars(settings).items()
                       if key not in ("config_file", "resume")})
        params["data_root"] = _relative_to(settings.data_root, Path.cwd(),
                                           _started_in(settings.resume))
        with atomic_write(path) as f:
            yaml.dump(params, f, default_flow_style=False)
        return run

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(None, None, None)  # ends exman's log.txt; the rest is decided here
        failed = exc_type is not None and not issubclass(
            exc_type, KeyboardInterrupt | BrokenPipeError) and not (
            issubclass(exc_type, SystemExit) and exc_val.code in (None, 0))
        # A full disk, or a directory that has gone, must not hide the error that ended the run.
        with contextlib.suppress(OSError):
            (self.run / LOCK_FILE).unlink(missing_ok=True)
            if failed:
                self._move_to_fails("".join(traceback.format_exception(exc_type, exc_val, exc_tb)))
        self.lock_of_run.release()

    def _move_to_fails(self, trace: str) -> None:
        place = self.fails / self.run.name
        if place.exists():                  # a copy of the run as it failed before
            place = self.fails / f"{self.run.name}-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
        self.run = self.run.rename(place)
        self.symlink.unlink(missing_ok=True)
        (self.run / TRACEBACK_FILE).write_text(trace)


def _started_in(run_dir: str) -> Path:
    """The folder in which the run in `run_dir` was started: FOLDER/logs/NAME/runs/ID-DATE."""
    path = Path(os.path.abspath(run_dir))
    if path.is_symlink():                   # to the run; `logs` itself may be a link, too
        path = path.resolve()
    parents = path.parents
    return parents[min(3, len(parents) - 1)]


def _relative_to(path: str, before: Path, after: Path) -> str:
    """`path`, absolute or relative to the folder `before`, seen from the folder `after`."""
    if Path(path).is_absolute() or before == after:
        return path
    return os.path.relpath(before / path, after)


def _git_worktree() -> str | None:
    """The project's folder if it is a git worktree with a commit, else None.

    exman records the commit in a run's params.yaml.
    """
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "--show-toplevel", "HEAD"],
                           capture_output=True, text=True)
    top = asked.stdout.split("\n")[0]
    return str(PROJECT) if asked.returncode == 0 and Path(top) == PROJECT else None
