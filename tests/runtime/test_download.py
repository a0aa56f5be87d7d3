"""Downloads are announced and shown, and what is cached is not: against a stand-in of the Hub that the real client talks to."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hub_stand_in import Hub, Repository
from processes import run_python

SIZE = 3_000_000
FETCH = """
import sys
from finetune.runtime import progress
from finetune.runtime.download import snapshot
from finetune.runtime.logging import be_quiet, quiet_libraries
quiet_libraries()
progress._SECONDS_BETWEEN_LINES = 1.5
if "--quiet" in sys.argv:
    be_quiet()
print(snapshot("me/model", "main", ["model_index.json", "transformer/*"], ["*.fp16.*"]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        repository = Repository(private=False)
        weights = bytes(range(256)) * (SIZE // 256)
        repository.branches["main"].files = {
            "model_index.json": b'{"_class_name": "LTXPipeline"}',
            "transformer/diffusion_pytorch_model.safetensors": weights,
            "transformer/diffusion_pytorch_model.fp16.safetensors": weights,  # another precision, which is not downloaded
            "vae/diffusion_pytorch_model.safetensors": weights,
        }
        started.repositories["me/model"] = repository
        yield started


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> Mapping[str, str]:
    off = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), **off}


def fetched(environment: Mapping[str, str], *arguments: str) -> tuple[str, list[str]]:
    """(the folder, the lines that were said)."""
    done = run_python(["-c", FETCH, *arguments], environment=environment, is_anew=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.splitlines()


def test_a_download_says_what_how_large_and_where_to_and_a_cached_one_says_nothing(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    folder, lines = fetched(environment)
    assert lines[0] == f"downloading me/model: 2 files, 3.0 MB, to {tmp_path}/home/hub/models--me--model"
    assert re.fullmatch(r"downloaded 3\.0 MB in 0:00:\d\d", lines[-1])
    assert "\x1b" not in "".join(lines)
    assert (Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size == SIZE // 256 * 256
    assert not list(Path(folder).rglob("*.fp16.*"))
    assert fetched(environment) == (folder, [])
    assert fetched({**environment, "HF_HUB_OFFLINE": "1"}) == (folder, [])


def test_a_slow_download_says_how_far_it_is(environment: Mapping[str, str], hub: Hub) -> None:
    large = {"transformer/diffusion_pytorch_model.safetensors": bytes(40_000_000)}  # the client writes 10 MB at once
    hub.repositories["me/model"].branches["main"].files |= large
    hub.rate = 8e6
    _, (first, *shown, last) = fetched(environment)
    assert first.startswith("downloading me/model: 2 files, 40.0 MB, to ")
    assert re.fullmatch(r"downloaded 40\.0 MB in 0:00:\d\d", last)
    assert shown[-1] == "downloading 40.0 MB/40.0 MB 100%  ETA 0:00:00"
    line = r"downloading \d+\.\d MB/40\.0 MB \d+%  ETA 0:00:\d\d  \d+\.\d MB/s"
    assert any(re.fullmatch(line, each) for each in shown), shown


def test_nothing_is_said_where_it_is_not_to_be(environment: Mapping[str, str]) -> None:
    assert fetched(environment, "--quiet")[1] == []


def test_another_rank_says_nothing(environment: Mapping[str, str]) -> None:
    assert fetched({**environment, "RANK": "1", "WORLD_SIZE": "2"})[1] == []


def test_a_download_that_fails_is_not_said_to_be_done(environment: Mapping[str, str], hub: Hub) -> None:
    hub.faults = [("resolve", 500)] * 40
    done = run_python(["-c", FETCH], environment=environment, is_anew=True)
    assert done.returncode != 0
    assert "downloading me/model" in done.stderr
    assert "downloaded" not in done.stderr
