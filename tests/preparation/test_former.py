"""A run that an earlier version began goes on with its clips as that version decoded and named them."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import imageio_ffmpeg
import pytest
from processes import Finetune

from finetune.checks.model import open_family
from finetune.data.buckets import fit_to_bucket
from finetune.data.cache import Cache, digest
from finetune.data.decode import probe
from finetune.data.loader import Item, Variant
from finetune.preparation.encode import encoders_of, prepare
from finetune.preparation.former import clips_digest
from finetune.recipe import Bucket, Recipe, load_recipe
from finetune.runtime.distributed import Runtime
from finetune.training.identity import begun
from finetune.training.run import train

CLIPS = {  # file name -> options of ffmpeg
    "a.mkv": ["-c:v", "libx264", "-r", "24"],
    "b.webm": ["-c:v", "libvpx-vp9", "-r", "24"],
    "c.webm": ["-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-r", "30"],  # with hidden frames
    "d.mp4": ["-c:v", "libx264", "-r", "24"],
}
JITTERED = ["-vf", "settb=1/1000,setpts=N*40+mod(N*7\\,3)-1+1", "-fps_mode", "passthrough"]
JITTERED += ["-enc_time_base", "1/1000", "-c:v", "libx264"]


def make_clip(path: Path, options: list[str]) -> Path:
    source = ["-f", "lavfi", "-i", "testsrc2=size=96x96:rate=24:duration=1.1"]
    run = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *options, path]
    subprocess.run(run, check=True, timeout=60)
    return path


def rate_as_before(path: Path) -> float:
    """The rate of a clip as the first decoder's `probe` found it: its lines, copied."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stored = [packet for packet in container.demux(stream) if packet.pts is not None]
        time_base, rate = stream.time_base, stream.average_rate
    packets = sorted((p.pts, p.duration or 0) for p in stored if not p.is_discard)
    ticks = [pts for pts, _ in packets]
    last = packets[-1][1] or (ticks[-1] - ticks[0]) // max(len(ticks) - 1, 1) or round(1 / (time_base * (rate or 25)))
    return len(ticks) / float((ticks[-1] - ticks[0] + last) * time_base)


@pytest.mark.parametrize("name, options", [*CLIPS.items(), ("jittered.mkv", JITTERED)])
def test_the_rate_that_is_part_of_old_keys_is_known(name: str, options: list[str], tmp_path: Path) -> None:
    path = make_clip(tmp_path / name, options)
    info, before = probe(path), rate_as_before(path)
    assert info.former_fps == before
    assert (info.fps == before) == name.endswith(".mp4")
    fit = fit_to_bucket(info, [Bucket(9, 64, 64)], None, name)
    assert (fit.fps, fit.former_fps) == (info.fps, before)
    assert fit_to_bucket(info, [Bucket(9, 64, 64)], 24.0, name).former_fps == 24.0


@dataclass
class OldRun:
    """A run at step 1 and its cache as the version with the first decoder left them.

    `keys` and `rates` are those of its clips, by name.
    """

    recipe_file: Path
    overrides: list[str]
    runtime: Runtime
    keys: dict[str, str]
    rates: dict[str, float]

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.recipe_file, self.overrides)

    @property
    def items(self) -> set[str]:
        return {item.key for item in Cache(self.recipe.data.cache).items()}

    def video(self, name: str) -> Path:
        return Cache(self.recipe.data.cache).path("video", self.keys[name])

    def prepared(self):
        family = open_family(self.recipe)
        return prepare(self.recipe, family, self.runtime, begun=begun([self.recipe], family))

    def trained(self, steps: int) -> None:
        recipe = self.recipe
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
        assert train(recipe, self.runtime) == 0

    def facts_file(self, step: int) -> Path:
        return self.recipe.run_folder / "checkpoints" / f"step_{step:08d}" / "trainer.json"


@pytest.fixture(scope="module")
def made_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "clips"
    folder.mkdir()
    for name, options in CLIPS.items():
        make_clip(folder / name, options).with_suffix(".txt").write_text(f"a test card, {name}\n")
    return folder


@pytest.fixture
def old_run(build_job: Callable, made_clips: Path, recipe_file: Path, runtime: Runtime, tmp_path: Path) -> OldRun:
    """Items are encoded by this version and stored by their old keys, so they cannot be taken for those of now."""
    folder = made_clips
    overrides = [f"data.path={folder}", "data.buckets=['9x64x64']"]
    job = build_job(*overrides, f"data.cache={tmp_path / 'new'}")
    job.save(1)
    new, old = Cache(tmp_path / "new"), Cache(tmp_path / "old")
    (encoder,) = (each for each in encoders_of(job.state.family, job.recipe) if each.kind == "video")
    made_of = digest(*encoder.fingerprint(new.file_hash), job.recipe.train.precision)
    keys, rates, clips = {}, {}, []
    for item in job.prepared.train:
        name = item.path.name
        rates[name] = rate_as_before(item.path)
        clip = [new.file_hash(item.path), "9x64x64", rates[name], "head"]
        keys[name] = digest("video", encoder.variant, made_of, *clip)
        for kind, key in (("video", keys[name]), ("text", item.keys["text"])):
            old.write(kind, key, new.read(kind, item.keys[kind]), "as before")
        clips.append([keys[name], item.keys["text"]])
    run = OldRun(recipe_file, [*overrides, f"data.cache={tmp_path / 'old'}"], runtime, keys, rates)
    facts = json.loads(run.facts_file(1).read_text())
    kept = {name: value for name, value in facts.items() if name not in ("base_content", "clip_list", "decoded_by")}
    run.facts_file(1).write_text(json.dumps({**kept, "clips": digest(clips)}))
    return run


def test_a_run_goes_on_with_the_items_that_it_began_with(old_run: OldRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = old_run.items
    prepared = old_run.prepared()
    assert {item.path.name: item.keys["video"] for item in prepared.train} == old_run.keys
    assert {item.path.name: item.fps for item in prepared.train} == old_run.rates
    assert prepared.decoder == 1
    old_run.trained(2)
    said = capsys.readouterr().err
    assert "goes on with its clips as an earlier version decoded them" in said
    assert "resuming after step 1" in said
    assert old_run.items == before
    assert json.loads(old_run.facts_file(2).read_text())["decoded_by"] == "1"


def test_the_command_that_only_encodes_goes_on_with_them_too(old_run: OldRun, finetune: Finetune) -> None:
    before = old_run.items
    settings = [word for override in old_run.overrides for word in ("--set", override)]
    done = finetune("prepare", "--recipe", old_run.recipe_file, *settings)
    assert done.returncode == 0, done.stderr
    assert old_run.items == before


def test_a_run_whose_old_items_are_gone_says_that_it_goes_on_with_clips_decoded_anew(
    old_run: OldRun, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = old_run.video("a.mkv").read_bytes()
    old_run.video("a.mkv").unlink()
    old_run.trained(2)
    said = capsys.readouterr().err
    assert "1 of these 4 items are not in the cache any more: it goes on with all of them decoded anew" in said
    assert "resuming after step 1" in said
    assert json.loads(old_run.facts_file(2).read_text())["decoded_by"] == "2"
    # The step-1 checkpoint is still there: only the newest decides, else the clips would change back amid the run.
    old_run.video("a.mkv").write_bytes(kept)
    assert old_run.prepared().decoder == 2
    shutil.rmtree(old_run.facts_file(2).parent)
    assert old_run.prepared().decoder == 1


def test_clips_of_another_dataset_are_other_clips() -> None:
    """Which dataset a clip is of decides how often it is drawn."""

    def items(*sources: int) -> list[Item]:
        variants = [Variant("", {"video": f"v{number}", "text": "t"}) for number in range(len(sources))]
        return [
            Item(Path("a.mp4"), Bucket(9, 64, 64), 24.0, ((variant,),), source=source)
            for variant, source in zip(variants, sources, strict=True)
        ]

    assert clips_digest(items(0, 0, 1), [], {}) != clips_digest(items(0, 1, 1), [], {})
    assert clips_digest(items(0, 0), [], {}) == digest([["v0", "t"], ["v1", "t"]])
