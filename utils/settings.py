"""The settings of a run: a YAML file and the command line, read by exman's parser.

`ExParser` decides the options' format and where runs live; `SettingsParser` is a thin layer
over it that refuses what exman passes over in silence, and creates the run's directory only
once everything has been checked.
"""

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

# exman imports GitPython, which without this refuses to import where there is no git binary.
os.environ["GIT_PYTHON_REFRESH"] = "quiet"

import configargparse
import exman.parser
import yaml
from exman import ExParser

from models import MODEL_CHOICES, MODEL_OPTIONS

from . import BadInput, whole_file
from .data import LOADERS

PROJECT = Path(__file__).resolve().parent.parent
PUBLISHED_UNUSED = ("k", "hid_dim", "logits", "lr_gamma", "lr_steps", "sup_ohe", "status")
EXMAN_KEYS = ("root", "time", "id", "commit", "dirty")      # what exman adds to a run's params.yaml
RESUMABLE = ("device", "threads", "data_root", "log_each", "epochs", "deterministic", "precision", "compile", "cuda_graph",
             "micro_bs", "time_limit", "config_file", "resume", "git_dirty")
TRACEBACK_FILE = "traceback.txt"
SHIPPED = "shipped"                                         # what a bare --pretrained means


def read_settings(argv=None):
    """Parse the command line `argv` (sys.argv[1:] if None) -> (parser, settings).

    settings: a namespace with every option. Writes nothing but the empty folders of exman's root.
    A setting that is wrong by itself ends the program with one line on stderr and exit code 2; one
    that cannot be used raises BadInput.
    """
    root = Path.cwd() / "logs" / "exman-train-flow-ssl.py"
    try:
        parser = SettingsParser(prog="train-flow-ssl.py", root=root, git=_git_worktree(),
                                description="Train or evaluate a semi-conditional normalizing flow.")
    except OSError as e:
        raise BadInput(f"cannot create the folders of runs in {root}: {e.strerror}") from None
    return parser, parser.read(argv)


def _number(kind, low, high, *, open_below=False, also=()):
    """An argparse type: a number of `kind` from `low` (more than it if `open_below`) to `high`, or one of `also`."""
    def convert(text):
        value = kind(text)
        if value not in also and not (low < value <= high if open_below else low <= value <= high):
            bound = f"at most {high}" if value > high else f"more than {low}" if open_below else f"at least {low}"
            raise argparse.ArgumentTypeError(f"must be {bound}{''.join(f' or {v}' for v in also)}, not {text}")
        return value
    convert.__name__ = kind.__name__                        # argparse: "invalid int value: 'x'"
    return convert


def _boolean(text):
    if text.lower() not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() in ("true", "yes", "on", "1")


def _name(text):
    if Path(text).name != text or len(text) > 100:
        raise argparse.ArgumentTypeError(f"must do as the end of a directory's name, of at most 100 characters, not {text!r}")
    return text


def _add_options(parser):
    def add(name, type, default, help, **more):
        parser.add_argument(f"--{name}", type=type, default=default, help=f"{help} (default: {default!r})", **more)

    large = 2**31 - 1
    seed, positive, fraction = _number(int, 0, large), _number(int, 1, large), _number(float, 0, 1e30)
    above_zero = {"low": 0, "high": 1e30, "open_below": True}
    add("seed", seed, 0, "initial weights, batches and dequantisation noise")

    add("data", str, "mnist", "dataset", choices=tuple(LOADERS))
    add("data_root", str, "data", "folder that holds, or will hold, MNIST/raw")
    add("num_examples", _number(int, 1, large, also=(-1,)), -1, "training examples to use; -1: all (1000 points of moons, circles)")
    add("data_seed", seed, 0, "choice of the labelled examples, and of num_examples of them; points of moons, circles")
    add("supervised", _number(int, 1, large, also=(-1,)), 100, "labelled examples; -1: all")
    add("sup_sample_weight", _number(float, **above_zero, also=(-1,)), 0.5,
        "w: each draw is labelled with probability w / (1 + w); -1: in proportion to their number")

    add("lr", _number(float, **above_zero), 1e-3, "learning rate of Adamax")
    add("epochs", positive, 500, "epochs, each of as many draws as there are training examples")
    add("train_bs", _number(int, 2, large), 256, "batch size in training")
    add("test_bs", positive, 512, "batch size in evaluation")
    add("lr_schedule", str, "linear", "no; linear: to zero; hat: up for lr_warmup epochs, then linear to zero; "
        "cosine: half a cosine to zero, a step at a time", choices=("no", "linear", "hat", "cosine"))
    add("lr_warmup", _number(int, 0, large), 0, "epochs of lr_schedule hat's rise")
    add("warmup_steps", _number(int, 0, large), 0, "first steps of a run, in which the learning rate also rises from zero")
    add("weight_decay", fraction, 1e-5, "L2 penalty of Adamax")
    add("clip_gn", fraction, 0.0, "largest norm of the gradient; 0: no limit")
    add("ema", _number(float, 0, 1 - 1e-9), 0.0, "decay of a moving average of the weights, kept beside them; 0: none")
    add("log_each", positive, 2, "epochs between two evaluations, log lines and checkpoints")

    for name in ("model", "conv", "ssl_model", "ssl_conv"):
        add(name, str, MODEL_OPTIONS[name], {
            "model": "architecture of f_w", "conv": "invertible 1x1 convolutions of f_w",
            "ssl_model": "h_phi: cond-flow (SCNF-GLOW) or cond-shift (SCNF-GMM)",
            "ssl_conv": "invertible 1x1 convolutions of h_phi"}[name], choices=MODEL_CHOICES[name])
    add("hh_factors", positive, MODEL_OPTIONS["hh_factors"], "Householder reflections in conv qr, qr-abs, hh")
    add("l", positive, MODEL_OPTIONS["l"], "steps of model toy")
    own_number = _number(int, 0, large)
    add("width", own_number, MODEL_OPTIONS["width"], "channels of f_w's networks (not toy's); 0: the model's own number")
    add("n_blocks", own_number, MODEL_OPTIONS["n_blocks"], "their residual blocks; 0: the model's own number")
    add("ssl_dim", _number(int, 2, large, also=(-1,)), MODEL_OPTIONS["ssl_dim"], "dimensions of z_f, an even number; -1: all of z")
    add("ssl_l", positive, MODEL_OPTIONS["ssl_l"], "levels of cond-flow")
    add("ssl_k", positive, MODEL_OPTIONS["ssl_k"], "steps in a level of cond-flow")
    add("ssl_hd", positive, MODEL_OPTIONS["ssl_hd"], "width of cond-flow's networks")
    add("ssl_hh", positive, MODEL_OPTIONS["ssl_hh"], "Householder reflections in ssl_conv qr, qr-abs, hh")
    add("ssl_nclasses", _number(int, 2, large, also=(-1,)), -1, "number of classes; -1: the data's")

    add("ssl_alg", str, "sgd", "unlabelled term: sgd: log p(x); em: E_q log p(x, y), q = p(y | x) held constant",
        choices=("sgd", "em"))
    add("sup_weight", _number(float, **above_zero), 1.0, "weight of a labelled row's log p(x, y)")
    add("cl_weight", fraction, 0.0, "weight of the labelled rows' cross-entropy of p(y | x)")

    add("cons_weight", fraction, 0.0, "weight of the consistency term: p(y | x) of an unlabelled image, where it is sure, "
        "is the target on the same image moved a little; L_clf then sees such images too")

    add("pretrained", str, "", "evaluate these weights and stop; without a value, those shipped for the data",
        nargs="?", const=SHIPPED, metavar="FILE")
    add("draws", _number(int, 1, 1000), 1, "draws of the dequantisation noise on which --pretrained evaluates")
    add("resume", str, "", "go on with the stopped run in this directory", metavar="RUN_DIR")
    add("device", str, "auto", "auto, cpu, cuda or cuda:N; auto: cuda where there is one")
    add("threads", _number(int, 0, 4096), 0, "CPU threads; 0: PyTorch's choice")
    add("precision", str, "auto", "of the networks in the couplings; tf32: of their convolutions, on a GPU; "
        "auto: bf16 on a GPU that has it, else fp32", choices=("auto", "fp32", "tf32", "bf16"))
    add("compile", str, "auto", "torch.compile for training and evaluation; auto: on a GPU", choices=("auto", "off", "on"))
    add("cuda_graph", str, "auto", "a step as one CUDA graph; auto: on a GPU, in a run of one process", choices=("auto", "off", "on"))
    add("micro_bs", _number(int, 0, large), 0, "rows of a forward and backward pass, which add up to a step; "
        "0: on a CPU what its caches suit, on a GPU all")
    add("time_limit", fraction, 0.0, "stop in good order after so many minutes; 0: no limit")
    add("deterministic", _boolean, False, "only algorithms that give the same bits again, on a GPU too",
        nargs="?", const=True, metavar="true|false")
    for name in PUBLISHED_UNUSED:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)


class SettingsParser(ExParser):
    """ExParser with our options: `read` checks the input, `start_run` creates the run's directory."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, add_config_file_help=False, add_env_var_help=False, **kwargs)
        for action in self._actions:
            if action.dest == "name":                       # an option of exman's own
                action.type, action.default = _name, ""
            elif action.dest == "config_file":
                action.metavar, action.help = "FILE", "YAML file of settings; the command line overrides it"
        _add_options(self)
        self._config_file_parser = _ConfigFile(self)
        self._checked = None

    def error(self, message):
        """One line on stderr, exit code 2."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def read(self, argv=None):
        """The settings that `argv` and its config file give, checked one by one; no run is created."""
        argv = list(sys.argv[1:] if argv is None else argv)
        settings = self._parse(argv)
        if settings.resume:
            settings = self._settings_to_resume(settings.resume, argv)
        elif settings.lr_schedule == "hat" and settings.lr_warmup >= settings.epochs:
            self.error(f"lr_warmup {settings.lr_warmup} leaves nothing of {settings.epochs} epochs")
        return settings

    def _parse(self, argv):
        settings, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self.unknown_key(unknown[0].split("=")[0], [s for a in self._actions for s in a.option_strings]))
        unused = [key for key in PUBLISHED_UNUSED if getattr(settings, key) is not None]
        for key in PUBLISHED_UNUSED:
            delattr(settings, key)
        if unused:
            print(f"Ignored, as nothing uses them: {', '.join(unused)}")
        return settings

    def _settings_to_resume(self, run_dir, argv):
        """The settings of the run in `run_dir`, with what `argv` changes; BadInput if it may not be."""
        params = Path(run_dir) / exman.parser.PARAMS_FILE
        if not params.is_file():
            raise BadInput(f"no run to resume in {run_dir}: it has no {params.name}")
        if not all((Path(run_dir).resolve().parent.parent / folder).is_dir() for folder in self.RESERVED_DIRECTORIES):
            raise BadInput(f"{run_dir} is not in a folder of runs: move it to {self.runs}")
        base = vars(self._parse(["--config", str(params)]))
        self.set_defaults(**base)
        settings = self._parse(argv)
        changed = [key for key, value in vars(settings).items() if key not in RESUMABLE and value != base[key]]
        if changed:
            raise BadInput(f"a resumed run keeps its {changed[0]} ({base[changed[0]]!r}, not "
                           f"{getattr(settings, changed[0])!r}): start a new run to change it")
        return settings

    @staticmethod
    def unknown_key(key, known):
        close = difflib.get_close_matches(key, known, 1, 0.5)
        return f"unknown setting {key}" + (f": did you mean {close[0]}?" if close else "")

    def parse_known_args(self, *args, **kwargs):
        if self._checked is not None:                       # exman's parse_args, called by start_run
            return self._checked, []
        return super().parse_known_args(*args, **kwargs)

    def start_run(self, settings):
        """Create the directory of a run with exman, `settings` in its params.yaml -> Run.

        exman does so within `parse_args`; what that parses is put in place of a command line here,
        since the settings of a run have been read, and checked against data and model, by then.
        """
        self._checked = argparse.Namespace(**vars(settings))
        try:
            return Run(self.root, super().parse_args().root)
        finally:
            self._checked = None


class _ConfigFile(configargparse.YAMLConfigFileParser):
    """A YAML mapping of known keys to scalars or lists. Each option's own type reads its text:
    so `no` is a word, and `3e-4` a number."""

    def __init__(self, parser):
        super().__init__()
        self.parser = parser

    def parse(self, stream):
        try:
            content = yaml.load(stream, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise configargparse.ConfigFileParserException(f"{stream.name} is not YAML: {e}") from None
        if not isinstance(content, dict):
            raise configargparse.ConfigFileParserException(f"{stream.name} is not a YAML mapping of settings to values")
        known = [action.dest for action in self.parser._actions if action.dest != "help"]
        settings = {}
        for key, value in content.items():
            if key in EXMAN_KEYS:
                continue
            if key not in known:
                raise configargparse.ConfigFileParserException(f"{stream.name}: {self.parser.unknown_key(str(key), known)}")
            if isinstance(value, dict) or (isinstance(value, list) and key not in PUBLISHED_UNUSED):
                raise configargparse.ConfigFileParserException(f"{stream.name}: {key} takes one value, not {value}")
            if value not in ("", "null", "~"):
                settings[key] = value
        return settings


class Run(exman.parser.SafeExperiment):
    """The directory of a run, as a context: prints also go to its log.txt.

    Leaving by an error moves it to `fails` with the traceback; an interrupt, or an exit with
    code 0, leaves it where it is.
    """

    @property
    def symlink(self):
        """Its entry in exman's index, which only runs in `runs` have."""
        return self.index / exman.parser.yaml_file(self.run.name)

    @classmethod
    def resumed(cls, settings):
        """The run in settings.resume, back in `runs` if it had failed; its params.yaml gets what `settings` changes."""
        directory = Path(settings.resume).resolve()
        run = cls(directory.parent.parent, directory)
        if directory.parent == run.fails:
            run.run = Path(shutil.move(directory, run.runs / directory.name))
            (run.run / TRACEBACK_FILE).unlink(missing_ok=True)
            run.symlink.symlink_to(Path("..", "runs", run.run.name, exman.parser.PARAMS_FILE))
        path = run.run / exman.parser.PARAMS_FILE
        params = yaml.safe_load(path.read_text())
        params.update({key: value for key, value in vars(settings).items() if key not in ("config_file", "resume")})
        with whole_file(path) as f:
            yaml.dump(params, f, default_flow_style=False)
        return run

    def __exit__(self, exc_type, exc_val, exc_tb):
        super().__exit__(None, None, None)                  # the end of exman's log.txt, and of nothing else
        if exc_type is None or issubclass(exc_type, KeyboardInterrupt) or (
                issubclass(exc_type, SystemExit) and exc_val.code in (None, 0)):
            return
        self.run = Path(shutil.move(self.run, self.fails / self.run.name))
        self.symlink.unlink(missing_ok=True)
        (self.run / TRACEBACK_FILE).write_text("".join(traceback.format_exception(exc_type, exc_val, exc_tb)))


def _git_worktree():
    """The project's folder if git can tell its commit (exman then notes it), else None."""
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "--show-toplevel", "HEAD"],
                           capture_output=True, text=True)
    top = asked.stdout.split("\n")[0]
    return str(PROJECT) if asked.returncode == 0 and Path(top) == PROJECT else None
