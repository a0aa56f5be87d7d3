"""A rank that fails says why, even if the ranks that it would agree with on the end are lost."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer
from finetune.runtime.shared_work import shared_work
from finetune.runtime.watch import Watch


class InVain(Watch):
    """The watch of a rank whose peer has ended."""

    def __init__(self) -> None:
        super().__init__(rank=0, world_size=1, attempt="0", limit_seconds=60)

    @property
    def sees_others(self) -> bool:
        return True

    def is_in_vain(self) -> bool:
        return True


@pytest.fixture
def alone(runtime: Runtime) -> Runtime:
    """One of two ranks, whose peer is lost."""
    return replace(runtime, world_size=2, store=dist.HashStore(), watch=InVain())


def test_a_rank_that_has_done_its_work_misses_a_lost_one(alone: Runtime) -> None:
    with pytest.raises(LostPeer), shared_work(alone, 4):
        pass


def test_a_rank_s_own_error_comes_before_that_others_are_lost(alone: Runtime) -> None:
    with pytest.raises(OSError, match="No space left"), shared_work(alone, 4):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_rank_s_own_error_is_raised_where_the_store_is_gone(alone: Runtime, error: BaseException) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=1))
    with pytest.raises(type(error)), shared_work(replace(alone, store=client), 4):
        del server
        raise error
