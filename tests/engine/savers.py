"""Every memory saver, and pairs of them: overrides of a recipe, and the plain run that each must equal."""

from dataclasses import dataclass
from functools import cache
from itertools import combinations

from processes import ROOT

from finetune.recipe import load_recipe
from finetune.recipe.rules import saver_problems

FAMILIES = ["ltx", "cogvideox", "hunyuan"]
ALONE = {"lora": "hunyuan", "full": "ltx"}  # the families of the default suite
PLAIN = ["memory.activation_checkpointing=none", "memory.layout=shard"]
METHODS = {"lora": ["lora.rank=4", "lora.alpha=8"], "full": ["train.method=full", "optimizer.lr=1e-3"]}

# What changes the figures themselves: a run with one of them is compared with a plain one that has it, too.
CHANGES = {
    "int8": ["memory.low_bit=int8"],
    "float8": ["memory.low_bit=float8"],
    "nf4": ["memory.low_bit=nf4"],
    "adamw_8bit": ["optimizer.name=adamw_8bit"],
    "adamw_4bit": ["optimizer.name=adamw_4bit"],
    "adamw_fp8": ["optimizer.name=adamw_fp8"],
    "bf16 weights": ["train.weights=bf16"],
    "float8 products": ["train.float8=true"],
    "unclipped": ["train.max_grad_norm=none"],
}


@dataclass(frozen=True)
class Saver:
    """Overrides, and the change of CHANGES that comes with them."""

    overrides: tuple[str, ...]
    change: str | None = None


SAVERS = {
    "full checkpointing": Saver(("memory.activation_checkpointing=full",)),
    "every second block": Saver(("memory.activation_checkpointing=every_n",)),
    "selective checkpointing": Saver(("memory.activation_checkpointing=selective",)),
    "zero2": Saver(("memory.layout=zero2",)),
    "hybrid": Saver(("memory.layout=hybrid", "memory.shard_size=2")),
    "replicate": Saver(("memory.layout=replicate",)),
    "offload": Saver(("memory.offload=true",)),
    "activations offloaded": Saver(("memory.offload_activations=true",)),
    "one block resident": Saver(("memory.offload=true", "memory.resident_blocks=1")),
    "state offloaded": Saver(("optimizer.offload=state",)),
    "gradients offloaded": Saver(("optimizer.offload=state_and_gradients",)),
    "compile": Saver(("memory.compile=true",)),
    "attention by products": Saver(("memory.attention=math",)),
    "updates in backward": Saver(("optimizer.in_backward=true", *CHANGES["unclipped"]), "unclipped"),
    **{name: Saver(tuple(CHANGES[name]), name) for name in CHANGES if name != "unclipped"},
}
# Pairs of these are in the default suite; all pairs in the full one.
OFTEN = {
    "full checkpointing",
    "every second block",
    "selective checkpointing",
    "zero2",
    "hybrid",
    "replicate",
    "offload",
    "int8",
    "float8",
    "nf4",
}


@cache
def savers(method: str, processes: int) -> list[str]:
    """Each saver alone, and each pair that the rules let pass, joined by " + "."""
    single = [name for name in SAVERS if _goes(name, method, processes)]
    pairs = [pair for pair in combinations(single, 2) if not _keys(pair[0]) & _keys(pair[1])]
    names = single + [" + ".join(pair) for pair in pairs if _goes(" + ".join(pair), method, processes)]
    if processes > 1:
        return names
    return [name for name in names if set(overrides(name)) != set(baseline_overrides(baseline(name)))]


def _goes(name: str, method: str, processes: int) -> bool:
    batch = ["train.global_batch_size=2", f"train.micro_batch_size={2 // processes}", f"train.method={method}"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", [*batch, *PLAIN, *overrides(name)])
    return not saver_problems(recipe, processes)


def _keys(name: str) -> set[str]:
    return {override.partition("=")[0] for override in overrides(name)}


def overrides(name: str) -> list[str]:
    return [override for part in _parts(name) for override in SAVERS[part].overrides]


def baseline(name: str) -> str:
    """The changes that a run must be compared with, joined; empty for the plain run."""
    return " + ".join(sorted(SAVERS[part].change for part in _parts(name) if SAVERS[part].change))


def baseline_overrides(name: str) -> list[str]:
    return [override for change in name.split(" + ") if change for override in CHANGES[change]]


def _parts(name: str) -> list[str]:
    return name.split(" + ")


def chosen(which: str, family: str, method: str, processes: int) -> list[str]:
    """The savers that a suite runs for a family: "all"; or for "some" each saver, and pairs in turns, on one family a method.

    What compiles takes long, and is in "all" alone.
    """
    names = savers(method, processes)
    if which == "all":
        return names
    if family != ALONE[method]:
        return []
    turn = 3 * (processes - 1) + (method == "full")
    pairs = [name for name in names if " + " in name and set(_parts(name)) <= OFTEN]
    return [name for name in names if " + " not in name and name != "compile"] + pairs[turn % 6 :: 6]
