"""The directory of a run: how exman creates it, how it is resumed, and how it ends."""

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# exman imports GitPython, which without this refuses to import where there is no git binary.
os.environ["GIT_PYTHON_REFRESH"] = "quiet"

import exman.parser
import filelock
import yaml

from .errors import BadInput
from .files import PROJECT, atomic_write, from_here, has_locks
from .terminal import Output, say

PARAMS_FILE = exman.parser.PARAMS_FILE
TRACEBACK_FILE, LOCK_FILE = "traceback.txt", ".lock"


class RunParser(exman.ExParser):
    """An ExParser that creates the directory of a run after its settings have been checked.

    Reading settings writes nothing: exman's folders, too, are created with the first run.
    """

    RESERVED_DIRECTORIES: frozenset[str] = frozenset()      # what ExParser creates

    def __init__(self, **options: Any):
        super().__init__(root=Path.cwd(), git=git_worktree(), **options)
        self.root = Path.cwd() / "logs" / "exman-train-flow-ssl.py"

    def start_run(self, settings: argparse.Namespace) -> "Run":
        """Let exman create the directory of a run, with `settings` in its params.yaml.

        These are exman's steps at the end of `parse_args`, where a run exists once its params.yaml
        does.

        Raises BadInput if exman's folders cannot be created.
        """
        try:
            self.lock = exman.parser.ExmanDirectory(self.root).lock
            if not has_locks(self.root / "lock"):
                self.lock = contextlib.nullcontext()
        except OSError as e:
            raise BadInput(
                f"cannot create the folders of runs in {self.root}: {e.strerror}") from None
        run, relative, _, time, number, _ = self.new_directory(settings.tmp, settings.name)
        partial = run / f"{PARAMS_FILE}.partial"
        try:
            self.dump_config(settings, relative, time, number, partial)
            if self.repo is not None and self.repo.is_dirty():
                self.dump_git_diff(run / exman.parser.DIFF_FILE)
            partial.rename(run / PARAMS_FILE)
        except BaseException as e:
            shutil.rmtree(run, ignore_errors=True)
            if isinstance(e, OSError):
                raise OSError(e.errno, e.strerror, str(run / PARAMS_FILE)) from None
            raise
        return Run(self.root, run)

    def dump_git_diff(self, diff_file: Path) -> None:
        """Write the uncommitted changes. They may have bytes that are not UTF-8."""
        diff_file.write_text(self.repo.git.diff(self.repo.head), "utf-8", "surrogateescape")


class Run(exman.parser.ExmanDirectory):
    """The directory of a run, as a context: what is printed also goes to its log.txt.

    An error moves the directory to `fails`, with the traceback; an interrupt or an exit with code 0
    leaves it where it is. `run` is its path. A lock keeps other processes out of it until the end
    of the context, or of the process.
    """

    def __init__(self, root: Path, run: Path):
        """Lock the directory, and remove what a killed process has left there half written.

        root: the folder with `runs`, `tmp`, `fails` and `index`.
        run: the directory of the run, in one of these.
        Raises BadInput if another process holds the lock.
        """
        super().__init__(root, mode="validate")
        self.run = run
        self.lock_of_run = filelock.FileLock(run / LOCK_FILE)
        try:
            if has_locks(run / LOCK_FILE):
                self.lock_of_run.acquire(blocking=False)
            else:
                say("Lock", "none, on this file system: only one process may train the run")
        except filelock.Timeout:
            raise BadInput(f"another process trains the run in {run}") from None
        self._enter_index()
        for partial in run.glob("*.partial"):
            if partial.is_file():
                partial.unlink()

    def _enter_index(self) -> None:
        """Add the run, if it lies in `runs`, to exman's index of symbolic links."""
        if self.run.parent == self.runs:
            with contextlib.suppress(OSError):      # not every file system has these
                self.symlink.unlink(missing_ok=True)
                self.symlink.symlink_to(Path("..", "runs", self.run.name, PARAMS_FILE))

    @property
    def symlink(self) -> Path:
        """Its entry in exman's index, which only runs in `runs` have."""
        return self.index / exman.parser.yaml_file(self.run.name)

    @property
    def resume_command(self) -> str:
        """The command line that continues the run."""
        return shlex.join(["python", sys.argv[0], "--resume", from_here(self.run)])

    def way_back(self, settings: argparse.Namespace, diverged: bool) -> str:
        """What the message of a run that failed adds: its last checkpoint, if there is one, and the
        command that goes on from there.

        diverged: whether a number was not finite: then a new run has a lower learning rate
        """
        checkpoint = self.run / "checkpoint.pt"
        if not checkpoint.exists():
            return ""
        command, how = self.resume_command, ""
        if diverged:
            command, how = shlex.join([
                "python", sys.argv[0], "--config", from_here(self.run / PARAMS_FILE),
                "--initial_weights", from_here(self.run), "--lr", f"{settings.lr / 10:g}",
            ]), " with a lower learning rate"
        return f". The last good checkpoint is {checkpoint}; to go on from it{how}: {command}"

    @classmethod
    def resumed(cls, settings: argparse.Namespace) -> "Run":
        """The run that is resumed, moved back to `runs`, or `tmp`, if it had failed.

        settings: all of them; settings.resume is its directory, and its params.yaml is updated.
        Raises BadInput if the place to which it would be moved is taken.
        """
        directory = Path(settings.resume).resolve()
        run = cls(directory.parent.parent, directory)
        if directory.parent == run.fails:
            place = (run.tmp if settings.tmp else run.runs) / directory.name
            if place.exists():
                raise BadInput(f"{directory} cannot go back to {place}, which exists: remove one")
            run.run = directory.rename(place)
            run._enter_index()
        (run.run / TRACEBACK_FILE).unlink(missing_ok=True)
        path = run.run / PARAMS_FILE
        params = read_params(path)
        params.update({key: value for key, value in vars(settings).items()
                       if key not in ("config_file", "resume")})
        params["data_root"] = relative_to(settings.data_root, Path.cwd(),
                                          started_in(settings.resume))
        with atomic_write(path) as f:
            yaml.dump(params, f, default_flow_style=False)
        return run

    def __enter__(self) -> "Run":
        self.log = open(self.run / "log.txt", "a", encoding="utf-8", errors="backslashreplace")
        self.redirect = contextlib.redirect_stdout(Output(sys.stdout, self.log))
        self.redirect.__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        self.redirect.__exit__(exc_type, exc_val, exc_tb)
        failed = exc_type is not None and not issubclass(exc_type, KeyboardInterrupt) and not (
            issubclass(exc_type, SystemExit) and exc_val.code in (None, 0))
        # A full disk, or a directory that has gone, must not hide the error that ended the run.
        with contextlib.suppress(OSError):
            self.log.close()
        with contextlib.suppress(OSError):
            (self.run / LOCK_FILE).unlink(missing_ok=True)
        self.lock_of_run.release()
        with contextlib.suppress(OSError):
            if failed and isinstance(exc_val, BadInput) and not any(self.run.glob("*.pt")):
                shutil.rmtree(self.run)         # there is nothing to keep
                self.symlink.unlink()
            elif failed:
                self._move_to_fails("".join(traceback.format_exception(exc_type, exc_val, exc_tb)))

    def _move_to_fails(self, trace: str) -> None:
        place = self.fails / self.run.name
        if place.exists():                  # a copy of the run as it failed before
            place = self.fails / f"{self.run.name}-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
        self.run = self.run.rename(place)
        self.symlink.unlink(missing_ok=True)
        (self.run / TRACEBACK_FILE).write_text(trace, "utf-8", "backslashreplace")


def read_params(path: Path) -> dict[str, Any]:
    """The content of a run's params.yaml, with YAML's types, such as dates. Raises BadInput."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as e:   # ValueError: of a date
        raise BadInput(f"{path} is damaged: {' '.join(str(e).split())}") from None
    if not isinstance(params, dict):
        raise BadInput(f"{path} is damaged: it is not a mapping")
    return params


def is_in_folder_of_runs(run_dir: str) -> bool:
    """Whether the directory, or what it links to, lies in one of exman's folders."""
    root = Path(run_dir).resolve().parent.parent
    return all((root / folder).is_dir() for folder in Run.RESERVED_DIRECTORIES)


def started_in(run_dir: str) -> Path:
    """The folder in which a run was started.

    run_dir: its directory, FOLDER/logs/NAME/runs/ID-DATE, or a link to it.
    """
    path = Path(os.path.abspath(run_dir))
    if path.is_symlink():                   # to the run; `logs` itself may be a link, too
        path = path.resolve()
    parents = path.parents
    return parents[min(3, len(parents) - 1)]


def relative_to(path: str, before: Path, after: Path) -> str:
    """A path as seen from another folder."""
    if Path(path).is_absolute() or before == after:
        return path
    return os.path.relpath(before / path, after)


def git_worktree() -> str | None:
    """The project's folder if it is a git worktree with a commit, else None.

    exman records the commit in a run's params.yaml.
    """
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(["git", "-C", str(PROJECT), "rev-parse", "--show-toplevel", "HEAD"],
                           capture_output=True, text=True)
    top = asked.stdout.split("\n")[0]
    return str(PROJECT) if asked.returncode == 0 and Path(top) == PROJECT else None
