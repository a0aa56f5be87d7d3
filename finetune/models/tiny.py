"""Parts of tiny pipelines: real tokenizers and encoders with random weights, small enough for tests and the quickstart."""

import math
from collections import Counter

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5TokenizerFast

CORPUS = (
    "a red ball moves to the left over a dark floor",
    "a green square turns slowly on a bright wall",
    "a blue triangle falls down, the camera follows it",
    "two yellow circles cross and grow, then shrink and fade away",
    "white stripes drift upwards; a small star blinks in the corner",
    "worst quality, inconsistent motion, blurry, jittery, distorted",
)


def t5_tokenizer(max_length: int) -> PreTrainedTokenizerBase:
    """A T5 tokenizer (Unigram, as the original) of the captions' words and characters, weighted by how often they occur."""
    words = [f"\N{LOWER ONE EIGHTH BLOCK}{word}" for caption in CORPUS for word in caption.split()]
    pieces = Counter(words) + Counter("".join(words))  # counted, not trained: tokenizers' trainer is not deterministic
    total = sum(pieces.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, math.log(count / total)) for piece, count in sorted(pieces.items())]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def t5_encoder(tokenizer: PreTrainedTokenizerBase, width: int) -> T5EncoderModel:
    """A two-layer T5 encoder with gated GELU, as in v1.1."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


@torch.no_grad()
def normalise_latents(vae: nn.Module, frames: int, size: int) -> None:
    """Set `latents_mean` and `latents_std` from videos of a few moving rectangles on plain dark floors.

    Normalised latents of such clips then have about unit variance, as those of real checkpoints do.
    """
    floor = torch.rand(8, 3, 1, 1, 1) * 0.4 - 0.9
    shape = torch.rand(8, 3, 1, 1, 1) * 2 - 1
    video = torch.where(torch.rand(8, 1, 3, 4, 4) < 0.15, shape, floor)
    video = nn.functional.interpolate(video, (frames, size, size), mode="nearest")
    z = vae.eval().encode(video).latent_dist.mode()
    vae.latents_mean.copy_(z.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(z.std((0, 2, 3, 4)))
