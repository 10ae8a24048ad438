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
from typing import NoReturn


class UsageError(Exception):
    """What was asked for cannot be done; the message is the one line the user sees."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake takes one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    if not (text.isascii() and text.isdigit()) or len(text) > 12 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a positive integer")
    return int(text)


def seed(text: str) -> int:
    """A seed: 0 to 2**32 - 1."""
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not an integer from 0 to 2**32 - 1")
    return int(text)


def exit_code(script: str, run: Callable[[], int]) -> int:
    """What `run` returns, or the exit code that stands for what it raised."""
    try:
        code = run()
        if sys.stdout is not None:  # None: it was closed before we started
            sys.stdout.flush()
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


def _refuse(script: str, message: str) -> int:
    if sys.stderr is not None:
        text = message.encode("unicode_escape").decode("ascii")  # one line, whatever it has
        print(f"{script}: error: {text}", file=sys.stderr)
    return 2


def drop_output() -> None:
    """Send what is still buffered nowhere: Python would try, and fail, to write it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
