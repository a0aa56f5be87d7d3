"""What is wrong on one machine of several is told on all, and no rank waits for one that has gone another way."""

import os
from pathlib import Path

from processes import ROOT, Finetune

FAMILY = """
import os

from finetune.models import family_class
from finetune.runtime.errors import UserError


class Fickle(family_class("ltx")):
    def __init__(self, folder):
        super().__init__(folder)
        if os.environ["RANK"] == "1":
            raise UserError("this machine has half of the model", "copy it again", str(folder.path))
"""


def test_a_model_that_one_rank_cannot_open_is_refused_by_all(
    recipe_file: Path, finetune: Finetune, tmp_path: Path, clips: Path
) -> None:
    (tmp_path / "fickle.py").write_text(FAMILY)
    recipe = recipe_file.read_text().replace('buckets = ["17x64x96"]', 'area = "64x96"\nframes = [17]')
    recipe_file.write_text(recipe.replace('"ltx"', '"fickle:Fickle"') + "[distributed]\ntimeout_seconds = 10\n")
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = finetune("check", "--recipe", recipe_file, processes=2, env={"PYTHONPATH": paths})
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.stderr
    assert told[0].endswith("this machine has half of the model")
