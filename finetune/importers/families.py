"""Which family a model of another trainer is, where it lies in the layout of diffusers, and which shapes it takes."""

import re
from dataclasses import dataclass

from finetune.importers.draft import Draft
from finetune.recipe.bucket import Area, Bucket
from finetune.runtime.errors import UserError


@dataclass(frozen=True)
class Shapes:
    """A model takes k x `frames` + 1 frames, and sides that are multiples of `side` pixels."""

    frames: int
    side: int


_SHAPES = {
    "cogvideox": Shapes(8, 16),
    "hunyuan": Shapes(4, 16),
    "hunyuan15": Shapes(4, 16),
    "ltx": Shapes(8, 32),
    "mochi": Shapes(6, 16),
    "wan": Shapes(4, 16),
}
_COGVIDEOX_5B_I2V = Bucket(49, 480, 720)

FPS = {"cogvideox": 8, "hunyuan": 24, "hunyuan15": 24, "ltx": 25, "mochi": 30, "wan": 16}
"""Frames per second that models of a family generate at."""

MODELS = {
    "wan_1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan_14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan_14b_i2v": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "wan_14b_flf2v": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    "wan2.2_5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "wan2.2_a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2_a14b_i2v": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "hunyuan": "hunyuanvideo-community/HunyuanVideo",
    "hunyuan_i2v": "hunyuanvideo-community/HunyuanVideo-I2V",
    "hunyuan15": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    "hunyuan15_i2v": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
    "ltx": "Lightricks/LTX-Video",
    "ltx_13b": "Lightricks/LTX-Video-0.9.7-dev",
    "mochi": "genmo/mochi-1-preview",
    "cogvideox": "zai-org/CogVideoX-5b",
}
"""Published checkpoints in the layout of diffusers, by the names of the shipped recipes."""

_NAMES = {
    "cogvideox": "cogvideox",
    "hunyuan": "hunyuan",
    "hunyuanvideo": "hunyuan",
    "hunyuanvideo15": "hunyuan15",
    "ltx": "ltx",
    "ltxv": "ltx",
    "ltxvideo": "ltx",
    "mochi": "mochi",
    "wan": "wan",
    "wan21": "wan",
}


def family_named(name: str, path: str, where: str) -> str:
    """The family of another trainer's name for it, and of the model's path, which tells image-to-video apart.

    Raises:
        UserError: no family of this project; `where` says which setting names it.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    if plain not in _NAMES:
        cure = "families here are " + ", ".join(_SHAPES) + ", each with _i2v too but mochi"
        raise UserError(f"{name!r} is no model that can be trained here", cure, where)
    family = _NAMES[plain]
    last = path.rstrip("/").rpartition("/")[2].lower()
    if family == "hunyuan" and "1.5" in last:
        family = "hunyuan15"
    is_image = re.search(r"(?<![a-z])(ti2v|i2v|flf2v)(?![a-z])", last.replace("_", "-"))
    return f"{family}_i2v" if is_image and is_image[1] != "ti2v" and family != "mochi" else family


def base_of(family: str) -> str:
    """A family without its `_i2v`."""
    return family.removesuffix("_i2v")


def put_published(draft: Draft, setting: str, name: str, where: str) -> None:
    """Take a published checkpoint for one that lies in another layout."""
    text = "the model is read in the layout of diffusers: a folder with model_index.json, or a Hub id"
    draft.change(setting, "model.path", MODELS[name], text, f"in place of {where.rpartition('/')[2]}")
    draft.todo.append(
        f"model.path: {MODELS[name]} is taken for {where}; set it to what you train, in the layout of diffusers"
    )


def published(family: str, written: str) -> str:
    """Which published checkpoint paths speak of, as `MODELS` names it."""
    plain = written.lower().replace("_", "-").replace(".", "")
    if base_of(family) == "wan":
        if "22" in plain and "5b" in plain:
            return "wan2.2_5b"
        suffix = "_i2v" if family.endswith("_i2v") else ""
        if "22" in plain or "a14b" in plain or "high-noise" in plain or "low-noise" in plain:
            return f"wan2.2_a14b{suffix}"
        if suffix:
            return "wan_14b_flf2v" if "flf2v" in plain else "wan_14b_i2v"
        return "wan_1.3b" if "13b" in plain else "wan_14b"
    if base_of(family) == "ltx":
        return "ltx_13b" if re.search(r"13b|0\.9\.[78]", written.lower()) and "2b-0" not in written.lower() else "ltx"
    return family if family in MODELS else base_of(family)


def put_experts(draft: Draft, written: str) -> None:
    """Of a checkpoint with two transformers, set which is trained."""
    if "A14B" not in str(draft.get("model.path", "")):
        return
    plain = written.lower().replace("_", "-")
    is_high, is_low = "high-noise" in plain, "low-noise" in plain
    if is_high != is_low:
        name = "high" if is_high else "low"
        draft.change(
            f"the {name}-noise model",
            "model.experts",
            [name],
            'the other is left as it is; ["high", "low"] trains both',
        )


def legal_bucket(draft: Draft, bucket: Bucket) -> Bucket:
    """The nearest shape that the draft's model takes: not more frames, since clips may not have more; sides to the nearest."""
    shapes, path = _SHAPES[base_of(draft.family)], str(draft.get("model.path", ""))
    side = 32 if "TI2V-5B" in path else shapes.side
    if draft.family == "cogvideox_i2v" and "1.5" not in path:
        return _COGVIDEOX_5B_I2V
    frames = (max(bucket.frames, 1) - 1) // shapes.frames * shapes.frames + 1
    if draft.family.endswith("_i2v"):
        frames = max(frames, shapes.frames + 1)
    return Bucket(frames, *(max(side, (length + side // 2) // side * side) for length in bucket[1:]))


def legal_area(draft: Draft, area: Area) -> Area:
    """An area that holds at least the smallest shape that the draft's model takes."""
    side = 32 if "TI2V-5B" in str(draft.get("model.path", "")) else _SHAPES[base_of(draft.family)].side
    return area if min(area) >= side else Area(*(max(side, length) for length in area))


def why_not(draft: Draft) -> str:
    """Which shapes the draft's model takes, in words."""
    shapes = _SHAPES[base_of(draft.family)]
    side = 32 if "TI2V-5B" in str(draft.get("model.path", "")) else shapes.side
    if draft.family == "cogvideox_i2v" and "1.5" not in str(draft.get("model.path", "")):
        return f"CogVideoX 5b-I2V takes {_COGVIDEOX_5B_I2V} only"
    return f"{draft.family} takes {shapes.frames}k + 1 frames, and sides that are multiples of {side}"
