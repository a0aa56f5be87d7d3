"""Values that recipes write as text: paths, buckets and areas."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from finetune.recipe.bucket import Area, Bucket
from finetune.runtime.paths import expanded


def _path(value: object) -> object:
    return expanded(value) if isinstance(value, str) and value else value


PathText = Annotated[Path, BeforeValidator(_path), PlainSerializer(str), WithJsonSchema({"type": "string"})]
BucketText = Annotated[
    Bucket,
    BeforeValidator(Bucket.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+x\d+x\d+$"}),
]
AreaText = Annotated[
    Area,
    BeforeValidator(Area.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+x\d+$"}),
]
