"""Full training of some of the model's own weights, chosen by name, beside frozen ones."""

import re
from fnmatch import fnmatchcase

from diffusers import ModelMixin
from torch import nn

from finetune.models.family import Family
from finetune.recipe.schema import Partial
from finetune.runtime.errors import UserError

_KEY = "partial.modules"
_SHOWN = 12  # words of names that an error lists


def chosen(transformer: nn.Module, family: Family, patterns: list[str]) -> list[str]:
    """The names of the parameters that are trained. The transformer may be on the meta device.

    Raises:
        UserError: nothing is named, a pattern names nothing, or only what no loss reaches.
    """
    if not patterns:
        cure = 'write some, like ["norm", "*.bias"], or set train.method = "full" for all weights'
        raise UserError("nothing is named that could be trained", cure, _KEY)
    without = family.without_gradient(transformer)
    idle = {id(parameter) for parameter in without}
    names = [name for name, parameter in transformer.named_parameters() if id(parameter) not in idle]
    for pattern in patterns:
        if not any(char.isalnum() or char in "*?" for char in pattern):
            cure = 'remove it, or write a part of a name, like "norm"; train.method = "full" trains all weights'
            raise UserError(f"{pattern!r} has no letter or number of a name", cure, _KEY)
        if not any(_is_named(name, pattern) for name in names):
            raise UserError(
                f"{pattern!r} names no weight that is trained", f"names have these parts: {_words(names)}", _KEY
            )
    return [name for name in names if any(_is_named(name, pattern) for pattern in patterns)]


def _is_named(name: str, pattern: str) -> bool:
    """Whether a pattern with wildcards fits the whole name, or one without is in it, not in the middle of a word or a number."""
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(name, pattern)
    before = r"(?<![a-zA-Z])" if pattern[0].isalpha() else r"(?<!\d)"
    after = r"(?![a-zA-Z])" if pattern[-1].isalpha() else r"(?!\d)"
    return re.search(before + re.escape(pattern) + after, name) is not None


def _words(names: list[str]) -> str:
    """Parts of names between dots, without numbers, the most frequent first."""
    words = [word for name in names for word in name.split(".") if not word.isdigit()]
    found = sorted(set(words), key=lambda word: (-words.count(word), word))
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")


def check(transformer: nn.Module, family: Family, settings: Partial) -> None:
    """Raise UserError for settings that the model cannot have."""
    chosen(transformer, family, settings.modules)


def add(transformer: ModelMixin, family: Family, settings: Partial, seed: int) -> None:
    """Have the chosen parameters trained."""
    for name in chosen(transformer, family, settings.modules):
        transformer.get_parameter(name).requires_grad_(True)
