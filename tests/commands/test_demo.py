"""`demo` writes a pipeline that draws shapes and clips of a new one, or a random pipeline of a family, and keeps what is there."""

from pathlib import Path

import av
import numpy as np
import pytest
from diffusers import WanPipeline

from finetune import cli
from finetune.commands.demo import LEARNT
from finetune.data.shapes import NEW_SHAPE, seen


def demo(*arguments: object) -> int:
    return cli.main(["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `demo` writes without --family."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert demo("--out", out) == 0
    return out


def test_its_clips_show_the_new_shape_and_their_captions_call_it_by_the_trigger_word(written: Path) -> None:
    for folder, count in (("clips", 12), ("heldout", 3)):
        videos = sorted((written / folder).glob("*.mp4"))
        assert len(videos) == count
        for video in videos:
            with av.open(str(video)) as container:
                shown = seen(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
            caption = video.with_suffix(".txt").read_text().split()
            assert shown.shape == NEW_SHAPE
            assert {"zorb", shown.colour, shown.direction} <= set(caption)


def test_no_heldout_clip_is_a_clip_of_the_training(written: Path) -> None:
    captions = {path.read_text() for path in (written / "clips").glob("*.txt")}
    files = {path.read_bytes() for path in (written / "clips").glob("*.mp4")}
    assert len(captions) == len(files) == 12
    assert not files & {path.read_bytes() for path in (written / "heldout").glob("*.mp4")}


def test_the_pipeline_opens_in_diffusers_and_has_nothing_but_its_parts(written: Path) -> None:
    pipeline = WanPipeline.from_pretrained(written / "model")
    assert sum(weight.numel() for weight in pipeline.transformer.parameters()) > 2e6
    parts = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert {path.name for path in (written / "model").iterdir()} == parts | {"model_index.json"}
    assert len(set(pipeline.tokenizer("a red zorb").input_ids)) == 4  # with the end: the trigger word is one token


def test_the_stored_pipeline_is_small_and_tells_how_it_was_made() -> None:
    assert sum(path.stat().st_size for path in LEARNT.rglob("*") if path.is_file()) < 12e6
    assert {"recipe.toml", "curve.jsonl", "README.md"} <= {path.name for path in LEARNT.iterdir()}


def test_what_is_there_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "mine.txt").write_text("my own")
    assert demo("--out", tmp_path) == 0
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["mine.txt"]
    assert "(clips/ kept as found)" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "heldout").is_dir()


def test_a_demo_of_another_family_is_not_taken_for_this_one(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo("--out", tmp_path, "--family", "ltx") == 0
    for arguments in ([], ["--family", "wan"], ["--family", "ltx", "--variant", "0.9.7"]):
        capsys.readouterr()
        assert demo("--out", tmp_path, *arguments) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "it holds another demo (ltx" in told
        assert "give another --out" in told
    (tmp_path / "demo.json").unlink()  # as of an earlier release
    assert demo("--out", tmp_path) == 2
    assert "it holds another demo (LTXPipeline)" in " ".join(capsys.readouterr().err.split())
    assert demo("--out", written, "--family", "wan") == 2


def test_a_variant_needs_its_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--out", tmp_path / "x", "--variant", "2.1") == 2
    assert "a variant of which family?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
