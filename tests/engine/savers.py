"""Every memory saver, and pairs of them: overrides of a recipe, and for which methods."""

from itertools import combinations

LOSSLESS = {
    "full checkpointing": ["memory.activation_checkpointing=full"],
    "every second block": ["memory.activation_checkpointing=every_n"],
    "selective checkpointing": ["memory.activation_checkpointing=selective"],
    "zero2": ["memory.layout=zero2"],
    "hybrid": ["memory.layout=hybrid", "memory.shard_size=2"],
    "replicate": ["memory.layout=replicate"],
    "offload": ["memory.offload=true"],
}
ROUNDED = {kind: [f"memory.low_bit={kind}"] for kind in ("int8", "float8", "nf4")}  # for LoRA
PLAIN = ["memory.activation_checkpointing=none", "memory.layout=shard"]
METHODS = {"lora": ["lora.rank=4", "lora.alpha=8"], "full": ["train.method=full", "optimizer.lr=1e-3"]}


def savers(method: str, processes: int) -> dict[str, list[str]]:
    """Each saver alone and each pair that can be set together, as overrides."""
    single = LOSSLESS | (ROUNDED if method == "lora" else {})
    if processes % 2:
        single = {name: overrides for name, overrides in single.items() if name != "hybrid"}
    pairs = {
        f"{one} + {other}": single[one] + single[other]
        for one, other in combinations(single, 2)
        if not keys(single[one]) & keys(single[other]) and {one, other} != {"replicate", "offload"}
    }
    return {"plain": [], **single, **pairs}


def keys(overrides: list[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def pairwise(names: list[str], turn: int) -> list[str]:
    """A sixth of the pairs, another one each turn; what is single stays."""
    pairs = [name for name in names if " + " in name]
    return [name for name in names if " + " not in name] + pairs[turn % 6 :: 6]


def turn_of(place: int, method: str, processes: int) -> int:
    """Families, methods and numbers of processes take turns, so that the default suite sees most pairs somewhere."""
    return place + 3 * (processes - 1) + (method == "full")
