"""Trainings that continue an adapter, and trainings on top of frozen ones, begin where the base with these loaded is."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from checkpointing import assert_same_state, run
from exports import export_weights
from given_adapters import loaded, write_adapter
from processes import figures_of
from safetensors.torch import load_file, save_file
from started_worker import OFTEN, WAYS
from torch import Tensor, nn

from finetune.checks.model import open_family
from finetune.commands import export
from finetune.engine.gradients import local
from finetune.engine.weights.exporters.exporter import gathered
from finetune.engine.weights.loading import plain_name
from finetune.models.adapters.given import moved
from finetune.models.family import Family
from finetune.recipe import load_recipe
from finetune.recipe.schema import FrozenAdapter, Lora
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.exported_videos import load_pipeline
from finetune.training.frozen_usage import frozen_lines
from finetune.training.job import Job

BuildJob = Callable[..., Job]
MODELS = [("ltx", "0.9.0"), ("cogvideox", "5b"), ("hunyuan", None), ("wan", "2.1")]


@torch.no_grad()
def prediction(job: Job, transformer: nn.Module) -> Tensor:
    return job.state.family.predict(transformer, job.micro_batches()[3].inputs)["video"]


def first_loss(job: Job) -> float:
    batches = job.micro_batches()
    return job.step(0, [batches[index] for index in range(job.split.accumulation)]).loss


def expected_loss(job: Job, transformer: nn.Module) -> float:
    batches, count = job.micro_batches(), job.split.accumulation
    total = torch.zeros(())
    with torch.no_grad():
        for batch in (batches[index] for index in range(count)):
            (losses,) = batch.losses(job.state.family.predict(transformer, batch.inputs)).values()
            total += losses.mean() / count
    return float(total)


@pytest.fixture
def family(recipe_file: Path) -> Family:
    return open_family(load_recipe(recipe_file))


@pytest.fixture
def adapter(family: Family, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter.safetensors", family)


@pytest.mark.parametrize(
    "alpha, overrides",
    [(4, []), (8, ["lora.rslora=true"]), (3, []), (8, ['lora.ranks={"to_q" = 8}', "lora.plus_ratio=4"])],
)
def test_a_continued_adapter_begins_with_the_loss_of_the_base_with_it_loaded(
    build_job: BuildJob, adapter: Path, alpha: int, overrides: list[str]
) -> None:
    """The strength of the file is 1; one that is a power of two here divides lora_B exactly, alpha = 3 rounds it."""
    job = build_job(f"lora.start_from={adapter}", f"lora.alpha={alpha}", *overrides)
    with_it, untouched = loaded(job.state.family, (adapter, 1.0)), loaded(job.state.family)
    if alpha != 3 and not overrides:
        assert torch.equal(prediction(job, job.state.transformer), prediction(job, with_it))
    torch.testing.assert_close(prediction(job, job.state.transformer), prediction(job, with_it), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(prediction(job, with_it), prediction(job, untouched), atol=1e-2)
    assert first_loss(job) == pytest.approx(expected_loss(job, with_it), rel=1e-6)


def test_frozen_adapters_are_in_the_forward_pass_and_not_in_the_export(
    build_job: BuildJob, family: Family, adapter: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other.safetensors", family, rank=2, seed=2, ends=("to_q", "net.2"))
    frozen = f'[{{path = "{adapter}", strength = 0.8}}, {{path = "{other}", strength = -0.5}}]'
    job = build_job(f"lora.frozen={frozen}")
    with_them = loaded(job.state.family, (adapter, 0.8), (other, -0.5))
    torch.testing.assert_close(prediction(job, job.state.transformer), prediction(job, with_them), atol=2e-5, rtol=1e-5)
    assert first_loss(job) == pytest.approx(expected_loss(job, with_them), rel=1e-5)
    export_weights(job.state, "lora", tmp_path / "lora")
    exported = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    trained = gathered(job.state.transformer, trained_only=True)
    assert exported.keys() == {f"transformer.{name.replace('.default.', '.')}" for name in trained}


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS[1:])
def test_every_familys_first_loss_is_that_of_the_base_with_the_adapters_loaded(
    build_job: BuildJob, family_recipe: Callable[..., Path], tmp_path: Path, model: tuple
) -> None:
    recipe_file = family_recipe(*model)
    family = open_family(load_recipe(recipe_file))
    started = write_adapter(tmp_path / "started.safetensors", family, rank=2)
    frozen = write_adapter(tmp_path / "frozen.safetensors", family, seed=2, ends=("to_q", "net.2"))
    given = [f"lora.start_from={started}", f'lora.frozen=[{{path = "{frozen}", strength = 0.5}}]']
    job = build_job(*given, "lora.rank=4", "lora.alpha=8", recipe_file=recipe_file)
    expected = expected_loss(job, loaded(job.state.family, (started, 1.0), (frozen, 0.5)))
    assert first_loss(job) == pytest.approx(expected, rel=1e-5)


def test_a_lower_rank_is_continued_with_rows_that_add_nothing_at_first(
    build_job: BuildJob, family: Family, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter.safetensors", family, rank=2)
    job, new = build_job(f"lora.start_from={adapter}"), build_job()
    with_it = loaded(job.state.family, (adapter, 1.0))
    torch.testing.assert_close(prediction(job, job.state.transformer), prediction(job, with_it), atol=1e-5, rtol=1e-5)
    ours, drawn = (gathered(each.state.transformer, trained_only=True) for each in (job, new))
    for name, value in ours.items():
        if ".lora_A." in name:
            assert torch.equal(value[2:], drawn[name][2:])
            assert not torch.equal(value[:2], drawn[name][:2])
        else:
            assert not value[:, 2:].any()


def test_targets_that_the_file_lacks_begin_anew(
    build_job: BuildJob, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = build_job(f"lora.start_from={adapter}", "lora.targets=to_q,to_k,to_v,to_out.0,ff.net.2")
    with_it = loaded(job.state.family, (adapter, 1.0))
    torch.testing.assert_close(prediction(job, job.state.transformer), prediction(job, with_it), atol=1e-5, rtol=1e-5)
    assert "16 layers of rank 4; 2 more begin anew" in "".join(capsys.readouterr())


# What is refused


@pytest.mark.parametrize(
    "overrides, what",
    [
        (["lora.targets=to_q,to_k"], r"adapts 8 layers that are not among the targets.*\n.*set lora\.targets = \["),
        (["lora.dora=true"], "cannot be continued as DoRA"),
        (['lora.frozen=[{path = "a.safetensors", strength = 0}]'], r"a\.safetensors has no effect at strength 0"),
        (["lora.rank=3"], r"has rank 4 in .*, which does not fit into 3\n.*set lora\.rank = 4"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_a_run_begins(
    recipe_file: Path, adapter: Path, overrides: list[str], what: str
) -> None:
    with pytest.raises(UserError, match=what):
        open_family(load_recipe(recipe_file, [f"lora.start_from={adapter}", *overrides]))


@pytest.mark.parametrize("key", ["lora.start_from={}", 'lora.frozen=[{{path = "{}"}}]'])
def test_a_file_that_is_not_there_is_refused_before_a_run_begins(recipe_file: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="no such adapter"):
        open_family(load_recipe(recipe_file, [key.format(tmp_path / "none.safetensors")]))


def test_a_frozen_adapter_of_zeros_is_refused(recipe_file: Path, adapter: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(adapter).items()}, adapter)
    with pytest.raises(UserError, match="adds nothing: all its matrices are zero"):
        open_family(load_recipe(recipe_file, [f'lora.frozen=[{{path = "{adapter}"}}]']))


# Going on


def test_going_on_from_a_checkpoint_is_the_same_as_not_having_stopped(
    build_job: BuildJob, family: Family, adapter: Path, tmp_path: Path
) -> None:
    frozen = write_adapter(tmp_path / "frozen.safetensors", family, seed=2)
    given = [f"lora.start_from={adapter}", f'lora.frozen=[{{path = "{frozen}"}}]']
    straight = build_job(*given)
    whole = run(straight, 0, 4, save_each=2)
    straight.checkpoints.set_aside_after(2)
    again = build_job(*given)
    assert again.resume() == 2
    assert [each.loss for each in run(again, 2, 4)] == [each.loss for each in whole[2:]]
    assert_same_state(straight, again)


@pytest.mark.parametrize("key", ["lora.start_from={}", 'lora.frozen=[{{path = "{}"}}]'])
def test_a_run_does_not_go_on_with_another_adapter_in_the_files_place(
    build_job: BuildJob, family: Family, adapter: Path, key: str
) -> None:
    run(build_job(key.format(adapter)), 0, 1, save_each=1)
    write_adapter(adapter, family, seed=3)
    with pytest.raises(UserError, match=r"the adapters in lora\.start_from or lora\.frozen are not those"):
        build_job(key.format(adapter)).resume()


def test_a_file_that_a_run_began_as_may_be_gone_once_there_is_a_checkpoint(
    build_job: BuildJob, recipe_file: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"lora.start_from={adapter}"
    straight = build_job(given, "checkpoint.keep_last=all")
    losses = [each.loss for each in run(straight, 0, 3, save_each=1)]
    straight.checkpoints.set_aside_after(1)
    kept = adapter.rename(tmp_path / "kept.safetensors")
    again = build_job(given)
    assert again.resume() == 1
    assert [each.loss for each in run(again, 1, 3, save_each=1)] == losses[1:]
    monkeypatch.setattr(export, "with_runtime", lambda recipe, body: body(again.state.runtime))
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    out = ["--out", str(tmp_path / "out")]
    export.run(parser.parse_args(["--recipe", str(recipe_file), "--set", given, *out]))
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert build_job(f"lora.start_from={kept}").resume() == 3
    with pytest.raises(UserError, match=r"adapters in lora\.start_from"):
        build_job().resume()
    write_adapter(adapter, again.state.family, seed=3)
    with pytest.raises(UserError, match=r"adapters in lora\.start_from"):
        build_job(given).resume()


def test_an_older_checkpoint_goes_on_without_the_file_that_it_began_as(build_job: BuildJob, adapter: Path) -> None:
    given = f"lora.start_from={adapter}"
    job = build_job(given)
    run(job, 0, 1, save_each=1)
    file = job.checkpoints.path(1) / "trainer.json"
    facts = json.loads(file.read_text())
    del facts["started_from"]
    file.write_text(json.dumps(facts))
    assert build_job(given).resume() == 1
    adapter.unlink()
    assert build_job(given).resume() == 1


def test_frozen_adapters_may_move_and_are_still_needed(build_job: BuildJob, adapter: Path, tmp_path: Path) -> None:
    frozen = 'lora.frozen=[{{path = "{}", strength = 0.5}}]'
    run(build_job(frozen.format(adapter)), 0, 1, save_each=1)
    there = adapter.rename(tmp_path / "moved.safetensors")
    assert build_job(frozen.format(there)).resume() == 1
    told = r"no such adapter\n.*give --set 'lora\.frozen=\[\{path = \"WHERE IT IS\", strength = 0\.5\}\]'"
    with pytest.raises(UserError, match=told):
        build_job(frozen.format(adapter))


def test_the_other_experts_frozen_adapters_are_where_the_present_recipe_has_them(
    family: Family, adapter: Path, tmp_path: Path
) -> None:
    """Its own recipe is of an earlier start; what is still where that says is taken from there."""

    def of(*adapters: tuple[Path, float]) -> Lora:
        return Lora(frozen=[FrozenAdapter(path=str(path), strength=strength) for path, strength in adapters])

    other = write_adapter(tmp_path / "other.safetensors", family, seed=2)
    before, gone = of((adapter, 1.0), (other, 0.5)), adapter.rename(tmp_path / "moved.safetensors")
    assert moved(before, of((gone, 1.0), (gone, 0.5)), family) == of((gone, 1.0), (other, 0.5))
    assert moved(before, of((gone, 1.0), (other, 0.4)), family) == before


# What users are told, and what `sample` does


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_sample_has_the_frozen_adapters_in_the_pipelines_weights(
    build_job: BuildJob, runtime: Runtime, adapter: Path, precision: str
) -> None:
    """The same weights as in training, bit for bit: both round the sum once."""
    job = build_job(f'lora.frozen=[{{path = "{adapter}", strength = 0.5}}]', f"train.precision={precision}")
    pipeline = load_pipeline(job.recipe, job.state.family, runtime)
    ours = {plain_name(name): value for name, value in job.state.transformer.state_dict().items()}
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, local(ours[name])), name
    assert torch.equal(prediction(job, pipeline.transformer.eval()), prediction(job, job.state.transformer))


def test_the_lines_that_are_printed_load_the_frozen_adapters(
    build_job: BuildJob, family: Family, adapter: Path, tmp_path: Path, tiny_ltx: Path
) -> None:
    settings = Lora(frozen=[FrozenAdapter(path=str(adapter), strength=0.5)])
    job = build_job(f'lora.frozen=[{{path = "{adapter}", strength = 0.5}}]', "optimizer.lr=1e-2")
    run(job, 0, 2)
    export_weights(job.state, "lora", tmp_path / "lora")
    pipe = diffusers.LTXPipeline.from_pretrained(tiny_ltx)
    pipe.load_lora_weights(tmp_path / "lora")
    exec("\n".join(frozen_lines(settings, family)), {"pipe": pipe})
    found, expected = prediction(job, pipe.transformer.eval()), prediction(job, job.state.transformer.eval())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_frozen_adapter_that_diffusers_cannot_load_is_named(family: Family, adapter: Path, tmp_path: Path) -> None:
    tensors = {}
    for name, value in load_file(adapter).items():
        part = "lora_down" if "lora_A" in name else "lora_up"
        tensors[f"lora_unet_{name.split('.', 1)[1].partition('.lora_')[0].replace('.', '_')}.{part}.weight"] = value
    save_file(tensors, tmp_path / "kohya.safetensors")
    settings = Lora(frozen=[FrozenAdapter(path=str(tmp_path / "kohya.safetensors"), strength=0.5)])
    (line,) = frozen_lines(settings, family)
    assert line == f"# it was trained on top of {tmp_path}/kohya.safetensors at strength 0.5: load that, too"


# Every way of holding the base, one process and two

CASES = [
    pytest.param(model, processes, way, marks=[] if model == MODELS[0] and way in OFTEN else [pytest.mark.full])
    for model in MODELS
    for processes, ways in ((1, ["streamed"]), (2, [way for way in WAYS if way != "bf16"]))
    for way in ways
]


@pytest.fixture(scope="session")
def held(
    tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]
) -> Callable[[str, int], dict[str, dict]]:
    """Figures of tests/engine/started_worker.py for "all" or "some" by a number of processes."""
    known: dict[tuple[str, int], dict] = {}

    def get(which: str, processes: int) -> dict[str, dict]:
        if (which, processes) not in known:
            recipes = [family_recipe(*model) for model in (MODELS if which == "all" else MODELS[:1])]
            folder = tmp_path_factory.mktemp("held")
            known[which, processes] = figures_of("started_worker.py", processes, folder, [which, *recipes])
        return known[which, processes]

    return get


@pytest.mark.parametrize("model, processes, way", CASES)
def test_weights_may_be_held_in_every_way(
    held: Callable[[str, int], dict], family_recipe: Callable[..., Path], model: tuple, processes: int, way: str
) -> None:
    """As one process trains on whole weights; of few bits, as one process trains on the same."""
    which, name = "some" if model == MODELS[0] and way in OFTEN else "all", family_recipe(*model).stem
    found = held(which, processes)[name][way]
    expected = held(which, 1)[name][way if way in ("int8", "nf4") else "plain"]
    for figure in ("loss", "grad_norm", "heldout"):
        assert found[figure] == pytest.approx(expected[figure], rel=1e-5), figure


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
def test_the_first_losses_of_few_bits_and_of_bf16_are_near(
    held: Callable[[str, int], dict], family_recipe: Callable[..., Path], model: tuple
) -> None:
    found = held("all", 1)[family_recipe(*model).stem]
    for way, limit in {"bf16": 0.02, "int8": 0.02, "nf4": 0.2}.items():
        assert found[way]["heldout"][0] == pytest.approx(found["plain"]["heldout"][0], rel=limit), way
        assert found[way]["heldout"][0] != found["plain"]["heldout"][0]
