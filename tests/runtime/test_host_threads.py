"""What is computed on the CPU beside GPUs uses the node's cores, which torchrun divides as if there were one."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime, host_threads


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a process among several, on a node of 16 cores."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def threads(processes: int = 4, kind: str = "cuda", used: bool = True) -> int:
    runtime = Runtime(0, 0, processes, Device(torch.device(kind, 0)), None, processes)
    with host_threads(runtime, used):
        return torch.get_num_threads()


@pytest.mark.parametrize("processes, share", [(1, 16), (4, 4), (8, 2), (16, 1), (32, 1)])
def test_each_process_of_a_node_has_its_share_of_the_cores(torchrun: None, processes: int, share: int) -> None:
    assert threads(processes) == share
    assert torch.get_num_threads() == 1


def test_nothing_changes_without_need(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads(kind="cpu") == 1  # a training on CPUs
    assert threads(used=False) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user has chosen
    assert threads() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # not torchrun
    assert threads() == 1


def test_an_error_gives_the_threads_back(torchrun: None) -> None:
    runtime = Runtime(0, 0, 2, Device(torch.device("cuda", 0)), None, 2)
    with pytest.raises(ZeroDivisionError), host_threads(dataclasses.replace(runtime)):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 1
