"""Exported LoRAs as ComfyUI's loader takes them: every tensor is known to it, and does to its weights what was trained.

What its loader does is written here as facts. The weights of its models lie under "diffusion_model."; each weight's name
without ".weight" is a name that a LoRA may have for it. Under such a name it takes "lora_A.weight" and "lora_B.weight", and
scales by ".alpha" / rank if there is such a tensor, else not at all. It warns of any other tensor, and goes on without.
Of HunyuanVideo it also knows the names of Tencent's repository: "_attn_qkv" for "_attn.qkv", "mlp.fc1" for "mlp.0", and so on.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from every_family import FIRST, MODELS, Model, title
from random_loras import change, differ, linear_layers, opened, random_lora
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from finetune.engine.weights.exporters import comfyui
from finetune.engine.weights.exporters.exporter import Details
from finetune.engine.weights.exporters.trained_lora import TrainedLora
from finetune.models.family import Family
from finetune.runtime.errors import UserError

# Rows of ComfyUI's fused weights, as the modules of its models have them, in our layers' names.
JOINT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
WAN = {
    f"{theirs}.{q}": (f"{ours}.{to}",)
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for q, to in ATTENTION.items()
}
WAN |= {
    "cross_attn.k_img": ("attn2.add_k_proj",),
    "cross_attn.v_img": ("attn2.add_v_proj",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
}
MOCHI = {
    "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
    "attn.proj_x": ("attn1.to_out.0",),
    "attn.proj_y": ("attn1.to_add_out",),
    "mlp_x.w1": ("ff.net.0.proj",),
    "mlp_x.w2": ("ff.net.2",),
    "mlp_y.w1": ("ff_context.net.0.proj",),
    "mlp_y.w2": ("ff_context.net.2",),
    "mod_x": ("norm1.linear",),
    "mod_y": ("norm1_context.linear", "norm1_context.linear_1"),  # a block has one of them
}
# family -> {our list of blocks: (its list, its layers)}
COMFYUI = {
    "hunyuan": {"transformer_blocks": ("double_blocks", JOINT), "single_transformer_blocks": ("single_blocks", SINGLE)},
    "hunyuan15": {"transformer_blocks": ("double_blocks", JOINT)},
    "ltx": {"transformer_blocks": ("transformer_blocks", None)},
    "mochi": {"transformer_blocks": ("blocks", MOCHI)},
    "wan": {"blocks": ("blocks", WAN)},
}
NATIVE = [model for model in MODELS if model[0].removesuffix("_i2v") in COMFYUI]
SWAPPED = {"mlp_x.w1", "mlp_y.w1"}  # the gate comes first
TENCENT = {
    "_mod.lin.": "_mod.linear.",
    "_attn.qkv.": "_attn_qkv.",
    "_attn.proj.": "_attn_proj.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
    ".modulation.lin.": ".modulation.linear.",
}

every_native_model = pytest.mark.parametrize(
    "model", [pytest.param(each, marks=() if each in FIRST else pytest.mark.full, id=title(each)) for each in NATIVE]
)


def weights_of_comfyui(family: Family) -> dict[str, list[str]]:
    """The weights of ComfyUI's blocks, each with the layers of ours whose rows it has."""
    found: dict[str, list[str]] = {}
    for name in linear_layers(family):
        blocks, number, layer = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name).groups()
        theirs, layers = COMFYUI[family.name.removesuffix("_i2v")][blocks]
        original = layer if layers is None else next(each for each, ours in layers.items() if layer in ours)
        found.setdefault(f"diffusion_model.{theirs}.{number}.{original}", []).append(name)
    order = {
        name: place for layers in (JOINT, SINGLE, MOCHI) for ours in layers.values() for place, name in enumerate(ours)
    }
    place = lambda name: order.get(re.sub(r"^\w+\.\d+\.", "", name), 0)  # noqa: E731
    return {name: sorted(ours, key=place) for name, ours in found.items()}


def loaded(file: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """What ComfyUI's loader makes of a file: the change of each of its weights, and a failure for a tensor it does not know."""
    known = {name: name for name in weights_of_comfyui(family)}
    if family.name.startswith("hunyuan"):
        for name in list(known):
            spelled = f"{name}."
            for theirs, tencents in TENCENT.items():
                spelled = spelled.replace(theirs, tencents)
            known[spelled.rstrip(".")] = name
    changes, taken = {}, set()
    for name, weight in known.items():
        if (up := f"{name}.lora_B.weight") in file:
            down = f"{name}.lora_A.weight"
            scale = float(file[f"{name}.alpha"]) / len(file[down]) if f"{name}.alpha" in file else 1.0
            changes[weight] = scale * (file[up].double() @ file[down].double())
            taken |= {up, down}
    assert file.keys() == taken
    return changes


def expected(lora: TrainedLora, family: Family) -> dict[str, Tensor]:
    """The changes of ComfyUI's weights that were trained."""
    found = {}
    shapes = linear_layers(family)
    for weight, layers in weights_of_comfyui(family).items():
        parts = [change(lora, each) if each in lora.scales else torch.zeros(shapes[each]).double() for each in layers]
        if any(each in lora.scales for each in layers):
            whole = torch.cat(parts)
            found[weight] = whole
            if any(weight.endswith(f".{each}") for each in SWAPPED):
                found[weight] = torch.cat(whole.chunk(2)[::-1])
    return found


def written(lora: TrainedLora, family: Family, folder: Path, details: Details | None = None) -> Path:
    comfyui.write_comfyui(lora, family, folder, details or Details())
    (file,) = folder.iterdir()
    return file


@every_native_model
def test_every_tensor_is_known_and_does_what_was_trained(
    tiny_model: Callable[..., Path], tmp_path: Path, model: Model
) -> None:
    """Of a fused matrix, the rows of layers that are not adapted stay as they are."""
    family = opened(model, tiny_model(*model))
    for targets in (".*", ".*to_(q|v)", ".*(add_k_proj|proj_mlp|net.0.proj|attn1.to_k)"):
        lora = random_lora(family, targets=targets)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        changes = loaded(load_file(written(lora, family, tmp_path / "out")), family)
        trained = expected(lora, family)
        assert changes.keys() == trained.keys()
        assert max(differ(changes[name], trained[name]) for name in trained) < 1e-6


@pytest.mark.parametrize(
    "model", [model for model in FIRST if model in NATIVE and model[0] in ("ltx", "wan", "wan_i2v")], ids=title
)
def test_diffusers_gives_the_exported_tensors_back(
    tiny_model: Callable[..., Path], tmp_path: Path, model: Model
) -> None:
    """By its own converter, tensor by tensor."""
    family = opened(model, tiny_model(*model))
    lora = random_lora(family)
    pipeline = getattr(diffusers, family.pipeline_class)
    found = pipeline.lora_state_dict(written(lora, family, tmp_path))
    tensors = lora.folded(None)
    assert found.keys() == {f"transformer.{name}" for name in tensors}
    assert all(torch.equal(found[f"transformer.{name}"], tensor) for name, tensor in tensors.items())


def test_diffusers_gives_hunyuans_changes_back(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Its converter knows one width alone, that of the real model."""
    folder = shutil.copytree(tiny_model("hunyuan"), tmp_path / "model")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    wide = {**config, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 1}
    (folder / "transformer" / "config.json").write_text(json.dumps(wide))
    family = opened(("hunyuan", None), folder)
    lora = random_lora(family, targets=r"(attn|ff|proj_out|proj_mlp)")
    found = diffusers.HunyuanVideoPipeline.lora_state_dict(written(lora, family, tmp_path / "out"))
    names = {f"transformer.{layer}.lora_{side}.weight" for layer in lora.layers for side in "AB"}
    assert found.keys() == names
    columns = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for layer in lora.layers:  # by a product with a vector: the matrices are large
        down, up = (found[f"transformer.{layer}.lora_{side}.weight"].double() for side in "AB")
        given = columns.repeat(down.shape[1] // len(columns))
        trained_down, trained_up = (lora.tensors[f"{layer}.lora_{side}.weight"].double() for side in "AB")
        assert differ(up @ (down @ given), 2 / 3 * trained_up @ (trained_down @ given)) < 1e-6


class Rest(dict):
    """A checkpoint in which every weight that it is not about has a few zeros."""

    def pop(self, name: str, *default: object) -> Tensor:
        return super().pop(name, torch.zeros(2, 2))


def test_diffusers_gives_mochis_changes_back(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """It has no converter of Mochi's LoRAs, but one of whole checkpoints, of 48 blocks."""
    folder = shutil.copytree(tiny_model("mochi"), tmp_path / "model")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 48}))
    family = opened(("mochi", None), folder)
    lora = random_lora(family)
    changes = loaded(load_file(written(lora, family, tmp_path / "out")), family)
    checkpoint = Rest({f"{name.removeprefix('diffusion_model.')}.weight": each for name, each in changes.items()})
    found = single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers(checkpoint)
    assert len(lora.layers) == 48 * 14 - 3  # the last block makes no text
    assert max(differ(found[f"{layer}.weight"], change(lora, layer)) for layer in lora.layers) < 1e-6


def test_a_model_that_comfyui_has_not_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    family = opened(("cogvideox", None), tiny_model("cogvideox"))
    what, instead = comfyui.problem(family)
    assert "ComfyUI has no model of its own for CogVideoX" in what
    assert "diffusers" in instead
    with pytest.raises(UserError, match="has no name in ComfyUI"):
        written(random_lora(family), family, tmp_path)


@pytest.mark.parametrize(
    "precision, dtype", [("bf16", torch.bfloat16), ("float16", torch.float16), (None, torch.float32)]
)
def test_each_matrix_is_rounded_once(tiny_ltx: Path, tmp_path: Path, precision: str | None, dtype: torch.dtype) -> None:
    family = opened(("ltx", None), tiny_ltx)
    lora = random_lora(family)
    file = load_file(written(lora, family, tmp_path, Details(precision)))
    for layer in lora.layers:
        down, up = (file[f"diffusion_model.{layer}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(down, lora.tensors[f"{layer}.lora_A.weight"].to(dtype))
        assert torch.equal(up, (lora.tensors[f"{layer}.lora_B.weight"] * (2 / 3)).to(dtype))


def test_the_file_says_what_it_is_and_is_the_same_bytes_each_time(tiny_ltx: Path, tmp_path: Path) -> None:
    family = opened(("ltx", None), tiny_ltx)
    lora, details = random_lora(family), Details(None, {"base_model": "Lightricks/LTX-Video", "step": "7"})
    files = [written(lora, family, tmp_path / str(number), details) for number in range(3)]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as opened_file:
        metadata = opened_file.metadata()
    assert metadata["base_model"] == "Lightricks/LTX-Video"
    assert (metadata["step"], metadata["trained_alpha"], metadata["trained_rank"]) == ("7", "2", "3")
    assert not any(name.endswith(".alpha") for name in load_file(files[0]))  # diffusers refuses such files
