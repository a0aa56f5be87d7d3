"""Trains the small text-to-video pipeline that `python -m finetune demo` writes.

    python -m benchmarks.demo_model --work runs/demo_model                 # hours on 2 cores; the same command resumes
    python -m benchmarks.demo_model --work /tmp/short --steps 20           # a trial of every part
    python -m benchmarks.demo_model --work runs/demo_model --write finetune/demo_model

It is a Wan pipeline: a VAE that has seen all shapes, a random text encoder, and a transformer that has seen all but the ring.
Sizes, rates and seeds are in finetune/demo_model/recipe.toml. Each step draws from its own number, so a training that was
killed goes on as if it had not been.
"""

import argparse
import json
import math
import os
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from transformers import T5TokenizerFast

from finetune.data.shapes import CAPTIONS, COLOURS, DIRECTIONS, FLOORS, FRAMES, NEW_SHAPE, SHAPES, draw, random_scene
from finetune.models import tiny

RECIPE = Path(__file__).parents[1] / "finetune" / "demo_model" / "recipe.toml"
LATENT_CHANNELS = 8
TEXT_LENGTH = 512  # tokens, as the pipeline pads to
SHORT = 32  # tokens of captions that the training computes
SPARE_WORDS = ("zorb", "ohwx", "sks")  # trigger words that are whole tokens; any other is spelt
Settings = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the states; the same one resumes")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--steps", type=int, help="of each part, at most: for a trial")
    parser.add_argument("--every", type=int, default=50, help="steps from one saved state to the next (50)")
    parser.add_argument(
        "--write", type=Path, help="folder to write the pipeline to in bfloat16, as far as it is trained"
    )
    parser.add_argument("--only-write", action="store_true", help="do not train")
    arguments = parser.parse_args()
    recipe = tomllib.loads(arguments.recipe.read_text())
    if arguments.steps is not None:
        shorten(recipe, arguments.steps)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.only_write:
        train_vae(recipe, arguments.work, arguments.every)
        train_transformer(recipe, arguments.work, arguments.every)
    if arguments.write:
        write(recipe, arguments.work, arguments.write)


def shorten(recipe: Settings, steps: int) -> None:
    """Bound the number of steps and clips of each part."""
    for part in ("vae", "transformer"):
        for name in ("frames", "crops", "whole", "steps", "clips"):
            if name in recipe[part]:
                recipe[part][name] = min(recipe[part][name], steps)


# The parts


def new_vae(settings: Settings, seed: int) -> AutoencoderKLWan:
    """A VAE that compresses 8x in space and 4x in time. Its convolutions see half-size pictures and have multiples of 16
    channels, which CPUs are fast at; torch's own initial weights are too small for it to begin to learn.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            inputs = module.weight[0].numel()
            if isinstance(module, nn.Conv3d):
                inputs //= module.kernel_size[0]  # a first frame has none before it
            nn.init.normal_(module.weight, std=inputs**-0.5)
            nn.init.zeros_(module.bias)
    return vae


def text_parts(settings: Settings, seed: int) -> tuple[Any, Any]:
    """A tokenizer of whole words and single letters, and a random UMT5 whose embeddings differ by word."""
    words = {word for caption in CAPTIONS for word in caption.replace(",", " ").split() if "{" not in word}
    words |= {"an", *COLOURS, *FLOORS, *DIRECTIONS, *SHAPES, NEW_SHAPE, *SPARE_WORDS}
    pieces = [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -4.0) for word in sorted(words)]
    letters = "\N{LOWER ONE EIGHTH BLOCK}abcdefghijklmnopqrstuvwxyz0123456789.,;:-'"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *((letter, -8.0) for letter in letters)]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_LENGTH)
    torch.manual_seed(seed)
    return tokenizer, tiny.umt5_encoder(tokenizer, width=settings["width"])


def new_transformer(settings: Settings, text: Settings, seed: int) -> WanTransformer3DModel:
    """A Wan transformer whose attention to text begins sharp: captions are 15 of 512 tokens, the others are zeros."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=settings["heads"],
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text["width"],
        freq_dim=64,
        ffn_dim=settings["feed_forward"],
        num_layers=settings["layers"],
        patch_size=(1, 2, 2),
    )
    nn.init.zeros_(transformer.proj_out.weight)
    for layer in (
        transformer.condition_embedder.text_embedder.linear_1,
        transformer.condition_embedder.text_embedder.linear_2,
    ):
        nn.init.zeros_(layer.bias)
    for block in transformer.blocks:
        nn.init.constant_(block.attn2.norm_k.weight, 3.0)
        nn.init.zeros_(block.attn2.to_k.bias)
        nn.init.zeros_(block.attn2.to_v.bias)
    return transformer


class ShortText(WanAttnProcessor):
    """Attention to text whose last token stands for all of the padding: the same sums as with 512 tokens."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            attention_mask = hidden_states.new_zeros(1, 1, 1, SHORT + 1)
            attention_mask[..., -1] = math.log(TEXT_LENGTH - SHORT)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


# Training


def train_vae(recipe: Settings, work: Path, every: int) -> None:
    """Train the VAE: single frames, then short crops, then whole clips."""
    settings, seed = recipe["vae"], recipe["seed"]
    vae = new_vae(settings, seed)
    ends = np.cumsum([settings["frames"], settings["crops"], settings["whole"]])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings["lr"], betas=(0.9, 0.99), weight_decay=1e-4)
    clips: list[np.ndarray] = []

    def step(number: int) -> Tensor:
        if not clips:
            rng = np.random.default_rng(seed)
            shapes = [*SHAPES, NEW_SHAPE, NEW_SHAPE]
            clips.extend(draw(random_scene(rng, shapes)) for _ in range(settings["clips"]))
        rng = np.random.default_rng([seed, number])
        frames, count = ((1, 16), (5, 4), (FRAMES, 2))[min(int((number >= ends).sum()), 2)]
        x = torch.from_numpy(np.stack([crop(clips[rng.integers(len(clips))], frames, 48, rng) for _ in range(count)]))
        x = x.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        mean = vae.encode(x).latent_dist.mean
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        y = vae.decode(mean + settings["noise"] * torch.randn(mean.shape, generator=generator)).sample
        return (y - x).abs().mean() + (y - x).square().mean() + 3e-4 * mean.square().mean()

    def rate(number: int) -> float:
        is_late = number >= ends[1]
        done, all_ = (number - ends[1], ends[2] - ends[1]) if is_late else (number, ends[1])
        peak = settings["lr_whole"] / settings["lr"] if is_late else 1.0
        return peak * min(1, (done + 1) / 40) * (0.97 * (0.5 + 0.5 * math.cos(math.pi * done / all_)) + 0.03)

    train("vae", vae, optimizer, step, rate, int(ends[-1]), work, every)


def crop(clip: np.ndarray, frames: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Some frames of a square of a clip."""
    _, height, width, _ = clip.shape
    start = rng.integers(0, len(clip) - frames + 1)
    top, left = 8 * rng.integers(0, (height - side) // 8 + 1), 8 * rng.integers(0, (width - side) // 8 + 1)
    return clip[start : start + frames, top : top + side, left : left + side]


def encoded(recipe: Settings, work: Path) -> tuple[Tensor, list[str], Settings]:
    """Latents (N, C, F, H, W) of unit variance, their captions, and the statistics; computed once."""
    path, settings = work / "latents.pt", recipe["transformer"]
    if not path.exists():
        vae = new_vae(recipe["vae"], recipe["seed"])
        vae.load_state_dict(torch.load(work / "vae.pt")["model"])
        rng = np.random.default_rng(recipe["seed"] + 1)
        latents, captions = [], []
        with torch.no_grad():
            while len(captions) < settings["clips"]:
                scenes = [random_scene(rng, SHAPES, settings["spread"]) for _ in range(4)]
                x = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 4, 1, 2, 3)
                latents.append(vae.encode(x.float() / 127.5 - 1).latent_dist.mean)
                captions += [scene.caption(int(rng.integers(len(CAPTIONS)))) for scene in scenes]
                if len(captions) % 100 == 0:
                    print(f"encoded {len(captions)} of {settings['clips']} clips", flush=True)
        z = torch.cat(latents)
        found = {"z": z, "captions": captions, "mean": z.mean((0, 2, 3, 4)), "std": z.std((0, 2, 3, 4))}
        save(found, path)
    found = torch.load(path)
    z = (found["z"] - found["mean"].view(1, -1, 1, 1, 1)) / found["std"].view(1, -1, 1, 1, 1)
    return z, found["captions"], {"mean": found["mean"].tolist(), "std": found["std"].tolist()}


@torch.no_grad()
def embedded(tokenizer: Any, encoder: Any, captions: list[str]) -> Tensor:
    """Embeddings (captions, SHORT + 1, D), padded with zeros."""
    table = torch.zeros(len(captions), SHORT + 1, encoder.config.d_model)
    for row, caption in zip(table, captions, strict=True):
        tokens = tokenizer(caption, return_tensors="pt")
        length = tokens.input_ids.shape[1]
        if length > SHORT:
            raise ValueError(f"a caption has {length} tokens, of {SHORT} at most: {caption}")
        row[:length] = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
    return table


def train_transformer(recipe: Settings, work: Path, every: int) -> None:
    """Train the transformer by flow matching: it predicts noise - x0 of (1 - sigma) x0 + sigma noise."""
    settings, seed = recipe["transformer"], recipe["seed"]
    z, captions, _ = encoded(recipe, work)
    names = sorted(set(captions))
    table = embedded(*text_parts(recipe["text"], seed), [*names, ""])
    caption_of = torch.tensor([names.index(caption) for caption in captions])
    transformer = new_transformer(settings, recipe["text"], seed)
    for block in transformer.blocks:
        block.attn2.set_processor(ShortText())
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=settings["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    total, size, shift = settings["steps"], settings["batch"], settings["shift"]

    def step(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        chosen = torch.randint(0, len(z), (size,), generator=generator)
        x0 = z[chosen]
        noise = torch.randn(x0.shape, generator=generator)
        even = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        sigma = shift * even / (1 + (shift - 1) * even)
        dropped = torch.rand(size, generator=generator) < settings["caption_dropout"]
        text = table[torch.where(dropped, len(names), caption_of[chosen])]
        at = sigma.view(-1, 1, 1, 1, 1)
        predicted = transformer(
            hidden_states=(1 - at) * x0 + at * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        return (predicted - (noise - x0)).square().mean()

    def rate(number: int) -> float:
        left = (total - number) / (0.3 * total)
        return min(1.0, (number + 1) / 100) * max(0.05, min(1.0, left))

    train("transformer", transformer, optimizer, step, rate, total, work, every, ema=settings["ema"])


def train(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[int], Tensor],
    rate: Callable[[int], float],
    total: int,
    work: Path,
    every: int,
    ema: float | None = None,
) -> None:
    """Train to the step `total`, from the state `work/NAME.pt` if there is one; the loss goes to work/curve.jsonl."""
    path, number, seconds = work / f"{name}.pt", 0, 0.0
    average = {key: value.clone() for key, value in model.state_dict().items()} if ema else {}
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        if state["step"] >= total:
            return
        optimizer.load_state_dict(state["optimizer"])
        average, number, seconds = state["average"], state["step"], state["seconds"]
        print(f"{name}: going on after step {number}", flush=True)
    base, losses = optimizer.defaults["lr"], []
    while number < total:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = float(base * rate(number))  # a scalar of numpy could not be loaded again
        optimizer.zero_grad()
        loss = step(number)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        number += 1
        if ema:
            keep = min(ema, number / (20 + number))
            with torch.no_grad():
                for key, value in model.state_dict().items():
                    average[key].lerp_(value, 1 - keep)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"{name}: the loss of step {number} is {losses[-1]}; the state before it is kept")
        seconds += time.monotonic() - started
        if number % every == 0 or number == total:
            row = {"part": name, "step": number, "loss": round(float(np.mean(losses)), 4), "seconds": round(seconds)}
            losses.clear()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            save(state | {"step": number, "seconds": seconds}, path)
            with (work / "curve.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: step {number} of {total}, loss {row['loss']:.4f}, {seconds / 60:.1f} minutes", flush=True)


def save(what: Settings, path: Path) -> None:
    """Save in one go: a kill leaves the former file."""
    torch.save(what, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


# The result


def assemble(recipe: Settings, work: Path) -> WanPipeline:
    """The pipeline of the states in `work`, in float32."""
    _, _, statistics = encoded(recipe, work)
    vae = new_vae(recipe["vae"], recipe["seed"])
    vae.load_state_dict(torch.load(work / "vae.pt")["model"])
    vae.register_to_config(latents_mean=statistics["mean"], latents_std=statistics["std"])
    with torch.no_grad():  # the posterior that the decoder has learnt with
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(recipe["vae"]["noise"])
    transformer = new_transformer(recipe["transformer"], recipe["text"], recipe["seed"])
    transformer.load_state_dict(torch.load(work / "transformer.pt")["average"])
    tokenizer, encoder = text_parts(recipe["text"], recipe["seed"])
    shift = recipe["transformer"]["shift"]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return WanPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=transformer)


def write(recipe: Settings, work: Path, folder: Path) -> None:
    """Write the pipeline in bfloat16, and its curve."""
    pipeline = assemble(recipe, work).to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    (folder / "curve.jsonl").write_text((work / "curve.jsonl").read_text())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
