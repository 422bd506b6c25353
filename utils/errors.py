"""How a command tells its user what is wrong: one line on stderr, and exit code 2 or 1."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn


class BadInput(ValueError):
    """The user's input cannot be used. The message is one line that says what is wrong and why.

    A command prints it to stderr and exits with code 2, without a traceback.
    """


class Failed(RuntimeError):
    """A command has no result although its input is valid: a number is not finite, for example.

    A command prints the message, one line, to stderr and exits with code 1.

    of_all: whether all processes raise it at the same time.
    """

    def __init__(self, message: str, of_all: bool = True):
        super().__init__(message)
        self.of_all = of_all


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


def exit_with(program: str, message: str, code: int = 2) -> NoReturn:
    """Print `message` as one line on stderr and exit with `code`."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def names_of_options(argv: Sequence[str]) -> list[str]:
    """The options in a command line, such as --lr of --lr=1."""
    return [word.partition("=")[0] for word in argv if word.startswith("--")]


def given_twice(argv: Sequence[str]) -> str | None:
    """An option that a command line has twice, of which argparse would take the last value."""
    names = names_of_options(argv)
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that prints one line for bad input, without the usage.

    An option may be given twice only if its action is to append. In a Path, ~ is the home folder.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        once = {name for action in self._actions for name in action.option_strings
                if not isinstance(action, argparse._AppendAction)}
        argv = sys.argv[1:] if args is None else args
        if twice := given_twice([name for name in names_of_options(argv) if name in once]):
            self.error(f"{twice} is given twice")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        exit_with(self.prog, message)


def check_output(path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Raise BadInput if no file can be written at `path`, if there is one, before anything is
    computed for it, or if its suffix is not one of `suffixes`, where there are such."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise BadInput(f"{path} must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder {path.parent} for {path.name}")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a file that could be replaced")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"nothing can be written to {path.parent}")


def run_command(main: Callable[[], object]) -> None:
    """Run `main`, and print the message of BadInput, Failed, or an OSError, such as that of a full
    disk. Exit code: 1 for Failed, 2 for the others, 130 after Ctrl-C."""
    from .terminal import sturdy_output     # which imports this module

    with sturdy_output():
        try:
            main()
        except (BadInput, Failed, OSError) as error:
            code = 1 if isinstance(error, Failed) else 2
            exit_with(Path(sys.argv[0]).name, one_line(error), code)
        except KeyboardInterrupt:
            sys.exit(130)
