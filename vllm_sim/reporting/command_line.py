"""What all command lines here have in common: mistakes, Ctrl-C, and output that cannot be written.

Reproduces nothing. Input that cannot be used is one line on stderr and exit code 2, never a
traceback; Ctrl-C is exit code 130 and a reader that has gone away (`| head`) 141, without a word.

    def main(argv: list[str] | None = None) -> int:
        return exit_code("main.py", lambda: run(build_parser().parse_args(argv)))

It imports the standard library alone, so that `--help` starts at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TextIO

LONGEST_MESSAGE = 1000  # characters: a name that is wrong may be as long as its author likes


class UsageError(Exception):
    """What was asked for cannot be done; the message is the one line the user sees."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake takes one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        """argparse passes over an OSError: --help into a full disk would end well, unbuffered."""
        stream = sys.stdout if file is None else file
        if message and stream is not None:
            stream.write(message)

    def parse_known_args(self, args=None, namespace=None):  # parse_args comes here too
        given = sys.argv[1:] if args is None else args
        for argument in given:
            option, *value = argument.split("=", 1)
            if option.startswith("--") and value == ["--"]:
                # argparse takes the value for the end of the options, and gives an empty list.
                self.error(f"argument {option}: expected one argument")
        return super().parse_known_args(given, namespace)


def positive(text: str) -> int:
    """A positive integer of at most twelve digits, for argparse."""
    if not (text.isascii() and text.isdigit()) or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a positive integer")
    if len(text) > 12:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is too large: at most 12 digits")
    return int(text)


def seed(text: str) -> int:
    """A seed: 0 to 2**32 - 1."""
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not an integer from 0 to 2**32 - 1")
    return int(text)


def folder(text: str) -> Path:
    """A folder's name. An empty one, of a variable that is not set say, is not the current one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text[:40]!a} names no folder ('.' is the current one)")
    return Path(text)


def file_name(text: str) -> Path:
    """A file's name, likewise: an empty one is no file, and Path would make a folder of it."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text[:40]!a} names no file")
    return Path(text)


def exit_code(script: str, run: Callable[[], int]) -> int:
    """What `run` returns, or the exit code that stands for what it raised."""
    try:
        try:
            code = run()
        except (UsageError, SystemExit):  # the latter after --help
            _flush()
            raise
        _flush()
        return code
    except UsageError as error:
        return _refuse(script, str(error))
    except BrokenPipeError:
        drop_output()
        return 141  # as the shell reports it: whoever read our output is gone
    except OSError as error:
        drop_output()
        return _refuse(script, f"cannot write the output: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130


def print_then(keep: Callable[[], None], show: Callable[[], None]) -> None:
    """Print what was found, then keep it; also where whoever read has gone, but not on a full disk.

    For what is printed when all of it is found: a reader that has seen enough loses nothing.
    """
    try:
        show()
        _flush()
    except BrokenPipeError:
        keep()
        raise
    keep()


def _flush() -> None:
    """Print now what is buffered: at Python's end a failure would be several lines and code 120."""
    if sys.stdout is not None:  # None: it was closed before we started
        sys.stdout.flush()


def _refuse(script: str, message: str) -> int:
    text = message.encode("unicode_escape").decode("ascii")  # one line, whatever it has
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE] + "..."
    if sys.stderr is not None:
        try:
            print(f"{script}: error: {text}", file=sys.stderr, flush=True)
        except OSError:  # nobody can be told, but for the exit code
            _drop(sys.stderr)
    return 2


def drop_output() -> None:
    """Send what is still buffered nowhere: Python would try, and fail, to write it at exit."""
    if sys.stdout is not None:
        _drop(sys.stdout)


def _drop(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def require_packages(script: str, *names: str) -> None:
    """One line and exit code 2 for packages that are not there, before a module asks for them."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        told = f"{' and '.join(missing)} {verb} not installed: pip install -r requirements.txt"
        sys.exit(_refuse(script, f"{told} (README, Quick start)"))


def end_on_interrupt() -> None:
    """Ctrl-C ends the process at once: for a script to call before it loads its modules.

    An exception would surface wherever an import happens to be, and numpy's, from within torch's,
    is even lost.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """Ctrl-C raises KeyboardInterrupt again, after `end_on_interrupt`: the modules are loaded."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
