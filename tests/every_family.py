"""Every family and variant there is, for tests that hold for all of them.

A test runs by default over what the code it is about tells apart, and with --full over all models: families where it encodes,
noises and predicts; kinds of transformer where it wraps, stores or moves blocks, whatever they are given.
"""

from collections.abc import Iterable, Sequence

import pytest

from finetune.models import FAMILIES, family_class

Model = tuple[str, str | None]

MODELS: list[Model] = [(name, variant) for name in FAMILIES for variant in family_class(name).variants or (None,)]
FIRST: list[Model] = [(name, next(iter(family_class(name).variants), None)) for name in FAMILIES]
# One model for each kind of transformer: that of image-to-video is the one of text-to-video.
TRANSFORMERS: list[Model] = list(
    {family_class(model[0]).transformer_class: model for model in reversed(FIRST)}.values()
)
TWO_LISTS: Model = ("hunyuan", None)  # whose blocks are of two kinds, in two lists


# A model for each way in which the code of models goes on: packed latents, v-prediction, two lists of blocks, image-to-video.
FEW: list[Model] = [model for model in FIRST if model[0] in ("ltx", "cogvideox", "hunyuan", "wan_i2v")]


def few(values: Iterable, count: int = 1) -> list:
    """Cases, of which the first `count` run by default and the others with --full."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=_marks(place >= count))
        for place, value in enumerate(values)
    ]


def title(model: Model) -> str:
    return " ".join(part for part in model if part)


def _marks(is_long: bool) -> tuple:
    return (pytest.mark.full,) if is_long else ()


def _over(short: Sequence[Model]) -> pytest.MarkDecorator:
    cases = [pytest.param(model, marks=_marks(model not in short), id=title(model)) for model in MODELS]
    return pytest.mark.parametrize("model", cases)


every_model = _over(MODELS)
every_family = _over(FIRST)
few_families = _over(FEW)
every_transformer = _over(TRANSFORMERS)


def every_transformer_with(names: str, first: Sequence, others: Sequence) -> pytest.MarkDecorator:
    """Parametrise `model` and `names` (separated by ", "): by default every kind of transformer has the values of `first`,
    and one of them those of `others`.
    """
    cases = []
    for model in MODELS:
        for value in (*first, *others):
            values = value if isinstance(value, tuple) else (value,)
            is_short = model in TRANSFORMERS if value in first else model == TWO_LISTS
            title_ = f"{title(model)} {' '.join(map(str, values))}"
            cases.append(pytest.param(model, *values, marks=_marks(not is_short), id=title_))
    return pytest.mark.parametrize(f"model, {names}", cases)
