"""The published checkpoints at full size, as folders without weights: finetune/models/published_configs."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import ROOT
from safetensors.torch import save_file

from finetune.models import family_class
from finetune.models.family import Family
from finetune.models.folder import ModelFolder

CONFIGS = ROOT / "finetune" / "models" / "published_configs"


@dataclass(frozen=True)
class Checkpoint:
    """What is published of a checkpoint: families that train it, parameters of its transformer, blocks by list."""

    families: tuple[str, ...]
    billions: str
    blocks: dict[str, int]


CHECKPOINTS = {
    "cogvideox-2b": Checkpoint(("cogvideox",), "1.69", {"transformer_blocks": 30}),
    "cogvideox-5b": Checkpoint(("cogvideox",), "5.57", {"transformer_blocks": 42}),
    "cogvideox-5b-i2v": Checkpoint(("cogvideox_i2v",), "5.57", {"transformer_blocks": 42}),
    "cogvideox-1.5-5b": Checkpoint(("cogvideox",), "5.57", {"transformer_blocks": 42}),
    "cogvideox-1.5-5b-i2v": Checkpoint(("cogvideox_i2v",), "5.57", {"transformer_blocks": 42}),
    "hunyuanvideo": Checkpoint(("hunyuan",), "12.8", {"transformer_blocks": 20, "single_transformer_blocks": 40}),
    "hunyuanvideo-i2v": Checkpoint(
        ("hunyuan_i2v",), "12.821", {"transformer_blocks": 20, "single_transformer_blocks": 40}
    ),
    "hunyuanvideo-i2v-33ch": Checkpoint(
        ("hunyuan_i2v",), "12.811", {"transformer_blocks": 20, "single_transformer_blocks": 40}
    ),
    "hunyuanvideo-1.5-480p-t2v": Checkpoint(("hunyuan15",), "8.327", {"transformer_blocks": 54}),
    "hunyuanvideo-1.5-480p-i2v": Checkpoint(("hunyuan15_i2v",), "8.327", {"transformer_blocks": 54}),
    "hunyuanvideo-1.5-720p-i2v": Checkpoint(("hunyuan15_i2v",), "8.327", {"transformer_blocks": 54}),
    "ltx-video": Checkpoint(("ltx", "ltx_i2v"), "1.92", {"transformer_blocks": 28}),
    "ltx-video-0.9.1": Checkpoint(("ltx", "ltx_i2v"), "1.92", {"transformer_blocks": 28}),
    "ltx-video-0.9.5": Checkpoint(("ltx", "ltx_i2v"), "1.92", {"transformer_blocks": 28}),
    "ltx-video-0.9.7": Checkpoint(("ltx", "ltx_i2v"), "13.0", {"transformer_blocks": 48}),
    "wan2.1-t2v-1.3b": Checkpoint(("wan",), "1.419", {"blocks": 30}),
    "wan2.1-t2v-14b": Checkpoint(("wan",), "14.288", {"blocks": 40}),
    "wan2.1-i2v-14b": Checkpoint(("wan_i2v",), "16.395", {"blocks": 40}),
    "wan2.1-flf2v-14b": Checkpoint(("wan_i2v",), "16.396", {"blocks": 40}),
    "wan2.2-ti2v-5b": Checkpoint(("wan", "wan_i2v"), "5.000", {"blocks": 30}),
    "wan2.2-t2v-a14b": Checkpoint(("wan",), "14.288", {"blocks": 40}),
    "wan2.2-i2v-a14b": Checkpoint(("wan_i2v",), "14.289", {"blocks": 40}),
    "mochi-1-preview": Checkpoint(("mochi",), "10.0", {"transformer_blocks": 48}),
}

PAIRS = [(name, checkpoint) for checkpoint, facts in CHECKPOINTS.items() for name in facts.families]


def open_full_size(name: str, checkpoint: str, folder: Path) -> Family:
    """A family on a published checkpoint; `folder` is written where the family reads more than configs."""
    if not checkpoint.startswith("ltx"):
        return family_class(name)(ModelFolder(CONFIGS / checkpoint))
    shutil.copytree(CONFIGS / checkpoint, folder, dirs_exist_ok=True)
    statistics = {"latents_mean": torch.zeros(128), "latents_std": torch.ones(128)}  # the values play no part here
    save_file(statistics, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return family_class(name)(ModelFolder(folder))
