"""Every command and program in a code block of a document is run, in real processes, or is marked there as not run.

A document's commands run one after the other in a folder that has what they name: `clips`, `mine.toml`, `runs/mine`. What is
not as the document has it:

- The folders Lightricks/LTX-Video and Wan-AI/Wan2.1-T2V-1.3B-Diffusers lie there, so that these ids on the Hub lead to tiny
  pipelines of the same classes, with random weights.
- mine.toml, once `new` has written it, is changed to small clips and few steps (`SMALL`); memory.md plans it as it is.
- `INSTEAD`: a training of two steps has no checkpoint of step 400.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tomlkit
from document_commands import MARKS, Code, code_of, named_in_text
from processes import OWN_PATHS, ROOT, run_python
from random_loras import opened, random_lora
from safetensors.torch import save_file
from test_links import DOCUMENTS, name_of

from finetune.commands.parsing import COMMANDS, parser_of

INSTEAD = {"--step 400": "--step 2"}
NEW = ["-m", "finetune", "new", "ltx_lora", "mine.toml", "--data", "clips"]
SMALL: dict[str, dict] = {
    "data": {"buckets": ["17x64x96"], "workers": 0},
    "train": {"steps": 2, "global_batch_size": 2, "precision": "float32"},
    "lora": {"rank": 4, "alpha": 4},
    "schedule": {"warmup_steps": 0},
    "checkpoint": {"every": 2},
    "export": {"formats": ["diffusers", "peft", "merged"]},
}
PROMPT = {"shape": "17x64x96", "steps": 2}
PARTIAL: dict[str, dict] = {
    "train": {"method": "partial"},
    "partial": {"modules": ["norm", "proj_in", "*.bias"]},
    "lora": {},
    "export": {},
}
SLOW = ("-m pytest", "--fit")  # these with --full alone
OTHER_TRAINERS = {
    "finetrainers": {
        "train.sh": "torchrun train.py --model_name ltx_video --pretrained_model_name_or_path Lightricks/LTX-Video "
        "--dataset_config training.json --training_type lora --rank 32 --lora_alpha 32 --train_steps 900 --lr 3e-5\n",
        "training.json": '{"datasets": [{"data_root": "clips", "dataset_type": "video", '
        '"video_resolution_buckets": [[49, 512, 768]]}]}',
    },
    "diffusion-pipe": {
        "config.toml": 'output_dir = "out"\ndataset = "dataset.toml"\nmax_steps = 800\nmicro_batch_size_per_gpu = 1\n'
        '[model]\ntype = "wan"\nckpt_path = "/models/Wan2.1-T2V-1.3B"\ndtype = "bfloat16"\n'
        '[adapter]\ntype = "lora"\nrank = 16\n[optimizer]\ntype = "adamw"\nlr = 2e-5\n',
        "dataset.toml": 'resolutions = [512]\nframe_buckets = [33]\n[[directory]]\npath = "clips"\nnum_repeats = 1\n',
    },
    "musubi-tuner": {
        "train.sh": "accelerate launch src/musubi_tuner/wan_train_network.py --task t2v-1.3B --dit wan.safetensors "
        "--dataset_config dataset.toml --sdpa --mixed_precision bf16 --optimizer_type adamw --learning_rate 2e-4 "
        "--network_module networks.lora_wan --network_dim 32 --timestep_sampling shift --discrete_flow_shift 3.0 "
        "--max_train_steps 640 --output_dir out --output_name waves\n",
        "dataset.toml": "[general]\nresolution = [832, 480]\ncaption_extension = '.txt'\nbatch_size = 1\n"
        "[[datasets]]\nvideo_directory = 'clips'\ntarget_frames = [81]\nframe_extraction = 'head'\n",
    },
}


@pytest.fixture(scope="module")
def laid_out(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path], few_clips: Path
) -> Callable[[str], Path]:
    """Make a folder with clips, and tiny pipelines in the place of published ones."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(few_clips, folder / "clips")
        for model, family in (("Lightricks/LTX-Video", "ltx"), ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan")):
            shutil.copytree(tiny_model(family), folder / model)
        return folder

    return make


@pytest.fixture(scope="module")
def trained(laid_out: Callable[[str], Path]) -> Path:
    """The same with mine.toml, and what its training leaves. Copy it before changing it."""
    folder = laid_out("trained")
    run(NEW, folder)
    shutil.copy(folder / "mine.toml", folder / "as_written.toml")
    change(folder / "mine.toml", SMALL)
    run(["-m", "finetune", "train", "mine.toml"], folder)
    return folder


@pytest.fixture
def folder(
    document: Path, laid_out: Callable[[str], Path], trained: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> Path:
    """Where a document's commands are run."""
    if document == ROOT / "CONTRIBUTING.md":
        return ROOT
    if document == ROOT / "README.md":
        return laid_out("first_page")
    folder = tmp_path / "folder"
    shutil.copytree(trained, folder)
    if document.name == "memory.md":
        (folder / "as_written.toml").replace(folder / "mine.toml")
    if document.name == "coming_from.md":
        (folder / "mine.toml").unlink()
    if document.name == "training.md":
        shutil.rmtree(folder / "runs")
    shutil.copytree(trained / "runs/mine/lora", folder / "other/lora")
    lora = random_lora(opened(("wan", None), tiny_model("wan")), alpha=3.0)
    save_file({f"transformer.{name}": tensor for name, tensor in lora.tensors.items()}, folder / "theirs.safetensors")
    return folder


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.full)], ids=["quick", "whole"])
@pytest.mark.parametrize("document", [each for each in DOCUMENTS if code_of(each)], ids=name_of)
def test_what_a_document_shows_runs_or_is_marked(document: Path, is_whole: bool, folder: Path) -> None:
    for code in code_of(document):
        if code.is_marked or (not is_whole and any(slow in code.text for slow in SLOW)):
            continue
        try:
            run_as_shown(code, folder)
        except AssertionError as error:
            hint = f"if it cannot be run, mark it: one of {sorted(MARKS)} in parentheses at the end of its comment"
            raise AssertionError(f"{name_of(document)}, line {code.line}: {code.text}\n{error}\n{hint}") from None


def test_a_command_that_does_not_work_is_found_and_only_known_marks_spare_it(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(
        "```bash\npython -m finetune plan nowhere.toml # first\n"
        "pip install it  # (installs, needs a GPU)\npip install it \\\n  again # (slow)\n```\n"
    )
    wrong, marked, unknown = code_of(document)
    assert (wrong.text, wrong.comment, wrong.line) == ("python -m finetune plan nowhere.toml", "first", 2)
    assert [each.is_marked for each in (wrong, marked, unknown)] == [False, True, False]
    assert unknown.text == "pip install it again"
    with pytest.raises(AssertionError, match="no such recipe"):
        run_as_shown(wrong, tmp_path)


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if named_in_text(each)], ids=name_of)
def test_commands_and_options_that_sentences_name_exist(document: Path) -> None:
    for command, *words in named_in_text(document):
        assert command in COMMANDS, f"{name_of(document)}: {command}"
        known = parser_of(command)[1].format_help()
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", known), f"{name_of(document)}: {command} {option}"


def run_as_shown(code: Code, folder: Path) -> None:
    if code.language == "python":
        run(["-c", code.text], folder)
        return
    if trainer := OTHER_TRAINERS.get(code.comment):
        folder = folder / code.comment
        folder.mkdir()
        (folder / "clips").symlink_to(folder.parent / "clips")
        for name, text in trainer.items():
            (folder / name).write_text(text)
    if "partial_difference" in code.text:
        change(folder / "mine.toml", PARTIAL)
        shutil.rmtree(folder / "runs/mine")
        run(["-m", "finetune", "train", "mine.toml"], folder)
    text = code.text
    for theirs, ours in INSTEAD.items():
        text = text.replace(theirs, ours)
    run_command(text, folder)
    if shlex.split(text)[1:] == NEW:
        change(folder / "mine.toml", SMALL)


def run_command(text: str, folder: Path) -> None:
    """A program of Python in a fork, if the suite has forks; any other command by a shell."""
    words = shlex.split(text)
    if words[0] == "python":
        run(words[1:], folder)
    elif words[:2] == ["torchrun", "--nproc_per_node"] and words[3] == "-m":
        run(words[3:], folder, processes=int(words[2]))
    else:
        done = subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def run(program: list[str], folder: Path, processes: int = 0) -> None:
    paths = os.pathsep.join([*OWN_PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_python(program, processes, folder, {"PYTHONPATH": paths}, seconds=280)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def change(recipe: Path, settings: dict[str, dict]) -> None:
    """Set keys of a recipe's tables, and make its samples small."""
    text = tomlkit.parse(recipe.read_text())
    for table, keys in settings.items():
        text.setdefault(table, {}).update(keys)
        if not keys:
            text.pop(table)
    for prompt in text["validation"]["prompts"]:
        prompt.update(PROMPT)
    recipe.write_text(tomlkit.dumps(text))
