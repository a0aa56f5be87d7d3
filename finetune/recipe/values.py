"""Values that recipes write as text: paths, buckets and areas."""

from pathlib import Path
from typing import Annotated, Any

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


# What other trainers and people call a family -> its name here.
FAMILY_ALIASES = {
    "ltx_video": "ltx",
    "ltxv": "ltx",
    "ltxvideo": "ltx",
    "hunyuan_video": "hunyuan",
    "hunyuanvideo": "hunyuan",
    "hunyuan_video_i2v": "hunyuan_i2v",
    "hunyuan_video_1.5": "hunyuan15",
    "hunyuan_1.5": "hunyuan15",
    "hunyuanvideo_1.5": "hunyuan15",
    "hunyuan_video_1_5": "hunyuan15",
    "cogvideo": "cogvideox",
    "cog_video_x": "cogvideox",
    "cogvideox_1.5": "cogvideox",
    "mochi_1": "mochi",
    "mochi1": "mochi",
    "genmo_mochi": "mochi",
    "wan2.1": "wan",
    "wan21": "wan",
    "wan_2.1": "wan",
    "wan2.2": "wan",
    "wan22": "wan",
    "wan_2.2": "wan",
    "wan_video": "wan",
    "wanvideo": "wan",
    "wan_t2v": "wan",
    "wan2.1_i2v": "wan_i2v",
    "wan2.2_i2v": "wan_i2v",
}


def family_name(value: Any) -> Any:
    """A family's name as it is here, of one that other trainers use; other values as they are."""
    if not isinstance(value, str) or ":" in value:
        return value
    plain = value.strip().lower().replace("-", "_").replace(" ", "_")
    return FAMILY_ALIASES.get(plain, value)
