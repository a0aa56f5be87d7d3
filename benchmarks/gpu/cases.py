"""The cases that are measured: CogVideoX with each memory saver, as tables of a recipe."""

from dataclasses import dataclass, field

from finetune.recipe import Bucket, Recipe

BUCKET = Bucket(49, 480, 720)
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
