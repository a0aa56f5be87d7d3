"""recipes/coming_from.md says what `import` does: its keys are a recipe's, and its settings are known to the importers."""

import re
from pathlib import Path

from processes import ROOT
from test_import_finetrainers import FACTORY, FIRST, LAST, TRAINING, write
from test_import_musubi import COMMAND
from test_import_musubi import write as write_musubi

from finetune.importers import TRAINERS, import_files
from finetune.recipe.optimizers import OPTIMIZERS
from finetune.recipe.schema import Recipe
from finetune.recipe.table import tables_of

PAGE = (ROOT / "recipes" / "coming_from.md").read_text()


def rows(title: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {title}")[1].split("\n## ")[0]
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")
    ]
    assert len(found) > 10
    return found[1:]


def test_every_key_of_the_page_is_one_of_a_recipe() -> None:
    keys = {f"[{name}]" for name in Recipe.model_fields}
    for name, field in Recipe.model_fields.items():
        classes = [*OPTIMIZERS.values()] if name == "optimizer" else tables_of(field)
        keys |= {f"{name}.{key}" for each in classes for key in each.model_fields}
    named = set(re.findall(rf"`((?:{'|'.join(Recipe.model_fields)})\.[a-z_]+)", PAGE.split("## ai-toolkit")[0]))
    assert len(named) > 40
    assert named - {"data.sources"} <= keys


def test_every_option_of_finetrainers_on_the_page_is_known_to_one_of_its_releases(tmp_path: Path) -> None:
    options = set(re.findall(r"--([a-z0-9_]+)", " ".join(row[0] + row[2] for row in rows("finetrainers"))))
    known = set(re.findall(r"--([a-z0-9_]+)", FIRST + LAST + FACTORY))
    for number, text in enumerate((FIRST, LAST, FACTORY)):
        (folder := tmp_path / str(number)).mkdir()
        script, training = write(folder, train=text, training=TRAINING)
        for option in options - known:
            script.write_text(text.replace("--output_dir", f"--{option} 1 --output_dir"))
            notes = import_files([str(script), str(training)]).notes
            known |= {option for note in notes if f"--{option} " in f"{note.setting} " and note.outcome != "unknown"}
    assert options - known == set()


def test_every_option_of_musubi_on_the_page_is_known(tmp_path: Path) -> None:
    options = set(re.findall(r"--([a-z0-9_]+)", " ".join(row[0] + row[2] for row in rows("musubi-tuner"))))
    script = write_musubi(tmp_path)
    for option in options - set(re.findall(r"--([a-z0-9_]+)", COMMAND)):
        script.write_text(COMMAND.replace("--no_such_setting", f"--{option} 1"))
        notes = import_files([str(script)]).notes
        assert [note for note in notes if f"--{option} " in f"{note.setting} " and note.outcome != "unknown"], option


def test_the_page_has_a_table_of_each_trainer() -> None:
    titles = " ".join(line for line in PAGE.splitlines() if line.startswith("## "))
    assert all(trainer.NAME in titles for trainer in TRAINERS)
