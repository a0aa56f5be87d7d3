"""What a simulated step takes is what a real one takes: the same code, storage by storage."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, run_python

FAMILIES = ["ltx", "cogvideox", "hunyuan", "mochi"]
WITH_THEIR_TRANSFORMERS = [
    "ltx_i2v",
    "cogvideox_i2v",
    "hunyuan_i2v",
]  # with other inputs: savers make no further difference
SAVERS = {
    "plain": [],
    "not checkpointed": ["memory.activation_checkpointing=none"],
    "every second block": ["memory.activation_checkpointing=every_n"],
    "selective": ["memory.activation_checkpointing=selective"],
    "bf16": ["train.precision=bf16"],
    "full": ["train.method=full"],
}
OF_LTX = {
    "streamed": ["memory.offload=true"],
    "streamed, one resident": ["memory.offload=true", "memory.resident_blocks=1"],
    "int8": ["memory.low_bit=int8"],
    "float8": ["memory.low_bit=float8"],
    "nf4, streamed": ["memory.low_bit=nf4", "memory.offload=true"],
    "bf16 weights": ["train.method=full", "train.weights=bf16"],
    "adamw_8bit": ["train.method=full", "optimizer.name=adamw_8bit"],
    "adamw_4bit, bf16 weights": ["train.method=full", "optimizer.name=adamw_4bit", "train.weights=bf16"],
    "adamw_fp8": ["train.method=full", "optimizer.name=adamw_fp8"],
    "updates in backward": ["train.method=full", "optimizer.in_backward=true", "train.max_grad_norm=none"],
    "float8 products": ["train.method=full", "train.float8=true", "train.precision=bf16"],
    "replicate": ["memory.layout=replicate"],
    "attention by products": ["memory.attention=math"],
    "attention by products, not checkpointed": ["memory.attention=math", "memory.activation_checkpointing=none"],
    "efficient attention": ["memory.attention=efficient"],
    "guided target": ["objective.guidance_target=3", "objective.loss=huber"],
    "guided target, streamed": ["objective.guidance_target=3", "memory.offload=true"],
    "average": ["train.method=full", "ema.decay=0.9"],
    "average of bf16 weights": ["train.method=full", "train.weights=bf16", "ema.decay=0.9"],
    "streamed, average on the host": ["memory.offload=true", "ema.decay=0.9", "ema.device=host"],
}
CONSTANT = ["schedule.name=constant_with_warmup"]
OPTIMIZERS = {  # as a LoRA is trained by each, or all weights
    "prodigy": ["optimizer.name=prodigy"],
    "lion": ["train.method=full", "optimizer.name=lion"],
    "adafactor, bf16 weights": ["train.method=full", "optimizer.name=adafactor", "train.weights=bf16"],
    "muon": ["train.method=full", "optimizer.name=muon"],
    "schedule_free_adamw": ["train.method=full", "optimizer.name=schedule_free_adamw", *CONSTANT],
    "adamw_bf16, bf16 weights": ["train.method=full", "optimizer.name=adamw_bf16", "train.weights=bf16"],
}
SHORT = [("ltx", saver) for saver in SAVERS]
SHORT += [(family, "plain") for family in FAMILIES if family != "ltx"]
SHORT += [*(("ltx", saver) for saver in OF_LTX), ("wan_i2v", "plain")]
SHORT += [("hunyuan15", "full")]  # with a forward pass of its own, and weights without gradients
ALL = [*FAMILIES, *WITH_THEIR_TRANSFORMERS, "hunyuan15", "hunyuan15_i2v"]
LONG = [(family, saver) for family in ALL for saver in SAVERS if (family, saver) not in SHORT]
LONG += [("ltx", optimizer) for optimizer in OPTIMIZERS]
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.full) for case in LONG)]
ON_THE_HOST = (
    300  # bytes of numbers that are on the CPU beside a GPU: AdamW counts its steps there, torchao has its rates
)


@pytest.fixture(scope="module")
def accounts(
    family_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], dict[str, dict[str, int]]]:
    """Figures of tests/planning/accounting_worker.py, a process for each family: a simulated device stays known to torch."""
    folder, known = tmp_path_factory.mktemp("accounts"), {}

    def get(family: str, saver: str) -> dict[str, dict[str, int]]:
        matrix = LONG if (family, saver) in LONG else SHORT
        key = family, matrix is LONG
        if key not in known:
            out = folder / f"{family}-{len(known)}.json"
            settings = {**OPTIMIZERS, **OF_LTX, **SAVERS}
            cases = {name: settings[name] for each, name in matrix if each == family}
            worker = ROOT / "tests" / "planning" / "accounting_worker.py"
            done = run_python([worker, out, family_recipe(family), json.dumps(cases)], seconds=280)
            assert done.returncode == 0, done.stderr
            known[key] = json.loads(out.read_text())
        return known[key][saver]

    return get


@pytest.mark.parametrize("family, saver", CASES)
def test_a_simulated_step_takes_the_bytes_of_a_real_one(accounts, family: str, saver: str) -> None:
    figures = accounts(family, saver)
    real, simulated = figures["real"], figures["simulated"]
    assert simulated["growth"] > 10_000
    if saver == "bf16":  # a GPU, and the simulated one, keeps statistics of norms in float32; a CPU in bf16
        assert real["growth"] <= simulated["growth"] <= 1.01 * real["growth"]
    elif (
        saver in OPTIMIZERS
    ):  # counts of steps, 4 bytes a parameter, are on the device if AdamW's kernel reads them there
        assert abs(real["growth"] - simulated["growth"]) <= 300
    else:
        assert 0 <= real["growth"] - simulated["growth"] <= (8 if "adamw_" in saver else 0)
    if "streamed" not in saver:  # there a CPU has two memories in one
        assert 0 <= real["before"] - simulated["before"] <= ON_THE_HOST * (1 + 5 * ("hunyuan" in family))


@pytest.mark.parametrize("family, saver", CASES)
def test_a_peak_has_the_weights_of_the_real_model(accounts, family: str, saver: str) -> None:
    figures = accounts(family, saver)
    weights = figures["real"]["weights"]
    if "streamed" in saver:  # blocks lie on the host
        assert 0 < figures["parts"].pop("frozen weights") <= weights.pop("frozen weights")
    assert {name: figures["parts"].get(name, 0) for name in weights} == weights


def test_an_average_of_the_weights_is_counted_where_it_is(accounts) -> None:
    for saver, place, size in (
        ("average", "parts", 1),
        ("average of bf16 weights", "parts", 2),  # of bytes of the weights: it is in float32
        ("streamed, average on the host", "parts on the host", 1),
    ):
        figures = accounts("ltx", saver)
        assert 0 <= figures[place]["average"] - size * figures["real"]["weights"]["trained weights"] <= 64 * 200
