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
from .files import PROJECT, atomic_write

PARAMS_FILE = exman.parser.PARAMS_FILE
TRACEBACK_FILE, LOCK_FILE = "traceback.txt", ".lock"


class RunParser(exman.ExParser):
    """An ExParser that creates the directory of a run after its settings have been checked."""

    def __init__(self, **options: Any):
        """Create exman's folders below the working directory, in `logs`.

        options: as for ExParser.
        Raises BadInput if the folders cannot be created.
        """
        root = Path.cwd() / "logs" / "exman-train-flow-ssl.py"
        try:
            super().__init__(root=root, git=git_worktree(), **options)
        except OSError as e:
            raise BadInput(f"cannot create the folders of runs in {root}: {e.strerror}") from None
        self._checked: argparse.Namespace | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        """As ArgumentParser's; within `start_run`, the settings that have been checked."""
        if self._checked is not None:
            return self._checked, []
        return super().parse_known_args(*args, **kwargs)

    def start_run(self, settings: argparse.Namespace) -> "Run":
        """Let exman create the directory of a run, with `settings` in its params.yaml.

        exman does this within `parse_args`, where `settings` take the place of what it would parse.

        settings: all of them, checked against data and model.
        """
        self._checked = argparse.Namespace(**vars(settings))
        try:
            with contextlib.redirect_stdout(None):      # exman would print all of them
                return Run(self.root, super().parse_args().root)
        finally:
            self._checked = None

    def params_to_resume(self, run_dir: str) -> Path:
        """The params.yaml of a run.

        run_dir: its directory.
        Raises BadInput if it has none, or lies in no folder of runs.
        """
        params = Path(run_dir) / PARAMS_FILE
        if not os.path.isfile(params):      # False where Path.is_file would raise
            raise BadInput(f"no run to resume in {run_dir}: it has no {params.name}")
        root = Path(run_dir).resolve().parent.parent
        if not all((root / folder).is_dir() for folder in self.RESERVED_DIRECTORIES):
            raise BadInput(f"{run_dir} is not in a folder of runs: move it to {self.runs}")
        return params

    def dump_git_diff(self, diff_file: Path) -> None:
        """Write the uncommitted changes. They may have bytes that are not UTF-8."""
        diff_file.write_text(self.repo.git.diff(self.repo.head), errors="surrogateescape")


class Run(exman.parser.SafeExperiment):
    """The directory of a run, as a context: what is printed also goes to its log.txt.

    An error moves the directory to `fails`, with the traceback; an interrupt, a closed pipe or an
    exit with code 0 leaves it where it is. `run` is its path. A lock keeps other processes out of
    it until the end of the context, or of the process.
    """

    run: Path

    def __init__(self, root: Path, run: Path):
        """Lock the directory.

        root: the folder with `runs`, `tmp`, `fails` and `index`.
        run: the directory of the run, in one of these.
        Raises BadInput if another process holds the lock.
        """
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
            (run.run / TRACEBACK_FILE).unlink(missing_ok=True)
            if not settings.tmp:
                run.symlink.unlink(missing_ok=True)
                run.symlink.symlink_to(Path("..", "runs", place.name, PARAMS_FILE))
        path = run.run / PARAMS_FILE
        params = read_params(path)
        params.update({key: value for key, value in vars(settings).items()
                       if key not in ("config_file", "resume")})
        params["data_root"] = relative_to(settings.data_root, Path.cwd(),
                                          started_in(settings.resume))
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


def read_params(path: Path) -> dict[str, Any]:
    """The content of a run's params.yaml, with YAML's types, such as dates. Raises BadInput."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as e:   # ValueError: of a date
        raise BadInput(f"{path} is damaged: {' '.join(str(e).split())}") from None
    if not isinstance(params, dict):
        raise BadInput(f"{path} is damaged: it is not a mapping")
    return params


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
    """A path as seen from another folder.

    path: absolute, or relative to `before`.
    before, after: absolute folders.
    """
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
