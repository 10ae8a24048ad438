"""How all commands end: mistakes, Ctrl-C, a parent that is gone, output that cannot be written.

Input that cannot be used is one line on stderr and exit code 2, never a traceback; Ctrl-C is exit
code 130, and a reader that has gone away (`| head`) 141, without a word. Standard library alone.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec


class UsageError(Exception):
    """What was asked for cannot be done; the message is the one line the user sees."""


def begin(script: str, *packages: str) -> None:
    """Before a script loads its modules: Ctrl-C ends it at once, packages not there take a line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # numpy even loses an exception
    if missing := [package for package in packages if find_spec(package) is None]:
        file = "requirements-models.txt" if "transformers" in missing else "requirements.txt"
        sys.exit(_refuse(script, f"no {' and '.join(missing)}: pip install -r {file}"))


def raise_on_interrupt() -> None:
    """Ctrl-C raises KeyboardInterrupt again, after `begin`: the modules are loaded."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with_parent(parent: int) -> None:
    """On Linux: kill this process when its parent, of this id, ends, be it killed."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGKILL)


def exit_code(script: str, run: Callable[[], int]) -> int:
    """For sys.exit: what `run` returns, or the code that stands for what it raised."""
    stdout = sys.stdout
    try:
        try:
            return run()
        finally:  # at Python's end, a failure would be several lines and code 120
            sys.stdout = stdout  # with `--json -` text goes elsewhere
            print(end="", flush=True)
    except UsageError as error:
        return _refuse(script, str(error))
    except OSError as error:
        _drop(sys.stdout)  # 141, as the shell reports it: whoever read our output is gone
        told = f"cannot write the output: {error.strerror or error}"
        return 141 if isinstance(error, BrokenPipeError) else _refuse(script, told)
    except KeyboardInterrupt:
        return 130


def _refuse(script: str, message: str) -> int:
    text = message.encode("unicode_escape").decode("ascii")[:1000]  # one line, whatever it has
    try:
        if sys.stderr is not None:
            print(f"{script}: error: {text}", file=sys.stderr, flush=True)
    except OSError:  # nobody can be told, but for the exit code
        _drop(sys.stderr)
    return 2


def _drop(stream) -> None:
    """Send what is still buffered nowhere: Python would try, and fail, to write it at exit."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
