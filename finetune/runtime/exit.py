"""How a process ends."""

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End with `status` once threads that are waited for, exit handlers and output are done; the interpreter is not dismantled.

    Threads of torch live on to the end. One that asks for the interpreter while that is dismantled, to hand back a
    tensor of the last collective say, is unwound through C++ that allows no unwinding ("terminate called without an active
    exception"): a training that had succeeded would end with SIGABRT.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
