"""Ends a process without finalizing the interpreter."""

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn


def leave(status: int, is_lost: bool = False) -> NoReturn:
    """Exit with `status`: join non-daemon threads, run exit handlers and flush output, but do not finalize the interpreter.
    The status is 1 instead of 0 if standard output cannot be written.

    If another process is lost (`is_lost`), no thread is joined: it may wait for that one.

    Some of torch's threads run until the process ends. If such a thread takes the interpreter's lock during finalization,
    for example to free a tensor of the last collective, Python unwinds it through C++ frames that do not allow this
    ("terminate called without an active exception"), and a training that had succeeded ends with SIGABRT.
    """
    if not is_lost:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads; typeshed omits private functions
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        status = status or 1
    with suppress(OSError):  # a log alone
        sys.stderr.flush()
    os._exit(status)
