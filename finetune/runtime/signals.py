"""A stop that is asked for politely (SIGTERM, SIGINT, SIGHUP, SIGUSR1) ends the run at the next step, with a checkpoint."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1  # prctl(2)

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

_Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.getsignal returns them


class StopRequest:
    """Remembers that a stop was asked for inside its `with` block, and gives the signals' handlers back at the end of it.

    After the first signal, SIGINT has its default effect: a second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> "StopRequest":
        for number in POLITE:
            previous = signal.getsignal(number)
            if previous != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous[number] = previous
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        while self._previous:
            number, previous = self._previous.popitem()
            # None is a handler that was not installed from Python, and that Python cannot install again.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if signal.SIGINT in self._previous:
            # The default effect needs no Python, which runs no handler while a collective waits for another rank.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def leave_group() -> None:
    """For helper processes: signals sent to the run's process group are the main process's business, not theirs."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def end_with_parent(parent: int | None = None) -> None:
    """For a program that runs beside another that has started it: it ends with that, however that ends. On Linux only.

    Args:
        parent: the other's process id; it may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
