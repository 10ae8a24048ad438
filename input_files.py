"""Files that a user names, opened with care: regular files alone, and without ever waiting.

Reproduces nothing. A pipe or a device may never end, and opening a pipe may already hang: what is
no regular file is refused before a byte of it is read, and its size is known.

    with open_regular("trace.csv") as file:
        size = os.fstat(file.fileno()).st_size
    text = read_bounded("config.json", 4 << 20)     # None if there is more
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


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
    return data if len(data) <= most else None


def _at_once(path: str, flags: int) -> int:
    """For open(): without waiting for somebody to write to a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)
