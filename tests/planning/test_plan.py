"""`plan` as a user runs it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from every_family import few
from PIL import Image

from finetune.recipe import load_recipe
from finetune.runtime.units import parse_bytes

BUCKET = "17x64x96"
ONE_EACH = ["--set", "train.global_batch_size=2", "--set", "train.micro_batch_size=1"]


def planned(finetune, recipe: Path, *arguments: str) -> dict:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--json", *arguments)
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


def test_a_plan_says_what_it_takes_and_whether_that_fits(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--device-memory", "24GiB")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:26].strip() for line in lines[1:6]] == [
        "encode text",
        f"encode video {BUCKET}",
        "load",
        f"step {BUCKET}",
        "export",
    ]
    explained = lines.index(next(line for line in lines if line.startswith("The peak is in")))
    assert "GiB" not in lines[explained + 1]
    assert lines[explained + 1].rstrip().endswith("#")
    assert lines[-1].startswith("fits: a GPU needs 0.0")


# ltx, as every other test here; the others take their own encoders and VAEs
@pytest.mark.parametrize(
    "family",
    [
        "cogvideox_i2v",
        *(
            pytest.param(family, marks=pytest.mark.full)
            for family in ("cogvideox", "hunyuan", "hunyuan15", "hunyuan_i2v", "mochi")
        ),
    ],
)
def test_a_plan_goes_through_every_phase_of_a_run(
    finetune, family_recipe: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    image = tmp_path / "first_frame.png"
    Image.new("RGB", (96, 64)).save(image)
    prompt = 'text = "a ball"' + (f', image = "{image}"' if "i2v" in family else "")
    plan = planned(finetune, family_recipe(family), "--set", f"validation.prompts=[{{{prompt}}}]")
    bucket = "13x64x96" if family == "mochi" else BUCKET
    names = ["encode text", f"encode video {bucket}", "load", f"step {bucket}", f"validation {bucket}", "export"]
    assert [phase["name"] for phase in plan["phases"]] == names
    kinds = ["encode text", "encode video", "load", "step", "validation", "export"]
    assert [phase["kind"] for phase in plan["phases"]] == kinds
    assert [phase["shape"] for phase in plan["phases"]] == [None, bucket, None, bucket, bucket, None]
    parts = {phase["name"]: phase["device"]["parts"] for phase in plan["phases"]}
    assert "text encoder" in parts["encode text"]
    assert "VAE" in parts[names[1]]
    assert "VAE" in parts[names[4]]
    assert plan["phases"][3]["flops"] > 0
    assert plan["phases"][3]["seconds"] > 0
    assert plan["phases"][3]["seconds_on"]["A100"] == plan["phases"][3]["seconds"]
    assert plan["phases"][3]["seconds_on"]["RTX 3060"] > plan["phases"][3]["seconds"]


def test_captions_that_are_encoded_on_the_cpu_take_nothing_of_the_gpu(finetune, recipe: Path) -> None:
    there, away = (planned(finetune, recipe, "--set", f"memory.text_encoder={where}") for where in ("device", "cpu"))
    assert there["phases"][0]["device"]["parts"]["text encoder"] > 0
    assert "text encoder" not in away["phases"][0]["device"]["parts"]


def test_a_plan_draws_what_lives_when(finetune, recipe: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--plot", picture)
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_fit_finds_settings_and_writes_a_recipe_that_is_planned_within_them(
    finetune, recipe: Path, tmp_path: Path
) -> None:
    found = tmp_path / "fits.toml"
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--device-memory", "24GiB", "--fit", "--write", found)
    assert done.returncode == 0, done.stderr
    assert 'activation_checkpointing = "none"' in done.stdout  # everything fits, so nothing is computed twice
    assert load_recipe(found).memory.activation_checkpointing == "none"
    again = finetune("plan", "--recipe", found, "--device-memory", "24GiB")
    assert again.returncode == 0, again.stderr


@pytest.mark.full
def test_where_nothing_fits_the_smallest_is_named(finetune, recipe: Path, tmp_path: Path) -> None:
    found = tmp_path / "fits.toml"
    memory = ["--device-memory", "2MiB", "--fit", "--write", found]
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, *memory, timeout=200)
    assert done.returncode == 3, done.stderr
    assert "encode video 17x64x96 alone takes 0.0" in done.stderr
    assert f"{found} is not written" in done.stdout
    assert not found.exists()
    assert "nothing fits; these settings take least" in done.stdout
    assert "[memory]" in done.stdout


@pytest.mark.full
def test_what_fit_finds_is_told_as_json(finetune, recipe: Path) -> None:
    found = planned(finetune, recipe, "--device-memory", "24GiB", "--fit")
    assert found["fits"] is True
    assert found["changes"] == {"memory.activation_checkpointing": "none"}
    assert [phase["kind"] for phase in found["phases"]] == ["encode text", "encode video", "load", "step", "export"]


def test_fit_needs_to_know_how_much_there_is(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--fit")
    assert done.returncode == 2
    assert "--device-memory" in done.stderr


def test_what_does_not_fit_says_how_much_is_missing(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--device-memory", "2MiB")
    assert done.returncode == 3
    assert "does not fit: a GPU needs 0.0" in done.stdout


def test_shards_of_eight_take_less_of_each(finetune, recipe: Path) -> None:
    sharded = ["--set", "memory.layout=shard", "--set", "train.method=full", "--set", "train.global_batch_size=8"]
    alone, eight = (planned(finetune, recipe, *sharded, "--gpus", gpus) for gpus in ("1", "8"))
    state = [plan["phases"][3]["device"]["parts"]["optimizer state"] for plan in (alone, eight)]
    assert state[1] == pytest.approx(state[0] / 8, rel=0.1)


def test_host_memory_is_a_limit_too(finetune, recipe: Path) -> None:
    memory = ["--set", "memory.offload=true", "--device-memory", "24GiB", "--host-memory", "0.1MiB"]
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, *memory)
    assert done.returncode == 3
    assert "does not fit: a node needs 0.00 GiB of host memory" in done.stdout


def test_half_a_node_too_much_is_refused(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--gpus", "6", "--gpus-per-node", "4")
    assert done.returncode == 2
    assert "error: --gpus-per-node: 6 GPUs are not nodes of 4" in done.stderr


def test_a_picture_that_cannot_be_drawn_is_refused_first(finetune, recipe: Path, tmp_path: Path) -> None:
    for picture, why in (
        (tmp_path / "plan.txt", "plan.txt is no name of a PNG"),
        (tmp_path / "nowhere" / "plan.png", "nowhere: no such folder"),
    ):
        done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--plot", picture)
        assert done.returncode == 2
        assert why in done.stderr
        assert done.stdout == ""


@pytest.mark.full
def test_offloaded_weights_are_in_host_memory(finetune, recipe: Path) -> None:
    memory = ["--set", "train.method=full", "--set", "memory.offload=true"]
    there, away = (planned(finetune, recipe, *settings)["phases"][3] for settings in (memory[:2], memory))
    weights = there["device"]["parts"]["trained weights"]
    assert "trained weights" not in away["device"]["parts"]
    assert weights <= away["host"]["parts"]["trained weights"] <= 2 * weights  # page-locked: powers of two


def test_moments_in_8_bits_lie_on_the_host_with_the_weights(finetune, recipe: Path) -> None:
    memory = ["--set", "train.method=full", "--set", "memory.offload=true", "--set", "optimizer.name=adamw_8bit"]
    step = planned(finetune, recipe, *memory)["phases"][3]
    assert "optimizer state" not in step["device"]["parts"]
    assert step["host"]["parts"]["optimizer state"] > 0


@pytest.mark.parametrize(
    "offload, gone", few([("state_and_gradients", {"optimizer state", "gradients"}), ("state", {"optimizer state"})])
)
def test_an_offloaded_optimizer_has_its_state_on_the_host(finetune, recipe: Path, offload: str, gone: set[str]) -> None:
    full = ["--set", "train.method=full", "--set", "train.micro_batch_size=2", "--set", "train.global_batch_size=2"]
    there, away = (
        planned(finetune, recipe, *full, *further)["phases"][3]
        for further in ([], ["--set", f"optimizer.offload={offload}"])
    )
    whole = {name: there["device"]["parts"].get(name, 0) for name in ("optimizer state", "gradients")}
    assert gone & away["device"]["parts"].keys() == set()
    assert away["host"]["parts"]["optimizer state"] == pytest.approx(whole["optimizer state"], rel=0.01)
    assert away["device"]["allocated"] <= there["device"]["allocated"] - whole["optimizer state"]


@pytest.mark.parametrize(
    "settings, is_said",
    [
        (["optimizer.name=adamw_8bit"], True),
        pytest.param(["train.weights=bf16"], True, marks=pytest.mark.full),
        pytest.param(["optimizer.name=adamw"], False, marks=pytest.mark.full),
    ],
)
def test_updates_that_take_host_time_are_said(finetune, recipe: Path, settings: list[str], is_said: bool) -> None:
    """torchao updates one parameter at a time; the tiny model's step takes far less than its updates."""
    overrides = [part for each in ["train.method=full", *settings] for part in ("--set", each)]
    notes = planned(finetune, recipe, *overrides, "--gpu", "a100")["notes"]
    assert any("one by one, take about" in note for note in notes) == is_said


def test_a_bad_recipe_is_refused_as_check_refuses_it(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, "--set", "train.float8=true")
    assert done.returncode == 2
    assert "float8 training is for weights that are trained" in done.stderr


def test_what_the_named_gpu_cannot_do_is_refused(finetune, recipe: Path) -> None:
    float8 = ["--set", "train.method=full", "--set", "train.float8=true"]
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, *float8, "--gpu", "a100")
    assert done.returncode == 2
    assert "A100 has no float8 arithmetic" in done.stderr


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * 2**30),
        ("24", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("512MiB", 2**29),
        ("1.5g", 3 * 2**29),
        ("85899345920B", 80 * 2**30),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "24XiB", "0"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match=r"float|no amount"):
        parse_bytes(text)
