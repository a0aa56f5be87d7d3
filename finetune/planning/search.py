"""Search for the fastest settings that fit a GPU: simulations of shallow models rank them, one of the whole model decides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import tomli_w

from finetune.checks.settings import check_recipe
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.planning.gpus import Hardware
from finetune.planning.plan import Phase, Plan
from finetune.planning.simulate import Simulation, largest, simulate, simulate_all
from finetune.recipe import Bucket, Recipe, recipe_values
from finetune.recipe.optimizers import Adam
from finetune.recipe.rules import saver_problems, streams
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.progress import PATIENCE, ProgressLine
from finetune.runtime.units import GIB

Changes = dict[str, Any]
"""Keys of a recipe, as `table.key` -> value."""

_PROBES = (4, 6)  # depths of the shallow models; memory and time are linear in depth from there on
_TIGHT = 0.9  # share of a GPU's memory from which fragmentation decides
_ROOM = 0.97  # share of a GPU's memory that resident blocks may fill; the rest is for fragmentation
_ACTIVATIONS: list[Changes] = [
    {"memory.activation_checkpointing": "none", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "selective", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "every_n", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "full", "memory.offload_activations": False},
    {"memory.activation_checkpointing": "every_n", "memory.offload_activations": True},
    {"memory.activation_checkpointing": "full", "memory.offload_activations": True},
]
_PLAIN: Changes = {  # the defaults of keys that belong to one setting: the others would refuse them
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
_BAND = 0.03  # times that differ by less count as equal: the simpler settings, which come first, are taken
_EIGHT_BIT = {"optimizer.name": "adamw_8bit"}
_INEXACT: dict[str, list[Changes]] = {  # settings that change a training's results, the least first
    "lora": [_EIGHT_BIT, {"memory.low_bit": "int8"}, _EIGHT_BIT | {"memory.low_bit": "nf4"}],
    "full": [
        {"train.weights": "bf16"},
        _EIGHT_BIT | {"train.weights": "bf16"},
        _EIGHT_BIT | {"train.weights": "bf16", "optimizer.in_backward": True, "train.max_grad_norm": "none"},
    ],
}


@dataclass(frozen=True)
class Candidate:
    """Settings with the figures that shallow models give for them.

    Attributes:
        memory, host: bytes allocated at the peak on each GPU and in a node's host memory.
        seconds: of a step, by the roofline model.
    """

    changes: Changes
    memory: float
    host: float
    seconds: float

    def share_of(self, hardware: Hardware) -> float:
        """The share of GPU or host memory that is taken, of the two the larger."""
        return max(self.memory / hardware.known_capacity, self.host / (hardware.host_capacity or math.inf))


@dataclass(frozen=True)
class SearchResult:
    """The settings that were found. `fits` is False if none fit; they are then those that take least."""

    recipe: Recipe
    changes: Changes
    plan: Plan
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """The plan's figures, whether these settings fit, and the keys of the recipe that change; None where one is removed."""
        return {**self.plan.as_json(), "fits": self.fits, "changes": self.changes}

    def lines(self) -> list[str]:
        """The plan, and the recipe's lines that change."""
        peak = f"{self.plan.highest.device.reserved / GIB:.2f} GiB"
        if not self.fits:
            return [*self.plan.lines(), f"nothing fits; these settings take least, {peak}:", "", *_toml(self.changes)]
        if not self.changes:
            return [*self.plan.lines(), "the recipe is the fastest that fits, as it is"]
        return [*self.plan.lines(), "the fastest settings found that fit:", "", *_toml(self.changes)]


def fit(recipe: Recipe, family: Family, hardware: Hardware, say: Callable[[str], None]) -> SearchResult:
    """Search the memory savers. Those that do not change the training's results come first.

    Args:
        hardware: must have the capacity of a GPU, and the GPU by which time is estimated.
        say: called with lines about the progress of the search.
    Raises:
        UserError: no combination of savers goes with the recipe.
    """
    bucket, capacity = largest(family, recipe.data.buckets), hardware.known_capacity
    for_encoding, hopeless = _for_encoding(recipe, family, hardware)
    smallest: Candidate | None = None
    extras = [{}, *inexact_settings(recipe)]
    if hopeless:  # look for the settings that take least
        extras = [next((extra for extra in reversed(extras) if any(_settings(recipe, hardware.gpus, extra))), {})]
    for extra in extras:
        settings = list(_settings(recipe, hardware.gpus, extra))
        say(f"{hopeless or 'searching'}: {len(settings)} settings{' with ' + _brief(extra) if extra else ''}")
        candidates = []
        with ProgressLine("probing", len(settings), patience=PATIENCE) as line:
            for each in settings:
                candidates.append(_probe(recipe, family, bucket, hardware, each))
                line.update(len(candidates), _brief(each))
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


def inexact_settings(recipe: Recipe) -> list[Changes]:
    """Settings that change a training's results, the least first; none puts another algorithm in the optimizer's place."""
    found = _INEXACT["full" if recipe.train.method == "full" else "lora"]
    if isinstance(recipe.optimizer, Adam):
        return found
    return [changes for changes in found if "optimizer.name" not in changes]


def _ranked(candidates: list[Candidate]) -> Iterator[Candidate]:
    """The fastest first; of several that count as equally fast, the one that came first."""
    left = list(candidates)
    while left:
        fastest = min(candidate.seconds for candidate in left)
        chosen = next(candidate for candidate in left if candidate.seconds <= (1 + _BAND) * fastest)
        left.remove(chosen)
        yield chosen


def _attempts(candidate: Candidate, capacity: int) -> Iterator[Changes]:
    """Variants of the settings to try: without and with expandable segments, then with fewer resident blocks."""
    expandable = {"memory.expandable_segments": True}
    if candidate.memory <= _TIGHT * capacity:
        yield candidate.changes
    yield candidate.changes | expandable
    if stay := candidate.changes["memory.resident_blocks"]:
        yield candidate.changes | expandable | {"memory.resident_blocks": max(0, stay - 1 - stay // 5)}


def _settings(recipe: Recipe, gpus: int, extra: Changes) -> Iterator[Changes]:
    """Combinations of savers that are allowed with the recipe."""
    kept = ("none", "state", "state_and_gradients") if recipe.train.method != "lora" else ("none",)
    weights: list[Changes] = [{"memory.offload": False, "optimizer.offload": what} for what in kept]
    weights += [{"memory.offload": True, "optimizer.offload": "none"}]
    if gpus == 1:
        weights = [{"memory.layout": "auto", **each} for each in weights]
    else:
        layouts = ("replicate", "shard") if recipe.train.method != "full" else ("shard",)
        weights = [{"memory.layout": layout, **each} for layout in layouts for each in weights]
    for activations, where in itertools.product(_ACTIVATIONS, weights):
        changes = _PLAIN | activations | where | extra
        if not saver_problems(_changed(recipe, changes), gpus):
            yield changes


class _Figures(NamedTuple):
    """Peaks in bytes of loading and of a step on a GPU, of both in a node's host memory, and the seconds of a step."""

    load: float
    step: float
    host: float
    seconds: float


def _probe(recipe: Recipe, family: Family, bucket: Bucket, hardware: Hardware, changes: Changes) -> Candidate:
    """The figures of settings, extrapolated from two shallow models. Of streamed blocks, as many stay on the GPU as fit."""
    blocks = [family.transformer_config[key] for key in family.depth_keys]
    full, chosen = min(blocks), _changed(recipe, changes)

    def figures(depth: int) -> _Figures:
        shallow = family.on(_ShallowFolder(family, [depth * count // full for count in blocks]))
        load, step = simulate(chosen, shallow, [bucket], replace(hardware, capacity=None)).phases
        host = hardware.processes * max(load.host.requested, step.host.requested)
        return _Figures(load.device.allocated, step.device.allocated, host, step.seconds or 0.0)

    if full > max(_PROBES):
        first, second = _PROBES
        whole = _extrapolated(figures(first), figures(second), (full - first) / (second - first))
    else:
        whole = figures(full)
    memory, host = max(whole.load, whole.step), whole.host
    if streams(chosen.memory, recipe.train.method, hardware.gpus):
        size = _block_bytes(chosen, family)
        stay = min(sum(blocks) - 1, max(0, int((_ROOM * hardware.known_capacity - memory) / size)))
        changes, memory = changes | {"memory.resident_blocks": stay}, memory + stay * size
        host -= hardware.processes * stay * size
    return Candidate(changes, memory, host, whole.seconds)


def _extrapolated(first: _Figures, second: _Figures, distance: float) -> _Figures:
    """Figures on the line through two others, at a distance from the first in units of that between them."""
    return _Figures(*(a + (b - a) * distance for a, b in zip(first, second, strict=True)))


def _block_bytes(recipe: Recipe, family: Family) -> float:
    """Bytes of the frozen weights of the largest block, as if all of them were held in low bits."""
    transformer = family.empty_transformer()
    weights = max(
        sum(parameter.numel() for parameter in block.parameters())
        for name in family.block_lists
        for block in getattr(transformer, name)
    )
    bits = {"int8": 8, "float8": 8, "nf4": 4.5}.get(
        recipe.memory.low_bit, 16 if recipe.train.precision == "bf16" else 32
    )
    return weights * bits / 8


class _ShallowFolder(ModelFolder):
    """The folder of a model, with a config that says fewer blocks."""

    def __init__(self, family: Family, depths: list[int]) -> None:
        super().__init__(family.folder.path)
        self._trained, self._depths = family.trained_component, dict(zip(family.depth_keys, depths, strict=True))

    def config(self, component: str) -> dict[str, Any]:
        config = super().config(component)
        return config | self._depths if component == self._trained else config


def _for_encoding(recipe: Recipe, family: Family, hardware: Hardware) -> tuple[Changes, str]:
    """Changes that captions and clips need to be encoded within the memory; and why they cannot be encoded, if so."""

    def encoded(recipe: Recipe) -> tuple[list[Phase], int]:
        with Simulation(recipe, family, hardware).running() as simulation:
            simulation.encoding(recipe.data.buckets)
        too_large = [phase for phase in simulation.phases if phase.device.reserved > hardware.known_capacity]
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
    """Plan all phases and buckets with the changes. Samples that do not fit get fewer resident blocks, or are left out.

    The result's `changes` are those that differ from the recipe.
    """
    chosen, capacity = _changed(recipe, changes), hardware.known_capacity
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
