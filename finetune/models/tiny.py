"""Parts of tiny pipelines: real tokenizers and encoders with random weights, small enough for tests and the quickstart."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import ModelMixin
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace, Punctuation, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CORPUS = (
    "a red ball moves to the left over a dark floor",
    "a green square turns slowly on a bright wall",
    "a blue triangle falls down, the camera follows it",
    "two yellow circles cross and grow, then shrink and fade away",
    "white stripes drift upwards; a small star blinks in the corner",
    "worst quality, inconsistent motion, blurry, jittery, distorted",
)


_SPECIAL = r"<\|\w+\|>|<image>"  # tokens by themselves in a template


def t5_tokenizer(max_length: int) -> PreTrainedTokenizerBase:
    """A T5 tokenizer (Unigram, like the original) of the words and characters in CORPUS, weighted by their frequency."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_pieces(CORPUS)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def llama_tokenizer(template: str, begin: int = 4, halved: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer with Llama 3's special tokens. Each word of the template is one token, to leave room for the caption.

    Pipelines drop as many tokens as the template has with Llama 3's tokenizer. Here it has fewer, so there are more of others.

    Args:
        begin: begin-of-text tokens that precede the text.
        halved: words of the template that are two tokens.
    """
    named = sorted(set(re.findall(_SPECIAL, template)))
    special = ["<|end_of_text|>", "<unk>", "<|begin_of_text|>", *named]
    words = [word for word in re.findall(r"\w+|[^\w\s]", re.sub(_SPECIAL, " ", template)) if word not in halved]
    pieces = dict(_pieces([*CORPUS, *words])) | {
        half: -5.0 for word in halved for half in (f"\N{LOWER ONE EIGHTH BLOCK}{word[:2]}", word[2:])
    }
    vocabulary = [*((token, 0.0) for token in special), *sorted(pieces.items())]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=1))
    tokenizer.pre_tokenizer = Sequence([Punctuation(), WhitespaceSplit(), Metaspace()])
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> " * begin + "$A", special_tokens=[("<|begin_of_text|>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|end_of_text|>",
        unk_token="<unk>",
        bos_token="<|begin_of_text|>",
        additional_special_tokens=special[3:],
        padding_side="right",
    )


def qwen_tokenizer(system: str, length: int) -> PreTrainedTokenizerBase:
    """A tokenizer with Qwen2.5's special tokens and chat template, in which a message of the system takes `length` tokens."""
    special = ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"]
    words = re.findall(r"\w+|[^\w\s]", f"{system} system user assistant")
    tokenizer = Tokenizer(Unigram([*((token, 0.0) for token in special), *_pieces([*CORPUS, *words])], unk_id=1))
    tokenizer.pre_tokenizer = Sequence([Punctuation(), WhitespaceSplit(), Metaspace()])
    qwen = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[2:3],
        padding_side="right",
    )
    head = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    # Each word is one token here, so there are fewer than Qwen's: more of the first one precede it.
    missing = length - len(qwen(head, add_special_tokens=False).input_ids)
    qwen.chat_template = (
        "<|im_start|>" * missing
        + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return qwen


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """A CLIP tokenizer whose vocabulary is the single bytes."""
    letters = sorted(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _pieces(captions: Iterable[str]) -> list[tuple[str, float]]:
    """(piece, log of its share) for each word and character of the captions."""
    words = [f"\N{LOWER ONE EIGHTH BLOCK}{word}" for caption in captions for word in caption.split()]
    pieces = Counter(words) + Counter("".join(words))  # counted, not trained: tokenizers' trainer is not deterministic
    total = sum(pieces.values())
    return [(piece, math.log(count / total)) for piece, count in sorted(pieces.items())]


def llama_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> LlamaModel:
    """A Llama of three layers, because the pipeline takes the hidden state before the last two."""
    return LlamaModel(_llama_config(tokenizer, width)).eval()


def _llama_config(tokenizer: PreTrainedTokenizerBase, width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.pad_token_id,
    )


def llava_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> LlavaForConditionalGeneration:
    """The same Llama, which sees images of 48 x 48 pixels as 576 tokens, as many as the real one makes of 336 x 336."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
        projection_dim=16,
    )
    text = _llama_config(tokenizer, width)
    text.initializer_range = vision.initializer_range = (
        0.2  # so that tokens of text and image differ by more than rounding
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        image_seq_length=576,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config).eval()


def clip_image_processor(size: int = 32) -> CLIPImageProcessor:
    """CLIP's scaling and cropping of images to a square of `size` pixels."""
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def qwen_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> Qwen2_5_VLTextModel:
    """The language model of Qwen2.5-VL in three layers, because the pipeline takes the hidden state before the last two."""
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )
    return Qwen2_5_VLTextModel(config).eval()


def clip_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> CLIPTextModel:
    """A two-layer CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


CLIP_TOKENS = 17  # of an image, with the class token


def clip_image_encoder(width: int) -> CLIPVisionModel:
    """A CLIP image encoder of three layers, because pipelines take the output of the last but one."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def t5_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> T5EncoderModel:
    """A two-layer T5 encoder with gated GELU, as in v1.1."""
    return T5EncoderModel(T5Config(**_t5_settings(tokenizer, width))).eval()


def umt5_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> UMT5EncoderModel:
    """The same of UMT5."""
    return UMT5EncoderModel(UMT5Config(**_t5_settings(tokenizer, width))).eval()


def _t5_settings(tokenizer: PreTrainedTokenizerBase, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }


@torch.no_grad()
def normalise_latents(vae: ModelMixin, frames: int, size: int) -> None:
    """Set a VAE's `latents_mean` and `latents_std` buffers so that latents have about unit variance, as real ones do."""
    z = latents(vae, frames, size)
    vae.latents_mean.copy_(z.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(z.std((0, 2, 3, 4)))


@torch.no_grad()
def scale_latents(vae: ModelMixin, frames: int, size: int, at_once: int = 8) -> None:
    """Set a VAE's `scaling_factor` so that latents have about unit variance, if it is all that the VAE has."""
    z = latents(vae, frames, size, at_once)
    vae.register_to_config(scaling_factor=1 / z.square().mean().sqrt().item())


@torch.no_grad()
def latents(vae: ModelMixin, frames: int, size: int, at_once: int = 8) -> Tensor:
    """Latents (8, C, F, H, W) of videos that show a few rectangles on plain dark floors, `at_once` of them encoded together."""
    floor = torch.rand(8, 3, 1, 1, 1) * 0.4 - 0.9
    shape = torch.rand(8, 3, 1, 1, 1) * 2 - 1
    video = torch.where(torch.rand(8, 1, 3, 4, 4) < 0.15, shape, floor)
    video = nn.functional.interpolate(video, (frames, size, size), mode="nearest")
    return torch.cat([vae.eval().encode(part).latent_dist.mode() for part in video.split(at_once)])
