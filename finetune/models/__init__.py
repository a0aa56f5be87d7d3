"""Model families: what each needs to be trained, one file a family. Adding one takes a file and a line here."""

import difflib
import importlib

from finetune.models.family import Family
from finetune.runtime.errors import UserError

FAMILIES = {
    "cogvideox": "finetune.models.cogvideox:CogVideoX",
    "cogvideox_i2v": "finetune.models.cogvideox:CogVideoXImageToVideo",
    "hunyuan": "finetune.models.hunyuan:HunyuanVideo",
    "ltx": "finetune.models.ltx:LTXVideo",
    "ltx_i2v": "finetune.models.ltx:LTXImageToVideo",
    "mochi": "finetune.models.mochi:Mochi",
}


def family_class(name: str) -> type[Family]:
    """The class of a family by its name in a recipe; raises UserError with the nearest name."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"families are: {', '.join(FAMILIES)}"
        raise UserError(f"unknown family {name!r}", cure, "model.family")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
