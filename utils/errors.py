"""How a command tells its user what is wrong: one line on stderr, exit code 2."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


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


def run_command(main: Callable[[], object]) -> None:
    """Run `main`; if it raises BadInput, print the message and exit with code 2."""
    try:
        main()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
