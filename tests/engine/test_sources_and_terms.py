"""A family with a source, a cached kind and a loss term of its own beside the usual ones: what LTX-2's sound will be."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.checks.everything import check_all
from finetune.data.sources import SourceFile
from finetune.models import FAMILIES
from finetune.models.batch import Batch, Tensors, Term
from finetune.models.encoder import Encoder
from finetune.models.family import SampleLike
from finetune.models.folder import ModelFolder
from finetune.models.ltx import LTXVideo
from finetune.models.objective import Objective
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import Bucket, load_recipe
from finetune.recipe.schema import Vae
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.job import Job, build


class SoundingLTX(LTXVideo):
    """LTX-Video that also answers with 16 numbers for each clip, which are to be those of its file of sound."""

    def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
        sound = Encoder("sound", ("audio",), "v1", lambda file_hash: [], lambda device: read_sound)
        return (*super().encoders(dtype, settings), sound)

    def batch(self, samples: Sequence[SampleLike], objective: Objective, u: Tensor | None = None) -> Batch:
        batch = super().batch(samples, objective, u)
        sound = torch.stack([sample.encoded["sound"]["samples"] for sample in samples])
        weight = torch.full((len(samples),), 0.5)
        return Batch(batch.inputs, batch.terms | {"sound": Term(sound, weight)}).contiguous()

    def predict(self, transformer: nn.Module, inputs: dict[str, Any]) -> Tensors:
        predictions = super().predict(transformer, inputs)
        return predictions | {"sound": predictions["video"].mean(1)}


def read_sound(sound: SourceFile) -> Tensors:
    assert (sound.bucket, sound.start) == (Bucket(17, 64, 96), 0.0)
    return {"samples": torch.from_numpy(np.load(sound.path))}


@pytest.fixture
def sounding_clips(tmp_path: Path, few_clips: Path) -> Path:
    """A manifest of clips, each with a file of sound and a licence."""
    folder = tmp_path / "sounding"
    folder.mkdir()
    rows = []
    for index, video in enumerate(sorted(few_clips.glob("*.mp4"))):
        np.save(folder / f"{video.stem}.npy", np.random.default_rng(index).normal(size=16).astype(np.float32))
        caption = video.with_suffix(".txt").read_text().strip()
        row = {"video": str(video), "caption": caption, "audio": f"{video.stem}.npy", "licence": "CC0", "note": ""}
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def prepared_with(
    recipe_file: Path, tiny_ltx: Path, sounding_clips: Path, runtime: Runtime
) -> Callable[[], tuple[Prepared, Job]]:
    overrides = [f"data.path={sounding_clips}", "train.steps=2", "validation.heldout_clips=1", "validation.sigmas=2"]

    def make() -> tuple[Prepared, Job]:
        recipe, family = load_recipe(recipe_file, overrides), SoundingLTX(ModelFolder(tiny_ltx))
        prepared = prepare(recipe, family, runtime)
        return prepared, build(recipe, runtime, family, prepared)

    return make


def test_each_kind_is_cached_by_itself_and_further_columns_stay_with_the_clip(
    prepared_with: Callable[[], tuple[Prepared, Job]], sounding_clips: Path
) -> None:
    prepared, _ = prepared_with()
    for item in prepared.train:
        assert list(item.keys) == ["text", "video", "sound"]
        file = sounding_clips / f"{item.path.stem}.npy"
        assert torch.equal(prepared.cache.read("sound", item.keys["sound"])["samples"], torch.from_numpy(np.load(file)))
        assert item.columns == {"audio": file.name, "licence": "CC0"}  # empty cells are left out


def test_another_file_of_sound_makes_another_item_of_its_kind_alone(
    prepared_with: Callable[[], tuple[Prepared, Job]], sounding_clips: Path
) -> None:
    before = {item.path: item.keys for item in prepared_with()[0].train}
    changed = next(iter(before))
    np.save(sounding_clips / f"{changed.stem}.npy", np.zeros(16, np.float32))
    after = {item.path: item.keys for item in prepared_with()[0].train}
    different = [(path, kind) for path in before for kind in before[path] if before[path][kind] != after[path][kind]]
    assert different == [(changed, "sound")]


def test_a_step_and_the_heldout_loss_tell_each_term(prepared_with: Callable[[], tuple[Prepared, Job]]) -> None:
    _, job = prepared_with()
    micro_batches = [job.micro_batches()[k] for k in range(job.split.accumulation)]
    with torch.no_grad():
        expected = {"video": 0.0, "sound": 0.0}
        for batch in micro_batches:
            output = job.state.transformer(**batch.inputs, return_dict=False)[0]
            video = torch.nn.functional.mse_loss(output, batch.terms["video"].target)
            sound = torch.nn.functional.mse_loss(output.mean(1), batch.terms["sound"].target)
            expected["video"] += video.item() / len(micro_batches)
            expected["sound"] += 0.5 * sound.item() / len(micro_batches)
        job.state.transformer.reshard()
    result = job.step(0, micro_batches)
    assert result.losses == pytest.approx(expected, rel=1e-5)
    assert result.loss == pytest.approx(sum(expected.values()), rel=1e-5)

    heldout = job.heldout_loss()
    assert set(heldout.losses) == set(heldout.zero_losses) == {"video", "sound"}
    (clip,) = job.prepared.heldout
    silence = 0.5 * job.prepared.cache.read("sound", clip.keys["sound"])["samples"].square().mean()
    assert heldout.zero_losses["sound"] == pytest.approx(silence.item(), rel=1e-5)
    assert heldout.loss == pytest.approx(sum(heldout.losses.values()))


def test_every_term_moves_the_weights(prepared_with: Callable[[], tuple[Prepared, Job]]) -> None:
    """lora_B starts as zeros, so that its gradient tells what the loss asks for."""
    gradients = []
    for weight in (0.5, 0.0):
        _, job = prepared_with()
        batch = job.micro_batches()[0]
        silenced = batch.terms["sound"].__class__(batch.terms["sound"].target, torch.full((2,), weight))
        result = job.step(0, [Batch(batch.inputs, batch.terms | {"sound": silenced})])
        gradients.append(result.grad_norm)
    assert abs(gradients[0] - gradients[1]) > 1e-3 * gradients[1]


def test_a_batch_of_several_terms_survives_the_way_from_a_loader_process(
    prepared_with: Callable[[], tuple[Prepared, Job]],
) -> None:
    import pickle

    batch = prepared_with()[1].micro_batches()[0]
    back = pickle.loads(pickle.dumps(batch))
    assert back.terms.keys() == batch.terms.keys()
    for name, term in batch.terms.items():
        assert torch.equal(back.terms[name].target, term.target)
        assert torch.equal(back.terms[name].weight, term.weight)


@pytest.mark.parametrize("fault", ["column", "file"])
def test_a_source_that_is_missing_is_named_with_its_clip(
    prepared_with: Callable[[], tuple[Prepared, Job]], sounding_clips: Path, fault: str
) -> None:
    manifest = sounding_clips / "metadata.jsonl"
    if fault == "file":
        next(sounding_clips.glob("*.npy")).unlink()
        expected = "no such file"
    else:
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        del rows[1]["audio"]
        manifest.write_text("\n".join(map(json.dumps, rows)))
        expected = "metadata.jsonl, line 2: the clip has no 'audio'"
    with pytest.raises(UserError, match=expected):
        prepared_with()


def test_check_misses_a_source_before_anything_is_encoded(
    recipe_file: Path, sounding_clips: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "ltx", f"{__name__}:SoundingLTX")
    recipe = load_recipe(recipe_file, [f"data.path={sounding_clips}"])
    assert check_all(recipe, runtime, 1) == []
    next(sounding_clips.glob("*.npy")).unlink()
    (problem,) = check_all(recipe, runtime, 1)
    assert problem.what == "no such file"


def test_a_clip_whose_sound_is_broken_is_left_out_where_bad_clips_are_skipped(
    recipe_file: Path, tiny_ltx: Path, sounding_clips: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = min(sounding_clips.glob("*.npy"))
    broken.write_bytes(b"")
    recipe = load_recipe(recipe_file, [f"data.path={sounding_clips}", "data.bad_clips=skip"])
    prepared = prepare(recipe, BrokenSound(ModelFolder(tiny_ltx)), runtime)
    assert broken.stem not in {item.path.stem for item in prepared.train}
    assert len(prepared.train) == len(list(sounding_clips.glob("*.npy"))) - 1
    assert f"skipped {broken}: the sound is empty" in capsys.readouterr().err


class BrokenSound(SoundingLTX):
    def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
        def read(sound: SourceFile) -> Tensors:
            if not sound.path.stat().st_size:
                raise UserError("the sound is empty", "record it again", str(sound.path))
            return read_sound(sound)

        return (
            *super().encoders(dtype, settings)[:2],
            Encoder("sound", ("audio",), "v1", lambda _: [], lambda _: read),
        )


@pytest.mark.parametrize("kinds", [("text", "sound"), ("text", "video", "image"), ("text", "video", "video")])
def test_kinds_that_a_family_may_not_list_are_refused(
    recipe_file: Path, tiny_ltx: Path, runtime: Runtime, kinds: tuple[str, ...]
) -> None:
    class Odd(LTXVideo):
        def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
            usual = super().encoders(dtype, settings)[0]
            return tuple(Encoder(kind, usual.sources, "v1", usual.fingerprint, usual.load) for kind in kinds)

    with pytest.raises(UserError, match=r"Odd\.encoders lists the kinds"):
        prepare(load_recipe(recipe_file), Odd(ModelFolder(tiny_ltx)), runtime)


def test_columns_that_a_family_reads_are_part_of_what_a_checkpoint_continues(
    prepared_with: Callable[[], tuple[Prepared, Job]], sounding_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepared_with()[1].identity
    manifest = sounding_clips / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace("CC0", "CC-BY"))
    assert prepared_with()[1].identity == before
    monkeypatch.setattr(SoundingLTX, "columns", ("licence",))
    after = prepared_with()[1].identity
    assert after != before
    manifest.write_text(manifest.read_text().replace("CC-BY", "CC0"))
    assert prepared_with()[1].identity != after
