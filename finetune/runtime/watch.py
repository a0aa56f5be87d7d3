"""What each rank is doing, noted where the others can read it, so that a rank which is lost or stuck can be named.

A thread of each rank writes a line a second, and when what it says changes, to the store that torchrun has made for the
process group. If a rank waits in vain, it compares two readings of all lines: one that has not changed is of a rank that has
ended, is stopped, or whose host is gone.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, Queue
from typing import TypeVar, cast

import torch.distributed as dist

from finetune.runtime.errors import LostPeer
from finetune.runtime.logging import print_error, say

BEAT = 1.0  # seconds between the lines of a rank, at the most
_REST = 0.1  # seconds between them, at the least
DONE = -1  # in place of the number of lines: of a rank that has done its work
_ANSWER = timedelta(seconds=5)  # in which the store must answer
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """What a rank has noted: how many lines before, its host, what it does and for how many seconds."""

    beat: int
    host: str
    doing: str
    seconds: float

    def __str__(self) -> str:
        return f"on {self.host}, {self.doing}"


class SilentStore(OSError):
    """The store does not answer: its host is cut off, or this one is."""


class _PatientStore:
    """A store whose answers are waited for `_ANSWER` long. Its own timeout is of keys that are not there yet: on a connection that
    is cut off it waits for as long as TCP does, which is minutes.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store, self._is_silent = store, False

    def ask(self, call: Callable[[dist.Store], T]) -> T:
        """What a call of the store returns. Raises SilentStore, and what the call raises."""
        if self._is_silent:  # the call before this one waits yet
            raise SilentStore
        answers: Queue[tuple[T | None, BaseException | None]] = Queue()

        def answer() -> None:
            try:
                answers.put((call(self._store), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=answer, name="watch-ask", daemon=True).start()
        try:
            value, error = answers.get(timeout=_ANSWER.total_seconds())
        except Empty:
            self._is_silent = True
            raise SilentStore from None
        if error is not None:
            raise error
        return cast(T, value)


class Watch:
    """Notes what this rank does, and tells of the others. Without peers it does neither."""

    def __init__(self, rank: int, world_size: int, attempt: str, limit_seconds: float) -> None:
        """
        Args:
            attempt: distinguishes restarts under one torchrun.
            limit_seconds: how long a limited activity may take; see `doing`.
        """
        self.rank, self.world_size, self.limit_seconds = rank, world_size, limit_seconds
        self._now, self._beat = ("starting", time.monotonic(), False), 0  # what, since when, whether it is limited
        self._ended, self._changed, self._is_done = threading.Event(), threading.Event(), False
        self._thread: threading.Thread | None = None
        self._reading: tuple[float, dict[int, Line | None]] = time.monotonic(), {}  # when, and of all ranks
        self._store: _PatientStore | None = None
        if world_size > 1 and "MASTER_ADDR" in os.environ:
            # A connection of its own: the process group's is blocked while a rank waits for another in it.
            try:
                store = dist.TCPStore(
                    os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_ANSWER
                )
            except RuntimeError as error:
                say(f"warning: a rank that is lost will not be named ({str(error).partition(chr(10))[0]})")
                return
            self._store = _PatientStore(dist.PrefixStore(f"watch_{attempt}_{world_size}", store))
            self._thread = threading.Thread(target=self._write_lines, name="watch", daemon=True)
            self._thread.start()

    def doing(self, what: str, is_limited: bool = False) -> None:
        """Note what this rank does from here on, such as "in step 12".

        Args:
            is_limited: whether it takes a rank `limit_seconds` only if it waits for others in vain. Then the process ends with
                an error that names them; NCCL would end it with one that does not.
        """
        self._now = (what, time.monotonic(), is_limited)  # at once: the thread must not take one's time for another's
        self._changed.set()

    def end(self) -> None:
        """Note that this rank has done its work. From then on it is missed by no other."""
        self._is_done = True
        self._ended.set()
        self._changed.set()
        if self._thread:
            self._thread.join(timeout=_ANSWER.total_seconds())

    @property
    def sees_others(self) -> bool:
        """Whether this rank can read what the others note."""
        return self._store is not None

    def lost(self) -> dict[int, Line | None]:
        """The ranks that note nothing any more, with their last lines; None of a rank that never noted any. Takes some seconds."""
        if self._store is None:
            return {}
        try:
            before = self._read()
            time.sleep(2.5 * BEAT)
            after = self._read()
        except (RuntimeError, OSError):  # the store is rank 0's, where torchrun does not keep it
            return {0: None} if self.rank else {}
        return {
            rank: line
            for rank, line in after.items()
            if rank != self.rank and (line is None or DONE != line.beat == getattr(before[rank], "beat", None))
        }

    def behind(self) -> dict[int, Line]:
        """The ranks that do something else than this one, as they last noted."""
        if self._store is None:
            return {}
        try:
            lines = self._read()
        except (RuntimeError, OSError):
            return {}
        return {
            rank: line
            for rank, line in lines.items()
            if line is not None and rank != self.rank and line.beat != DONE and line.doing != self._now[0]
        }

    def _write_lines(self) -> None:
        host, told = socket.gethostname(), 0.0
        while not self._ended.is_set():
            self._beat += 1
            what, since, is_limited = self._now
            line = Line(self._beat, host, what, round(time.monotonic() - since, 1))
            try:
                self._write(line)
            except SilentStore:  # this rank may wait for the others in vain
                pass
            except (RuntimeError, OSError):
                return  # the store has ended, and with it the run
            is_stuck = line.seconds > self.limit_seconds and self._now[1] == since and since != told
            if is_stuck and (is_limited or self.is_in_vain()):
                told = since  # in a thread of its own: a rank that writes no lines is taken for lost
                threading.Thread(target=self._leave, args=(line, since), name="watch-leave", daemon=True).start()
            self._ended.wait(_REST)
            self._changed.wait(BEAT - _REST)
            self._changed.clear()
        if self._is_done:
            with suppress(RuntimeError, OSError):
                self._write(Line(DONE, host, "done", 0.0))

    def is_in_vain(self) -> bool:
        """Whether a rank has noted nothing for a quarter of `limit_seconds`, or the store does not answer. Called again and again
        by a rank that may wait for it.

        The peers are lost then, also in what has no limit of its own: a checkpoint on a slow disk, or the end of this process,
        which joins the thread that writes one.
        """
        since, before = self._reading
        if time.monotonic() - since < max(2.5 * BEAT, self.limit_seconds / 4):
            return False
        try:
            after = self._read()
        except SilentStore:
            return True
        except (RuntimeError, OSError):
            return False
        self._reading = time.monotonic(), after
        others = [(line, after.get(rank)) for rank, line in before.items() if rank != self.rank]
        return any(line and now and DONE != line.beat == now.beat for line, now in others)

    def _leave(self, line: Line, since: float) -> None:
        """End this process, whose main thread is stuck in what it has done since then."""
        error = lost_peer(
            self,
            f"rank {self.rank} is {line.doing} for {line.seconds:.0f} s",
            "the same command resumes from the newest checkpoint; distributed.timeout_seconds says how long ranks wait",
        )
        if self._now[1] == since:  # still: to look at the others has taken seconds
            print_error(error)
            os._exit(1)

    def _write(self, line: Line) -> None:
        assert self._store is not None
        self._store.ask(lambda store: store.set(str(self.rank), json.dumps(vars(line))))

    def _read(self) -> dict[int, Line | None]:
        assert self._store is not None

        def lines(store: dist.Store) -> dict[int, Line | None]:
            keys = [str(rank) for rank in range(self.world_size)]
            return {int(key): Line(**json.loads(store.get(key))) if store.check([key]) else None for key in keys}

        return self._store.ask(lines)


def lost_peer(watch: Watch | None, what: str, cure: str, reason: str = "") -> LostPeer:
    """The error of a rank that waits in vain: what it does, and which others are lost. Takes some seconds.

    Args:
        reason: of the collective that has failed, in its own words.
    """
    who, is_main_lost = _describe_lost(watch) if watch else ("", False)
    text = f"{what}: {who}" if who else what
    return LostPeer(f"{text} ({reason})" if reason else text, cure, is_main_lost=is_main_lost)


def _describe_lost(watch: Watch, limit: int = 4) -> tuple[str, bool]:
    """(which ranks are lost, or behind, in words; whether rank 0 is one of them). Empty if nothing is known."""
    lost = watch.lost()
    if lost:
        texts = [f"rank {rank} ({line})" if line else f"rank {rank}" for rank, line in sorted(lost.items())]
        more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
        return f"{', '.join(texts[:limit])}{more} ended, or answers no more", 0 in lost
    behind = watch.behind()
    texts = [f"rank {rank} is {line} for {line.seconds:.0f} s" for rank, line in sorted(behind.items())]
    return "; ".join(texts[:limit]), False
