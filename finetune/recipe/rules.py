"""Which memory savers go together: the one list of rules.

`check` reports what breaks a rule, `plan --fit` leaves such settings out, the table in recipes/memory.md is printed from
them, and the tests of savers combine what they allow. They stand beside the schema, because a rule looks at a
recipe's keys and at the number of ranks alone: it is read before torch is imported, and by every room above this one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.recipe.schema import Memory, Recipe, is_set
from finetune.runtime.errors import Problem
from finetune.runtime.units import counted

Text = str | Callable[[Recipe, int], str]


@dataclass(frozen=True)
class Rule:
    """Settings that cannot work together, or one that has no effect beside the others.

    Attributes:
        key: the key that the problem is reported at, as `table.key`.
        broken: whether a recipe breaks the rule on a number of ranks.
        what: what is wrong; a text, or a function of recipe and ranks.
        cure: what to type instead; the same.
    """

    key: str
    broken: Callable[[Recipe, int], bool]
    what: Text
    cure: Text

    def problem(self, recipe: Recipe, ranks: int) -> Problem:
        """What to tell the user of a recipe that breaks the rule."""
        what, cure = (text if isinstance(text, str) else text(recipe, ranks) for text in (self.what, self.cure))
        return Problem(what, self.key, cure)


def saver_problems(recipe: Recipe, ranks: int) -> list[Problem]:
    """Every rule that a recipe breaks on this many ranks."""
    return [rule.problem(recipe, ranks) for rule in RULES if rule.broken(recipe, ranks)]


def streams(memory: Memory, method: str, ranks: int) -> bool:
    """Whether offloaded weights are frozen and whole on each rank, so that its blocks take turns on the device."""
    return memory.offload and method != "full" and (ranks == 1 or memory.layout == "replicate")


def _streams(recipe: Recipe, ranks: int) -> bool:
    return streams(recipe.memory, recipe.train.method, ranks)


def _trains_all(recipe: Recipe) -> bool:
    return recipe.train.method == "full"


def _is_idle(key: str, has_effect: Callable[[Recipe], bool]) -> Callable[[Recipe, int], bool]:
    """Whether a key is set, and nothing reads it."""
    return lambda recipe, ranks: is_set(recipe, key) and not has_effect(recipe)


def _how_to_stream(recipe: Recipe, ranks: int) -> str:
    missing = [] if recipe.memory.offload else ["memory.offload = true"]
    missing += ['train.method = "lora"'] if _trains_all(recipe) else []
    missing += ['memory.layout = "replicate"'] if ranks > 1 and recipe.memory.layout != "replicate" else []
    return f"remove it, or set {', '.join(missing)}"


def _has_odd_groups(recipe: Recipe, ranks: int) -> bool:
    size = recipe.memory.shard_size
    return recipe.memory.layout == "hybrid" and size is not None and ranks % size != 0


def _nearest_group(recipe: Recipe, ranks: int) -> str:
    near = max(size for size in range(1, recipe.memory.shard_size or 2) if ranks % size == 0)
    return f"set it to {near}" if near > 1 else 'remove it, and set memory.layout = "shard"'


def _accumulates(recipe: Recipe, ranks: int) -> bool:
    return recipe.train.global_batch_size > ranks * recipe.train.micro_batch_size


def _whole_share(recipe: Recipe, ranks: int) -> str:
    return f"set train.micro_batch_size = {recipe.train.global_batch_size // ranks}"


# What an update of these needs beside a parameter's own shard and its gradient.
_TOGETHER = ("prodigy", "schedule_free_adamw")  # all parameters, which share an estimate or a count
_WHOLE = ("adafactor", "muon", "prodigy")  # whole matrices, which several ranks gather on their devices


def _is_called(*names: str) -> Callable[[Recipe], bool]:
    return lambda recipe: recipe.optimizer.name in names


def _updates_on_host(recipe: Recipe, ranks: int) -> bool:
    return recipe.memory.offload and not _streams(recipe, ranks)


def _of(recipe: Recipe, ranks: int) -> str:
    return f'or take another optimizer than "{recipe.optimizer.name}"'


def _on_device(recipe: Recipe, ranks: int) -> str:
    replicated = ranks > 1 and not _trains_all(recipe)
    first = 'memory.layout = "replicate"' if replicated else "memory.offload = false"
    return f"set {first}, {_of(recipe, ranks)}"


_NO_EFFECT = "this key has no effect here"
RULES = (
    # Where the weights are
    Rule(
        "memory.layout",
        lambda recipe, ranks: recipe.memory.offload and recipe.memory.layout == "replicate" and _trains_all(recipe),
        "replicated weights that are trained stay on the device, and cannot be in host memory",
        'set it to "shard", or memory.offload = false',
    ),
    Rule(
        "memory.resident_blocks",
        lambda recipe, ranks: recipe.memory.resident_blocks > 0 and not _streams(recipe, ranks),
        f"{_NO_EFFECT}: blocks take turns on the device only with LoRA, on one GPU or replicated",
        _how_to_stream,
    ),
    Rule(
        "memory.shard_size",
        _has_odd_groups,
        lambda recipe, ranks: f"{counted(ranks, 'rank')} cannot be divided into groups of {recipe.memory.shard_size}",
        _nearest_group,
    ),
    Rule(
        "memory.shard_size",
        _is_idle("memory.shard_size", lambda recipe: recipe.memory.layout == "hybrid"),
        _NO_EFFECT,
        'remove it, or set memory.layout = "hybrid"',
    ),
    # What is recomputed
    Rule(
        "memory.checkpoint_every",
        _is_idle("memory.checkpoint_every", lambda recipe: recipe.memory.activation_checkpointing == "every_n"),
        _NO_EFFECT,
        'remove it, or set memory.activation_checkpointing = "every_n"',
    ),
    Rule(
        "memory.keep_gib",
        _is_idle("memory.keep_gib", lambda recipe: recipe.memory.activation_checkpointing == "selective"),
        _NO_EFFECT,
        'remove it, or set memory.activation_checkpointing = "selective"',
    ),
    # What is held or computed in few bits
    Rule(
        "memory.low_bit",
        lambda recipe, ranks: recipe.memory.low_bit != "none" and _trains_all(recipe),
        "all weights are trained, and none is frozen that could be held in fewer bits",
        'remove it, or set train.method = "lora"',
    ),
    Rule(
        "train.float8",
        lambda recipe, ranks: recipe.train.float8 and not _trains_all(recipe),
        "float8 training is for weights that are trained",
        'remove it, or hold the frozen ones in float8: memory.low_bit = "float8"',
    ),
    # An update in the backward pass sees one gradient at a time, of one micro-batch.
    Rule(
        "optimizer.in_backward",
        lambda recipe, ranks: recipe.optimizer.in_backward and not _trains_all(recipe),
        lambda recipe, ranks: (
            "an adapter's gradients are small; nothing is saved"
            if recipe.train.method == "lora"
            else "updates in the backward pass are for training all weights"
        ),
        "remove it",
    ),
    Rule(
        "optimizer.in_backward",
        lambda recipe, ranks: recipe.optimizer.in_backward and recipe.train.max_grad_norm != "none",
        "the norm of all gradients is not known before the last one",
        'set train.max_grad_norm = "none"',
    ),
    Rule(
        "optimizer.in_backward",
        lambda recipe, ranks: recipe.optimizer.in_backward and _accumulates(recipe, ranks),
        "gradients cannot be accumulated",
        lambda recipe, ranks: f"{_whole_share(recipe, ranks)}, or remove it",
    ),
    Rule(
        "optimizer.in_backward",
        lambda recipe, ranks: recipe.optimizer.in_backward and recipe.memory.offload,
        "offloaded gradients are in host memory already, and the update is made there",
        "remove it",
    ),
    Rule(
        "optimizer.in_backward",
        lambda recipe, ranks: recipe.optimizer.in_backward and _is_called(*_TOGETHER)(recipe),
        lambda recipe, ranks: f"{recipe.optimizer.name} updates all weights together",
        lambda recipe, ranks: f"remove it, {_of(recipe, ranks)}",
    ),
    Rule(
        "optimizer.in_backward",
        lambda recipe, ranks: recipe.optimizer.in_backward and ranks > 1 and _is_called("adafactor", "muon")(recipe),
        lambda recipe, ranks: (
            f"{recipe.optimizer.name} gathers whole matrices on {ranks} ranks, which the backward pass has no time for"
        ),
        lambda recipe, ranks: f"remove it, {_of(recipe, ranks)}",
    ),
    # What an algorithm cannot do
    Rule(
        "optimizer.name",
        lambda recipe, ranks: _is_called("prodigy")(recipe) and recipe.train.method != "lora" and ranks > 1,
        lambda recipe, ranks: (
            f"prodigy estimates one rate from all weights, which each of {ranks} ranks would hold whole"
        ),
        'set train.method = "lora", or another optimizer.name, such as "adamw" or "schedule_free_adamw"',
    ),
    Rule(
        "lora.plus_ratio",
        lambda recipe, ranks: (
            _is_called("prodigy")(recipe) and recipe.train.method == "lora" and recipe.lora.plus_ratio != 1
        ),
        "prodigy finds one rate for all parameters, and takes no other for the second matrices",
        'remove it, or set optimizer.name = "adamw"',
    ),
    Rule(
        "train.weights",
        lambda recipe, ranks: recipe.train.weights == "bf16" and _is_called(*_TOGETHER)(recipe),
        lambda recipe, ranks: (
            f"{recipe.optimizer.name} does not round stochastically, and bf16 would lose small updates"
        ),
        lambda recipe, ranks: f'set it to "float32", {_of(recipe, ranks)}',
    ),
    Rule(
        "schedule.name",
        lambda recipe, ranks: (
            _is_called("schedule_free_adamw")(recipe)
            and recipe.schedule.name not in ("constant", "constant_with_warmup")
        ),
        "schedule_free_adamw averages the weights in place of a falling rate",
        'set it to "constant_with_warmup", or optimizer.name = "adamw"',
    ),
    Rule(
        "ema.decay",
        lambda recipe, ranks: recipe.ema.decay is not None and _is_called("schedule_free_adamw")(recipe),
        "schedule_free_adamw averages the weights by itself, and is evaluated by that average",
        'remove [ema], or set optimizer.name = "adamw"',
    ),
    Rule(
        "memory.offload",
        lambda recipe, ranks: (
            _updates_on_host(recipe, ranks)
            and (_is_called("muon")(recipe) or (ranks > 1 and _is_called("adafactor", "prodigy")(recipe)))
        ),
        lambda recipe, ranks: (
            f"{recipe.optimizer.name} needs whole matrices on the GPU, and offloaded weights are updated on the CPU"
        ),
        _on_device,
    ),
    # Where the optimizer's state is
    Rule(
        "optimizer.offload",
        lambda recipe, ranks: (
            recipe.optimizer.offload != "none" and recipe.memory.offload and not _streams(recipe, ranks)
        ),
        f"{_NO_EFFECT}: what is trained is offloaded with the weights, and its optimizer's state is in host memory",
        "remove it, or set memory.offload = false",
    ),
    Rule(
        "optimizer.offload",
        lambda recipe, ranks: recipe.optimizer.offload != "none" and recipe.optimizer.in_backward,
        "updates in the backward pass are made on the GPU",
        'remove it, or set optimizer.in_backward = false; "state_and_gradients" drops gradients as early',
    ),
    Rule(
        "optimizer.offload",
        lambda recipe, ranks: recipe.optimizer.offload == "state_and_gradients" and _accumulates(recipe, ranks),
        "gradients that have left the GPU cannot be accumulated",
        lambda recipe, ranks: f'set it to "state", or {_whole_share(recipe, ranks)}',
    ),
    Rule(
        "optimizer.offload",
        lambda recipe, ranks: recipe.optimizer.offload != "none" and _is_called(*_WHOLE, *_TOGETHER)(recipe),
        lambda recipe, ranks: f"updates of {recipe.optimizer.name} are made on the GPU: they take more than one shard",
        lambda recipe, ranks: f"remove it, {_of(recipe, ranks)}",
    ),
)

Settings = Mapping[str, Any]
"""Keys of a recipe, as `table.key` -> value."""

# The switches of the table in recipes/memory.md, each with all its values: what goes for one of them goes for all.
SWITCHES: dict[str, tuple[Settings, ...]] = {
    "checkpointing": tuple({"memory.activation_checkpointing": which} for which in ("full", "every_n", "selective")),
    "zero2, hybrid": ({"memory.layout": "zero2"}, {"memory.layout": "hybrid", "memory.shard_size": 2}),
    "replicate": ({"memory.layout": "replicate"},),
    "offload": ({"memory.offload": True},),
    "offload_activations": ({"memory.offload_activations": True},),
    "low_bit": tuple({"memory.low_bit": bits} for bits in ("int8", "float8", "nf4")),
    "8- and 4-bit optimizers": tuple({"optimizer.name": f"adamw_{bits}"} for bits in ("8bit", "4bit", "fp8")),
    "optimizer.offload": tuple({"optimizer.offload": what} for what in ("state", "state_and_gradients")),
    "bf16 weights": ({"train.weights": "bf16"},),
    "in_backward": ({"optimizer.in_backward": True, "train.max_grad_norm": "none"},),
    "float8": ({"train.float8": True},),
    "compile": ({"memory.compile": True},),
}
_RANKS = 2  # of the table: the fewest that can be divided


def combinations_table() -> str:
    """The table in recipes/memory.md of switches that go together, as Markdown: each pair, and with which method."""
    names = list(SWITCHES)
    lines = ["| | " + " | ".join(names[:-1]) + " |", "|---" * len(names) + "|"]
    for row, name in enumerate(names[1:], start=1):
        cells = [_cell(name, other) for other in names[:row]] + [""] * (len(names) - 1 - row)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(one: str, other: str) -> str:
    """Raises ValueError if it depends on the values: the switch must then be two."""
    found = {_together(first, second) for first in SWITCHES[one] for second in SWITCHES[other]}
    if len(found) > 1:
        raise ValueError(f"{one} and {other}: some of their values go together, and others do not")
    return found.pop()


def _together(one: Settings, other: Settings) -> str:
    if one.keys() & other.keys():
        return "one of them"
    methods: dict[str, Literal["lora", "full"]] = {"LoRA": "lora", "full": "full"}
    passing = [name for name, method in methods.items() if not _problems_of({**one, **other, "train.method": method})]
    return {2: "yes", 1: "".join(passing), 0: "no"}[len(passing)]


def _problems_of(settings: Settings) -> list[Problem]:
    values: dict[str, dict[str, Any]] = {
        "model": {"family": "any", "path": "any"},
        "data": {"path": "any", "buckets": ["17x64x96"]},
        "train": {"global_batch_size": _RANKS},
    }
    for key, value in settings.items():
        table, _, name = key.partition(".")
        values.setdefault(table, {})[name] = value
    return saver_problems(Recipe.model_validate(values), _RANKS)
