"""What a user gets wrong, through the command line: one clear message that names the thing and its cure, and no hang."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import finetune as finetune_package
from finetune.data.synthetic import RECORDINGS, Recording, write_clips

Result = subprocess.CompletedProcess
GOOD = RECORDINGS[0]
PACKAGE = Path(finetune_package.__file__).parent
TORCHRUN = r"\n[A-Z]\d{4} "  # its log, and then its own account of the end, with a traceback of its own


def recipe_text(folder: Path, model: Path, data: Path, extra: str = "") -> Path:
    """A recipe of a test's own, in its folder."""
    path = folder / "recipe.toml"
    path.write_text(
        f"""\
output = "{folder / "run"}"
[model]
family = "ltx"
path = "{model}"
[data]
path = "{data}"
buckets = ["17x64x96"]
cache = "{folder / "cache"}"
workers = 0
[train]
steps = 50
global_batch_size = 4
micro_batch_size = 2
precision = "float32"
{extra}"""
    )
    return path


def messages(result: Result, status: int = 2) -> dict[str, str]:
    """What an ended run tells its user: problem -> cure. The exit status is right, and no traceback is ours."""
    assert result.returncode == status, result.stderr
    assert f'File "{PACKAGE}{os.sep}' not in result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    told = re.split(TORCHRUN, result.stderr.partition("error: ")[2])[0].splitlines()
    found: dict[str, str] = {}
    for line, following in zip(told, [*told[1:], ""], strict=True):
        if following.startswith("    -> "):
            found[line] = following.removeprefix("    -> ")
    return found


def about(found: dict[str, str], name: object) -> tuple[str, str]:
    """The one problem that names a thing, without the thing, and its cure."""
    ((problem, cure),) = [(problem, cure) for problem, cure in found.items() if str(name) in problem]
    return problem.replace(f"{name}: ", ""), cure


@pytest.fixture(scope="session")
def hollow_model(tmp_path_factory: pytest.TempPathFactory, tiny_ltx: Path) -> Path:
    """A model whose text encoder has a sound header and nothing in it: whoever begins with a run's work fails."""
    folder = tmp_path_factory.mktemp("weightless") / "model"
    shutil.copytree(tiny_ltx, folder)
    save_file({"nothing": torch.zeros(1)}, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    return folder


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_mistakes_of_the_recipe_are_found_before_anything_is_looked_for(finetune, tmp_path: Path) -> None:
    recipe = recipe_text(tmp_path, Path("no/model"), Path("no/data"), "sede = 3\n[lora]\nrank = '4'\n")
    found = messages(finetune("--recipe", recipe))
    assert about(found, f"{recipe}, line 15") == ("unknown key 'train.sede'", "did you mean 'train.seed'?")
    assert about(found, f"{recipe}, line 17")[0] == "lora.rank = '4': should be a valid integer"
    assert len(found) == 2


def test_a_recipe_that_is_not_there(finetune, tmp_path: Path) -> None:
    recipe_text(tmp_path, tmp_path, tmp_path)
    found = messages(finetune("--recipe", tmp_path / "recipes.toml"))
    assert found == {f"{tmp_path / 'recipes.toml'}: no such recipe": f"did you mean {tmp_path / 'recipe.toml'}?"}


# --- clips ------------------------------------------------------------------------------------------------------------


def encode(binary: str, path: Path, *options: str) -> bytes:
    subprocess.run([binary, "-nostdin", "-v", "error", *options, str(path)], timeout=60, check=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def bad_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good clip and eight that cannot be used, each with a caption."""
    import imageio_ffmpeg

    ffmpeg, folder, spare = (
        imageio_ffmpeg.get_ffmpeg_exe(),
        tmp_path_factory.mktemp("bad"),
        tmp_path_factory.mktemp("x"),
    )
    write_clips(folder, [GOOD, Recording("short.mp4", 64, 96, 12, 24)])
    pattern = ("-f", "lavfi", "-i", "testsrc2=size=192x128:rate=25:duration=1", "-c:v", "libx264")
    index_last = encode(ffmpeg, spare / "last.mp4", *pattern)
    index_first = encode(ffmpeg, spare / "first.mp4", *pattern, "-movflags", "+faststart")
    still = ("-f", "lavfi", "-i", "testsrc2=size=192x128", "-frames:v", "1", "-update", "1")
    contents = {
        "no_index.mp4": index_last[: len(index_last) * 2 // 3],
        "no_end.mp4": index_first[: len(index_first) * 2 // 3],
        "nothing.mp4": b"",
        "text.mp4": b"<html>404 not found</html>",
        "sound.mp4": encode(ffmpeg, spare / "sound.mp4", "-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac"),
        "png.mp4": encode(ffmpeg, spare / "still.png", *still),
        "jpeg.mp4": encode(ffmpeg, spare / "still.jpg", *still),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("something moves")
    return folder


@pytest.fixture(scope="module")
def bad_clips_run(finetune, bad_clips: Path, hollow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Training on them, with a model that nobody may load before the clips are seen to be bad."""
    return finetune("--recipe", recipe_text(tmp_path_factory.mktemp("bad_run"), hollow_model, bad_clips))


OR_SKIP = '; or data.bad_clips = "skip" goes on without it'
AGAIN = "copy or export it again, or remove it"


@pytest.mark.parametrize(
    "name, what, cure",
    [
        ("no_index.mp4", "cannot be read as a video", f"the file is cut off or not a video: {AGAIN}"),
        (
            "no_end.mp4",
            "the file is cut off: ",
            f"{AGAIN}; or keep its beginning: ffmpeg -i no_end.mp4 -t 0.56 no_end_new.mp4",
        ),
        ("nothing.mp4", "the file is empty (0 bytes)", AGAIN),
        ("text.mp4", "cannot be read as a video", f"the file is cut off or not a video: {AGAIN}"),
        ("sound.mp4", "there is no video stream in it", "remove it: sound alone cannot be trained on"),
        ("png.mp4", "this is an image (PNG), not a video", "remove it, or make a video of it"),
        ("jpeg.mp4", "this is an image (JPEG), not a video", "remove it, or make a video of it"),
        (
            "short.mp4",
            "12 frames at 24 fps, but the shortest bucket has 17",
            "add a bucket of at most 12 frames to data.buckets, or remove the clip",
        ),
    ],
)
def test_a_clip_that_cannot_be_used(bad_clips_run: Result, bad_clips: Path, name: str, what: str, cure: str) -> None:
    problem, told = about(messages(bad_clips_run), bad_clips / name)
    assert problem.startswith(what)
    assert told == cure + OR_SKIP


def test_bad_clips_are_counted_and_good_ones_not_mentioned(bad_clips_run: Result) -> None:
    assert "error: 8 clips cannot be used:" in bad_clips_run.stderr
    assert bad_clips_run.stderr.count('data.bad_clips = "skip"') >= 8
    assert GOOD.name not in bad_clips_run.stderr


# --- check: recipe, output, model and dataset, all at once ------------------------------------------------------------


@pytest.fixture(scope="module")
def first_check(finetune, tiny_ltx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A batch that does not divide, the output of another run, a missing shard and files without a partner."""
    from diffusers import LTXVideoTransformer3DModel

    folder = tmp_path_factory.mktemp("first_check")
    model = folder / "model"
    shutil.copytree(tiny_ltx, model, ignore=shutil.ignore_patterns("transformer"))
    transformer = LTXVideoTransformer3DModel.from_pretrained(tiny_ltx, subfolder="transformer")
    transformer.save_pretrained(model / "transformer", max_shard_size="200KB")
    next((model / "transformer").glob("*-00002-of-*.safetensors")).unlink()

    write_clips(folder / "clips", [GOOD])
    (folder / "clips" / GOOD.name).rename(folder / "clips" / "alone.mp4")
    recipe = recipe_text(folder, model, folder / "clips")
    (folder / "run").mkdir()
    shutil.copy(recipe, folder / "run")
    with open(folder / "run" / "recipe.toml", "a") as saved:
        saved.write("[lora]\nrank = 8\n")
    (folder / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "step_00000001" / "trainer.json").touch()
    return folder, finetune("check", "--recipe", recipe, "--set", "train.micro_batch_size=3")


def test_a_batch_that_cannot_be_split(first_check: tuple[Path, Result]) -> None:
    assert about(messages(first_check[1]), "train.global_batch_size") == (
        "a global batch of 4 cannot be split over 1 rank taking 3 at a time",
        "set train.global_batch_size = 3",
    )


def test_an_output_folder_of_another_recipe(first_check: tuple[Path, Result]) -> None:
    folder, result = first_check
    assert about(messages(result), folder / "run") == (
        "this folder holds a run of another recipe: lora.alpha = 8.0 there, 64.0 here; lora.rank = 8 there, 64 here",
        "set `output` to a new folder, or put the keys back to resume",
    )


def test_a_model_with_a_missing_shard(first_check: tuple[Path, Result]) -> None:
    folder, result = first_check
    problem, cure = about(messages(result), folder / "model" / "transformer" / "diffusion_pytorch_model-00002-of-")
    assert problem.endswith(".safetensors: this weight file is missing")
    assert cure == "download it again"


def test_a_caption_without_a_video_and_a_video_without_a_caption(first_check: tuple[Path, Result]) -> None:
    folder, result = first_check
    found = messages(result)
    assert about(found, folder / "clips" / "alone.mp4") == (
        "video without a caption",
        f"write alone.txt beside it{OR_SKIP}",
    )
    assert about(found, folder / "clips" / "wide.txt") == (
        "caption without a video",
        f"add the video of the same name, or remove the text{OR_SKIP}",
    )
    assert len(found) == 5


@pytest.fixture(scope="module")
def second_check(finetune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """An output that is a file, a model and a dataset that do not exist."""
    folder = tmp_path_factory.mktemp("second_check")
    (folder / "run").write_text("a file")
    recipe = recipe_text(folder, folder / "no_model", folder / "no_data")
    return folder, finetune("check", "--recipe", recipe)


@pytest.mark.parametrize(
    "name, what, cure",
    [
        ("run", "this is a file, and the run needs a folder", "set `output` to a folder"),
        ("no_model", "no such folder", "set model.path to a diffusers folder or a Hub id"),
        (
            "no_data",
            "the dataset does not exist",
            "set data.path, or `path` in [[data.sources]], to a folder of videos or a manifest file",
        ),
    ],
)
def test_a_path_that_leads_nowhere(second_check: tuple[Path, Result], name: str, what: str, cure: str) -> None:
    folder, result = second_check
    problem, told = about(messages(result), folder / name)
    assert (problem, told.startswith(cure)) == (what, True)


@pytest.fixture(scope="module")
def third_check(finetune, hollow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Buckets that the VAE cannot divide, and a dataset without files."""
    folder = tmp_path_factory.mktemp("third_check")
    (folder / "clips").mkdir()
    recipe = recipe_text(folder, hollow_model, folder / "clips")
    return folder, finetune("check", "--recipe", recipe, "--set", "data.buckets=17x60x96,16x64x96")


@pytest.mark.parametrize("bucket", ["17x60x96", "16x64x96"])
def test_a_bucket_that_the_vae_cannot_divide(third_check: tuple[Path, Result], bucket: str) -> None:
    messages(third_check[1])
    assert (
        f"data.buckets: {bucket}: LTX-Video needs 8k + 1 frames and sides that 32 divides; the nearest is 17x64x96"
        in third_check[1].stderr.splitlines()
    )


def test_an_empty_dataset(third_check: tuple[Path, Result]) -> None:
    folder, result = third_check
    problem, cure = about(messages(result), folder / "clips")
    assert problem == "the dataset is empty"
    assert ".mp4" in cure


def test_an_unknown_family(finetune, tmp_path: Path, tiny_ltx: Path, clips: Path) -> None:
    found = messages(
        finetune("check", "--recipe", recipe_text(tmp_path, tiny_ltx, clips), "--set", "model.family=ltxx")
    )
    assert found == {"model.family: unknown family 'ltxx'": "did you mean 'ltx'?"}


# --- what only training sees ------------------------------------------------------------------------------------------


def test_an_unknown_lora_target(finetune, recipe_file: Path) -> None:
    found = messages(finetune("--recipe", recipe_file, "--set", "lora.targets=to_q,to_z"))
    problem, cure = about(found, "lora.targets")
    assert problem == "'to_z' names no linear layer of the blocks"
    assert "attn1.to_q" in cure


def ended(folder: Path) -> bool:
    """Whether no process is left that was started with anything in a folder."""
    mine = os.fspath(folder).encode()
    commands = (path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid()))
    for path in commands:
        try:
            if mine in path.read_bytes():
                return False
        except OSError:
            continue  # it has just ended
    return True


def test_a_clip_that_only_another_rank_reads_ends_both_ranks(
    finetune, hollow_model: Path, bad_clips: Path, tmp_path: Path
) -> None:
    write_clips(tmp_path / "clips", [Recording("a.mp4", 64, 96, 17, 24), Recording("b.mp4", 64, 96, 17, 24)])
    shutil.copy(bad_clips / "no_end.mp4", tmp_path / "clips" / "b.mp4")  # paths are dealt out in turn
    result = finetune("--recipe", recipe_text(tmp_path, hollow_model, tmp_path / "clips"), processes=2)
    problem, cure = about(messages(result, status=1), tmp_path / "clips" / "b.mp4")
    assert problem.startswith("the file is cut off")
    assert cure.startswith(AGAIN)
    assert ended(tmp_path)


# --- a full disk ------------------------------------------------------------------------------------------------------


FULL = "the disk is full"


def test_a_disk_that_is_full_from_the_start(
    finetune, tmp_path: Path, small_disk, hollow_model: Path, clips: Path
) -> None:
    output = small_disk("512k") / "run"
    result = finetune("--recipe", recipe_text(tmp_path, hollow_model, clips), "--set", f"output={output}")
    assert messages(result) == {f"{output}: {FULL}": "free some space, or set `output` to another disk"}


def test_a_disk_that_the_cache_fills(finetune, tmp_path: Path, small_disk, tiny_ltx: Path, clips: Path) -> None:
    disk = small_disk("128k")
    recipe = recipe_text(tmp_path, tiny_ltx, clips)
    found = messages(finetune("prepare", "--recipe", recipe, "--set", f"data.cache={disk / 'cache'}"))
    ((problem, cure),) = found.items()
    assert problem.startswith(str(disk / "cache"))
    assert problem.endswith(FULL)
    assert cure == "free some space (see df -h and df -i), then run the same command: it goes on where it stopped"
    assert list(disk.rglob("*.safetensors"))
    assert list(disk.rglob(".partial-*")) == []


@pytest.mark.full
def test_a_disk_that_checkpoints_fill_ends_both_ranks_and_keeps_what_is_whole(
    finetune, recipe_file: Path, tmp_path: Path, small_disk
) -> None:
    output = small_disk("3m") / "run"
    settings = (f"output={output}", "train.steps=50", "checkpoint.every=1", "checkpoint.keep_last=all")
    overrides = [text for setting in settings for text in ("--set", setting)]
    result = finetune("--recipe", recipe_file, *overrides, processes=2)
    problem, cure = about(messages(result, status=1), output / "checkpoints")
    saved = sorted(path.parent.name for path in output.glob("checkpoints/*/trainer.json"))
    assert problem.startswith(FULL)
    assert f"the checkpoint of step {len(saved) + 1} was not written; step {len(saved)} is safe" in problem
    assert cure.endswith("or lower checkpoint.keep_last; then run the same command: it goes on from there")
    assert saved == [f"step_{step:08d}" for step in range(1, len(saved) + 1)]
    assert sorted(path.name for path in output.glob("checkpoints/*")) == saved
    assert ended(tmp_path)
