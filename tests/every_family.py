"""Every family and variant there is, for tests that hold for all of them."""

import pytest

from finetune.models import FAMILIES, family_class

Model = tuple[str, str | None]

MODELS: list[Model] = [(name, variant) for name in FAMILIES for variant in family_class(name).variants or (None,)]
FIRST: list[Model] = [(name, next(iter(family_class(name).variants), None)) for name in FAMILIES]


def title(model: Model) -> str:
    return " ".join(part for part in model if part)


every_model = pytest.mark.parametrize("model", MODELS, ids=title)
every_family = pytest.mark.parametrize(
    "model", [pytest.param(m, marks=() if m in FIRST else pytest.mark.full, id=title(m)) for m in MODELS]
)
