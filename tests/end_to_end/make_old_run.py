"""Made tests/end_to_end/old_run: a run, its cache, clips and model, which later versions must read and go on with.

`python tests/end_to_end/make_old_run.py`, in a checkout whose version is to be kept; `commit` in expected.json says which
it was. Paths in it are relative to the folder, so it can be trained in wherever it is copied to. The VAE, the text encoder
and the tokenizer are kept because keys of the cache hash their files. The transformer's weights are not: they are made anew
by `write_base_weights`, the same on every processor.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

ROOT = Path(__file__).parents[2]
OLD_RUN = Path(__file__).with_name("old_run")
WEIGHTS = "diffusion_pytorch_model.safetensors"
STOPPED_AFTER, STEPS = 4, 8
CLIPS = ("fast", "slow", "small", "wide", "tall", "turned")  # of the demo's: four lie, two stand

RECIPE = f"""\
output = "run"
[model]
family = "ltx"
path = "model"
[data]
path = "clips"
buckets = ["9x64x96", "9x96x64"]
caption_dropout = 0.3
cache = "cache"
workers = 0
[train]
steps = {STEPS}
global_batch_size = 2
precision = "float32"
max_grad_norm = 0.1
[lora]
rank = 2
alpha = 4
[objective]
stratified = true
[optimizer]
lr = 1e-2
[schedule]
name = "cosine"
warmup_steps = 2
[validation]
heldout_clips = 1
sigmas = 2
"""


def write_base_weights(folder: Path) -> str:
    """Write the weights of a transformer folder that has its config alone; returns a digest of them.

    Every operation is exact or rounds as IEEE 754 says, unlike the normal distributions of torch's own initialisation,
    whose last bits depend on the processor's vector instructions.
    """
    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    content = hashlib.blake2b(digest_size=8)
    tensors = {}
    for name, like in sorted(LTXVideoTransformer3DModel.from_config(config).state_dict().items()):
        mean = 1 if "norm" in name else 0
        tensors[name] = mean + (torch.rand(like.shape, generator=generator) - 0.5) / 4
        content.update(tensors[name].numpy())
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return content.hexdigest()


def make_model(folder: Path) -> None:
    """A pipeline of a few hundred kB with LTX-Video's parts."""
    torch.manual_seed(0)
    letters = [(letter, -3.0) for letter in "\N{LOWER ONE EIGHTH BLOCK}abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=128)
    widths = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", is_encoder_decoder=False, **widths)
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(4, 4, 8, 8),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    vae.encoder.conv_out.conv.bias.data[-1] = -10  # the log-variance channel: a trained VAE's posterior is narrow
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        num_layers=2,
    )
    shift = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    scheduler = FlowMatchEulerDiscreteScheduler(**shift, base_image_seq_len=1024, max_image_seq_len=4096)
    LTXPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)


def make_clips(folder: Path) -> None:
    folder.mkdir()
    with tempfile.TemporaryDirectory() as demo:
        finetune(Path(demo), "demo", "--out", demo, "--family", "ltx")
        for name in CLIPS:
            for suffix in (".mp4", ".txt"):
                shutil.copy(Path(demo, "clips", name).with_suffix(suffix), folder)


def finetune(folder: Path, *arguments: str) -> None:
    """Run the checkout's command line in a folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "finetune", *arguments], cwd=folder, env=env, check=True)


def expected(weights: str) -> dict:
    """What this version does when it goes on with the run."""
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(OLD_RUN, Path(name, "run"))
        finetune(folder, "--recipe", "recipe.toml")
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%H", "--", "finetune"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    later = [row for row in rows if row["step"] > STOPPED_AFTER]
    figures = {key: {row["step"]: row[key] for row in later if key in row} for key in ("loss", "lr", "heldout_loss")}
    return {"commit": commit, "base_weights": weights, "stopped_after": STOPPED_AFTER, **figures}


def main() -> None:
    shutil.rmtree(OLD_RUN, ignore_errors=True)
    OLD_RUN.mkdir()
    make_model(OLD_RUN / "model")
    weights = write_base_weights(OLD_RUN / "model" / "transformer")
    make_clips(OLD_RUN / "clips")
    (OLD_RUN / "recipe.toml").write_text(RECIPE)
    finetune(OLD_RUN, "--recipe", "recipe.toml", "--set", f"train.steps={STOPPED_AFTER}")
    (OLD_RUN / "expected.json").write_text(json.dumps(expected(weights), indent=1) + "\n")
    (OLD_RUN / "model" / "transformer" / WEIGHTS).unlink()
    (OLD_RUN / "run" / ".lock").unlink()  # names this machine, as paths in files.json do
    facts = OLD_RUN / "cache" / "files.json"
    entries = {str(Path(path).relative_to(OLD_RUN)): entry for path, entry in json.loads(facts.read_text()).items()}
    facts.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
