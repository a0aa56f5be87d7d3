"""The fastest settings with which a training fits a GPU: shallow models rank them, the whole one decides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import tomli_w

from finetune.checks.settings import check_recipe
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.planning.gpus import Hardware
from finetune.planning.report import GIB, Phase, Plan
from finetune.planning.simulate import Simulation, largest, simulate, simulate_all
from finetune.recipe import Bucket, Recipe, recipe_values
from finetune.recipe.rules import saver_problems, streams
from finetune.runtime.errors import Problem, UserError

Changes = dict[str, Any]
"""Keys of a recipe, as `table.key` -> value."""

_PROBES = (4, 6)  # depths of shallow models; memory and time are linear in depth from there on
_TIGHT = 0.9  # share of a GPU's memory from which what is lost between pieces decides
_ROOM = 0.97  # share that resident blocks may fill: what they leave is for the pieces between them
_ACTIVATIONS: list[Changes] = [
    {"memory.activation_checkpointing": "none", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "selective", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "every_n", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "full", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "every_n", "memory.offload_activations": True},
    {"memory.activation_checkpointing": "full", "memory.offload_activations": True},
]
_PLAIN: Changes = {  # what belongs to settings that may not be chosen
    "memory.resident_blocks": 0,
    "memory.keep_gib": None,
    "memory.checkpoint_every": 2,
    "memory.shard_size": None,
}
_NO_SAMPLES: Changes = {
    "validation.prompts": [],
    "validation.prompts_file": None,
    "validation.samples_every": None,
    "validation.tiling": True,
}
_BAND = 0.03  # times that differ by less are alike: the simpler settings, which come first, are taken
_EIGHT_BIT = {"optimizer.name": "adamw_8bit"}
_INEXACT: dict[str, list[Changes]] = {  # what changes a training's numbers, least first
    "lora": [_EIGHT_BIT, {"memory.low_bit": "int8"}, _EIGHT_BIT | {"memory.low_bit": "nf4"}],
    "full": [
        {"train.weights": "bf16"},
        _EIGHT_BIT | {"train.weights": "bf16"},
        _EIGHT_BIT | {"train.weights": "bf16", "optimizer.in_backward": True, "train.max_grad_norm": "none"},
    ],
}


@dataclass(frozen=True)
class Candidate:
    """Settings, and what shallow models say of them: bytes of a GPU and of a node's host at the peak, seconds of a step."""

    changes: Changes
    memory: float
    host: float
    seconds: float

    def share_of(self, hardware: Hardware) -> float:
        """What is taken of the memory that is scarcer."""
        return max(self.memory / hardware.capacity, self.host / (hardware.host_capacity or math.inf))


@dataclass(frozen=True)
class SearchResult:
    """What was found; `fits` is False where nothing fits, and the plan is then the smallest."""

    recipe: Recipe
    changes: Changes
    plan: Plan
    fits: bool

    def lines(self) -> list[str]:
        """The plan, and the lines of the recipe that it takes."""
        peak = f"{self.plan.highest.device.reserved / GIB:.2f} GiB"
        if not self.fits:
            return [*self.plan.lines(), f"nothing fits; these settings take least, {peak}:", "", *_toml(self.changes)]
        if not self.changes:
            return [*self.plan.lines(), "the recipe is the fastest that fits, as it is"]
        return [*self.plan.lines(), "the fastest settings found that fit:", "", *_toml(self.changes)]


def fit(recipe: Recipe, family: Family, hardware: Hardware, say: Callable[[str], None]) -> SearchResult:
    """Search the memory savers. Those that leave the training's numbers alone come first.

    Args:
        hardware: with what a GPU has, and whose time is estimated.
        say: is told how the search goes on.
    """
    bucket, capacity = largest(family, recipe.data.buckets), hardware.capacity
    for_encoding, hopeless = _for_encoding(recipe, family, hardware)
    smallest: Candidate | None = None
    extras = [{}, *_INEXACT[recipe.train.method]]
    if hopeless:  # all that is left to say is what takes least
        extras = [next((extra for extra in reversed(extras) if any(_settings(recipe, hardware.gpus, extra))), {})]
    for extra in extras:
        settings = list(_settings(recipe, hardware.gpus, extra))
        say(f"{hopeless or 'searching'}: {len(settings)} settings{' with ' + _brief(extra) if extra else ''}")
        candidates = [_probe(recipe, family, bucket, hardware, each) for each in settings]
        for candidate in _ranked(candidates):
            smallest = min(smallest or candidate, candidate, key=lambda each: each.share_of(hardware))
            if hopeless or candidate.share_of(hardware) > 1:
                continue
            for changes in _attempts(candidate, capacity):
                say(
                    f"trying {_brief(changes)}: {candidate.memory / GIB:.1f} GiB, {candidate.seconds:.1f} s a step expected"
                )
                if not simulate(_changed(recipe, changes), family, [bucket], hardware).fits:
                    continue
                if (found := _whole(recipe, changes | for_encoding, family, hardware)).fits:
                    return found
    if smallest is None:
        problems = check_recipe(recipe, hardware.gpus) or [
            Problem("no setting of the memory savers goes with this recipe", "--fit")
        ]
        raise UserError.of(problems)
    least = smallest.changes | {"memory.expandable_segments": True} | for_encoding
    return replace(_whole(recipe, least, family, hardware), fits=False)


def _ranked(candidates: list[Candidate]) -> Iterator[Candidate]:
    """The fastest first; of those that are as good as it, the first."""
    left = list(candidates)
    while left:
        fastest = min(candidate.seconds for candidate in left)
        chosen = next(candidate for candidate in left if candidate.seconds <= (1 + _BAND) * fastest)
        left.remove(chosen)
        yield chosen


def _attempts(candidate: Candidate, capacity: int) -> Iterator[Changes]:
    """The settings with and without expandable segments; then, of blocks that stay on the GPU, a few fewer."""
    expandable = {"memory.expandable_segments": True}
    if candidate.memory <= _TIGHT * capacity:
        yield candidate.changes
    yield candidate.changes | expandable
    if stay := candidate.changes["memory.resident_blocks"]:
        yield candidate.changes | expandable | {"memory.resident_blocks": max(0, stay - 1 - stay // 5)}


def _settings(recipe: Recipe, gpus: int, extra: Changes) -> Iterator[Changes]:
    """Combinations of savers that go together."""
    weights: list[Changes] = [{"memory.offload": False}, {"memory.offload": True}]
    if gpus == 1:
        weights = [{"memory.layout": "auto", **each} for each in weights]
    else:
        layouts = ("replicate", "shard") if recipe.train.method == "lora" else ("shard",)
        weights = [{"memory.layout": layout, **each} for layout in layouts for each in weights]
    for activations, where in itertools.product(_ACTIVATIONS, weights):
        changes = _PLAIN | activations | where | extra
        if not saver_problems(_changed(recipe, changes), gpus):
            yield changes


def _probe(recipe: Recipe, family: Family, bucket: Bucket, hardware: Hardware, changes: Changes) -> Candidate:
    """What settings take, by two shallow models; of blocks that are streamed, as many stay on the GPU as have room."""
    blocks = [family.transformer_config[key] for key in family.depth_keys]
    full, chosen = min(blocks), _changed(recipe, changes)
    figures = []
    for depth in _PROBES if full > max(_PROBES) else [full]:
        shallow = type(family)(_ShallowFolder(family, [depth * count // full for count in blocks]))
        load, step = simulate(chosen, shallow, [bucket], replace(hardware, capacity=None)).phases
        host = hardware.processes * max(load.host.requested, step.host.requested)
        figures.append((load.device.allocated, step.device.allocated, host, step.seconds))
    if len(figures) == 2:
        first, second = _PROBES
        figures = [[a + (b - a) * (full - first) / (second - first) for a, b in zip(*figures, strict=True)]]
    load, step, host, seconds = figures[0]
    memory = max(load, step)
    if streams(chosen.memory, recipe.train.method, hardware.gpus):
        size = _block_bytes(chosen, family)
        stay = min(sum(blocks) - 1, max(0, int((_ROOM * hardware.capacity - memory) / size)))
        changes, memory = changes | {"memory.resident_blocks": stay}, memory + stay * size
        host -= hardware.processes * stay * size
    return Candidate(changes, memory, host, seconds)


def _block_bytes(recipe: Recipe, family: Family) -> float:
    """A block's frozen weights, the largest's."""
    transformer = family.empty_transformer()
    numbers = max(
        sum(parameter.numel() for parameter in block.parameters())
        for name in family.block_lists
        for block in getattr(transformer, name)
    )
    bits = {"int8": 8, "float8": 8, "nf4": 4.5}.get(
        recipe.memory.low_bit, 16 if recipe.train.precision == "bf16" else 32
    )
    return numbers * bits / 8


class _ShallowFolder(ModelFolder):
    """The same model with fewer blocks."""

    def __init__(self, family: Family, depths: list[int]) -> None:
        super().__init__(family.folder.path)
        self._trained, self._depths = family.trained_component, dict(zip(family.depth_keys, depths, strict=True))

    def config(self, component: str) -> dict[str, Any]:
        config = super().config(component)
        return config | self._depths if component == self._trained else config


def _for_encoding(recipe: Recipe, family: Family, hardware: Hardware) -> tuple[Changes, str]:
    """What captions and clips need, so that they can be encoded; and why they cannot be, if so."""

    def encoded(recipe: Recipe) -> tuple[list[Phase], int]:
        with Simulation(recipe, family, hardware).running() as simulation:
            simulation.encoding(recipe.data.buckets)
        too_large = [phase for phase in simulation.phases if phase.device.reserved > hardware.capacity]
        return too_large, simulation.plan().host_bytes if simulation.phases else 0

    changes: Changes = {}
    too_large, host = encoded(recipe)
    for phase in too_large:
        changes |= {"memory.text_encoder": "cpu"} if phase.kind == "encode text" else {"vae.tiling": True}
    if changes:
        too_large, host = encoded(_changed(recipe, changes))
    for phase in too_large:
        return changes, f"{phase.name} alone takes {phase.device.reserved / GIB:.2f} GiB, whatever the other settings"
    if host > (hardware.host_capacity or math.inf):
        return changes, f"encoding alone takes {host / GIB:.2f} GiB of a node's memory, whatever the other settings"
    return changes, ""


def _whole(recipe: Recipe, changes: Changes, family: Family, hardware: Hardware) -> SearchResult:
    """All phases of what was chosen, with every bucket. Only what differs from the recipe is told."""
    chosen, capacity = _changed(recipe, changes), hardware.capacity
    plan = simulate_all(chosen, family, recipe.data.buckets, hardware)
    samples = plan.of_kind("validation")
    excess = max((phase.device.reserved - capacity for phase in samples), default=0)
    if excess > 0 and (stay := changes["memory.resident_blocks"]):
        fewer = max(0, stay - 1 - int(excess / _block_bytes(chosen, family)))
        return _whole(recipe, changes | {"memory.resident_blocks": fewer}, family, hardware)
    if excess > 0:
        needed = (excess + capacity) / GIB
        plan.notes.append(f"samples would take {needed:.2f} GiB, and are left out; a smaller shape may fit")
        plan = replace(plan, phases=[phase for phase in plan.phases if phase not in samples])
        changes = changes | _NO_SAMPLES
    before = recipe_values(recipe)
    told = {key: value for key, value in changes.items() if _value(before, key) != value}
    return SearchResult(_changed(recipe, changes), told, plan, bool(plan.fits))


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    values = recipe_values(recipe)
    for key, value in changes.items():
        table, name = key.split(".")
        values.setdefault(table, {})[name] = value
        if value is None:
            del values[table][name]
    return Recipe.model_validate(values)


def _value(values: dict[str, Any], key: str) -> Any:
    table, name = key.split(".")
    return values.get(table, {}).get(name)


def _brief(changes: Changes) -> str:
    chosen = (key for key, value in changes.items() if value not in (False, 0, None, "auto", "none"))
    return (
        ", ".join(f"{key} = {changes[key]}" for key in chosen if key not in ("memory.checkpoint_every",)) or "no savers"
    )


def _toml(changes: Changes) -> list[str]:
    tables: dict[str, dict[str, Any]] = {}
    gone = [f"# remove {key}" for key, value in changes.items() if value is None]
    for key, value in changes.items():
        table, name = key.split(".")
        if value is not None:
            tables.setdefault(table, {})[name] = value
    return [*gone, *tomli_w.dumps(tables).splitlines()]
