"""Every message in the tables of the page of messages is raised by a recipe, or clips, that have that fault."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT

from finetune.checks.everything import check_all
from finetune.data.synthetic import RECORDINGS, write_clips
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError

PAGE = (ROOT / "recipes" / "troubleshooting.md").read_text()
RAISED_BY = {
    "unknown key": ["lora.rnk=4"],
    "should be 'lora', 'full' or 'partial'": ["train.method=ful"],
    "this key has no effect here": ["checkpoint.keep_best=2"],
    "unknown family": ["model.family=lxt"],
    "cannot be split over": ["train.global_batch_size=3", "train.micro_batch_size=2"],
    "moves each weight by about that much in every step": ["optimizer.lr=3"],
    "no such folder": ["model.path=./nowhere"],
    "and family 'wan' trains WanPipeline": ["model.family=wan"],
    "names no linear layer of the blocks": ['lora.targets=["to_x"]'],
    "there is no such adapter": ["lora.start_from=none.safetensors"],
    "takes no condition image": ['validation.prompts=[{text="a",image="x.png"}]'],
    "the dataset does not exist": ["data.path=nowhere"],
    "video without a caption": ["data.path=UNCAPTIONED"],
    "cannot be read as a video": ["data.path=CUT"],
    "but the shortest bucket has": ['data.buckets=["97x64x96"]'],
    "the nearest is": ['data.buckets=["10x64x96"]'],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("UNCAPTIONED", "CUT")}
    for folder in made.values():
        write_clips(folder, RECORDINGS[1:2])
    (made["UNCAPTIONED"] / "small.txt").unlink()
    cut = made["CUT"] / "small.mp4"
    cut.write_bytes(cut.read_bytes()[:500])
    return made


def test_the_page_lists_what_is_raised_here() -> None:
    assert set(re.findall(r"^\| `([^|]+)` \|", PAGE, re.MULTILINE)) == RAISED_BY.keys()


@pytest.mark.parametrize("message", RAISED_BY)
def test_the_message_is_raised(
    family_recipe: Callable[..., Path], runtime: Runtime, folders: dict[str, Path], message: str
) -> None:
    settings = RAISED_BY[message]
    for name, folder in folders.items():
        settings = [setting.replace(name, str(folder)) for setting in settings]
    try:
        said = "\n".join(map(str, check_all(load_recipe(family_recipe("ltx"), settings), runtime, 1)))
    except UserError as error:
        said = str(error)
    assert message in said
