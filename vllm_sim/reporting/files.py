"""Files that scripts write: whole or not at all, and refused before the work if they cannot be.

Reproduces nothing. One line says which file and why (OutputError).

    check_writable(path)            # before a run of minutes
    write_json(path, found)         # after it

[input_files] Files that a user names, opened with care: regular files alone, and without ever waiting.

Reproduces nothing. A pipe or a device may never end, and opening a pipe may already hang: what is
no regular file is refused before a byte of it is read, and its size is known.

    with open_regular("trace.csv") as file:
        size = os.fstat(file.fileno()).st_size
    text = read_bounded("config.json", 4 << 20)     # None if there is more
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from vllm_sim.reporting.command_line import UsageError


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, open. Raises OSError, for anything but a regular file too; ValueError for a NUL."""
    file = open(path, "rb", opener=_at_once)  # noqa: SIM115 - whoever called closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes | None:
    """All of a file of at most so many bytes, None for a larger one. Raises as `open_regular`."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            return None
        data = file.read(most + 1)  # what the system makes up, as in /proc, says no size
    if data is None:  # such a file may have nothing yet, as the kernel's log
        raise OSError(errno.EAGAIN, "it would have to be waited for")
    return data if len(data) <= most else None


def _at_once(path: str, flags: int) -> int:
    """For open(): without waiting for somebody to write to a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


class OutputError(UsageError):
    """A file cannot be written; one line says which and why."""


def write_json(path: Path, data: object) -> None:
    """Write JSON as `write_whole` does. Raises OutputError, ValueError for NaN and infinity."""
    write_whole(path, f"{json.dumps(data, indent=1, allow_nan=False)}\n".encode("ascii"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, through a link if it is one. Raises OutputError."""
    check_writable(path)
    target = Path(os.path.realpath(path))
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.chmod(temporary, 0o666 & ~current_umask())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """OutputError unless `path` could be written: asked before a long run, not only after it."""
    target = Path(os.path.realpath(path))
    reason = None
    try:
        target.stat()
        exists = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as error:  # a name that is too long, say
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    if target.is_dir():
        reason = "it is a directory"
    elif not target.parent.is_dir():
        reason = f"there is no directory {path.parent}"
    elif exists and not target.is_file():
        # Replaced by a file, a device such as /dev/null would be gone for everybody.
        reason = "it is not a regular file"
    elif exists and not os.access(target, os.W_OK):
        reason = "permission denied"
    else:
        try:
            with tempfile.TemporaryFile(dir=target.parent):  # asking for permission is not enough
                pass
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
    if reason is not None:
        raise OutputError(f"cannot write {path}: {reason}")


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
