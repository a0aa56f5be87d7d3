"""Ends a process without finalizing the interpreter."""

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(status: int, is_lost: bool = False) -> NoReturn:
    """Exit with `status`: join non-daemon threads, run exit handlers and flush output, but do not finalize the interpreter.

    If another process is lost (`is_lost`), no thread is joined: it may wait for that one.

    Some of torch's threads run until the process ends. If such a thread takes the interpreter's lock during finalization,
    for example to free a tensor of the last collective, Python unwinds it through C++ frames that do not allow this
    ("terminate called without an active exception"), and a training that had succeeded ends with SIGABRT.
    """
    if not is_lost:
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads; typeshed omits private functions
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
