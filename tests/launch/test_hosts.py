"""launch/nodes.sh on two hosts: they meet, train as one host does, and go on without one that is cut off."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from trainings import Run, adapter, assert_equal_ends, checkpoints, resumed_after, rows, steps_done
from two_hosts import Host, Training, TwoHosts, wait_until, why_impossible

STEPS, TIMEOUT = 10, 12  # seconds that ranks wait for each other
SETTINGS = (
    "checkpoint.every=2",
    f"train.steps={STEPS}",
    "optimizer.lr=1e-2",
    f"distributed.timeout_seconds={TIMEOUT}",
    "train.micro_batch_size=2",
)
LOST = re.compile(r"rank \d.*: rank \d .*ended, or answers no more")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    if why := why_impossible():
        pytest.skip(why)
    with TwoHosts() as both:
        yield both


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[[Path], Path]) -> Path:
    return small_recipe(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Run:
    """Two ranks on one host."""
    run = Run(recipe, recipe.with_name("straight"), 2, SETTINGS)
    assert run.wait() == 0, run.said
    return run


def start(hosts: list[Host], recipe: Path, *settings: str, of_second: Sequence[str] = ()) -> list[Training]:
    """A training on both hosts, of which the second has further settings."""
    started = []
    for host, own in zip(hosts, ([], of_second), strict=True):
        log = recipe.with_name(f"{host.name}-{len(host.processes)}.log")
        started.append(host.start(log, recipe, [*SETTINGS, *settings, *own], HEAD=hosts[0].address))
    return started


def test_two_hosts_train_as_one_and_one_fills_a_cache_of_its_own(
    hosts: list[Host], recipe: Path, straight: Run, cache: Path
) -> None:
    """The other's cache has all that is needed."""
    output, local = recipe.with_name("together"), recipe.with_name("local_disk")
    trainings = start(hosts, recipe, f"output={output}", of_second=[f"data.cache={local}"])
    for training in trainings:
        assert training.wait() == 0, training.said
    assert "2 processes on 2 hosts" in trainings[0].said + trainings[1].said
    main = next(training for training in trainings if "2 hosts" in training.said)
    assert sorted(re.findall(r"^host\d: rank \d$", main.said, re.MULTILINE)) in (
        ["host1: rank 0", "host2: rank 1"],
        ["host1: rank 1", "host2: rank 0"],
    )
    assert [row["loss"] for row in rows(output)] == [row["loss"] for row in rows(straight.output)]
    theirs = adapter(straight.output)
    assert all(tensor.equal(theirs[name]) for name, tensor in adapter(output).items())
    filled = {path.name for path in local.rglob("*.safetensors")}
    assert filled
    assert filled <= {path.name for path in cache.rglob("*.safetensors")}


def test_a_host_that_is_cut_off_is_named_and_one_host_goes_on(hosts: list[Host], recipe: Path, straight: Run) -> None:
    output = recipe.with_name("cut")
    trainings = start(hosts, recipe, f"output={output}")
    wait_until(lambda: steps_done(output) >= 5 and bool(checkpoints(output)), trainings)
    hosts[1].pull_cable()
    try:
        wait_until(lambda: all(LOST.search(training.said) for training in trainings), [])
        assert trainings[0].wait() != 0
        wait_until(lambda: not hosts[1].runs("-u -m finetune"), [])  # torchrun waits there for the network
    finally:
        hosts[1].pull_cable(out=False)
    assert trainings[1].wait() != 0
    assert "(on host2, " in LOST.search(trainings[0].said)[0]
    kept = max(checkpoints(output))  # one may have been under way
    again = Run(recipe, output, 2, SETTINGS)
    assert again.wait() == 0, again.said
    assert resumed_after(again.said) == kept >= 2
    assert_equal_ends(again, straight)


@pytest.mark.full
def test_an_output_that_one_host_alone_sees_is_refused(hosts: list[Host], recipe: Path) -> None:
    trainings = start(hosts, recipe, of_second=[f"output={recipe.with_name('elsewhere')}"])
    for training in trainings:
        assert training.wait() == 1, training.said
    said = "\n".join(training.said for training in trainings)
    assert re.search(r"host\d cannot see what rank 0's host writes there", said), said
    assert "-> set output to a folder that all hosts mount" in said
