"""A stop that is asked for politely (SIGTERM, SIGINT, SIGHUP, SIGUSR1) ends the run at the next step, with a checkpoint."""

import ctypes
import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1  # prctl(2)

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Remembers that a stop was asked for. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in POLITE:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)


def leave_group() -> None:
    """For helper processes: signals sent to the run's process group are the main process's business, not theirs."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def end_with_parent() -> None:
    """For a program that runs beside another that has started it: it ends with that, however that ends. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
