"""The one reader of text files that a user names: length files and traces, plain or gzipped.

Reproduces nothing of the paper. A file is read line by line, within limits, whatever its name; a
JSON array counts as a line an element. UTF-8, UTF-16 and, for bytes that are neither, Latin-1; the
cells of a line may be separated as Excel does it, by semicolons or tabs. What is wrong with a file
is told in one line: WorkloadError.

    for place, text in read_text("trace.jsonl"):        # 'trace.jsonl, line 1', and the line
    for place, cells in read_csv(read_text("lengths.csv.gz")):
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import BinaryIO

from vllm_sim.reporting.files import open_input

MAX_FILE_BYTES = 256 * 2**20
MAX_PACKED_BYTES = 2**24  # of a gzipped file: what costs time and unpacks to nothing
MAX_LINE_BYTES = 2**16
MAX_LINES = 2 * 10**6
READ_AHEAD = 4 * MAX_LINE_BYTES  # of a JSON array, in characters
BETWEEN, DECODE = re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode  # two elements, and one
SEPARATORS = ",;\t|"
BLANKS = " \r\n\v\f"  # a tab may separate cells
Line = tuple[str, str]  # 'file, line n' and its text
Row = tuple[str, list[str]]  # 'file, line n' and cells of it


class WorkloadError(ValueError):
    """A file of lengths or requests cannot be used; the message is one line, with its place."""


class TooLongError(WorkloadError):
    """There is more of a file than is read."""


class _Packed:
    """A gzipped file as gzip reads it, of which so many bytes are read and no more."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name, self._file, self._left = name, file, MAX_PACKED_BYTES

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise TooLongError(f"{self._name}: the file is too long")
        return data


def read_text(path: str | os.PathLike[str], part: bool = False) -> Iterator[Line]:
    """('file, line n', the line without the blanks around it) of every line that is not blank.

    Of a gzipped file 16 MiB are read, and 256 MiB once unpacked, of any file 2 million lines. A
    larger file is not read at all, unless only `part` of it is wanted. Raises WorkloadError for
    anything else; a device, which may never end, is not read at all.
    """
    name, size = os.fspath(path), 0
    try:
        with open_input(path) as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            most = MAX_PACKED_BYTES if packed else MAX_FILE_BYTES
            if not part and os.fstat(file.fileno()).st_size > most:
                raise TooLongError(f"{name}: the file is too long")
            stream = gzip.GzipFile(fileobj=_Packed(name, file), mode="rb") if packed else file
            for count, (number, line) in enumerate(_pieces(stream), 1):
                size += len(line)
                place = f"{name}, line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise WorkloadError(f"{place}: the line is too long")
                if size > MAX_FILE_BYTES or count > MAX_LINES:
                    raise TooLongError(f"{place}: the file is too long")
                text = line if isinstance(line, str) else _decoded(line)
                if text and not text.isspace():
                    yield place, text.strip(BLANKS)
    except WorkloadError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise WorkloadError(f"{path}: cannot be read: {reason}") from None


def _pieces(stream: BinaryIO) -> Iterator[tuple[int, bytes | str]]:
    """(its number, a line), or (its line, an element of a JSON array), none much too long."""
    head = stream.peek(64)[:64]
    marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    wide = marked or head[1:2] == b"\0" != head[:1]
    encoding = "utf-8-sig" if not wide else "utf-16" if marked else "utf-16-le"
    array = head.decode(encoding, "ignore").lstrip().startswith("[")
    if not wide and not array:
        yield from enumerate(iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""), 1)
        return
    with io.TextIOWrapper(stream, encoding, "replace", newline="\n") as text:
        if array:
            yield from _elements(text)
        else:
            yield from enumerate(iter(partial(text.readline, MAX_LINE_BYTES + 1), ""), 1)


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("latin-1")  # which knows all bytes: bad ones fail as cells


def _elements(text: io.TextIOBase) -> Iterator[tuple[int, str]]:
    """(its line, the text) of each element of a JSON array; what is broken, as far as was read."""
    buffer, line, more = text.read(READ_AHEAD), 1, True
    at = buffer.index("[") + 1
    while True:
        if more and len(buffer) - at <= MAX_LINE_BYTES:
            more = text.read(READ_AHEAD)
            buffer, at = buffer[at:] + more, 0
            continue
        start = BETWEEN.match(buffer, at).end()
        line += buffer.count("\n", at, start)
        if buffer[start : start + 1] in ("]", ""):
            return
        try:
            end = DECODE(buffer, start)[1]
        except (ValueError, RecursionError):
            end = len(buffer)
        yield line, buffer[start:end]
        line += buffer.count("\n", start, end)
        at = end


def find_separator(lines: Iterator[Line]) -> tuple[str, Iterator[Line]]:
    """What separates the cells of a CSV, by its first line, and the lines from the header on.

    Excel's own first line, 'sep=;', says it; otherwise it is the commonest in the header.
    """
    first = next(lines, None)
    if first is None:
        return ",", lines
    said = re.fullmatch(r'"?sep=([,;\t|])"?', first[1], re.IGNORECASE)
    if said:
        return said[1], lines
    bare = re.sub('"[^"]*"', "", first[1])
    return max(SEPARATORS, key=bare.count), chain([first], lines)


def shown(names: Sequence[str]) -> str:
    """The first names of a header, short and in ASCII, for a message."""
    return ", ".join(f"{name[:30]!a}" for name in names[:8]) + " ..." * (len(names) > 8)


def read_csv(lines: Iterable[Line], separator: str | None = None) -> Iterator[Row]:
    """('file, line n', cells without blanks around them) of the rows that lines make up.

    A cell in quotes may hold separators and line breaks; n is the row's first line. The separator
    is found unless given. Raises WorkloadError for a cell in quotes that does not end.
    """
    if separator is None:
        separator, lines = find_separator(iter(lines))
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

    reader = csv.reader(texts(), delimiter=separator)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            cells = [row[1]]  # no cells that any header names
        if cells is None:
            return
        yield row[0], [cell.strip() for cell in cells]
        row, size = None, 0
