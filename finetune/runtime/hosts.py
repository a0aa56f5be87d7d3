"""Which ranks are on which host, and which hosts see the same folder."""

import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import PARTIAL
from finetune.runtime.units import counted

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Host:
    """A host's name, and the ranks that run on it."""

    name: str
    ranks: Ranks

    def __str__(self) -> str:
        first, last = self.ranks[0], self.ranks[-1]
        if len(self.ranks) == 1:
            return f"{self.name}: rank {first}"
        is_row = self.ranks == tuple(range(first, last + 1))
        return f"{self.name}: ranks {f'{first} to {last}' if is_row else ', '.join(map(str, self.ranks))}"


def hosts_of(runtime: Runtime) -> list[Host]:
    """The hosts, by their first rank. Collective. torchrun numbers them, since two may have one name."""
    places = runtime.gather((os.environ.get("GROUP_RANK", ""), socket.gethostname()))
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    return [Host(name, tuple(its)) for (_, name), its in ranks.items()]


def describe(runtime: Runtime) -> list[str]:
    """For the log: processes, hosts and device; and of several hosts a line each, with its ranks. Collective."""
    hosts = hosts_of(runtime)
    among = f"{counted(runtime.world_size, 'process')} on {counted(len(hosts), 'host')}, {runtime.device.name}"
    return [among, *(map(str, hosts) if len(hosts) > 1 else ())]


def sharing(runtime: Runtime, folder: Path) -> list[Ranks]:
    """The ranks in groups that see the same files in `folder`, by their first rank. Collective.

    Each host writes a file there, and all look for it. A file system of a network shows a new name at once if nobody has asked
    for it before. A host that cannot write there is in the group of the first host whose file it sees, or by itself.
    """
    hosts = hosts_of(runtime)
    if len(hosts) == 1:
        return [hosts[0].ranks]
    token = runtime.from_main(uuid.uuid4().hex)
    files = [folder / f"{PARTIAL}seen-{token}-{number}" for number in range(len(hosts))]
    own = next(number for number, host in enumerate(hosts) if runtime.rank in host.ranks)
    writes = runtime.rank == hosts[own].ranks[0]
    try:
        if writes:
            with suppress(OSError):
                files[own].touch(exist_ok=False)
        runtime.gather(None)  # all are written
        first_seen = next((number for number, file in enumerate(files) if os.path.exists(file)), own)
        groups: dict[int, list[int]] = {}
        for rank, group in enumerate(runtime.gather(first_seen)):
            groups.setdefault(group, []).append(rank)
    finally:
        if writes:
            with suppress(OSError):
                files[own].unlink()
    return [tuple(ranks) for ranks in groups.values()]


def refuse_unshared(runtime: Runtime, folder: Path) -> None:
    """Raise a UserError if not all hosts see what rank 0 writes in `folder`. Collective."""
    groups = sharing(runtime, folder)
    apart = [host.name for host in hosts_of(runtime) if host.ranks[0] not in groups[0]]
    if apart:
        raise UserError(
            f"{', '.join(apart)} cannot see what rank 0's host writes there, and each rank writes a part of a checkpoint",
            "set output to a folder that all hosts mount; data.cache may be a local one",
            str(folder),
        )
