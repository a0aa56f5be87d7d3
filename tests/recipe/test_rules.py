"""The rules of which memory savers go together: `check` reports them, recipes/memory.md tells them, and none is idle."""

from pathlib import Path

import pytest

from finetune.checks.settings import check_recipe
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.rules import RULES, SWITCHES, combinations_table, saver_problems

ROOT = Path(__file__).parents[2]
FULL, OFFLOAD, REPLICATE = "train.method=full", "memory.offload=true", "memory.layout=replicate"
IN_BACKWARD, UNCLIPPED = "optimizer.in_backward=true", "train.max_grad_norm=none"
SCHEDULE_FREE, CONSTANT = "optimizer.name=schedule_free_adamw", "schedule.name=constant_with_warmup"


def recipe_of(*overrides: str) -> Recipe:
    plain = [
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "lora.rank=64",
        "lora.alpha=64",
        "lora.targets=[]",
    ]
    return load_recipe(ROOT / "recipes" / "quickstart.toml", [*plain, *overrides])


# (overrides, ranks, the key at fault, words of what is wrong): settings that break one rule alone
CASES = [
    ([FULL, OFFLOAD, REPLICATE], 4, "memory.layout", "cannot be in host memory"),
    (["memory.resident_blocks=1"], 4, "memory.resident_blocks", "take turns on the device only with LoRA"),
    (["memory.layout=hybrid", "memory.shard_size=3"], 4, "memory.shard_size", "groups of 3"),
    (["memory.shard_size=2"], 4, "memory.shard_size", "no effect"),
    (["memory.checkpoint_every=3"], 4, "memory.checkpoint_every", "no effect"),
    (["memory.keep_gib=1"], 4, "memory.keep_gib", "no effect"),
    ([FULL, "memory.low_bit=nf4"], 4, "memory.low_bit", "none is frozen"),
    (["train.float8=true"], 4, "train.float8", "weights that are trained"),
    ([IN_BACKWARD, UNCLIPPED], 4, "optimizer.in_backward", "an adapter's gradients are small"),
    ([FULL, IN_BACKWARD], 4, "optimizer.in_backward", "the norm of all gradients"),
    ([FULL, IN_BACKWARD, UNCLIPPED], 2, "optimizer.in_backward", "cannot be accumulated"),
    ([FULL, IN_BACKWARD, UNCLIPPED, OFFLOAD], 4, "optimizer.in_backward", "the update is made there"),
    ([FULL, OFFLOAD, "optimizer.offload=state"], 4, "optimizer.offload", "no effect"),
    ([FULL, IN_BACKWARD, UNCLIPPED, "optimizer.offload=state"], 4, "optimizer.offload", "are made on the GPU"),
    ([FULL, "optimizer.offload=state_and_gradients"], 2, "optimizer.offload", "cannot be accumulated"),
    ([FULL, IN_BACKWARD, UNCLIPPED, SCHEDULE_FREE, CONSTANT], 4, "optimizer.in_backward", "all weights together"),
    (
        [FULL, IN_BACKWARD, UNCLIPPED, "optimizer.name=adafactor"],
        4,
        "optimizer.in_backward",
        "whole matrices on 4 ranks",
    ),
    ([FULL, "optimizer.name=prodigy"], 4, "optimizer.name", "prodigy estimates one rate"),
    (["optimizer.name=prodigy", "lora.plus_ratio=4"], 4, "lora.plus_ratio", "prodigy finds one rate"),
    ([SCHEDULE_FREE, CONSTANT, "train.weights=bf16"], 4, "train.weights", "would lose small updates"),
    ([SCHEDULE_FREE, "schedule.name=cosine"], 4, "schedule.name", "in place of a falling rate"),
    ([SCHEDULE_FREE, CONSTANT, "ema.decay=0.99"], 4, "ema.decay", "averages the weights by itself"),
    ([OFFLOAD, "optimizer.name=prodigy"], 4, "memory.offload", "prodigy needs whole matrices on the GPU"),
    (["optimizer.name=muon", "optimizer.offload=state"], 4, "optimizer.offload", "updates of muon are made on the GPU"),
]


@pytest.mark.parametrize("overrides, ranks, key, what", CASES)
def test_check_tells_of_a_broken_rule_and_of_nothing_else(
    overrides: list[str], ranks: int, key: str, what: str
) -> None:
    (problem,) = check_recipe(recipe_of(*overrides), ranks)
    assert problem.where == key
    assert what in problem.what
    assert problem.cure
    assert check_recipe(recipe_of(*(o for o in overrides if o in (FULL, UNCLIPPED))), ranks) == []


def test_every_rule_has_its_case() -> None:
    told = [saver_problems(recipe_of(*overrides), ranks) for overrides, ranks, _, _ in CASES]
    broken = {(problem.where, problem.what) for (problem,) in told}
    assert len(broken) == len(CASES) == len(RULES)


@pytest.mark.parametrize(
    "overrides, ranks, cure",
    [
        (["memory.resident_blocks=1"], 1, "remove it, or set memory.offload = true"),
        (["memory.resident_blocks=1", OFFLOAD], 2, 'remove it, or set memory.layout = "replicate"'),
        (["memory.resident_blocks=1", OFFLOAD, FULL], 1, 'remove it, or set train.method = "lora"'),
        (["memory.layout=hybrid", "memory.shard_size=4"], 6, "set it to 3"),
        (["memory.layout=hybrid", "memory.shard_size=4"], 5, 'remove it, and set memory.layout = "shard"'),
        ([FULL, IN_BACKWARD, UNCLIPPED], 2, "set train.micro_batch_size = 4, or remove it"),
        (
            [FULL, "optimizer.offload=state_and_gradients"],
            2,
            'set it to "state", or set train.micro_batch_size = 4',
        ),
        (
            [OFFLOAD, "optimizer.name=adafactor"],
            4,
            'set memory.layout = "replicate", or take another optimizer than "adafactor"',
        ),
        (
            [OFFLOAD, FULL, "optimizer.name=muon"],
            1,
            'set memory.offload = false, or take another optimizer than "muon"',
        ),
    ],
)
def test_a_cure_names_what_is_missing(overrides: list[str], ranks: int, cure: str) -> None:
    assert [problem.cure for problem in saver_problems(recipe_of(*overrides), ranks)] == [cure]


def test_the_readme_says_which_switches_go_together() -> None:
    """Print its table with: python -c "from finetune.recipe import rules; print(rules.combinations_table())"."""
    assert combinations_table() in (ROOT / "recipes" / "memory.md").read_text()


def test_a_switch_whose_values_disagree_is_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a cell of the table would say what holds for some of them."""
    monkeypatch.setitem(SWITCHES, "offload", ({"memory.offload": True}, {"memory.offload": False}))
    with pytest.raises(ValueError, match="offload and replicate: some of their values go together"):
        combinations_table()
