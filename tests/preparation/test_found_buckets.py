"""Buckets that are found for real clips: in check, in training, on resume, and what is said without the clips."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from trainings import rows

from finetune.checks.buckets import resolve_buckets
from finetune.checks.everything import check_all
from finetune.checks.model import open_family
from finetune.data.synthetic import Recording, write_clips
from finetune.preparation.encode import prepare
from finetune.preparation.own_shape import with_own_shape
from finetune.recipe import Bucket, Recipe, load_recipe
from finetune.recipe.bucket import Area
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.run import train

BY_AREA = ["data.buckets=[]", "data.area=64x96", "data.frames=1, 9, 17"]
# Of the twelve clips, all of 17 frames or more: nine lie, one of them at 3:5; two stand, one of them turned; one is square.
FOUND = {"17x64x96": 9, "17x64x64": 1, "17x96x64": 2}


@pytest.fixture
def by_area(recipe_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The small recipe with an area in the place of its buckets."""

    def make(*overrides: str) -> Recipe:
        return load_recipe(recipe_file, [*BY_AREA, "train.steps=2", f"output={tmp_path / 'run'}", *overrides])

    return make


def resolved(recipe: Recipe, runtime: Runtime) -> list[str]:
    return list(map(str, resolve_buckets(recipe, open_family(recipe), runtime).data.buckets))


def recipe_of_run(recipe: Recipe) -> Recipe:
    return load_recipe(recipe.run_folder / "recipe.toml")


def test_check_says_which_are_found_and_for_how_many_clips(
    by_area: Callable[..., Recipe], runtime: Runtime, capsys: pytest.CaptureFixture
) -> None:
    assert check_all(by_area(), runtime, gpus=1) == []
    counts = ", ".join(f"{count} in {bucket}" for bucket, count in FOUND.items())
    said = capsys.readouterr().err
    assert f"buckets found for data.area = 64x96, with the clips that fit them best: {counts}" in said
    assert "12 clips, 1 in 17x64x64, 9 in 17x64x96, 2 in 17x96x64" in said


def test_they_depend_on_the_clips_alone(
    by_area: Callable[..., Recipe], runtime: Runtime, clips: Path, tmp_path: Path
) -> None:
    """Not on the order of a table, nor on names, nor on how the clips are shared out among datasets."""
    videos = sorted(path for path in clips.iterdir() if path.suffix != ".txt")
    orders = (videos, videos[::-1])
    for number, order in enumerate(orders):
        rows = [json.dumps({"video": str(path), "caption": "a clip"}) for path in order]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
        assert resolved(by_area(f"data.path={tmp_path / f'{number}.jsonl'}"), runtime) == list(FOUND)
    for index, path in enumerate(videos):
        part = tmp_path / ("even", "odd")[index % 2]
        part.mkdir(exist_ok=True)
        shutil.copy(path, part / f"{9 - index % 10}-{path.name}")
        (part / f"{9 - index % 10}-{path.stem}.txt").write_text("a clip")
    sources = ", ".join(f'{{path = "{tmp_path / name}"}}' for name in ("odd", "even"))
    assert resolved(by_area("data.path=none", f"data.sources=[{sources}]"), runtime) == list(FOUND)
    left_out = sources.replace("}", ", repeats = 0}", 1)
    assert len(resolved(by_area("data.path=none", f"data.sources=[{left_out}]"), runtime)) <= len(FOUND)


def test_a_training_writes_them_into_its_recipe_and_its_copy_trains_the_same(
    by_area: Callable[..., Recipe], runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = by_area()
    assert train(recipe, runtime) == 0
    effective = recipe_of_run(recipe)
    assert list(map(str, effective.data.buckets)) == list(FOUND)
    assert (effective.data.area, effective.data.frames) == ((64, 96), [1, 9, 17])
    capsys.readouterr()
    copy = load_recipe(recipe.run_folder / "recipe.toml", [f"output={tmp_path / 'copy'}"])
    assert train(copy, runtime) == 0
    assert "data.buckets are used as they are given" in capsys.readouterr().err
    losses = [[row["loss"] for row in rows(each.run_folder)] for each in (recipe, copy)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_run_keeps_its_buckets_whatever_clips_are_added(
    by_area: Callable[..., Recipe], runtime: Runtime, clips: Path, heldout: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clips, tmp_path / "clips"))
    skipping = [f"data.path={folder}", "data.bad_clips=skip"]
    recipe = by_area(*skipping)
    train(recipe, runtime)
    # A broken clip, which is skipped, and held-out clips of another ratio and length: the training stays the same.
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("a clip")
    held = Path(shutil.copytree(heldout, tmp_path / "held"))
    write_clips(held, [Recording("strip.mp4", 64, 256, 25, 25), Recording("brief.mp4", 64, 96, 10, 25)], first_scene=20)
    more = by_area(*skipping, f"validation.heldout={held}", "train.steps=3")
    assert len(resolved(more.model_copy(update={"output": tmp_path / "new"}), runtime)) > len(FOUND)
    assert resolved(more, runtime) == list(FOUND)
    assert train(more, runtime) == 0
    assert list(map(str, recipe_of_run(more).data.buckets)) == list(FOUND)
    # A clip that would be trained on makes it another training, for the clip's sake and not for its buckets'.
    write_clips(folder, [Recording("wider.mp4", 64, 256, 30, 25)], first_scene=30)
    with pytest.raises(UserError, match="1 are new and 0 are gone"):
        train(by_area(*skipping, f"validation.heldout={held}", "train.steps=4"), runtime)


def test_another_area_is_another_training(by_area: Callable[..., Recipe], runtime: Runtime) -> None:
    train(by_area("train.steps=1"), runtime)
    for other in ("data.area=96x64", "data.frames=9", "data.bucket_count=1"):
        with pytest.raises(UserError, match=f"a run of another recipe: {other.partition('=')[0]}"):
            train(by_area("train.steps=2", other), runtime)


def test_two_processes_find_what_one_does(finetune, recipe_file: Path, tmp_path: Path) -> None:
    overrides = [part for each in (*BY_AREA, f"data.cache={tmp_path / 'empty'}") for part in ("--set", each)]
    done = finetune("check", "--recipe", recipe_file, *overrides, processes=2)
    assert done.returncode == 0, done.stderr
    counts = ", ".join(f"{count} in {bucket}" for bucket, count in FOUND.items())
    assert f"fit them best: {counts}\n" in done.stderr


@pytest.mark.full
def test_two_processes_train_in_what_they_have_found(finetune, recipe_file: Path, tmp_path: Path) -> None:
    settings = (*BY_AREA, "train.steps=8", f"data.cache={tmp_path / 'empty'}")
    overrides = [part for each in settings for part in ("--set", each)]
    for processes in (2, 1):
        output = tmp_path / f"run{processes}"
        done = finetune("--recipe", recipe_file, *overrides, "--set", f"output={output}", processes=processes)
        assert done.returncode == 0, done.stderr
        assert list(map(str, load_recipe(output / "recipe.toml").data.buckets)) == list(FOUND)
    losses = [[row["loss"] for row in rows(tmp_path / f"run{processes}")] for processes in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_wan_finds_finer_shapes(
    family_recipe: Callable[..., Path], runtime: Runtime, clips: Path, tmp_path: Path
) -> None:
    """Its sides are multiples of 16: the clip of 3:5 has a shape of its own."""
    area = [f"data.path={clips}", "data.buckets=[]", "data.area=96x144", "data.frames=5, 17", f"output={tmp_path}"]
    recipe = load_recipe(family_recipe("wan"), area)
    found = resolved(recipe, runtime)
    assert found == ["17x96x144", "17x80x144", "17x112x112", "17x144x96"]


def test_a_clip_that_is_too_short_is_refused_by_name(
    by_area: Callable[..., Recipe], runtime: Runtime, clips: Path
) -> None:
    recipe = by_area("data.frames=25, 33")
    with pytest.raises(UserError) as caught:
        train(recipe, runtime)
    assert "3 clips cannot be used" in str(caught.value)
    assert f"{clips / 'slow.mp4'}: 18 frames at 12 fps, but the shortest bucket has 25" in str(caught.value)
    assert "add a length of at most 18 to data.frames, or remove the clip" in str(caught.value)


def test_where_all_are_too_short_each_is_named(by_area: Callable[..., Recipe], runtime: Runtime) -> None:
    with pytest.raises(UserError, match="12 clips cannot be used"):
        train(by_area("data.frames=97"), runtime)


@pytest.mark.parametrize(
    "override, where, what, cure",
    [
        ("data.frames=9,20", "data.frames", "20: LTX-Video needs 8k + 1 frames", "the nearest lengths are 17 and 25"),
        ("data.area=20x40", "data.area", "20x40 has fewer pixels than any shape", "the least is 32x32"),
    ],
)
def test_what_the_model_cannot_take_is_named_with_what_it_can(
    by_area: Callable[..., Recipe], override: str, where: str, what: str, cure: str
) -> None:
    prompt = 'validation.prompts=[{text = "a"}]'  # its shape is that of the area: no problem of its own
    with pytest.raises(UserError) as caught:
        open_family(by_area(override, prompt))
    assert [problem.where for problem in caught.value.problems] == [where]
    assert what in str(caught.value)
    assert cure in str(caught.value)


def test_an_area_need_not_be_a_shape_of_the_model(
    by_area: Callable[..., Recipe], runtime: Runtime, capsys: pytest.CaptureFixture
) -> None:
    """It is a number of pixels: what is found has no more of them."""
    recipe = by_area("data.area=70x100")
    assert check_all(recipe, runtime, gpus=1) == []
    assert resolved(recipe, runtime) == ["17x64x96", "17x64x64", "17x96x64"]
    family = open_family(recipe)
    capsys.readouterr()
    assert with_own_shape(recipe, family).data.sample_shape == Bucket(17, 64, 96)
    said = "data.area = 70x100 is no shape of LTX-Video; the nearest of no more pixels is taken: 64x96\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("area", ["1x5000", "33x33", "63x95", "64x96", "500x700", "719x1279"])
def test_whatever_its_sides_the_shape_of_an_area_is_legal_and_near(
    by_area: Callable[..., Recipe], runtime: Runtime, area: str
) -> None:
    recipe = by_area(f"data.area={area}")
    family = open_family(recipe)
    shape = with_own_shape(recipe, family, is_said=False).data.sample_shape
    assert family.bucket_problem(shape) is None
    asked = Area.parse(area)
    legal = [(h, w) for h in range(32, 5001, 32) for w in range(32, 5001, 32) if h * w <= asked.height * asked.width]
    off = lambda h, w: abs(math.log(h / asked.height)) + abs(math.log(w / asked.width))  # noqa: E731
    assert off(*shape[1:]) == pytest.approx(min(off(*each) for each in legal))


def test_a_cache_is_pruned_of_nothing_that_they_use(
    finetune, by_area: Callable[..., Recipe], recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    recipe = by_area(f"data.cache={tmp_path / 'own'}")
    family = open_family(recipe)
    prepare(resolve_buckets(recipe, family, runtime), family, runtime)
    items = sorted(recipe.data.cache.rglob("*.safetensors"))
    overrides = [part for each in (*BY_AREA, f"data.cache={recipe.data.cache}") for part in ("--set", each)]
    done = finetune("cache", "prune", "--yes", "--recipe", recipe_file, *overrides)
    assert done.returncode == 0, done.stderr
    assert sorted(recipe.data.cache.rglob("*.safetensors")) == items
    assert len(items) > len(FOUND)


@pytest.mark.parametrize("area", ["64x96", pytest.param("67x99", marks=pytest.mark.full)])
@pytest.mark.full
def test_a_plan_takes_the_area_s_own_shape_and_needs_no_clips(
    finetune, recipe_file: Path, tmp_path: Path, area: str
) -> None:
    """It is the largest that may be found; the nearest legal one, where it is none."""
    overrides = [*BY_AREA, f"data.area={area}", "train.global_batch_size=2", f"data.path={tmp_path / 'nothing'}"]
    done = finetune(
        "plan", "--recipe", recipe_file, *(part for each in overrides for part in ("--set", each)), "--json"
    )
    assert done.returncode == 0, done.stderr
    names = [phase["name"] for phase in json.loads(done.stdout)["phases"]]
    assert names == ["encode text", "encode video 17x64x96", "load", "step 17x64x96", "export"]


@pytest.mark.full
def test_what_fits_is_written_without_the_shapes_that_it_was_planned_with(
    finetune, recipe_file: Path, tmp_path: Path
) -> None:
    area = [part for override in (*BY_AREA, "train.global_batch_size=2") for part in ("--set", override)]
    out = ["--fit", "--device-memory", "24GiB", "--write", tmp_path / "fits.toml"]
    done = finetune("plan", "--recipe", recipe_file, *area, *out, timeout=290)
    assert done.returncode == 0, done.stderr
    assert load_recipe(tmp_path / "fits.toml").data == load_recipe(recipe_file, BY_AREA).data
