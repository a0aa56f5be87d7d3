"""What a command of musubi-tuner says of noise levels, optimizer, memory and samples."""

import re
from typing import Any

from finetune.importers import common
from finetune.importers.draft import Draft
from finetune.importers.settings import Settings, existing, flag, integer, number, text, words
from finetune.recipe.bucket import Bucket
from finetune.recipe.text import read_utf8

_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw_8bit",
    "lion": "lion",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
    "muon": "muon",
    "adamwschedulefree": "schedule_free_adamw",
}
_WITH_BETAS = ("adamw", "adamw_8bit", "lion", "prodigy", "schedule_free_adamw", "muon")
_UNSHIFTED = ("uniform", "sigmoid")


def put_objective(draft: Draft, given: Settings) -> None:
    """Set the noise levels: which of the settings are read depends on --timestep_sampling."""
    kind, scheme = given.take("timestep_sampling", text, "sigma"), given.take("weighting_scheme", text, "none")
    setting = given.spelled("timestep_sampling") if "timestep_sampling" in given else "--timestep_sampling is sigma"
    shift = given.take("discrete_flow_shift", number, 1.0)
    shift_setting = (
        given.spelled("discrete_flow_shift") if "discrete_flow_shift" in given else "--discrete_flow_shift is 1"
    )
    weighting = scheme if scheme in ("sigma_sqrt", "cosmap") else "none"
    if kind == "sigma":
        sampling = scheme if scheme in ("logit_normal", "mode") else "uniform"
        draft.change(setting, "objective.sigma_sampling", sampling, f"with --weighting_scheme {scheme}")
    else:
        sampling = "uniform" if kind == "uniform" else "logit_normal"
        known = kind in ("uniform", "sigmoid", "shift") or kind.endswith("_shift")
        draft.change(
            setting,
            "objective.sigma_sampling",
            sampling,
            "the distribution of sigma before the shift" if known else f"a recipe has no {kind!r}",
        )
    _curve(draft, given, kind, sampling)
    if kind in _UNSHIFTED:
        draft.put("objective.shift", 1.0)
        if "discrete_flow_shift" in given:
            draft.drop(shift_setting, f"--timestep_sampling {kind} does not read it: objective.shift = 1.0")
    elif kind in ("sigma", "shift"):
        draft.move(shift_setting, "objective.shift", shift)
    else:
        why = "by the number of tokens, as the checkpoint's scheduler has it"
        draft.change(shift_setting, "objective.shift", "scheduler", why)
    if weighting != "none":
        draft.move(given.spelled("weighting_scheme"), "objective.weighting", weighting)
    elif "weighting_scheme" in given:
        draft.read(given.spelled("weighting_scheme"), "the loss has no weight")
    guidance = given.take("guidance_scale", number, None)
    if guidance is not None and draft.family == "hunyuan":
        draft.move(given.spelled("guidance_scale"), "objective.guidance", guidance)
    elif guidance is not None:
        draft.drop(given.spelled("guidance_scale"), f"{draft.family} is told no guidance")
    _range(draft, given)


def _curve(draft: Draft, given: Settings, kind: str, sampling: str) -> None:
    if sampling == "logit_normal" and kind == "sigma":
        given.move(
            draft, {"logit_mean": ("objective.logit_mean", number), "logit_std": ("objective.logit_std", number)}
        )
    elif sampling == "logit_normal":
        given.move(draft, {"sigmoid_scale": ("objective.logit_std", number)})
    elif sampling == "mode":
        given.move(draft, {"mode_scale": ("objective.mode_scale", number)})
    why = f"--timestep_sampling {kind} does not read it"
    given.drop(draft, dict.fromkeys(("logit_mean", "logit_std", "mode_scale", "sigmoid_scale"), why))


def _range(draft: Draft, given: Settings) -> None:
    names = [name for name in ("min_timestep", "max_timestep") if given.values.get(name) is not None]
    least, most = given.take("min_timestep", number, 0), given.take("max_timestep", number, 1000)
    keeps = given.take("preserve_distribution_shape", flag, False)
    if not names:
        given.drop(draft, {"preserve_distribution_shape": "there is no range"})
        return
    setting = " ".join(map(given.spelled, [*names, *(["preserve_distribution_shape"] if keeps else [])]))
    if "A14B" in str(draft.get("model.path", "")):
        draft.drop(
            setting,
            "each expert is trained on the range that the checkpoint is for; objective.sigma_range sets another",
        )
    elif not 0 <= least < most <= 1000:
        draft.drop(setting, "it is no range within 0 to 1000")
    elif keeps:
        draft.change(
            setting,
            "objective.sigma_range",
            [least / 1000, most / 1000],
            "sigma is timestep / 1000; others are drawn again",
        )
    else:
        most_set = draft.put("objective.sigma_max", most / 1000)
        why = f"sigma is timestep / 1000; the distribution is rescaled to the limits; {most_set}"
        draft.change(setting, "objective.sigma_min", least / 1000, why)


def put_optimizer(draft: Draft, given: Settings) -> None:
    """Set optimizer, rate and schedule."""
    kind = given.take("optimizer_type", text, "")
    setting = given.spelled("optimizer_type") if kind else "--optimizer_type is AdamW"
    plain = re.sub(r"[^a-z0-9]", "", kind.rpartition(".")[2].lower()) or "adamw"
    ours = _OPTIMIZERS.get(plain)
    if ours is None:
        draft.change(setting, "optimizer.name", "adamw", f"a recipe has no {kind!r}")
        ours = "adamw"
    else:
        draft.move(setting, "optimizer.name", ours)
    rate = given.take("learning_rate", number, None)
    if rate is None:
        draft.default("--learning_rate is not set", "optimizer.lr", 2e-6, "musubi-tuner takes 2e-6")
    elif ours == "adafactor":
        why = "of Adafactor it is a share of the weights' size: relative steps are not taken; 1e-2 suits adapters"
        draft.change(given.spelled("learning_rate"), "optimizer.lr", rate, why)
    else:
        draft.move(given.spelled("learning_rate"), "optimizer.lr", rate)
    arguments = dict(pair.partition("=")[::2] for pair in given.take("optimizer_args", words, []))
    if "weight_decay" not in arguments and ours in ("adamw", "adamw_8bit"):
        draft.default(
            "weight_decay is not in --optimizer_args", "optimizer.weight_decay", 0.01, "torch's AdamW has 0.01"
        )
    if "betas" not in arguments and ours in ("adamw", "adamw_8bit"):
        draft.default("betas are not in --optimizer_args", "optimizer.betas", [0.9, 0.999], "torch's AdamW has these")
    for name, value in arguments.items():
        _argument(draft, ours, name, value)
    norm = given.take("max_grad_norm", number, None)
    if norm is not None:
        draft.move(given.spelled("max_grad_norm"), "train.max_grad_norm", norm if norm > 0 else "none")
    _schedule(draft, given)


def _argument(draft: Draft, ours: str, name: str, value: str) -> None:
    written = f"--optimizer_args {name}={value}"
    try:
        numbers = [float(part) for part in re.sub(r"[()\[\] ]", "", value).split(",") if part]
    except ValueError:
        numbers = []
    if name == "weight_decay" and len(numbers) == 1:
        draft.move(written, "optimizer.weight_decay", numbers[0])
    elif name == "betas" and len(numbers) >= 2 and ours in _WITH_BETAS:
        draft.move(written, "optimizer.betas", numbers[:2])
    elif name == "eps" and len(numbers) == 1 and ours in _WITH_BETAS and ours != "lion":
        draft.move(written, "optimizer.eps", numbers[0])
    elif name in ("d_coef", "d0") and len(numbers) == 1 and ours == "prodigy":
        draft.move(written, f"optimizer.{name}", numbers[0])
    else:
        draft.drop(written, f"{ours} has no such key")


def _schedule(draft: Draft, given: Settings) -> None:
    name = given.take("lr_scheduler", text, "constant")
    warmup = given.take("lr_warmup_steps", number, 0)
    setting = given.spelled("lr_scheduler") if "lr_scheduler" in given else "--lr_scheduler is constant"
    steps = int(draft.get("train.steps", 1000))
    count = round(warmup * steps) if 0 < warmup < 1 else int(warmup)
    common.put_schedule(
        draft, setting, name, count, given.spelled("lr_warmup_steps") if "lr_warmup_steps" in given else ""
    )
    if name == "cosine_with_restarts":
        given.move(draft, {"lr_scheduler_num_cycles": ("schedule.cycles", integer)})
    if name == "polynomial":
        given.move(draft, {"lr_scheduler_power": ("schedule.power", number)})
    given.drop(
        draft, dict.fromkeys(("lr_scheduler_num_cycles", "lr_scheduler_power"), f"the schedule {name} does not read it")
    )


def put_memory(draft: Draft, given: Settings) -> None:
    """Set what is recomputed, held in few bits or in host memory, and compiled."""
    name = "gradient_checkpointing"
    offloads = given.take(f"{name}_cpu_offload", flag, False)
    if given.take(name, flag, False):
        draft.move(given.spelled(name), "memory.activation_checkpointing", "full")
        if offloads:
            draft.move(given.spelled(f"{name}_cpu_offload"), "memory.offload_activations", True)
    else:
        draft.default(
            f"--{name} is not set", "memory.activation_checkpointing", "none", "a recipe has it on unless it is said"
        )
        given.drop(draft, {f"{name}_cpu_offload": f"--{name} is not set"})
    fp8 = [each for each in ("fp8_base", "fp8_scaled") if given.take(each, flag, False)]
    if fp8:
        why = "the frozen weights of the blocks are held in float8, with a scale for each row"
        draft.change(" ".join(map(given.spelled, fp8)), "memory.low_bit", "float8", why)
    given.drop(draft, dict.fromkeys(("fp8_base", "fp8_scaled"), "it is off"))
    swapped = given.take("blocks_to_swap", integer, 0)
    if swapped:
        why = f"all blocks take turns on the GPU, not {swapped} of them; memory.resident_blocks keeps some there, which is faster"
        draft.change(given.spelled("blocks_to_swap"), "memory.offload", True, why)
        if draft.gpus > 1:
            draft.put("memory.layout", "replicate")
    if given.take("compile", flag, False):
        draft.change(given.spelled("compile"), "memory.compile", True, "each block is compiled by itself")
    precision = given.take("mixed_precision", text, None)
    if precision in ("bf16", "no"):
        draft.move(given.spelled("mixed_precision"), "train.precision", "bf16" if precision == "bf16" else "float32")
    elif precision:
        draft.change(given.spelled("mixed_precision"), "train.precision", "bf16", f"a recipe has no {precision}")


def put_samples(draft: Draft, given: Settings, file: str) -> None:
    """Set the prompts that a text file has, one a line, with options like `--w 832 --h 480 --f 81`."""
    path = given.take("sample_prompts", text, "")
    if not path:
        return
    place = existing(path, file)
    if place is None or place.suffix.lower() != ".txt":
        draft.drop(
            given.spelled("sample_prompts"), "it is not here, or no .txt; write its prompts as [[validation.prompts]]"
        )
        draft.todo.append(f"{path}: write its prompts as [[validation.prompts]]")
        return
    try:
        lines = read_utf8(place).splitlines()
    except (OSError, ValueError) as error:
        draft.drop(given.spelled("sample_prompts"), f"it cannot be read ({error})")
        return
    prompts = [_prompt(line) for line in lines if line.strip() and not line.startswith("#")]
    common.put_prompts(
        draft, given.spelled("sample_prompts"), prompts, "--fs, the shift of samples, is the scheduler's"
    )


def _prompt(line: str) -> dict[str, Any]:
    words_ = re.split(r" --(?=[a-z]+ )", line.strip())
    options = dict(each.partition(" ")[::2] for each in words_[1:])
    size = [int(options[name]) for name in ("f", "h", "w") if options.get(name, "").strip().isdecimal()]
    prompt: dict[str, Any] = {
        "text": words_[0],
        "negative": options.get("n", "").strip(),
        "image": options.get("i", "").strip(),
    }
    if len(size) == 3 and min(size) > 0:
        prompt["shape"] = Bucket(*size)
    for name, key in (("d", "seed"), ("s", "steps")):
        if options.get(name, "").strip().isdecimal():
            prompt[key] = int(options[name])
    scale = (options.get("l") or options.get("g") or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", scale):
        prompt["guidance"] = float(scale)
    return prompt
