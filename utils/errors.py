"""How a command tells its user what is wrong: one line on stderr, exit code 2."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn


class BadInput(ValueError):
    """The user's input cannot be used. The message is one line that says what is wrong and why.

    A command prints it to stderr and exits with code 2, without a traceback.
    """


@contextlib.contextmanager
def value_errors_as_bad_input() -> Iterator[None]:
    """Turn a ValueError of the block into BadInput, for calls of `models` with user input."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from None


def one_line(error: Exception) -> str:
    """The message of `error`; of an OSError without its number, such as "No space left: PATH"."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(map(str, filter(None, (error.strerror, error.filename))))
    return str(error)


def exit_with(program: str, message: str) -> NoReturn:
    """Print `message` as one line on stderr and exit with code 2."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that prints one line for bad input, without the usage."""

    def error(self, message: str) -> NoReturn:
        exit_with(self.prog, message)


def check_output(path: Path) -> None:
    """Raise BadInput if no file can be written at `path`, before anything is computed for it."""
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder {path.parent} for {path.name}")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a file that could be replaced")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"nothing can be written to {path.parent}")


def run_command(main: Callable[[], object]) -> None:
    """Run `main`; if it raises BadInput or an OSError, such as that of a full disk, print the
    message and exit with code 2; after Ctrl-C exit with 130."""
    try:
        main()
    except (BadInput, OSError) as error:
        exit_with(Path(sys.argv[0]).name, one_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
