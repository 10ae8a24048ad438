"""Files: those that a user names are opened with care, those that scripts write are whole.

A pipe is read once, to its end; a device, which may never end, is refused before a byte of it is
read. What cannot be written is refused before the work. `-` is standard output: it then has the
document alone, and what is printed goes to stderr.

    data = read_bounded("config.json", 4 << 20)     # None if there is more
    check_writable(path)                            # before a run of minutes
    write_json(path, found)                         # after it
"""

import argparse
import errno
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from vllm_sim.reporting.arguments import STANDARD, FileName, folder
from vllm_sim.reporting.command_line import UsageError

out_file = FileName("file", written=True)
out_folder = replace(folder, written=True, within="")  # whose files the script itself checks
pictures = replace(folder, written=True, within="*.png")
MAX_PIPE = 2**28 + 1  # bytes: more than any reader takes
DASH = "-: to standard output, the text to stderr"


class OutputError(UsageError):
    """A file cannot be written; one line says which and why."""


def add_output_options(parser: argparse.ArgumentParser, written: str, drawn: str = "") -> None:
    """--json, --figures (if `drawn` says what), --format and --quiet."""
    add, needed = parser.add_argument, "(needs matplotlib: requirements-dev.txt)"
    add("--json", type=out_file, metavar="FILE", help=f"write {written} here ({DASH})")
    if drawn:
        add("--figures", type=pictures, metavar="DIR", help=f"draw {drawn} there {needed}")
    add("--format", choices=("plain", "github", "latex"), default="plain", help="of the tables")
    add("--quiet", action="store_true", help="no progress on stderr")


def short_name(path: str) -> str:
    """A file's own name, in ASCII; of a pipe such as /dev/fd/63 all of it."""
    return ascii(path if path.startswith("/dev/") else os.path.basename(path))[1:-1]


def open_input(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, open; of a pipe, what came through it, which comes only once.

    Raises OSError, for what is neither a regular file nor a pipe too; ValueError for a NUL.
    """
    # Without waiting for somebody to open the other end of a pipe.
    file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115 - whoever called closes it
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode):
        return file
    with file:
        if not stat.S_ISFIFO(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        os.set_blocking(file.fileno(), True)
        if not (content := file.read(MAX_PIPE)):
            raise OSError(errno.ENODATA, "nothing comes through this pipe")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - whoever called closes it
    copy.write(content)
    copy.seek(0)
    return copy


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes | None:
    """All of a file of at most so many bytes, None for a larger one. Raises as `open_input`."""
    with open_input(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            return None
        data = file.read(most + 1)  # what the system makes up, as in /proc, says no size
    if data is None:  # such a file may have nothing yet, as the kernel's log
        raise OSError(errno.EAGAIN, "it would have to be waited for")
    return data if len(data) <= most else None


def write_json(path: Path, data: object) -> None:
    """Write JSON as `write_whole` does. Raises OutputError, ValueError for NaN and infinity."""
    write_whole(path, f"{json.dumps(data, indent=1, allow_nan=False)}\n".encode("ascii"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, through a link if it is one. OutputError, or OSError of
    what STANDARD is."""
    check_writable(path)
    if path == STANDARD:
        with open(sys.__stdout__.fileno(), "wb", closefd=False) as out:
            out.write(content)
        return
    target = Path(os.path.realpath(path))
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                mask = os.umask(0o077)  # which can only be read by setting it
                os.umask(mask)
                os.chmod(temporary, 0o666 & ~mask)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """OutputError unless `path` could be written: asked before a long run, not only after it.

    Standard output is for the document from now on: what is printed goes to stderr.
    """
    if path == STANDARD:
        if sys.__stdout__ is None:
            raise OutputError("there is no standard output to write to")
        sys.stdout = sys.stderr
        return
    target = Path(os.path.realpath(path))
    try:
        exists = os.path.lexists(target) and target.stat()
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
            with tempfile.TemporaryFile(dir=target.parent):  # asking for permission is not enough
                return
    except OSError as error:  # of a name that is too long, say
        reason = (error.strerror or str(error)).lower()
    raise OutputError(f"cannot write {path}: {reason}")


def make_folder(folder: Path, names: Iterable[str]) -> None:
    """A folder where these files could be written, made if it is not there. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # of a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot make {folder}: {reason}") from None
    for name in names:
        check_writable(folder / name)


def print_then(keep: Callable[[], None], show: Callable[[], None]) -> None:
    """Print what was found, then keep it: also if its reader has gone, but not on a full disk.

    For what is printed when all of it is found: a reader that has seen enough loses nothing.
    """
    try:
        show()
        print(end="", flush=True)
    except BrokenPipeError:
        keep()
        raise
    keep()
