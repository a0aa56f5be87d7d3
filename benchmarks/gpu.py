"""Step time, peak memory and model FLOPs utilisation of CogVideoX-2b and 5b with each memory saver, random weights.

`python -m benchmarks.gpu [--models 5b 2b] [--seconds 540]` on one GPU: LoRA of rank 64 at 49x480x720, batch 1, and full
finetuning. Each line measures this project's own step on a newly built model, without its first two steps. "over without"
is the step time divided by that of the same step without its last saver; for copies, it shows the cost that does not
overlap with computation. Utilisation is the FLOPs of one forward and one backward pass, counted on the meta device without
recomputation, divided by the step time and by the measured rate of a large bf16 matrix product. `--smoke` runs a tiny
model on any device, to test the benchmark itself.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paired import print_table
from finetune.data.loader import Sample
from finetune.engine.step import run_step
from finetune.models.adapters import lora
from finetune.models.batch import Batch
from finetune.models.cogvideox import CogVideoX
from finetune.models.folder import ModelFolder
from finetune.recipe import Bucket, Recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.training.job import build_state

BUCKET = Bucket(49, 480, 720)
MODELS = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "smoke": {"num_attention_heads": 2, "num_layers": 2, "attention_head_dim": 16, "text_embed_dim": 32},
}
FULL, NONE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "none"}
CHECKPOINTED = "full checkpointing"


@dataclass(frozen=True)
class Case:
    """Tables of a recipe. `over` is the case whose step time this one's is divided by."""

    memory: dict
    train: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    over: str = ""


FINETUNED = {"method": "full", "weights": "bf16"}
UNCLIPPED = {**FINETUNED, "max_grad_norm": "none"}
EIGHT_BIT = {"name": "adamw_8bit"}
CASES = {
    CHECKPOINTED: Case(FULL),
    "streamed": Case({**FULL, "offload": True}, over=CHECKPOINTED),
    "streamed, 10 blocks resident": Case({**FULL, "offload": True, "resident_blocks": 10}, over=CHECKPOINTED),
    "activations offloaded": Case({**FULL, "offload_activations": True}, over=CHECKPOINTED),
    "streamed, activations offloaded": Case({**FULL, "offload": True, "offload_activations": True}, over=CHECKPOINTED),
    "compile": Case({**FULL, "compile": True}, over=CHECKPOINTED),
    "compile, streamed": Case({**FULL, "compile": True, "offload": True}, over="compile"),
    "no checkpointing": Case(NONE, over=CHECKPOINTED),
    "no checkpointing, activations offloaded": Case({**NONE, "offload_activations": True}, over="no checkpointing"),
    "every second block": Case({"activation_checkpointing": "every_n"}, over=CHECKPOINTED),
    "selective": Case({"activation_checkpointing": "selective"}, over=CHECKPOINTED),
    "int8": Case({**FULL, "low_bit": "int8"}, over=CHECKPOINTED),
    "float8": Case({**FULL, "low_bit": "float8"}, over=CHECKPOINTED),
    "nf4": Case({**FULL, "low_bit": "nf4"}, over=CHECKPOINTED),
    "nf4, compile": Case({**FULL, "low_bit": "nf4", "compile": True}, over="compile"),
    "nf4, streamed, activations offloaded": Case(
        {**FULL, "low_bit": "nf4", "offload": True, "offload_activations": True}, over=CHECKPOINTED
    ),
    "full finetuning, bf16, 8 bits": Case(FULL, FINETUNED, EIGHT_BIT),
    "the same, updates in backward": Case(
        FULL, UNCLIPPED, {**EIGHT_BIT, "in_backward": True}, over="full finetuning, bf16, 8 bits"
    ),
    "the same, float8 products, compile": Case(
        {**FULL, "compile": True}, {**FINETUNED, "float8": True}, EIGHT_BIT, over="full finetuning, bf16, 8 bits"
    ),
    "full finetuning, offload": Case({**FULL, "offload": True}, {"method": "full"}),
}


class RandomWeights:
    """Stands in for a transformer's weights with the same million random numbers, because drawing billions takes minutes."""

    def __init__(self, shapes: dict[str, torch.Size], dtype: torch.dtype) -> None:
        self.shapes = shapes
        self.drawn = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(dtype)

    def names(self) -> set[str]:
        return set(self.shapes)

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = torch.Size([stop - start, *self.shapes[name][1:]])
        return self.drawn.repeat(-(-shape.numel() // len(self.drawn)))[: shape.numel()].view(shape)


class RandomCogVideoX(CogVideoX):
    """CogVideoX with random weights."""

    def transformer_weights(self) -> RandomWeights:
        shapes = {name: parameter.shape for name, parameter in self.empty_transformer().named_parameters()}
        return RandomWeights(shapes, torch.bfloat16)


def model_folder(path: Path, name: str) -> ModelFolder:
    """Write a model folder that has only configs."""
    configs = {
        "transformer/config.json": {"_class_name": "CogVideoXTransformer3DModel", "sample_frames": 49, **MODELS[name]},
        "vae/config.json": {"block_out_channels": [0] * 4, "temporal_compression_ratio": 4, "scaling_factor": 0.7},
        "scheduler/scheduler_config.json": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        "model_index.json": {"_class_name": "CogVideoXPipeline"},
    }
    defaults = {"patch_size": 2, "sample_height": 60, "sample_width": 90, "attention_head_dim": 64}
    configs["transformer/config.json"] = defaults | configs["transformer/config.json"]
    for file, config in configs.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(json.dumps(config))
    return ModelFolder(path)


def recipe_with(case: Case, precision: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"family": "cogvideox", "path": "random"},
            "data": {"path": "none", "buckets": [str(BUCKET)]},
            "train": {"precision": precision, **case.train},
            "optimizer": case.optimizer,
            "memory": case.memory,
        }
    )


def batch_for(family: CogVideoX, bucket: Bucket, recipe: Recipe, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (16, *family.vae_shape(bucket))
    width = family.config.get("text_embed_dim", 4096)
    text = {"encoder_hidden_states": torch.randn(226, width, generator=generator).to(dtype)}
    moments = {"mean": torch.randn(shape, generator=generator), "logvar": torch.full(shape, -10.0)}
    return family.batch(
        [Sample({"video": moments, "text": text}, bucket, 8.0, generator)], family.objective(recipe.objective)
    )


def step_flops(family: CogVideoX, batch: Batch, recipe: Recipe, method: str) -> int:
    """FLOPs of one forward and one backward pass without recomputation, counted on the meta device."""
    transformer = family.empty_transformer().requires_grad_(method == "full")
    with torch.device("meta"):
        if method == "lora":
            lora.add(transformer, family, recipe.lora, seed=0)
        inputs = batch.to(torch.device("meta")).inputs
        with FlopCounterMode(display=False) as counter:
            family.predict(transformer, {**inputs, "hidden_states": inputs["hidden_states"].float()})[
                "video"
            ].sum().backward()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOPs per second of the product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def measure(
    family: CogVideoX, recipe: Recipe, batch: Batch, runtime: Runtime, steps: int
) -> tuple[float, float, float]:
    """(median seconds per step, peak GiB allocated, peak GiB reserved)."""
    state = build_state(recipe, runtime, family, family.transformer_weights())
    seconds = []
    for step in range(steps + 2):
        if step == 2:
            runtime.device.reset_peak()
        start = time.perf_counter()
        run_step(state, step, [batch])  # waits for the device, since it reads the loss
        seconds.append(time.perf_counter() - start)
    memory = runtime.device.memory()
    return statistics.median(seconds[2:]), memory.allocated / 2**30, memory.reserved / 2**30


def describe_bus() -> str:
    """The GPU's name, PCIe generation and width, from nvidia-smi."""
    fields = "name,pcie.link.gen.max,pcie.link.width.max"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=["2b", "5b"], default=["5b", "2b"])
    parser.add_argument("--seconds", type=float, default=540, help="begin no further measurement after this long")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and small video, on any device")
    arguments = parser.parse_args()
    began = time.monotonic()
    runtime = distributed.start(600)
    device = runtime.device
    if device.is_cpu and not arguments.smoke:
        parser.error("there is no GPU here; --smoke runs on a CPU")
    bucket, precision = (Bucket(9, 64, 96), "float32") if arguments.smoke else (BUCKET, "bf16")
    dtype = torch.float32 if arguments.smoke else torch.bfloat16
    rate = matmul_rate(device.torch_device, 512 if arguments.smoke else 8192, dtype)
    print(
        f"{device.name}; PCIe: {describe_bus()}; matrix product {rate / 1e12:.3g} TFLOP/s; torch {torch.__version__}\n"
    )
    rows, left_out = [], []
    for name in ["smoke"] if arguments.smoke else arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            family = RandomCogVideoX(model_folder(Path(folder), name))
            reference = recipe_with(CASES[CHECKPOINTED], precision)
            batch = batch_for(family, bucket, reference, dtype)
            flops = {method: step_flops(family, batch, reference, method) for method in ("lora", "full")}
            times: dict[str, float] = {}
            for title, case in CASES.items():
                if time.monotonic() - began > arguments.seconds:
                    left_out.append(f"{name} {title}")
                    continue
                recipe = recipe_with(case, precision)
                try:
                    seconds, allocated, reserved = measure(family, recipe, batch, runtime, arguments.steps)
                    times[title] = seconds
                    used = f"{flops[recipe.train.method] / seconds / rate:.1%}"
                    over = f"{seconds / times[case.over]:.3f}" if case.over in times else ""
                    rows.append([name, title, f"{seconds:.3f}", over, f"{allocated:.2f}", f"{reserved:.2f}", used])
                except torch.OutOfMemoryError:
                    rows.append([name, title, "out of memory", "", "", "", ""])
                torch.compiler.reset()
                gc.collect()
                device.empty_cache()
                print(f"{rows[-1]}", file=sys.stderr, flush=True)
    heads = ["model", "savers", "s/step", "over without", "GiB allocated", "GiB reserved", "utilisation"]
    print_table(heads, rows)
    if left_out:
        print(f"\nnot measured, for want of time: {', '.join(left_out)}")
    distributed.stop()


if __name__ == "__main__":
    main()
