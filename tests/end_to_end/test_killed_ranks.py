"""One rank is killed: all processes end soon, and the same command goes on as if nothing had been. Real processes and signals."""

import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from every_family import few
from trainings import Run, assert_equal_ends, checkpoints, descendants, resumed_after, steps_done

from finetune.runtime.watch import Watch, lost_peer

STEPS, SOON = 12, 10.0  # seconds
SETTINGS = ("checkpoint.every=2", f"train.steps={STEPS}", "data.workers=1", "optimizer.lr=1e-2")
PROMPT = 'validation.prompts=[{text = "a ball", shape = "17x64x96", steps = 60}]'
DOING = "(in|waiting for the clips of|saving the checkpoint of)"  # as it was noted a second before at the most
AT: dict[str, tuple[list[str], Callable[[Path], bool]]] = {  # when -> (further settings, whether it is now)
    "training": ([], lambda output: steps_done(output) >= 5),
    "saving": (["checkpoint.every=1"], lambda output: any(output.glob("checkpoints/.partial-*/state/*"))),
    "sampling": (
        [PROMPT, "validation.samples_every=4"],
        lambda output: steps_done(output) == 4 and bool(checkpoints(output)),
    ),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[[Path], Path]) -> Path:
    return small_recipe(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Run:
    run = Run(recipe, recipe.with_name("straight"), 2, SETTINGS)
    assert run.wait() == 0, run.said
    return run


def assert_ends_soon(runs: list[Run], started: list[int], may_be_done: bool = False) -> None:
    """All processes of some runs end, also those that were started by their ranks; with an error, unless they were done before."""
    deadline = time.monotonic() + SOON
    for run in runs:
        run.process.wait(max(0.1, deadline - time.monotonic()))
        assert run.process.returncode != 0 or may_be_done
    while left := [pid for pid in started if is_alive(pid)]:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "when, workers, rank",
    [
        ("training", 1, 1),
        pytest.param("saving", 2, 0, marks=pytest.mark.full),
        pytest.param("sampling", 1, 1, marks=pytest.mark.full),
        pytest.param("training", 2, 0, marks=pytest.mark.full),
        pytest.param("training", 0, 1, marks=pytest.mark.full),
        pytest.param("saving", 1, 1, marks=pytest.mark.full),
        pytest.param("sampling", 2, 0, marks=pytest.mark.full),
    ],
)
def test_after_one_rank_is_killed_all_end_and_the_same_command_goes_on(
    recipe: Path, straight: Run, when: str, workers: int, rank: int
) -> None:
    more, is_now = AT[when]
    output = recipe.with_name(f"{when}-{workers}-{rank}")
    settings = [*SETTINGS, *more, f"data.workers={workers}"]
    run = Run(recipe, output, 2, settings)
    run.wait_until(lambda: is_now(output))
    started = descendants(run.process.pid)
    os.kill(run.rank(rank), signal.SIGKILL)
    assert_ends_soon([run], started)
    assert "the same command resumes" in run.said or "Signal 9" in run.said
    again = Run(recipe, output, 2, settings)
    assert again.wait() == 0, again.said
    assert resumed_after(again.said) > 0 or when == "saving"
    assert_equal_ends(again, straight)


@pytest.mark.full
def test_a_rank_that_is_killed_while_clips_are_encoded_leaves_what_was_encoded(recipe: Path, straight: Run) -> None:
    output, cache = recipe.with_name("encoding"), recipe.with_name("own_cache")
    settings = [*SETTINGS, f"data.cache={cache}"]
    run = Run(recipe, output, 2, settings)
    run.wait_until(lambda: any((cache / "text").rglob("*.safetensors")))
    started = descendants(run.process.pid)
    os.kill(run.rank(1), signal.SIGKILL)
    assert_ends_soon([run], started)
    again = Run(recipe, output, 2, settings)
    assert again.wait() == 0, again.said
    assert_equal_ends(again, straight)


@pytest.mark.full
def test_max_restarts_goes_on_by_itself(recipe: Path, straight: Run) -> None:
    output = recipe.with_name("restarts")
    run = Run(recipe, output, 2, SETTINGS, torchrun=["--standalone", "--max_restarts", "2"])
    for saved, rank in ((2, 1), (6, 0)):
        run.wait_until(lambda saved=saved: max(checkpoints(output), default=0) >= saved)
        os.kill(run.rank(rank), signal.SIGKILL)
    assert run.wait() == 0, run.said
    assert run.said.count("resuming after step") == 2
    assert_equal_ends(run, straight)


@pytest.mark.full
def test_with_two_torchruns_the_other_node_ends_too(recipe: Path, straight: Run) -> None:
    output = recipe.with_name("nodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        ["--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        for node in (0, 1)
    ]
    settings = [*SETTINGS, "train.micro_batch_size=2"]
    runs = [Run(recipe, output, 1, settings, torchrun=options) for options in nodes]
    runs[0].wait_until(lambda: steps_done(output) >= 5)
    started = [pid for run in runs for pid in descendants(run.process.pid)]
    os.kill(runs[1].rank(1), signal.SIGKILL)
    assert_ends_soon(runs, started)
    assert re.search(
        rf"rank 0 lost its peers: rank 1 \(on {socket.gethostname()}, {DOING} step \d+\) ended", runs[0].said
    )
    again = Run(recipe, output, 2, SETTINGS)
    assert again.wait() == 0, again.said
    assert_equal_ends(again, straight)
    assert checkpoints(output)[-1] == STEPS


# At any moment


@pytest.mark.full
@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.timeout(900))])
@pytest.mark.parametrize(
    "what", ["one rank is killed", "all are killed", "SIGTERM", "one rank is stopped for a second"]
)
def test_disturbed_at_random_moments_a_run_ends_as_if_nothing_had_been(
    recipe: Path, straight: Run, what: str, moments: int
) -> None:
    drawn = random.Random(f"{what} {moments}")
    output = recipe.with_name(f"{what.replace(' ', '_')}-{moments}")
    settings = [*SETTINGS, "checkpoint.every=1"]
    for _ in range(moments):
        run = Run(recipe, output, 2, settings)
        time.sleep(drawn.uniform(2, 8))
        started = descendants(run.process.pid)
        disturb(run, what, drawn.randrange(2))
        if what == "one rank is stopped for a second":
            assert run.wait() == 0, run.said
        else:
            assert_ends_soon([run], started, may_be_done=True)
    last = Run(recipe, output, 2, settings)
    assert last.wait() == 0, last.said
    assert_equal_ends(last, straight)


def disturb(run: Run, what: str, rank: int) -> None:
    """Send a signal to a run, or to one of its ranks if it has begun them; nothing to one that has ended."""
    if run.process.poll() is not None:
        return
    if what == "all are killed":
        run.kill_all()
    elif what == "SIGTERM":
        run.process.send_signal(signal.SIGTERM)
    else:
        with suppress(LookupError, ProcessLookupError, FileNotFoundError):
            process = run.rank(rank)
            os.kill(process, signal.SIGKILL if what == "one rank is killed" else signal.SIGSTOP)
            if what == "one rank is stopped for a second":
                time.sleep(1)
                os.kill(process, signal.SIGCONT)
            return
        if what == "one rank is killed":  # the ranks have not begun
            run.process.terminate()


# A rank that is stopped, and not killed


@pytest.mark.parametrize("stopped, tells", few([(1, 0), (0, 1)]))
def test_a_rank_that_is_stopped_is_named_within_the_timeout(recipe: Path, stopped: int, tells: int) -> None:
    """By another one, also if it is rank 0, which says everything else."""
    timeout = 6.0
    output = recipe.with_name(f"stopped-{stopped}")
    run = Run(recipe, output, 2, ["train.steps=100000", f"distributed.timeout_seconds={timeout}"])
    run.wait_until(lambda: steps_done(output) >= 5)
    os.kill(run.rank(stopped), signal.SIGSTOP)
    began = time.monotonic()
    expected = re.compile(
        rf"error: rank {tells} (is|lost its peers).*: rank {stopped} \(on {socket.gethostname()}, "
        rf"{DOING} step \d+\) ended, or answers no more"
    )
    run.wait_until(lambda: expected.search(" ".join(run.said.split())) is not None)
    assert time.monotonic() - began < timeout + SOON
    assert "the same command resumes from the newest checkpoint" in run.said
    run.kill_all()


@pytest.mark.parametrize(
    "when, more",
    few(
        [
            ("the run waits for its last checkpoint", ["train.steps=2"]),
            (
                "videos are made while one is written",
                ["train.steps=8", "checkpoint.every=2", "validation.samples_every=2", PROMPT],
            ),
        ]
    ),
)
@pytest.mark.full
def test_a_rank_that_is_stopped_amid_a_checkpoint_is_named_within_twice_the_timeout(
    recipe: Path, when: str, more: list[str]
) -> None:
    """Ranks wait a day for one whose disk is slow, and processes that end for their own writing: not for a rank that is gone."""
    timeout = 6.0
    output = recipe.with_name(f"stopped-{len(more)}")
    full = ["train.method=full", "lora.rank=64", "lora.alpha=64"]
    run = Run(recipe, output, 2, [*full, *more, f"distributed.timeout_seconds={timeout}"])
    run.wait_until(lambda: any(output.glob("checkpoints/.partial-*/state")))
    os.kill(run.rank(1), signal.SIGSTOP)
    began, rank = time.monotonic(), run.rank(0)
    while is_alive(rank):
        assert time.monotonic() - began < 2 * timeout + SOON, run.said
        time.sleep(0.1)
    assert re.search(r"error: rank 0 .*: rank 1 \(on [^)]*\) ended, or answers no more", " ".join(run.said.split()))
    run.kill_all()


@contextmanager
def three_watches(limit_seconds: float) -> Iterator[list[Watch]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    with patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}):
        watches = [Watch(rank, 3, "0", limit_seconds) for rank in range(3)]
    yield watches
    for watch in watches:
        watch.end()


def fall_silent(watch: Watch) -> None:
    """As if its process were stopped."""
    watch._ended.set()


def test_a_rank_that_waits_for_its_clips_is_told_from_those_that_wait_for_it() -> None:
    """Two ranks that answer: one is in a step, the other reads clips."""
    with three_watches(limit_seconds=60) as ranks:
        for rank in (0, 1):
            ranks[rank].doing("in step 7")
        ranks[2].doing("waiting for the clips of step 7")
        time.sleep(1.5)
        assert ranks[0].lost() == {}
        error = lost_peer(ranks[0], "rank 0 waits", "")
        behind = rf"rank 0 waits: rank 2 is on {socket.gethostname()}, waiting for the clips of step 7 for \d s"
        assert re.fullmatch(behind, str(error))
        assert not error.is_main_lost
        fall_silent(ranks[2])
        time.sleep(1.5)
        assert "rank 2 (on " in str(lost_peer(ranks[1], "rank 1 waits", ""))


def test_ranks_that_wait_for_a_lost_one_do_not_take_each_other_for_lost() -> None:
    said: list[str] = []
    with (
        patch("finetune.runtime.watch.print_error", lambda error: said.append(str(error))),
        patch("finetune.runtime.watch.os._exit"),
        three_watches(limit_seconds=1) as ranks,
    ):
        fall_silent(ranks[2])
        ranks[0].doing("in step 7", is_limited=True)
        time.sleep(0.5)
        ranks[1].doing("in step 7", is_limited=True)
        time.sleep(6)
    assert len(said) == 2
    for line in said:
        assert re.search(r"rank 2( \(.*\))? ended, or answers no more", line)
        assert "rank 0 (" not in line
        assert "rank 1 (" not in line


def test_a_rank_that_has_done_its_work_is_not_missed() -> None:
    """Rank 0 may still send what it has logged, for longer than the timeout."""
    said: list[str] = []
    with (
        patch("finetune.runtime.watch.print_error", lambda error: said.append(str(error))),
        patch("finetune.runtime.watch.os._exit"),
        three_watches(limit_seconds=1) as ranks,
    ):
        ranks[0].doing("exporting")
        for rank in (1, 2):
            ranks[rank].end()
        time.sleep(7)
        assert ranks[0].lost() == {}
        assert ranks[0].behind() == {}
    assert said == []


def test_a_step_that_ends_after_all_is_no_reason_to_leave() -> None:
    """The rank looks at the others for seconds before it ends; by then it may be in the next step."""
    said: list[str] = []
    with patch("finetune.runtime.watch.print_error", said.append), three_watches(limit_seconds=1) as ranks:
        ranks[0].doing("in step 7", is_limited=True)
        time.sleep(2.2)
        ranks[0].doing("in step 8", is_limited=False)
        time.sleep(3.5)
    assert said == []
