"""Files that scripts write: whole or not at all, and refused before the work if they cannot be.

Reproduces nothing. One line says which file and why (OutputError).

    check_writable(path)            # before a run of minutes
    write_json(path, found)         # after it
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from command_line import UsageError


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
