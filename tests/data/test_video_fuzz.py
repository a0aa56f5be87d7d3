"""Files with wrong bytes anywhere: they are decoded or refused, and neither end the run nor keep it waiting."""

import random
from pathlib import Path

import pytest
from damage import anywhere
from ffmpeg_oracle import Ffmpeg
from test_video_damage import FILES

from finetune.data.decode import decode, probe
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError


def fuzz(ffmpeg: Ffmpeg, path: Path, seed: int) -> None:
    """Damage a file by a seed, and read windows of it."""
    chance = random.Random(seed)
    name = chance.choice(sorted(FILES))
    whole = ffmpeg.make(f"short_{name}", *FILES[name], seconds=1.0)
    path = path.with_suffix(whole.suffix)
    path.write_bytes(anywhere(whole.read_bytes(), chance))
    refusal = str(path)
    try:
        info = probe(path)
        count = min(info.frames, 20)
        assert decode(path, info, Bucket(count, 64, 96), info.fps, threads=1).shape == (count, 64, 96, 3)
        decode(path, info, Bucket(1, 64, 96), info.fps, start=max(0.0, info.duration - 1 / info.fps), threads=1)
    except UserError as error:
        refusal = str(error)
    assert str(path) in refusal


@pytest.mark.timeout(20)
@pytest.mark.parametrize("seed", range(30))
def test_any_bytes(ffmpeg: Ffmpeg, tmp_path: Path, seed: int) -> None:
    fuzz(ffmpeg, tmp_path / "fuzzed", seed)


@pytest.mark.full
@pytest.mark.timeout(20)
@pytest.mark.parametrize("seed", range(30, 630))
def test_any_more_bytes(ffmpeg: Ffmpeg, tmp_path: Path, seed: int) -> None:
    fuzz(ffmpeg, tmp_path / "fuzzed", seed)
