"""The one reader of text files that a user names: length files and traces, plain or gzipped.

Reproduces nothing of the paper. A file is read line by line, within limits, whatever its name.
What is wrong with it is told in one line: WorkloadError.

    for place, text in read_text("trace.jsonl"):        # 'trace.jsonl, line 1', and the line
    for place, cells in read_csv(read_text("lengths.csv.gz")):
"""

import csv
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import partial

from vllm_sim.reporting.files import open_regular

MAX_FILE_BYTES = 256 * 2**20
MAX_PACKED_BYTES = 2**24  # of a gzipped file: what costs time and unpacks to nothing
MAX_LINE_BYTES = 2**16
MAX_LINES = 2 * 10**6
Line = tuple[str, str]  # 'file, line n' and its text
Row = tuple[str, list[str]]  # 'file, line n' and cells of it


class WorkloadError(ValueError):
    """A file of lengths or requests cannot be used; the message is one line, with its place."""


def read_text(path: str | os.PathLike[str]) -> Iterator[Line]:
    """('file, line n', the line without the blanks around it) of every line that is not blank.

    A gzipped file may have 16 MiB, and 256 MiB once unpacked, any file 2 million lines. Raises
    WorkloadError for anything else; a pipe or a device, which may never end, is not read at all.
    """
    size = 0
    try:
        with open_regular(path) as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            if os.fstat(file.fileno()).st_size > (MAX_PACKED_BYTES if packed else MAX_FILE_BYTES):
                raise WorkloadError(f"{os.fspath(path)}: the file is too long")
            stream = gzip.GzipFile(fileobj=file) if packed else file
            lines = iter(partial(stream.readline, MAX_LINE_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                size += len(line)
                place = f"{os.fspath(path)}, line {number}"
                too_many = size > MAX_FILE_BYTES or number > MAX_LINES
                if too_many or len(line) > MAX_LINE_BYTES:
                    raise WorkloadError(f"{place}: the file, or this line, is too long")
                text = line.decode("utf-8-sig", errors="replace").strip()  # bad bytes fail as cells
                if text:
                    yield place, text
    except WorkloadError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise WorkloadError(f"{path}: cannot be read: {reason}") from None


def read_csv(lines: Iterable[Line]) -> Iterator[Row]:
    """('file, line n', cells without blanks around them) of the rows that lines make up.

    A cell in quotes may hold commas and line breaks; n is the row's first line. Raises
    WorkloadError for a cell in quotes that does not end.
    """
    row, size = None, 0  # the first line of the row that is being read, and what it has so far

    def texts() -> Iterator[str]:
        nonlocal row, size
        for line in lines:
            row, size = row or line, size + len(line[1])
            if size > MAX_LINE_BYTES:
                break
            # A lone carriage return is a blank, or where cells are in quotes a csv.Error.
            yield (line[1] if '"' in line[1] else line[1].replace("\r", " ")) + "\n"
        if row is not None:
            raise WorkloadError(f"{row[0]}: a cell in quotes does not end")

    reader = csv.reader(texts())
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            cells = [row[1]]  # no cells that any header names
        if cells is None:
            return
        yield row[0], [cell.strip() for cell in cells]
        row, size = None, 0
