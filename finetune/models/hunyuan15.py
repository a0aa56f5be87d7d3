"""HunyuanVideo-1.5 (Tencent 2025), text-to-video and image-to-video.

Training follows diffusers' HunyuanVideo15 pipelines in reverse: flow matching on VAE latents that are scaled by one factor. The
text is encoded by Qwen2.5-VL, inside a chat template, and what stands in it in quotes also by ByT5, letter for letter, so that
it can be written in the video. Beside the noised latents, the transformer takes those of given frames, and a mask of these.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import ByT5Tokenizer, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from finetune.models import hunyuan15_transformer, original_names, tiny
from finetune.models.batch import Tensors
from finetune.models.encoder import EncodedImage, Encoder, FileHash
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.sample import SampleLike
from finetune.models.text_limit import TextLimit, chat_template
from finetune.models.text_mask import MARK, cut
from finetune.recipe import Bucket
from finetune.recipe.schema import Data, Model, ObjectiveSettings, Vae
from finetune.recipe.validation import Prompt
from finetune.runtime.errors import Problem

_SIGLIP = ("image_encoder", "feature_extractor")
_IMAGE_TOKENS = 729  # a constant of the pipelines, as are the next
_TEXT_TOKENS, _GLYPH_TOKENS = 1000, 256
_TEMPLATE_TOKENS = 108
_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
_GLYPHS_END = '". '  # behind what is in quotes
_GLYPHS = ("encoder_hidden_states_2", "encoder_attention_mask_2")


class HunyuanVideo15(Family):
    """HunyuanVideo-1.5, text-to-video."""

    name = "hunyuan15"
    title = "HunyuanVideo-1.5"
    pipeline_classes = ("HunyuanVideo15Pipeline",)
    transformer_class = "HunyuanVideo15Transformer3DModel"
    attention_masks = "padding"
    original_layers = original_names.HUNYUAN15
    original_spellings = original_names.HUNYUAN_SPELLINGS
    lora_spellings = original_names.HUNYUAN_LORA_SPELLINGS
    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    components: ClassVar[tuple[str, ...]] = ("scheduler", "guider", "vae", "transformer", *text_components)
    text_arguments: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_embeds_mask",
        "encoder_hidden_states_2": "prompt_embeds_2",
        "encoder_attention_mask_2": "prompt_embeds_mask_2",
    }

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        vae, transformer = folder.config("vae"), self.transformer_config
        self.spatial, self.temporal = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
        self.scaling_factor = vae["scaling_factor"]
        self.patch, self.patch_t = transformer["patch_size"], transformer["patch_size_t"]

    def problems(self, model: Model, data: Data) -> list[Problem]:
        found = super().problems(model, data)
        if self.transformer_config.get("use_meanflow"):
            what = "this is a step-distilled checkpoint (use_meanflow): flow matching is not what it was trained for"
            cure = "train on the checkpoint that it was distilled from; LoRAs of that one can be tried with this one"
            found.append(Problem(what, str(self.folder.path / self.trained_component), cure))
        return found

    # Encoding

    def text_encoder(self, device: torch.device, dtype: torch.dtype) -> Callable[[str], Tensors]:
        pipeline = getattr(diffusers, self.pipeline_class)  # its helpers are static: it cannot be built without a VAE
        tokenizer, encoder, tokenizer_2, encoder_2 = (
            self.transformers_component(name, device, dtype) for name in self.text_components
        )

        @torch.no_grad()
        def encode(caption: str) -> Tensors:
            text, mask = pipeline._get_mllm_prompt_embeds(encoder, tokenizer, caption, device)
            glyphs, glyph_mask = pipeline._get_byt5_prompt_embeds(tokenizer_2, encoder_2, caption, device)
            tensors = text, mask, glyphs, glyph_mask
            return dict(zip((*_TEXT, *_GLYPHS), (tensor[0].to(dtype) for tensor in tensors), strict=True))

        return encode

    def text_limits(self) -> tuple[TextLimit, ...]:
        # Imported when it is needed, because it imports the text encoder's code, too.
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input

        template = chat_template(lambda caption: format_text_input([caption], system_message())[0])
        return (
            TextLimit(_TEXT_TOKENS, template=template, dropped=_TEMPLATE_TOKENS, special_tokens=False),
            TextLimit(
                _GLYPH_TOKENS, "tokenizer_2", _glyphs, template=lambda tokenizer: ("", _GLYPHS_END), of="text in quotes"
            ),
        )

    def example_text(self, dtype: torch.dtype) -> Tensors:
        config = self.transformer_config
        return {
            "encoder_hidden_states": torch.zeros(_TEXT_TOKENS, config["text_embed_dim"], dtype=dtype),
            "encoder_attention_mask": torch.ones(_TEXT_TOKENS, dtype=dtype),
            "encoder_hidden_states_2": torch.zeros(_GLYPH_TOKENS, config["text_embed_2_dim"], dtype=dtype),
            "encoder_attention_mask_2": torch.ones(_GLYPH_TOKENS, dtype=dtype),
        }

    def normalise(self, z: Tensor) -> Tensor:
        return z * self.scaling_factor

    # Training

    def adapt_transformer(self, transformer: HunyuanVideo15Transformer3DModel) -> HunyuanVideo15Transformer3DModel:
        return hunyuan15_transformer.adapt(transformer)

    def without_gradient(self, transformer: HunyuanVideo15Transformer3DModel) -> list[nn.Parameter]:
        """The last block's text is thrown away, and with it what makes the text's queries and changes it after attention."""
        last = transformer.transformer_blocks[-1]
        modules = [last.attn.add_q_proj, last.attn.norm_added_q, last.attn.to_add_out, last.ff_context]
        if not self.takes_image:
            modules.append(transformer.image_embedder)
        return [parameter for module in modules for parameter in module.parameters()]

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        dtype = text["encoder_hidden_states"].dtype
        given = condition["given"] if self.takes_image else torch.zeros_like(torch.cat([noisy, noisy[:, :1]], 1))
        text, masks_text = cut(text, self.keeps_text_length)
        text, masks_glyphs = self._cut_glyphs(text)
        return {
            "hidden_states": torch.cat([noisy, given], 1).to(dtype),
            "timestep": (level * 1000).to(dtype),
            "image_embeds": None,
            **text,
            MARK: not (masks_text or masks_glyphs),
        }

    def _cut_glyphs(self, text: Tensors) -> tuple[Tensors, bool]:
        """`cut` for glyphs, of which most captions have none.

        None are zero tokens, not None, so that the weights of their embedder get a gradient on every rank.
        """
        if self.keeps_text_length or bool(text[_GLYPHS[1]].any()):
            return cut(text, self.keeps_text_length, _GLYPHS)
        return {**text, **{name: text[name][:, :0] for name in _GLYPHS}}, False

    # Generating

    def sampling_arguments(self, prompt: Prompt) -> dict[str, Any]:
        return {}

    def prompt_components(self, prompt: Prompt) -> dict[str, Any]:
        guider = getattr(diffusers, self.folder.class_name("guider")).from_config(self.folder.config("guider"))
        return {"guider": guider if prompt.guidance is None else guider.new(guidance_scale=prompt.guidance)}

    @classmethod
    def tiny(cls, path: Path, seed: int = 0, variant: str | None = None) -> None:
        torch.manual_seed(seed)
        pipeline = getattr(diffusers, cls.pipeline_classes[0])
        pipeline(**cls._tiny_components()).save_pretrained(path)

    @classmethod
    def _tiny_components(cls) -> dict[str, Any]:
        tokenizer, tokenizer_2 = tiny.qwen_tokenizer(system_message(), length=_TEMPLATE_TOKENS), ByT5Tokenizer()
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(4, 4, 8, 8, 8),
            layers_per_block=1,
            spatial_compression_ratio=16,
            temporal_compression_ratio=4,
        )
        vae.encoder.conv_out.conv.bias.data[4:] = -10  # low log-variances, as a trained VAE's posterior is narrow
        tiny.scale_latents(vae, frames=17, size=64, at_once=1)  # its attention takes no more than one video
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=32,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            target_size=80,
            task_type="i2v" if cls.takes_image else "t2v",
        )
        return {
            "text_encoder": tiny.qwen_encoder(tokenizer, width=32),
            "tokenizer": tokenizer,
            "transformer": transformer.to(
                torch.bfloat16
            ),  # half the size: the glyphs' embedder is 2048 wide in any config
            "vae": vae,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
            "text_encoder_2": tiny.t5_encoder(tokenizer_2, width=32),
            "tokenizer_2": tokenizer_2,
            "guider": ClassifierFreeGuidance(guidance_scale=6.0),
        }


class HunyuanVideo15ImageToVideo(HunyuanVideo15):
    """HunyuanVideo-1.5, image-to-video.

    The image's latents are given at the first frame, and SigLIP's tokens beside the text. The VAE is causal, so the image's
    latents are the first of its clip. The pipeline takes the video's size from the image.
    """

    name = "hunyuan15_i2v"
    title = "HunyuanVideo-1.5 image-to-video"
    pipeline_classes = ("HunyuanVideo15ImageToVideoPipeline",)
    components = (*HunyuanVideo15.components, *_SIGLIP)
    takes_image = True

    @property
    def least_frames(self) -> int:
        return self.temporal + 1

    def unused_keys(self) -> dict[str, str]:
        return super().unused_keys() | {"vae.image_noise": f"the condition images of {self.title} have no noise"}

    # Encoding

    def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
        load = partial(self.image_encoder, dtype=dtype)
        siglip = Encoder("image_embeds", ("first_frame",), "last_hidden_state", self._image_fingerprint, load)
        return (*super().encoders(dtype, settings), siglip)

    def _image_fingerprint(self, file_hash: FileHash) -> list[Any]:
        return [self.folder.fingerprint(name, file_hash) for name in _SIGLIP]

    def image_encoder(self, device: torch.device, dtype: torch.dtype) -> Callable[[np.ndarray], Tensors]:
        """Load SigLIP. Returns a function from an image, uint8 (H, W, 3), to its embeddings (tokens, D)."""
        pipeline = getattr(diffusers, self.pipeline_class)
        encoder, processor = (self.transformers_component(name, device, dtype) for name in _SIGLIP)

        @torch.no_grad()
        def encode(image: np.ndarray) -> Tensors:
            height, width = (side // self.spatial * self.spatial for side in image.shape[:2])
            shown = Image.fromarray(image[:height, :width])  # without what `condition_image` adds
            return {"embeds": pipeline._get_image_embeds(encoder, processor, shown, device)[0]}

        return encode

    def example(self, bucket: Bucket, dtype: torch.dtype) -> dict[str, Tensors]:
        embeds = torch.zeros(_IMAGE_TOKENS, self.transformer_config["image_embed_dim"], dtype=dtype)
        return super().example(bucket, dtype) | {"image_embeds": {"embeds": embeds}}

    # Training

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        given = torch.zeros(x0.shape[0] + 1, *x0.shape[1:])  # latents, and the mask of frames that they are given for
        embeds = sample.encoded["image_embeds"]["embeds"]
        if sample.image_dropped:
            return {"given": given, "embeds": torch.zeros_like(embeds)}
        given[:-1, 0] = self.normalise(sample.moments["mean"][:, 0].float())
        given[-1, 0] = 1
        return {"given": given, "embeds": embeds}

    def inputs(
        self, noisy: Tensor, level: Tensor, text: Tensors, condition: Tensors, samples: Sequence[SampleLike]
    ) -> dict[str, Any]:
        inputs = super().inputs(noisy, level, text, condition, samples)
        dropped = [sample.image_dropped for sample in samples]
        kept = 0 if all(dropped) and not self.keeps_text_length else _IMAGE_TOKENS
        embeds = condition["embeds"][:, :kept].to(inputs["hidden_states"].dtype)
        return inputs | {
            "image_embeds": embeds,
            "timestep_r": None,
            MARK: inputs[MARK] and not (kept and any(dropped)),
        }

    # Generating

    def shape_arguments(self, shape: Bucket) -> dict[str, int]:
        return {"num_frames": shape.frames}

    def condition_image(self, image: Image.Image, shape: Bucket) -> Image.Image:
        """The image, scaled to cover a video's frame and cropped to it; it has a row or column more where the pipeline would
        else make another size of it. The pipeline's own crop takes that away.
        """
        fitted = self._processor.resize(image, height=shape.height, width=shape.width, resize_mode="crop")
        height, width = self._image_size(shape) or shape[1:]
        pixels = np.asarray(fitted)
        return Image.fromarray(np.pad(pixels, ((0, height - shape.height), (0, width - shape.width), (0, 0)), "edge"))

    def prompt_problem(self, prompt: Prompt) -> str | None:
        if prompt.shape is not None and self._image_size(prompt.shape) is None:
            return (
                f"{self.title} takes the size from the image, and makes no {prompt.shape}; {self._near(prompt.shape)}"
            )
        return super().prompt_problem(prompt)

    @property
    def _processor(self) -> HunyuanVideo15ImageProcessor:
        return HunyuanVideo15ImageProcessor(vae_scale_factor=self.spatial)

    def _image_size(self, shape: Bucket) -> tuple[int, int] | None:
        """(height, width) of an image of which the pipeline makes a video of a shape; None if it makes none."""
        for height, width in (shape[1:], (shape.height + 1, shape.width), (shape.height, shape.width + 1)):
            made = self._processor.calculate_default_height_width(height, width, self.transformer_config["target_size"])
            if made == shape[1:]:
                return height, width
        return None

    def _near(self, shape: Bucket) -> str:
        """The shape nearest in its proportions that the pipeline makes, in words."""
        size = self._processor.calculate_default_height_width(
            shape.height, shape.width, self.transformer_config["target_size"]
        )
        return f"the nearest is {Bucket(shape.frames, *size)}. Clips of the shape can be trained on"

    def encoded_components(self, encoded: Mapping[str, Tensors], device: torch.device) -> dict[str, Any]:
        embeds = encoded["image_embeds"]["embeds"].to(device)
        processor = self.transformers_component("feature_extractor", device, embeds.dtype)
        return {"feature_extractor": processor, "image_encoder": EncodedImage(embeds[None])}

    @classmethod
    def _tiny_components(cls) -> dict[str, Any]:
        config = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=54,
            patch_size=2,
        )
        return super()._tiny_components() | {
            "image_encoder": SiglipVisionModel(config).eval(),
            "feature_extractor": SiglipImageProcessor(size={"height": 54, "width": 54}),
        }


def _glyphs(caption: str) -> str | None:
    """What is in quotes in a caption, as ByT5 reads it, without the end; None if nothing is."""
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

    text = extract_glyph_texts(caption)
    return text and text.removesuffix(_GLYPHS_END)


def system_message() -> str:
    """What the chat template tells the text encoder before the caption: the default of the pipelines' own helper."""
    helper = diffusers.HunyuanVideo15Pipeline._get_mllm_prompt_embeds
    return inspect.signature(helper).parameters["system_message"].default
