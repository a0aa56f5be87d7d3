"""The configs of published checkpoints that come with this package, and folders with all that `plan` reads of them: no weights.

Where they come from is said for each component: the configs in published_configs were read from the Hub, or are what diffusers'
conversion script saves; those of encoders are here, with the sizes of the models that these scripts take them from.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE as WITH_IMAGE
from safetensors.torch import save_file
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLTextConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
    T5Config,
    UMT5Config,
)

from finetune.models import tiny
from finetune.models.folder import INDEX, ModelFolder
from finetune.models.hunyuan15 import system_message
from finetune.models.hunyuan_i2v import HALVED

CONFIGS = Path(__file__).parent / "published_configs"


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        folder: of its configs, in `CONFIGS`.
        script: of diffusers, which saves the configs that were not read from the Hub.
        from_hub: components whose configs were read from the Hub.
    """

    folder: str
    script: str
    from_hub: tuple[str, ...] = ()


_READ = ("scheduler", "transformer", "vae")
_COG, _LTX = "convert_cogvideox_to_diffusers.py", "convert_ltx_to_diffusers.py"
_HUNYUAN, _HUNYUAN_15 = "convert_hunyuan_video_to_diffusers.py", "convert_hunyuan_video1_5_to_diffusers.py"
_MOCHI, _WAN = "convert_mochi_to_diffusers.py", "convert_wan_to_diffusers.py"

PUBLISHED = {  # a recipe's model.path -> its configs
    "zai-org/CogVideoX-2b": Published("cogvideox-2b", _COG, _READ),
    "zai-org/CogVideoX-5b": Published("cogvideox-5b", _COG, _READ),
    "zai-org/CogVideoX-5b-I2V": Published("cogvideox-5b-i2v", _COG, _READ),
    "zai-org/CogVideoX1.5-5B": Published("cogvideox-1.5-5b", _COG, ("vae",)),
    "zai-org/CogVideoX1.5-5B-I2V": Published("cogvideox-1.5-5b-i2v", _COG, ("vae",)),
    "hunyuanvideo-community/HunyuanVideo": Published("hunyuanvideo", _HUNYUAN, ("scheduler", "transformer")),
    "hunyuanvideo-community/HunyuanVideo-I2V": Published("hunyuanvideo-i2v", _HUNYUAN),
    "hunyuanvideo-community/HunyuanVideo-I2V-33ch": Published("hunyuanvideo-i2v-33ch", _HUNYUAN),
    "Lightricks/LTX-Video": Published("ltx-video", _LTX, _READ),
    "Lightricks/LTX-Video-0.9.5": Published("ltx-video-0.9.5", _LTX, ("transformer",)),
    "Lightricks/LTX-Video-0.9.7-dev": Published("ltx-video-0.9.7", _LTX, ("transformer",)),
    "genmo/mochi-1-preview": Published("mochi-1-preview", _MOCHI),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": Published("hunyuanvideo-1.5-480p-t2v", _HUNYUAN_15),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": Published("hunyuanvideo-1.5-480p-i2v", _HUNYUAN_15),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v": Published("hunyuanvideo-1.5-720p-i2v", _HUNYUAN_15),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published("wan2.1-t2v-1.3b", _WAN),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published("wan2.1-t2v-14b", _WAN),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": Published("wan2.1-i2v-14b", _WAN),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": Published("wan2.1-i2v-14b", _WAN),  # in its configs the same
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": Published("wan2.1-flf2v-14b", _WAN),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": Published("wan2.2-ti2v-5b", _WAN),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Published("wan2.2-t2v-a14b", _WAN),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": Published("wan2.2-i2v-a14b", _WAN),
}
_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
T5_XXL = T5Config(vocab_size=32128, **_XXL)  # google/t5-v1_1-xxl's encoder
UMT5_XXL = UMT5Config(vocab_size=256384, **_XXL)  # google/umt5-xxl's encoder
LLAMA = LlamaConfig(  # Llama 3 8B, with the tokens that LLaVA adds
    vocab_size=128320,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
CLIP_L_336 = CLIPVisionConfig(  # LLaVA's eye, openai/clip-vit-large-patch14-336
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


QWEN = Qwen2_5_VLTextConfig(  # Qwen2.5-VL 7B
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
)
BYT5_SMALL = T5Config(
    vocab_size=384,
    d_model=1472,
    d_kv=64,
    d_ff=3584,
    num_layers=12,
    num_heads=6,
    feed_forward_proj="gated-gelu",
    is_encoder_decoder=False,
    use_cache=False,
)
SIGLIP = SiglipVisionConfig(  # so400m-patch14-384
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


class PublishedFolder(ModelFolder):
    """The configs of a published checkpoint as this package has them, in a folder that goes with this object. It has no weights."""

    def __init__(self, hub_id: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="finetune_configs_")
        self._hub_id = hub_id
        super().__init__(complete(hub_id, Path(self._folder.name)))

    @property
    def origin(self) -> list[str]:
        """In words, which configs these are and where each comes from: two lines."""
        published = PUBLISHED[self._hub_id]
        others = sorted(name for name in self.index if self.has(name) and name not in published.from_hub)
        tokenizers = [name for name in others if name.startswith("tokenizer")]
        converted = [name for name in others if name not in tokenizers]
        read = f"{', '.join(published.from_hub)} as on the Hub; " if published.from_hub else ""
        return [
            f"configs: this package's own of {self._hub_id}, which is neither in the Hub's cache nor to be reached now",
            f"  {read}{', '.join(converted)} as diffusers' {published.script} saves them; "
            f"{', '.join(tokenizers)}: a stand-in, since texts are padded to one length",
        ]


def complete(path: str, folder: Path) -> Path:
    """Write all that `plan` reads of a published checkpoint to `folder`. `path` is a recipe's model.path."""
    shutil.copytree(CONFIGS / PUBLISHED[path].folder, folder, dirs_exist_ok=True)
    index = json.loads((folder / INDEX).read_text())
    for name, tokenizer in _with_encoders(folder, index).items():
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]  # small, since encoders pad to a fixed length
    (folder / INDEX).write_text(json.dumps(index))
    if "LTX" in index["_class_name"]:
        statistics = {"latents_mean": torch.zeros(128), "latents_std": torch.ones(128)}  # the values do not matter here
        save_file(statistics, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def _with_encoders(folder: Path, index: dict[str, list[str | None]]) -> dict[str, PreTrainedTokenizerBase]:
    """Write configs of the text encoders, and of an image encoder if there is one; returns tokenizers."""
    kind = index["text_encoder"][1]
    if kind == "LlamaModel":
        LLAMA.save_pretrained(folder / "text_encoder")
        CLIP_L.save_pretrained(folder / "text_encoder_2")
        template = DEFAULT_PROMPT_TEMPLATE["template"]
        return {"tokenizer": tiny.llama_tokenizer(template), "tokenizer_2": tiny.clip_tokenizer()}
    if kind == "LlavaForConditionalGeneration":
        return _with_llava(folder)
    if kind == "Qwen2_5_VLTextModel":
        QWEN.save_pretrained(folder / "text_encoder")
        BYT5_SMALL.save_pretrained(folder / "text_encoder_2")
        if "image_encoder" in index:
            SIGLIP.save_pretrained(folder / "image_encoder")
            SiglipImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder / "feature_extractor")
        return {"tokenizer": tiny.qwen_tokenizer(system_message(), length=108), "tokenizer_2": ByT5Tokenizer()}
    if kind == "UMT5EncoderModel":
        UMT5_XXL.save_pretrained(folder / "text_encoder")
        if (folder / "image_encoder").exists():  # whose config is among those that are published
            CLIPImageProcessor().save_pretrained(folder / "image_processor")
        return {"tokenizer": tiny.t5_tokenizer(max_length=512)}
    T5_XXL.save_pretrained(folder / "text_encoder")
    return {"tokenizer": tiny.t5_tokenizer(max_length=256)}


def _with_llava(folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    """Write the configs of HunyuanVideo-I2V's encoders; returns its tokenizers."""
    tokenizer = tiny.llama_tokenizer(WITH_IMAGE["template"], begin=2, halved=HALVED)
    llava = LlavaConfig(
        vision_config=CLIP_L_336,
        text_config=LLAMA,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        image_seq_length=576,
        vision_feature_layer=-2,
    )
    llava.save_pretrained(folder / "text_encoder")
    CLIP_L.save_pretrained(folder / "text_encoder_2")
    tiny.clip_image_processor(336).save_pretrained(folder / "image_processor")
    return {"tokenizer": tokenizer, "tokenizer_2": tiny.clip_tokenizer()}
