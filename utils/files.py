"""Files: the project's folder, atomic writes, checksums."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:             # Windows, whose file systems have locks
    fcntl = None                # type: ignore[assignment]

PROJECT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that replaces `path`, atomically, when the block ends.

    Readers see either the old file or the new one, never a part. An error leaves `path` as it was;
    an OSError, such as that of a full disk, names `path`. If `path` is a link, the file that it
    points to is replaced; what is not a file, such as a folder or a device, raises an OSError.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "Not a file that could be replaced", path)
    partial = f"{path}.partial"
    try:
        with open(partial, mode, **options) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        cause: BaseException | None = error
        while cause and not (isinstance(cause, OSError) and cause.errno):
            cause = cause.__context__       # torch.save hides the error of a disk that fills up
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, path) from error
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` to `path`, atomically."""
    with atomic_write(path) as f:
        f.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


def from_here(path: Path) -> str:
    """`path` as seen from the working directory; as it is where that lies on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def has_locks(path: str | Path) -> bool:
    """Whether the file system of the file at `path`, which is created, has locks. filelock waits
    for ever, or reports another process, where it has none."""
    with open(path, "a") as f:
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)      # another process has it
    return True


def sha256(path: str | Path) -> str:
    """The SHA-256 of the file at `path`, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
