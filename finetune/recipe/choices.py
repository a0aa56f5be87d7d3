"""What a key may be where it is one of a few words, each with what it means.

The schema that editors show has it from here, and so have the tables of recipes/README.md.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema


@dataclass(frozen=True, eq=False)
class Means:
    """Says what each word of a Literal means, in the JSON schema: as the editors of VS Code, and of TOML (Taplo), look for it."""

    of: dict[str, str]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        words = found["enum"] if "enum" in found else [found["const"]]
        if words != list(self.of):
            raise TypeError(f"{words} are to be explained, and {list(self.of)} are")
        meanings = list(self.of.values())
        if "const" in found:
            found = {**found, "description": meanings[0]}
        return {**found, "enumDescriptions": meanings, "x-taplo": {"docs": {"enumValues": meanings}}}


FAMILY_TITLES = {
    "cogvideox": "CogVideoX",
    "cogvideox_i2v": "CogVideoX image-to-video",
    "hunyuan": "HunyuanVideo",
    "hunyuan15": "HunyuanVideo-1.5",
    "hunyuan15_i2v": "HunyuanVideo-1.5 image-to-video",
    "hunyuan_i2v": "HunyuanVideo image-to-video",
    "ltx": "LTX-Video",
    "ltx_i2v": "LTX-Video image-to-video",
    "mochi": "Mochi",
    "wan": "Wan",
    "wan_i2v": "Wan image-to-video",
}
ExpertNamed = Annotated[
    Literal["high", "low"],
    Means({"high": "the transformer for high noise", "low": "the one for low noise"}),
]
Method = Annotated[
    Literal["lora", "full", "partial"],
    Means(
        {
            "lora": "a low-rank adapter",
            "full": "all weights",
            "partial": "the weights that [partial] names",
        }
    ),
]
Precision = Annotated[
    Literal["bf16", "float32"],
    Means(
        {
            "bf16": "half the bytes; sums and the adapter stay in float32",
            "float32": "exact, slow and large: for tests and tiny models",
        }
    ),
]
HeldAs = Annotated[
    Literal["float32", "bf16"],
    Means(
        {
            "float32": "4 bytes each, and as many of gradients",
            "bf16": "half of that; updates are rounded stochastically",
        }
    ),
]
NotClipped = Annotated[Literal["none"], Means({"none": "gradients are not clipped"})]
SigmaSampling = Annotated[
    Literal["uniform", "logit_normal", "mode"],
    Means(
        {
            "uniform": "every sigma as often",
            "logit_normal": "most at the middle: the sigmoid of a normal of `logit_mean` and `logit_std`",
            "mode": "most at the middle, by `mode_scale`, and still some at both ends",
        }
    ),
]
SchedulersShift = Annotated[Literal["scheduler"], Means({"scheduler": "as the checkpoint's own scheduler shifts"})]
Weighting = Annotated[
    Literal["none", "sigma_sqrt", "cosmap", "min_snr"],
    Means(
        {
            "none": "all noise levels weigh the same",
            "sigma_sqrt": "flow matching: sigma to the power of -2, as the Stable Diffusion 3 paper has it",
            "cosmap": "flow matching: 2 / (pi (1 - 2 sigma + 2 sigma^2)), of the same paper",
            "min_snr": "v-prediction (CogVideoX): min(SNR, snr_gamma) / (SNR + 1) (Hang et al. 2023)",
        }
    ),
]
Loss = Annotated[
    Literal["mse", "huber", "smooth_l1"],
    Means(
        {
            "mse": "e^2",
            "huber": "e^2 / 2 up to `loss_delta`, and straight from there on: outliers pull less",
            "smooth_l1": "huber, divided by `loss_delta`",
        }
    ),
]
ScheduleName = Annotated[
    Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
    Means(
        {
            "constant": "the peak rate throughout, without warm-up",
            "constant_with_warmup": "the peak rate after `warmup_steps`",
            "linear": "falls in a line to 0 at the last step",
            "cosine": "falls along half a cosine to 0",
            "cosine_with_restarts": "falls so `cycles` times, and begins again at the peak",
            "polynomial": "falls by a polynomial of `power` to 1e-7",
        }
    ),
]
Layout = Annotated[
    Literal["auto", "shard", "zero2", "hybrid", "replicate"],
    Means(
        {
            "auto": "of those that fit, the one with the least communication",
            "shard": "sharded over all GPUs",
            "zero2": "sharded, but kept whole from forward to backward pass",
            "hybrid": "sharded within groups of `shard_size` and replicated between them",
            "replicate": "whole on each GPU; only what is trained is reduced",
        }
    ),
]
Checkpointing = Annotated[
    Literal["none", "full", "every_n", "selective"],
    Means(
        {
            "none": "keep all activations: fastest, and largest",
            "full": "recompute all blocks",
            "every_n": "recompute each `checkpoint_every`th block",
            "selective": "recompute all but attention and matrix products, of which up to `keep_gib` are kept",
        }
    ),
]
EncoderPlace = Annotated[
    Literal["device", "cpu"],
    Means({"device": "on the GPU", "cpu": "in host memory, where each caption takes seconds"}),
]
LowBit = Annotated[
    Literal["none", "int8", "float8", "nf4"],
    Means(
        {
            "none": "in train.precision",
            "int8": "half of bf16, with a scale for each row",
            "float8": "half of bf16, e4m3 with a scale for each row",
            "nf4": "a quarter of bf16, with a scale for each block of values",
        }
    ),
]
AttentionKernel = Annotated[
    Literal["auto", "flash", "cudnn", "efficient", "math", "fa3", "fa4"],
    Means(
        {
            "auto": "torch's choice",
            "flash": "FlashAttention 2, as torch has it; takes no masks",
            "cudnn": "cuDNN's, fast on Hopper",
            "efficient": "the memory-efficient kernel, which takes masks",
            "math": "matrix products, which hold a score for each pair of tokens",
            "fa3": "FlashAttention 3, whose package must be there; takes no masks",
            "fa4": "FlashAttention 4, whose package must be there; takes no masks",
        }
    ),
]
AllCheckpoints = Annotated[Literal["all"], Means({"all": "remove none"})]
Tracker = Annotated[
    Literal["tensorboard", "wandb", "mlflow", "trackio"],
    Means(
        {
            "tensorboard": "event files in the run's folder",
            "wandb": "Weights & Biases",
            "mlflow": "`mlflow/` in the run's folder, or the server that MLFLOW_TRACKING_URI names",
            "trackio": "Trackio, on this machine or in a Space",
        }
    ),
]
Window = Annotated[
    Literal["head", "centre", "random", "all"],
    Means(
        {
            "head": "its first frames",
            "centre": "those in its middle",
            "random": "`windows` pieces at random places, of which each epoch takes another",
            "all": "all of them, as one sample after the other",
        }
    ),
]
BadClips = Annotated[
    Literal["refuse", "skip"], Means({"refuse": "end with a list of them", "skip": "go on without them"})
]
Purpose = Annotated[
    Literal["samples", "heldout", "export"],
    Means(
        {
            "samples": "videos that are generated in training",
            "heldout": "the held-out loss",
            "export": "exported weights",
        }
    ),
]
AveragePlace = Annotated[
    Literal["device", "host"],
    Means({"device": "beside the weights", "host": "in host memory, which each update copies the weights to"}),
]
ExportFormat = Annotated[
    Literal["diffusers", "comfyui", "peft", "merged"],
    Means(
        {
            "diffusers": "as diffusers loads it",
            "comfyui": "a LoRA under the names that ComfyUI knows",
            "peft": "a folder of peft",
            "merged": "the whole transformer with the LoRA in its weights",
        }
    ),
]
ExportPrecision = Annotated[
    Literal["float32", "bf16", "float16", "float8"],
    Means(
        {
            "float32": "4 bytes a value",
            "bf16": "2 bytes a value, of float32's range",
            "float16": "2 bytes a value, finer and of a smaller range",
            "float8": '1 byte a value (e4m3), for "merged"',
        }
    ),
]
OptimizerOffload = Annotated[
    Literal["none", "state", "state_and_gradients"],
    Means(
        {
            "none": "all on the GPU",
            "state": "the state in host memory, where updates are made, while weights stay on the GPU",
            "state_and_gradients": "gradients, too, leave the GPU as soon as they are whole; they cannot be accumulated",
        }
    ),
]
LowBitMoments = Annotated[
    Literal["adamw_8bit", "adamw_4bit", "adamw_fp8"],
    Means(
        {
            "adamw_8bit": "AdamW with its moments in 8 bits (torchao)",
            "adamw_4bit": "AdamW with its moments in 4 bits (torchao)",
            "adamw_fp8": "AdamW with its moments in float8 (torchao)",
        }
    ),
]
