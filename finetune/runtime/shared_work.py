"""Work that ranks share without waiting for each other: each takes the next piece when it is free."""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist

from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer
from finetune.runtime.hosts import Ranks
from finetune.runtime.watch import lost_peer

_ALL = 2**40  # more numbers than any work has
_PAUSES = 0.01, 0.5  # seconds between two looks at whether the other ranks have ended: at first, and at the most
_CURE = "see the first error above, if there is one; the same command goes on from what is done"


class SharedWork:
    """The numbers 0 to total - 1, each of which one rank takes. What is taken and done is counted in the process group's store.

    Groups of ranks may have numbers of their own each; then an error in one still ends the work of all.
    """

    def __init__(self, runtime: Runtime, total: int, name: str, groups: Sequence[Ranks] = ()) -> None:
        """
        Args:
            total: of this rank's group.
            name: of this work alone, the same on every rank.
            groups: ranks that share their numbers; all in one if there are none.
        """
        assert runtime.store is not None or runtime.world_size == 1
        self.runtime, self.total = runtime, total
        groups = groups or [tuple(range(runtime.world_size))]
        (number,) = (number for number, ranks in enumerate(groups) if runtime.rank in ranks)
        self._ranks = groups[number]
        self._all = dist.PrefixStore(name, runtime.store or dist.HashStore())
        self._groups = [dist.PrefixStore(str(number), self._all) for number in range(len(groups))]
        self._store = self._groups[number]
        self._has_taken = False

    def take(self) -> int | None:
        """A number that no other rank has; None if all are taken, or an error on any rank has ended the work.

        Raises:
            LostPeer: another rank ended or stopped answering.
        """
        self._refuse_lost_peers()
        if self._has_taken:
            number = len(self._ranks) - 1 + self._store.add("taken", 1)
        else:  # each rank has a first one of its own, so that none takes two before another has one
            number, self._has_taken = self._ranks.index(self.runtime.rank), True
        return number if number < self.total else None

    def done(self, failed: bool) -> tuple[int, int]:
        """Note that a number is done with; returns how many are, on all ranks of the group, and how many of these have failed."""
        return self._store.add("done", 1), self._store.add("failed", int(failed))

    def stop(self) -> None:
        """Let no rank take a further number."""
        for group in self._groups:
            group.add("taken", _ALL)

    def end(self) -> None:
        """Note that this rank takes no more."""
        self._all.add("ended", 1)

    def wait(self) -> None:
        """Wait until every rank has ended, for as long as they take, which a collective would not.

        Raises:
            LostPeer: another rank ended or stopped answering.
        """
        pause, limit = _PAUSES
        while self._all.add("ended", 0) < self.runtime.world_size and self._sees_lost_peers:
            self._refuse_lost_peers()
            time.sleep(pause)
            pause = min(2 * pause, limit)

    @property
    def _sees_lost_peers(self) -> bool:
        return self.runtime.watch is not None and self.runtime.watch.sees_others

    def _refuse_lost_peers(self) -> None:
        if self.runtime.watch and self.runtime.watch.is_in_vain():
            raise lost_peer(self.runtime.watch, f"rank {self.runtime.rank} waits for others in vain", _CURE)


@contextmanager
def shared_work(runtime: Runtime, total: int, groups: Sequence[Ranks] = ()) -> Iterator[SharedWork]:
    """Numbers that ranks share inside the block, which all leave together, with one outcome as `Runtime.together`. Collective.

    An error on one rank ends the work of all, each after the number that it is at. It is raised there even if the others are lost.
    """
    work = SharedWork(runtime, total, f"work_{runtime.from_main(uuid.uuid4().hex)}", groups)
    error: Exception | None = None
    try:
        yield work
    except LostPeer:  # with whom nothing can be agreed on
        raise
    except Exception as caught:
        error = caught
    except BaseException:  # ends this process, as Ctrl-C does
        with suppress(RuntimeError):  # the store is gone
            work.stop()
            work.end()
        raise
    try:
        if error is not None:
            work.stop()
        work.end()
        work.wait()
    except (LostPeer, RuntimeError) as lost:  # RuntimeError: the store is gone
        raise error or lost from None
    with runtime.together():
        if error is not None:
            raise error
