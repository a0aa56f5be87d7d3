"""Every key of a recipe, one class per TOML table; the docstring below a key is its documentation.

Defaults live here and nowhere else. Keys marked `Free` may change when a run is resumed; any other change is refused,
because it would continue a different training under the same name.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from finetune.recipe.choices import (
    AllCheckpoints,
    AttentionKernel,
    Checkpointing,
    EncoderPlace,
    ExpertNamed,
    HeldAs,
    Layout,
    Loss,
    LowBit,
    Method,
    NotClipped,
    Precision,
    ScheduleName,
    SchedulersShift,
    SigmaSampling,
    Tracker,
    Weighting,
)
from finetune.recipe.data import Data
from finetune.recipe.ema import Ema
from finetune.recipe.export import Export
from finetune.recipe.optimizers import AdamW, AnyOptimizer
from finetune.recipe.sigma_table import SigmaTable
from finetune.recipe.table import FREE_ON_RESUME, Free, Table, tables_of
from finetune.recipe.validation import Validation
from finetune.recipe.values import PathText, family_name

GENERATED = "generated"  # the folder of `sample` in `output`
_OF_A_RUN = (  # what would be read as clips, captions or tables, or is named file by file, if a run's folder is the dataset's
    *("samples", "checkpoints", "starts", "lora", "transformer", "partial"),
    *("log.txt", "use.py", "report.html", "metrics.jsonl", "recipe.toml", "results.json", "report.html"),
)

ExpertName = Literal["high", "low"]
SigmaRange = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)]


def _of_experts(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a value, or of a table that has one for each expert."""
    table = {"type": "object", "properties": {"high": schema, "low": schema}, "additionalProperties": False}
    return {"anyOf": [schema, table]}


_STEPS_SCHEMA = {"type": "integer", "minimum": 1}
_RANGE_SCHEMA = {
    "type": "array",
    "items": {"type": "number", "minimum": 0, "maximum": 1},
    "minItems": 2,
    "maxItems": 2,
}


class Model(Table):
    family: Annotated[str, BeforeValidator(family_name)]
    """Which model family: see `finetune families`; or one of your own, as "package.module:Class"."""
    path: str = Free(...)
    """A Hugging Face Hub id or a folder saved by diffusers (with model_index.json). A run is resumed wherever the model lies: its
    weights are known by their content."""
    revision: str = Free("main")
    """Branch, tag or commit on the Hub; without meaning for a folder."""
    experts: Annotated[list[ExpertNamed], Field(min_length=1)] | None = None
    """Which transformers of a checkpoint with two (Wan 2.2 A14B) are trained, one after the other, each in a folder of its own
    in `output`; unset: both."""


class Vae(Table):
    tiling: bool = False
    """Encode clips in overlapping tiles (saves memory; differs slightly from whole frames, so it is part of the cache key)."""
    image_noise: bool = False
    """Add noise of random strength, exp(N(-3, 0.5)), to condition images before they are encoded, as CogVideoX image-to-video
    was trained. Drawn once for each clip."""


class Train(Table):
    method: Method = "lora"
    """What is trained."""
    steps: Annotated[int, Field(ge=1), WithJsonSchema(_of_experts(_STEPS_SCHEMA))] = Free(1000)
    """Optimizer steps in all."""
    expert_steps: dict[ExpertName, Annotated[int, Field(ge=1)]] = Free({})
    """Steps of an expert that is to have another number of them than `steps`, like {high = 500}. `steps = {high = 500, low = 1000}`
    says it in one; an expert that is not named there takes the largest number."""
    global_batch_size: Annotated[int, Field(ge=1)] = 1
    """Samples of one optimizer step, over all ranks. Gradient accumulation follows from it."""
    micro_batch_size: Annotated[int, Field(ge=1)] = Free(1)
    """Samples that one rank takes through the model at once."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seeds order, noise, adapter initialisation and everything else that is random."""
    precision: Precision = "bf16"
    """Compute precision. Frozen weights are held in it, too."""
    weights: HeldAs = "float32"
    """How trained weights are held."""
    float8: bool = False
    """Full finetuning: compute the blocks' linear layers in float8 (torchao.float8, scaled tensor by tensor), faster on GPUs
    that have it (compute capability 8.9 and above); emulated on a CPU. Best with memory.compile."""
    max_grad_norm: Annotated[float, Field(gt=0)] | NotClipped = Free(1.0)
    """Clip the global gradient norm to this, once per optimizer step."""

    @model_validator(mode="before")
    @classmethod
    def _steps_of_experts(cls, values: Any) -> Any:
        """`steps` as a table is `expert_steps`, and the most of them."""
        if isinstance(values, dict) and isinstance(steps := values.get("steps"), dict) and "expert_steps" not in values:
            if not steps:
                raise ValueError("the table names no expert: write {high = 500, low = 1000}, or one number")
            counts = [count for count in steps.values() if isinstance(count, int)]
            return {**values, "steps": max(counts, default=1), "expert_steps": steps}
        return values


class FrozenAdapter(Table):
    path: str = Free(...)
    """Its file, as in lora.start_from. A run is resumed wherever it lies: it is known by its content."""
    strength: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """What it is multiplied by."""


Rank = Annotated[int, Field(ge=1, le=32768)]  # more than the full rank of any layer of these models


class Lora(Table):
    rank: Rank = 64
    """Rank of the adapter matrices."""
    alpha: Annotated[float, Field(gt=0)] = 64.0
    """The adapter's output is scaled by alpha / rank; unset: as `rank`, so by 1."""
    targets: list[str] = Field(default=[])
    """Linear layers inside the transformer blocks, like ["to_q", "to_k", "to_v", "to_out.0"]; empty: the family's default."""
    ranks: dict[str, Rank] = Field(default={})
    """Ranks of layers that are to have another one than `rank`, by the end of their names as in `targets`, like
    {"attn1.to_q" = 32}, or one block's, {"transformer_blocks.0.attn1.to_q" = 8}. Of several that fit, the longest holds."""
    alphas: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Their alphas in the same way; a layer that is not named has `alpha`, also if it has a rank of its own."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023), so that a higher rank does not learn more slowly."""
    dora: bool = False
    """Train the length of each row of W + BA, too, apart from its direction (Liu et al. 2024, DoRA)."""
    plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """The learning rate of the second matrix of each pair, B, is this many times optimizer.lr (Hayou et al. 2024, LoRA+; they
    take 16); 1: the same."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    start_from: str | None = Free(None)
    """Begin with this adapter's weights instead of new ones: a .safetensors file by the names of diffusers, ComfyUI, kohya's
    scripts or musubi-tuner; a folder of peft's, or of an earlier run; or "owner/name/file" on the Hub. Its rank may be lower than
    `rank`, and its strength is kept whatever `alpha` is. A run that has
    checkpoints does not need it any more; if it is there, wherever it lies, it must have the same content."""
    frozen: list[FrozenAdapter] = Field(default=[])
    """Train on top of these adapters, like [{path = "other.safetensors", strength = 0.8}]: they are added to the base weights, in
    samples and held-out losses too, are not trained, and are not in what is exported."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_of_rank(cls, values: Any) -> Any:
        is_unset = isinstance(values, dict) and "alpha" not in values and isinstance(values.get("rank"), int)
        return {**values, "alpha": values["rank"]} if is_unset else values


class Partial(Table):
    modules: list[str] = Field(default=[])
    """What is trained, by its name: a part of it like "norm" (also norm1 and norm_q) or "attn1.to_q"; or with `*`, the whole of it,
    like "*.bias" or "transformer_blocks.0.*"."""


class ObjectiveSettings(Table):
    sigma_sampling: SigmaSampling | None = None
    """Distribution of sigma before the shift (Stable Diffusion 3 paper, section 3.1); unset: logit_normal for flow matching,
    uniform for v-prediction, where sigma is timestep / 1000."""
    stratified: bool = False
    """Spread the samples of a global batch evenly over the distribution of sigma: less noise in the loss of a step."""
    logit_mean: float = 0.0
    """Mean of the normal behind "logit_normal"."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the normal behind "logit_normal"."""
    mode_scale: float = 1.29
    """Scale of "mode"."""
    sigma_table: SigmaTable | None = None
    """In the place of `sigma_sampling`: the distribution of sigma before the shift as a table. Either points
    [[sigma, density], ...] with sigma ascending, the density linear in between and 0 outside of them; or a list of weights of
    equal bins of [0, 1]."""
    shift: Annotated[float, Field(gt=0, le=1000)] | SchedulersShift = "scheduler"
    """Flow shift s, sigma' = s sigma / (1 + (s - 1) sigma); "scheduler" does what the checkpoint's own scheduler does."""
    sigma_min: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Least sigma; the distribution is rescaled to the limits, not cut off."""
    sigma_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest sigma."""
    sigma_range: Annotated[SigmaRange | None, WithJsonSchema(_of_experts(_RANGE_SCHEMA))] = None
    """Train only sigma in [low, high), after the shift, distributed as if all others were drawn again; 1 as the upper limit is
    included. Unset: the range that the checkpoint is for, all of sigma if it is for no other. Of two experts, a table has that of
    each: {high = [0.8, 1.0], low = [0.0, 0.9]}."""
    expert_ranges: dict[ExpertName, SigmaRange] = Field(default={})
    """The same ranges of experts; one that has none is trained on its own. `sigma_range` as a table says it in one."""
    weighting: Weighting = "none"
    """Loss weight as a function of sigma."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """The gamma of "min_snr": noise levels with a higher ratio of signal to noise weigh less."""
    loss: Loss = "mse"
    """What is made of the error e of each element, before the mean. Held-out losses are measured with it, too, so they compare with
    those of the same loss only."""
    loss_delta: Annotated[float, Field(gt=0)] = 1.0
    """The error from which on "huber" and "smooth_l1" are straight, in units of the target, whose variance is about 2 in flow
    matching and 1 in v-prediction."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Embedded guidance scale that the model is told, for guidance-distilled checkpoints (HunyuanVideo)."""
    guidance_target: Annotated[float, Field(gt=1, le=1000)] | None = None
    """LoRA: fold guidance of this scale s into the target, v0 + s (target - v0) with the prediction v0 of the frozen base without
    the caption. For guidance-distilled checkpoints, which would else unlearn their guidance, with `guidance` at the same scale;
    or for a LoRA that is to be used without guidance. Costs one more forward pass. Held-out losses are measured so, too."""

    @model_validator(mode="before")
    @classmethod
    def _ranges_of_experts(cls, values: Any) -> Any:
        """`sigma_range` as a table is `expert_ranges`."""
        if isinstance(values, dict) and isinstance(values.get("sigma_range"), dict) and "expert_ranges" not in values:
            rest = {name: value for name, value in values.items() if name != "sigma_range"}
            return {**rest, "expert_ranges": values["sigma_range"]}
        return values


class Schedule(Table):
    name: ScheduleName = "constant"
    """Learning-rate schedule, as diffusers' `get_scheduler` names it."""
    warmup_steps: Annotated[int, Field(ge=0)] = Free(0)
    """Optimizer steps of linear warm-up; "constant" has none."""
    cycles: Annotated[int, Field(ge=1)] = 1
    """Restarts of "cosine_with_restarts"."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Power of "polynomial"."""


class Memory(Table):
    layout: Layout = Free("auto")
    """How weights lie on the GPUs."""
    shard_size: Annotated[int, Field(ge=2)] | None = Free(None)
    """GPUs that hold one copy with "hybrid"; unset: those of a node."""
    offload: bool = Free(False)
    """Keep weights in host memory; a GPU holds a block or two at a time. Sharded weights take their gradients and optimizer state
    with them, and are updated there. The frozen blocks of a LoRA, on one GPU or replicated, are streamed: copied while
    others compute, with the adapter on the GPU."""
    resident_blocks: Annotated[int, Field(ge=0)] = Free(0)
    """How many of the blocks that `offload` streams stay on the GPU: each makes steps faster and takes its size."""
    offload_activations: bool = Free(False)
    """Keep what the forward pass saves for the backward pass in host memory, copied while the next blocks compute."""
    activation_checkpointing: Checkpointing = Free("full")
    """Recompute transformer blocks in the backward pass instead of keeping their activations."""
    checkpoint_every: Annotated[int, Field(ge=2)] = Free(2)
    """Which blocks "every_n" recomputes."""
    keep_gib: Annotated[float, Field(gt=0)] | None = Free(None)
    """GiB of outputs that "selective" keeps over all blocks; unset: all of them."""

    expandable_segments: bool = Free(False)
    """Have the GPU's caching allocator grow its segments (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True): little is then lost
    between pieces of memory, which counts where it is short. What the environment sets of the allocator stays."""
    text_encoder: EncoderPlace = Free("device")
    """Where captions are encoded, once: a text encoder may be larger than the GPU."""
    low_bit: LowBit = "none"
    """How the frozen weights of the blocks are held, for LoRA. Slightly different weights are trained on, and the adapter is used
    with the whole ones."""
    attention: AttentionKernel = Free("auto")
    """What computes the attention of the blocks. The flash kernels take no masks; samples whose prompts are padded go to the
    memory-efficient one."""
    compile: bool = Free(False)
    """Compile each block with torch.compile: faster steps after a minute of compiling for each bucket. On a
    CPU the blocks' graphs are taken, and run without kernels of their own."""
    plan: bool = Free(True)
    """On a GPU, have a process beside the training predict its peak memory as `python -m finetune plan` does, and say whether it
    fits. The training does not wait for it. It is made once: the next start of the same training reads it from data.cache."""


class Checkpoint(Table):
    every: Annotated[int, Field(ge=1)] = Free(500)
    """Save each this many optimizer steps; a run's last step and a polite stop (SIGTERM) save too."""
    keep_last: Annotated[int, Field(ge=1)] | AllCheckpoints = Free(2)
    """Keep this many checkpoints."""
    keep_best: Annotated[int, Field(ge=0)] = Free(0)
    """Besides, keep this many with the least held-out loss: whenever it is among the least so far, that step is saved. `export` and
    `sample` take the best of them with `--step best`."""
    background: bool = Free(True)
    """Write checkpoints while the training goes on, from a copy in host memory of what is trained and of the optimizer's state.
    Without effect where these are in host memory anyway (full finetuning with memory.offload)."""
    verify: bool = Free(True)
    """Compare each file's digest with the one that was noted when it was written, before a checkpoint is taken up. A damaged
    one is named, and the one before is taken."""


class Tracking(Table):
    trackers: list[Tracker] = Free([])
    """Besides metrics.jsonl, which is always written."""
    project: str = Free("finetune")
    """Project in W&B and Trackio, experiment in MLflow."""
    name: str | None = Free(None)
    """Name of the run there; unset: the output folder's."""
    quantiles_every: Annotated[int, Field(ge=1)] = Free(50)
    """Each this many steps, report the training loss since then in each quarter of the noise levels, and by term."""
    block_norms_every: Annotated[int, Field(ge=1)] | None = Free(None)
    """Each this many steps, report the gradient norm of each transformer block, before clipping."""


class Distributed(Table):
    timeout_seconds: Annotated[float, Field(ge=1)] = Free(1800.0)
    """How long a rank waits for its peers in a collective, and how long a step may take, before the run ends with an error that
    names the rank which is waited for. Raise it where a step's first compilation, or its many micro-batches, take longer."""


class Recipe(Table):
    """A whole recipe."""

    output: PathText = Free(Path("runs/run"))
    """Folder of the run: checkpoints, metrics, the effective recipe and the exported weights."""
    model: Model
    """What is trained."""
    data: Data
    """What it is trained on."""
    vae: Vae = Vae()
    """How clips are encoded."""
    train: Train = Train()
    """How it is trained."""
    lora: Lora = Lora()
    """The adapter, for train.method = "lora"."""
    partial: Partial = Partial()
    """The trained weights, for train.method = "partial"."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """Noise levels and loss."""
    optimizer: AnyOptimizer = AdamW()
    """The update."""
    schedule: Schedule = Schedule()
    """The learning rate over time."""
    ema: Ema = Ema()
    """A moving average of what is trained."""
    memory: Memory = Memory()
    """What is traded for memory."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept."""
    export: Export = Export()
    """What is written at the end."""
    validation: Validation = Validation()
    """How it is judged."""
    tracking: Tracking = Tracking()
    """Where metrics go."""
    distributed: Distributed = Distributed()
    """How processes work together."""

    @property
    def run_folder(self) -> Path:
        """The folder of a run's checkpoints and results: `output`, or that of the one expert in it."""
        experts = self.model.experts
        return self.output / experts[0] if experts and len(experts) == 1 else self.output

    @property
    def own_paths(self) -> list[Path]:
        """Folders and files that a run writes. If they lie in a dataset's folder, they are no clips, captions or tables of it."""
        # Those in it count by themselves where the run writes into the dataset's folder itself, which cannot be left out whole.
        inside = (self.run_folder / name for name in _OF_A_RUN)
        return [self.output, *inside, self.output / GENERATED, self.data.cache]

    @property
    def adapter(self) -> Table | None:
        """The settings of what is trained: the table that is called as train.method. None with "full"."""
        return None if self.train.method == "full" else getattr(self, self.train.method)


def free_keys(table: type[BaseModel] = Recipe, prefix: str = "") -> set[str]:
    """Dotted names of the keys that may change when a run is resumed."""
    found: set[str] = set()
    for name, field in table.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and FREE_ON_RESUME in field.json_schema_extra:
            found.add(prefix + name)
        for nested in tables_of(field):
            found |= free_keys(nested, f"{prefix}{name}.")
    return found


def is_set(recipe: Recipe, key: str) -> bool:
    """Whether a key, `table.key`, differs from its default."""
    table, _, name = key.partition(".")
    settings = getattr(recipe, table)
    return getattr(settings, name) != type(settings).model_fields[name].default
