"""What the tests of importers share: files of another trainer become a recipe, which is checked on the published checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from full_size import open_full_size

from finetune.checks.model import family_problems
from finetune.checks.settings import check_recipe
from finetune.importers import Draft, import_files, recipe_text
from finetune.recipe import Recipe, load_recipe

CHECKPOINTS = {
    "Lightricks/LTX-Video": "ltx-video",
    "Lightricks/LTX-Video-0.9.5": "ltx-video-0.9.5",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-t2v-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-14b",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "wan2.1-i2v-14b",
    "Wan-AI/Wan2.1-I2V-14B-480P-diffusers": "wan2.1-i2v-14b",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan2.2-t2v-a14b",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan2.2-i2v-a14b",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan2.2-ti2v-5b",
    "hunyuanvideo-community/HunyuanVideo": "hunyuanvideo",
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": "hunyuanvideo-1.5-480p-t2v",
    "THUDM/CogVideoX-5b": "cogvideox-5b",
    "THUDM/CogVideoX-5b-I2V": "cogvideox-5b-i2v",
    "THUDM/CogVideoX-2b": "cogvideox-2b",
    "genmo/mochi-1-preview": "mochi-1-preview",
}


@dataclass
class Imported:
    """A recipe, and the draft that it was made of."""

    draft: Draft
    recipe: Recipe

    def line(self, setting: str) -> str:
        """The one line on a setting."""
        (found,) = [str(note) for note in self.draft.notes if note.setting.startswith(setting)]
        return found

    def problems(self, folder: Path) -> list[str]:
        """What `check` finds in the recipe, but for the model's files and the clips."""
        family = open_full_size(self.recipe.model.family, CHECKPOINTS[self.recipe.model.path], folder / "checkpoint")
        found = [*check_recipe(self.recipe, self.draft.gpus), *family_problems(self.recipe, family)]
        return [str(problem) for problem in found if "no such condition image" not in str(problem)]


def imported(*files: Path, gpus: int | None = None, clips: int | None = None) -> Imported:
    """Import files as the command does."""
    draft = import_files([str(file) for file in files], gpus, clips)
    recipe = files[0].with_suffix(".imported.toml")
    recipe.write_text(recipe_text(draft, files[0].name))
    return Imported(draft, load_recipe(recipe))
