"""Every family and variant there is, for tests that hold for all of them."""

import pytest

from finetune.models import FAMILIES, family_class

Model = tuple[str, str | None]

MODELS: list[Model] = [(name, variant) for name in FAMILIES for variant in family_class(name).variants or (None,)]
FIRST: list[Model] = [(name, next(iter(family_class(name).variants), None)) for name in FAMILIES]


def title(model: Model) -> str:
    return " ".join(part for part in model if part)


def _marks(is_long: bool) -> tuple:
    return (pytest.mark.full,) if is_long else ()


every_model = pytest.mark.parametrize("model", MODELS, ids=title)
# Other variants of a family are run by --full.
every_family = pytest.mark.parametrize(
    "model", [pytest.param(model, marks=_marks(model not in FIRST), id=title(model)) for model in MODELS]
)
# All weights of other variants are trained by --full.
every_model_and_method = pytest.mark.parametrize(
    "model, method",
    [
        pytest.param(
            model, method, marks=_marks(method == "full" and model not in FIRST), id=f"{title(model)} {method}"
        )
        for model in MODELS
        for method in ("lora", "full")
    ],
)
