"""Writing recipes, and comparing them: which keys may change when a run is resumed."""

from pathlib import Path

import pytest
from minimal import MINIMAL

from finetune.recipe import Recipe, load_recipe, write_recipe
from finetune.recipe.load import changes, differences, recipe_values
from finetune.recipe.schema import Data, free_keys

EVERYTHING = (
    MINIMAL
    + """\
fps = 23.976
id_token = "say \\"hi\\" \\\\ ünï"
[train]
max_grad_norm = "none"
[lora]
targets = ["to_q", "to_out.0"]
[objective]
shift = 3
sigma_range = [0.875, 1]
sigma_table = [[0, 1], [0.5, 2.5]]
[checkpoint]
keep_last = "all"
[validation]
every = 7
heldout = "held out"
[[validation.prompts]]
text = "first"
shape = "17x64x96"
guidance = 0.0
[[validation.prompts]]
text = "second"
"""
)


@pytest.mark.parametrize("text", [MINIMAL, EVERYTHING], ids=["minimal", "everything"])
def test_a_written_recipe_reads_back_equal(written, tmp_path: Path, text: str) -> None:
    recipe = load_recipe(written(text))
    write_recipe(recipe, tmp_path / "effective.toml")
    assert load_recipe(tmp_path / "effective.toml") == recipe


def test_a_written_recipe_spells_defaults_out(written, tmp_path: Path) -> None:
    write_recipe(load_recipe(written(MINIMAL)), tmp_path / "effective.toml")
    assert "weight_decay = 0.0001" in (tmp_path / "effective.toml").read_text()


FREE = [
    "output=elsewhere",
    "model.path=moved/ltx",
    "model.revision=v2",
    "data.path=moved/clips",
    "data.cache=elsewhere",
    "lora.start_from=elsewhere.safetensors",
    "data.workers=0",
    "train.steps=9",
    "train.micro_batch_size=2",
    "memory.activation_checkpointing=none",
    "memory.layout=zero2",
    "memory.shard_size=2",
    "memory.checkpoint_every=3",
    "memory.offload=true",
    "memory.resident_blocks=2",
    "memory.expandable_segments=true",
    "memory.text_encoder=cpu",
    "optimizer.in_backward=true",
    "optimizer.offload=state",
    "memory.offload_activations=true",
    "memory.keep_gib=2",
    "memory.compile=true",
    "memory.plan=false",
    "memory.attention=math",
    "checkpoint.every=1",
    "checkpoint.keep_last=all",
    "checkpoint.background=false",
    "checkpoint.verify=false",
    "export.formats=comfyui,merged",
    "export.precision=bf16",
    "validation.every=3",
    "validation.heldout=held",
    "validation.sigmas=2",
    "validation.samples_every=2",
    "validation.samples_at_start=false",
    "validation.samples_at_end=false",
    "validation.tiling=false",
    "validation.prompts=a cat@@@9x64x64:::a dog",
    "validation.prompts_file=prompts.txt",
    "tracking.trackers=wandb",
    "tracking.project=p",
    "tracking.name=n",
    "tracking.quantiles_every=5",
    "tracking.block_norms_every=5",
    "validation.patience=3",
    "checkpoint.keep_best=2",
    "distributed.timeout_seconds=5",
    "data.bad_clips=skip",
    "train.max_grad_norm=none",
    "train.expert_steps={high = 5}",
    "optimizer.lr=1e-3",
    "schedule.warmup_steps=3",
    "ema.device=host",
    "ema.use=samples",
]


@pytest.mark.parametrize("override", FREE)
def test_a_free_key_may_change_on_resume(written, override: str) -> None:
    path = written(MINIMAL)
    assert differences(load_recipe(path, [override]), load_recipe(path)) == []


def test_prompts_may_change_on_resume(written, tmp_path: Path) -> None:
    write_recipe(load_recipe(written(MINIMAL)), tmp_path / "before.toml")
    after = load_recipe(written(MINIMAL + '[[validation.prompts]]\ntext = "a"\n'))
    assert differences(after, load_recipe(tmp_path / "before.toml")) == []


class LaterData(Data):
    cache_format: int = 1


class LaterRecipe(Recipe):
    """A recipe with a key that begins as a free one does: data.cache may change when a run is resumed."""

    data: LaterData


def test_a_key_that_only_begins_like_a_free_one_is_not_free(written) -> None:
    values = recipe_values(load_recipe(written(MINIMAL)))
    before = LaterRecipe.model_validate(values)
    after = LaterRecipe.model_validate(values | {"data": values["data"] | {"cache_format": 2}})
    assert differences(after, before) == ["data.cache_format = 1 there, 2 here"]


def test_a_free_key_of_tables_in_a_list_may_change_and_others_may_not(written) -> None:
    values = recipe_values(load_recipe(written(MINIMAL)))
    shared = {key: value for key, value in values["data"].items() if key != "path"}

    def of(*sources: dict) -> Recipe:
        return Recipe.model_validate(values | {"data": shared | {"sources": list(sources)}})

    before = of({"path": "a"}, {"path": "b"})
    assert differences(of({"path": "a"}, {"path": "moved/b"}), before) == []
    assert changes(of({"path": "a"}, {"path": "moved/b"}), before) != []
    assert len(differences(of({"path": "a"}, {"path": "b", "repeats": 2.0}), before)) == 1
    assert len(differences(of({"path": "a"}), before)) == 1


def test_no_other_key_is_free() -> None:
    assert free_keys() == {override.partition("=")[0] for override in FREE} | {
        "validation.prompts",
        "data.sources.path",
        "lora.frozen.path",
    }


@pytest.mark.parametrize(
    "override, shown",
    [
        ("train.seed=1", "train.seed = 42 there, 1 here"),
        ("train.global_batch_size=8", "train.global_batch_size = 1 there, 8 here"),
        ("lora.targets=to_q", "lora.targets = [] there, ['to_q'] here"),
        ("data.buckets=25x64x96", "data.buckets = ['17x64x96'] there, ['25x64x96'] here"),
        ("objective.sigma_range=0,0.9", "objective.sigma_range = 'unset' there, [0.0, 0.9] here"),
        ("data.fps=24", "data.fps = 'unset' there, 24.0 here"),
        ("model.family=ltx_i2v", "model.family = 'ltx' there, 'ltx_i2v' here"),
    ],
)
def test_any_other_change_is_named_with_both_values(written, override: str, shown: str) -> None:
    path = written(MINIMAL)
    assert differences(load_recipe(path, [override]), load_recipe(path)) == [shown]


AREA = MINIMAL.replace('buckets = ["17x64x96"]', 'area = "64x96"\nframes = [9, 17]')


@pytest.mark.parametrize("text", [AREA, AREA + 'buckets = ["17x64x96", "9x96x64"]\n'], ids=["yet to find", "given"])
def test_buckets_that_are_yet_to_be_found_are_no_difference(written, text: str) -> None:
    found = load_recipe(written(AREA), ["data.buckets=17x64x96, 9x96x64"])
    assert differences(load_recipe(written(text)), found) == []


@pytest.mark.parametrize(
    "override, shown",
    [
        ("data.area=64x64", "data.area = '64x96' there, '64x64' here"),
        ("data.frames=17", "data.frames = [9, 17] there, [17] here"),
        ("data.bucket_count=2", "data.bucket_count = 9 there, 2 here"),
        ("data.buckets=17x64x96", "data.buckets = ['17x64x96', '9x96x64'] there, ['17x64x96'] here"),
    ],
)
def test_what_they_are_found_by_is_one(written, override: str, shown: str) -> None:
    found = load_recipe(written(AREA), ["data.buckets=17x64x96, 9x96x64"])
    assert differences(load_recipe(written(AREA), [override]), found) == [shown]


def test_an_area_in_the_place_of_buckets_is_another_training(written) -> None:
    shown = differences(load_recipe(written(AREA)), load_recipe(written(MINIMAL)))
    assert shown == ["data.area = 'unset' there, '64x96' here", "data.frames = [] there, [9, 17] here"]


def test_a_recipe_with_an_area_reads_back_equal_with_and_without_its_buckets(written, tmp_path: Path) -> None:
    for overrides in ([], ["data.buckets=17x64x96, 9x96x64"]):
        recipe = load_recipe(written(AREA), overrides)
        write_recipe(recipe, tmp_path / "effective.toml")
        assert load_recipe(tmp_path / "effective.toml") == recipe


def test_a_key_that_is_set_to_its_default_is_no_difference(written, tmp_path: Path) -> None:
    before = load_recipe(written(MINIMAL))
    assert differences(load_recipe(written(MINIMAL + "[lora]\nrank = 64\n")), before) == []
