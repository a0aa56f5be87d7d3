"""Reading recipes: every problem at once, with its line and its cure; --set typed by the schema."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from minimal import MINIMAL
from pydantic import BaseModel

from finetune.recipe import Bucket, Recipe, load_recipe
from finetune.recipe.schema import Lora
from finetune.recipe.shareable import write_shareable
from finetune.runtime.errors import Problem, UserError


def problems(path: Path, *overrides: str) -> tuple[Problem, ...]:
    """What is wrong with a recipe."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def problem(path: Path, *overrides: str) -> Problem:
    """The one thing that is wrong with a recipe."""
    (found,) = problems(path, *overrides)
    return found


# --- problems of the file ---------------------------------------------------------------------------------------------


def test_reports_every_problem_at_once(written) -> None:
    path = written(
        """\
[model]
family = "ltx"
[data]
path = "clips"
buckets = ["17x64"]
[train]
steps = "many"
precision = "fp16"
rank = 4
[optimiser]
lr = 1e-4
"""
    )
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert {(found.where, found.what.split(":")[0]) for found in caught.value.problems} == {
        (f"{path}, line 1", "missing key 'model.path'"),
        (f"{path}, line 5", "data.buckets[0] = '17x64'"),
        (f"{path}, line 7", "train.steps = 'many'"),
        (f"{path}, line 8", "train.precision = 'fp16'"),
        (f"{path}, line 9", "unknown key 'train.rank'"),
        (f"{path}, line 10", "unknown key 'optimiser'"),
    }
    assert str(caught.value).startswith(f"{path}: 6 problems\n")


@pytest.mark.parametrize(
    "text, line, what, cure",
    [
        ("[lora]\nrnk = 4\n", 8, "unknown key 'lora.rnk'", "did you mean 'lora.rank'?"),
        ("[lora]\nRank = 4\n", 8, "unknown key 'lora.Rank'", "did you mean 'lora.rank'?"),
        ("[lora]\nrank2 = 4\n", 8, "unknown key 'lora.rank2'", "did you mean 'lora.rank'?"),
        ("[Lora]\nrank = 4\n", 7, "unknown key 'Lora'", "did you mean 'lora'?"),
        ("[train]\nlr = 1e-4\n", 8, "unknown key 'train.lr'", "did you mean 'optimizer.lr'?"),
        ("[lora]\nsteps = 4\n", 8, "unknown key 'lora.steps'", "did you mean 'train.steps'?"),
        ("fsp = 24\n", 7, "unknown key 'data.fsp'", "did you mean 'data.fps'?"),
        ("[[validation.prompts]]\ntext = 'a'\ncuont = 2\n", 9, "unknown key 'validation.prompts[0].cuont'",
         "did you mean 'validation.prompts[0].count'?"),
        ("[vae]\nbanana = 1\n", 8, "unknown key 'vae.banana'", "keys here are: tiling, image_noise"),
    ],
)  # fmt: skip
def test_unknown_key_names_the_nearest_that_exists(written, text: str, line: int, what: str, cure: str) -> None:
    path = written(MINIMAL + text)
    assert problem(path) == Problem(what, f"{path}, line {line}", cure)


@pytest.mark.parametrize(
    "text, what",
    [
        ("[train]\nsteps = 3.5", "train.steps = 3.5: should be a valid integer"),
        ("[train]\nsteps = '3'", "train.steps = '3': should be a valid integer"),
        ("[train]\nsteps = true", "train.steps = True: should be a valid integer"),
        ("[train]\nsteps = 0", "train.steps = 0: should be greater than or equal to 1"),
        ("[train]\nmax_grad_norm = 'off'", "train.max_grad_norm = 'off': should be a valid number, or: should be 'none'"),
        ("[train]\nmethod = 'dora'", "train.method = 'dora': should be 'lora', 'full' or 'partial'"),
        ("[optimizer]\nlr = '1e-4'", "optimizer.lr = '1e-4': should be a valid number"),
        ("[optimizer]\nlr = 0", "optimizer.lr = 0: should be greater than 0"),
        ("[optimizer]\nbetas = [0.9, 1.5]", "optimizer.betas[1] = 1.5: should be less than 1"),
        ("[lora]\ntargets = 'to_q'", "lora.targets = 'to_q': should be a valid list"),
        ("[vae]\ntiling = 1", "vae.tiling = 1: should be true or false"),
        ("id_token = 7", "data.id_token = 7: should be a valid string"),
        ("caption_dropout = 1.5", "data.caption_dropout = 1.5: should be less than or equal to 1"),
        ("fps = inf", "data.fps = inf: should be a finite number"),
        ("[optimizer]\nlr = nan", "optimizer.lr = nan: should be a finite number"),
        ("[optimizer]\nbetas = [0.9, nan]", "optimizer.betas[1] = nan: should be a finite number"),
        ("[objective]\nlogit_mean = -inf", "objective.logit_mean = -inf: should be a finite number"),
        ("[train]\nmax_grad_norm = inf", "train.max_grad_norm = inf: should be a finite number, or: should be 'none'"),
        (
            "cache = '~nosuchuser/run'",
            "data.cache = '~nosuchuser/run': there is no user 'nosuchuser': write the folder in place of ~nosuchuser",
        ),
    ],
)  # fmt: skip
def test_wrong_type_or_value_says_what_should_be_there(written, text: str, what: str) -> None:
    found = problem(written(MINIMAL + text + "\n"))
    assert (found.what, found.where.rpartition(", ")[2]) == (what, f"line {7 if '[' not in text[:1] else 8}")


@pytest.mark.parametrize(
    "repeats, what",
    [
        ("inf", "should be a finite number"),
        ("1001", "should be less than or equal to 1000"),
        ("-1", "should be greater than or equal to 0"),
        ("1e-6", "the least is 0.001; 0 leaves the source out"),
    ],
)
def test_a_source_is_repeated_a_sensible_number_of_times(written, repeats: str, what: str) -> None:
    sources = f"[[data.sources]]\npath = 'a'\nrepeats = {repeats}\n"
    path = written(MINIMAL.replace('path = "clips"\n', "") + sources)
    assert problem(path).what == f"data.sources[0].repeats = {float(repeats):g}: {what}"
    load_recipe(written(MINIMAL.replace('path = "clips"\n', "") + sources.replace(repeats, "0.001")))


@pytest.mark.parametrize("bucket", ["17x64", "17*64*96", "0x64x96", "17x64x96.5", ""])
def test_malformed_bucket_says_the_form(written, bucket: str) -> None:
    found = problem(written(MINIMAL.replace("17x64x96", bucket)))
    assert 'write frames x height x width, like "49x512x768"' in found.what


BUCKETS = 'buckets = ["17x64x96"]\n'


@pytest.mark.parametrize(
    "shapes, what",
    [
        ("", "no training shapes"),
        ('area = "64x96"\n', "`area` without `frames`"),
        ("frames = [17]\n", "`frames` has no effect without `area`"),
        (BUCKETS + "frames = [17]\n", "`frames` has no effect without `area`"),
        (BUCKETS + "bucket_count = 3\n", "`bucket_count` has no effect without `area`"),
        (BUCKETS + 'area = "64x96"\nframes = [9, 25]\n', "17x64x96 in `buckets` is not of the lengths in `frames`"),
        (BUCKETS + 'area = "64x64"\nframes = [17]\n', "or larger than `area`: remove `buckets`"),
    ],
)
def test_shapes_are_given_or_found_by_area_and_lengths(written, shapes: str, what: str) -> None:
    path = written(MINIMAL.replace(BUCKETS, shapes))
    found = problem(path)
    assert (found.where, what in found.what) == (f"{path}, line 4", True), found.what


@pytest.mark.parametrize("area", ["64", "64x", "0x96", "17x64x96", "64*96", ""])
def test_a_malformed_area_says_the_form(written, area: str) -> None:
    found = problem(written(MINIMAL.replace(BUCKETS, f'area = "{area}"\nframes = [17]\n')))
    assert 'write height x width, like "512x768"' in found.what


def test_an_area_stands_for_its_own_shape_in_each_length_until_shapes_are_found(written) -> None:
    path = written(MINIMAL.replace(BUCKETS, 'area = "64x96"\nframes = [1, 17, 9, 17]\n'))
    assert load_recipe(path).data.buckets == []
    assert list(map(str, load_recipe(path).data.stated_buckets)) == ["17x64x96", "9x64x96", "1x64x96"]
    found = load_recipe(path, ["data.buckets=9x96x64"])
    assert found.data.stated_buckets == found.data.buckets == [Bucket(9, 96, 64)]


@pytest.mark.parametrize(
    "text, line",
    [
        ("# a comment\n" + MINIMAL + "[train]\nsteps = 0\n", 9),
        ("train.steps = 0\n" + MINIMAL, 1),
        ("train = {seed = 3, steps = 0}\n" + MINIMAL, 1),
        (MINIMAL + "[ train ]   # a table\n'steps'=0\n", 8),
        ('output = """\n[train]\nsteps = 5"""\n' + MINIMAL + "[train]\nsteps = 0\n", 11),
        (MINIMAL + "[train]\r\nsteps = 0\r\n", 8),
        (MINIMAL + '[[validation.prompts]]\ntext = "a"\n[[validation.prompts]]\ntext = "b"\nsteps = 0\n', 11),
    ],
)
def test_line_is_found_however_the_key_is_written(written, text: str, line: int) -> None:
    path = written(text)
    assert problem(path).where == f"{path}, line {line}"


def test_missing_table_says_what_to_add(written) -> None:
    found = problem(written('[model]\nfamily = "ltx"\npath = "m"\n'))
    assert (found.what, found.cure) == ("missing table [data]", "add it: What it is trained on.")


def test_missing_key_says_what_to_add(written) -> None:
    found = problem(written(MINIMAL.replace('family = "ltx"\n', "")))
    assert found.what == "missing key 'model.family'"
    assert found.cure.startswith("add `family = ...` to its table [model]: Which model family")


def test_broken_toml_names_the_line(written) -> None:
    path = written(MINIMAL + "[train]\nprecision = bf16\n")
    found = problem(path)
    assert found.where == str(path)
    assert "line 8" in found.what
    assert "strings need quotes" in found.cure


def test_missing_file_suggests_the_nearest_name(written) -> None:
    path = written(MINIMAL)
    found = problem(path.with_name("recpie.toml"))
    assert (found.what, found.cure) == ("no such recipe", f"did you mean {path}?")


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe\x00\x01")])
def test_what_is_no_text_file_is_refused(tmp_path: Path, make) -> None:
    make(tmp_path / "recipe.toml")
    found = problem(tmp_path / "recipe.toml")
    assert found.what.startswith("cannot be read as a recipe")
    assert found.cure == "give --recipe a TOML text file"


# --- --set ------------------------------------------------------------------------------------------------------------


def value_of(recipe: Recipe, dotted: str) -> object:
    value: object = recipe
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    "override, value",
    [
        ("train.steps=5", 5),
        ("train.seed = 7", 7),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=1", 1.0),
        ("lora.alpha=16", 16.0),
        ("data.fps=24", 24.0),
        ("objective.shift=3", 3.0),
        ("objective.shift=scheduler", "scheduler"),
        ("train.max_grad_norm=1", 1.0),
        ("train.max_grad_norm=0.5", 0.5),
        ("checkpoint.keep_last=3", 3),
        ("checkpoint.keep_last=all", "all"),
        ("vae.tiling=true", True),
        ("train.precision=float32", "float32"),
        ('train.precision="float32"', "float32"),
        ("data.id_token=afkx", "afkx"),
        ("data.id_token=42", "42"),
        ("data.id_token=1e-3", "1e-3"),
        ("data.id_token=007", "007"),
        ("data.id_token=true", "true"),
        ("data.id_token=2026-01-01", "2026-01-01"),
        ("data.id_token=two words", "two words"),
        ('data.id_token=""', ""),
        ("data.id_token=a=b", "a=b"),
        ("model.revision=1.5", "1.5"),
        ("tracking.name=12", "12"),
        ("data.path=other/clips", Path("other/clips")),
        ("data.cache=123", Path("123")),
        ("output=runs/x", Path("runs/x")),
        ("data.path=~/clips", Path.home() / "clips"),
        ("data.buckets=25x64x96", [Bucket(25, 64, 96)]),
        ("data.buckets=17x64x96,25x96x64", [Bucket(17, 64, 96), Bucket(25, 96, 64)]),
        ('data.buckets=["17x64x96", "25x96x64"]', [Bucket(17, 64, 96), Bucket(25, 96, 64)]),
        ("lora.targets=to_q", ["to_q"]),
        ("lora.targets=to_q, to_out.0", ["to_q", "to_out.0"]),
        ("lora.targets=[]", []),
        ("optimizer.betas=0.9,0.99", [0.9, 0.99]),
        ("optimizer.betas=[0.9, 0]", [0.9, 0.0]),
        ("tracking.trackers=tensorboard,wandb", ["tensorboard", "wandb"]),
    ],
)
def test_set_reads_the_value_as_the_schema_wants_it(written, override: str, value: object) -> None:
    recipe = load_recipe(written(MINIMAL), [override])
    found = value_of(recipe, override.partition("=")[0].strip())
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "table, key",
    [("data", "fps"), ("validation", "every"), ("validation", "heldout"), ("tracking", "name")],
)
def test_set_none_unsets_an_optional_key(written, table: str, key: str) -> None:
    value = {"fps": "24", "every": "5", "heldout": '"held"', "name": '"n"'}[key]
    text = MINIMAL.replace("[data]", f"[data]\n{key} = {value}") if table == "data" else None
    path = written(text or f"{MINIMAL}[{table}]\n{key} = {value}\n")
    assert value_of(load_recipe(path), f"{table}.{key}") is not None
    assert value_of(load_recipe(path, [f"{table}.{key}=none"]), f"{table}.{key}") is None


def test_set_none_is_a_value_where_the_schema_has_one(written) -> None:
    recipe = load_recipe(written(MINIMAL), ["train.max_grad_norm=none", "objective.weighting=none"])
    assert (recipe.train.max_grad_norm, recipe.objective.weighting) == ("none", "none")


def test_the_last_set_of_a_key_holds(written) -> None:
    assert load_recipe(written(MINIMAL), ["train.steps=5", "train.steps=6"]).train.steps == 6


def test_set_mends_a_mistake_of_the_file(written) -> None:
    path = written(MINIMAL + "[train]\nsteps = 0\n")
    assert load_recipe(path, ["train.steps=5"]).train.steps == 5


@pytest.mark.parametrize(
    "override, what, cure",
    [
        ("lora.rnk=4", "unknown key 'lora.rnk'", "did you mean 'lora.rank'?"),
        ("lr=4", "unknown key 'lr'", "did you mean 'optimizer.lr'?"),
        ("train.steps=many", "train.steps = 'many': should be a valid integer", "Optimizer steps in all."),
        ("optimizer.betas=0.9,1.5", "optimizer.betas[1] = 1.5: should be less than 1", "Adam's moment decays."),
        ("train.steps", "not an override", "write --set table.key=value"),
        ("train..steps=3", "not an override", "write --set table.key=value"),
        ("model.path.name=3", "'path' is no table", "write --set table.key=value"),
    ],
)
def test_problem_of_a_set_names_the_set(written, override: str, what: str, cure: str) -> None:
    assert problem(written(MINIMAL), override) == Problem(what, f"--set {override}", cure)


def test_problems_of_file_and_sets_come_together(written) -> None:
    path = written(MINIMAL + "[train]\nsteps = 0\n")
    where = {found.where for found in problems(path, "lora.rnk=4", "vae.tiling=maybe")}
    assert where == {f"{path}, line 8", "--set lora.rnk=4", "--set vae.tiling=maybe"}


# --- recipes for others -----------------------------------------------------------------------------------------------

# Texts that say nothing of where things lie.
NO_PLACES = {
    *("model.family", "model.revision", "data.id_token", "data.video_column", "data.caption_column", "data.background"),
    *(f"data.sources.{key}" for key in ("id_token", "video_column", "caption_column")),
    *("lora.targets", "lora.ranks", "lora.alphas", "partial.modules", "validation.prompts.text"),
    *("validation.prompts.negative", "optimizer.name"),
}
PLACES = """
output = "/secret/run"
[model]
family = "ltx"
path = "/secret/model"
[data]
sources = [{path = "/secret/clips"}, {path = "/secret/more"}]
buckets = ["17x64x96"]
cache = "/secret/cache"
[lora]
start_from = "/secret/first.safetensors"
frozen = [{path = "me/adapters/a.safetensors"}, {path = "~/secret.safetensors"}, {path = "../secret/x.safetensors"}]
[validation]
heldout = "/secret/heldout"
prompts_file = "/secret/prompts.txt"
prompts = [{text = "a ball", image = "/secret/first.png", last_image = "/secret/last.png"}]
[tracking]
project = "secret"
name = "secret"
"""


def texts(annotation: Any, key: str = "") -> Iterator[str]:
    """The keys of all texts and paths below a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from texts(field.annotation, f"{key}.{name}".removeprefix("."))
    elif annotation in (str, Path):
        yield key
    elif get_origin(annotation) is not Literal:
        for each in get_args(annotation):
            yield from texts(each, key)


def test_a_recipe_for_others_names_no_place_of_this_machine(written, tmp_path: Path) -> None:
    """Every key that takes a text is a place in the recipe here, or known to be none."""
    given = {
        *(
            "output",
            "model.path",
            "data.path",
            "data.sources.path",
            "data.cache",
            "lora.start_from",
            "lora.frozen.path",
        ),
        *("validation.heldout", "validation.prompts_file", "validation.prompts.image", "validation.prompts.last_image"),
        *("tracking.project", "tracking.name"),
    }
    assert set(texts(Recipe)) - NO_PLACES == given
    for text in (PLACES, PLACES.replace("sources = [{path = ", "path = ").replace('}, {path = "/secret/more"}]', "")):
        write_shareable(load_recipe(written(text)), tmp_path / "shared.toml")
        assert "secret" not in (tmp_path / "shared.toml").read_text()
        assert isinstance(lora := load_recipe(tmp_path / "shared.toml").lora, Lora)
        assert [each.path for each in lora.frozen] == ["me/adapters/a.safetensors", *["path/to/an/adapter"] * 2]
