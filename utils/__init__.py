"""Everything around the model: settings, data, checkpoints, the log of a run and its figures."""

import contextlib
import hashlib
import importlib.util
import os
import sys
from pathlib import Path


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that says what and why.

    The training script prints it to stderr and exits with code 2, without a traceback.
    """


@contextlib.contextmanager
def whole_file(path, mode="w", **options):
    """Open a file for writing that takes the place of `path` once it is whole.

    At any moment `path` is the old file or the new one; a crash leaves a `.partial` beside it.
    """
    partial = f"{path}.partial"
    with open(partial, mode, **options) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def sha256(path):
    """The SHA-256 of the file at `path`, as sha256sum writes it."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_script():
    """train-flow-ssl.py as a module; its name, with hyphens, is not one that `import` takes."""
    path = Path(__file__).resolve().parent.parent / "train-flow-ssl.py"
    spec = importlib.util.spec_from_file_location("train_flow_ssl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_command(main):
    """Run `main` of an experiment or benchmark; bad input is one line on stderr and exit code 2."""
    try:
        main()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
