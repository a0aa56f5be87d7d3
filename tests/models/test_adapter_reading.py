"""Adapters of other trainers are read as what peft adds to our transformer, whatever their layers are called."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from finetune.models import family_class
from finetune.models.adapters.reading import ReadAdapter, read_adapter
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.runtime.errors import UserError

RANK, ALPHA = 3, 7.5
Opened = Callable[..., Family]


@pytest.fixture(scope="module")
def opened(tiny_model: Callable[..., Path]) -> Opened:
    def open_(name: str) -> Family:
        cls = family_class(name)
        return cls(ModelFolder(tiny_model(name, next(iter(cls.variants), None))))

    return open_


def low_rank(out: int, width: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, width, generator=generator), torch.randn(out, RANK, generator=generator)


def matrices(family: Family, *endings: str) -> dict[str, Tensor]:
    """Random lora_A and lora_B of the layers of blocks whose names end like this, by "layer.lora_A.weight"."""
    found = {}
    for index, (name, module) in enumerate(family.empty_transformer().named_modules()):
        if name.startswith(family.block_lists) and name.endswith(endings):
            lora_A, lora_B = low_rank(*module.weight.shape, seed=index)
            found |= {f"{name}.lora_A.weight": lora_A, f"{name}.lora_B.weight": lora_B}
    return found


def named(layers: dict[str, tuple[int, int]], style: str) -> dict[str, Tensor]:
    """An adapter of layers (name -> rows, columns) as ComfyUI or kohya's scripts name them, with an alpha that is not the rank."""
    found = {}
    for index, (name, shape) in enumerate(layers.items()):
        lora_A, lora_B = low_rank(*shape, seed=index)
        if style == "comfyui":
            found |= {f"diffusion_model.{name}.lora_A.weight": lora_A, f"diffusion_model.{name}.lora_B.weight": lora_B}
        else:
            flat = f"lora_unet_{name.replace('.', '_')}"
            found |= {f"{flat}.lora_down.weight": lora_A, f"{flat}.lora_up.weight": lora_B}
            found[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return found


def deltas(adapter: ReadAdapter) -> dict[str, Tensor]:
    return {name: each.delta() for name, each in adapter.layers.items()}


def loaded_deltas(family: Family, tensors: dict[str, Tensor], **arguments: object) -> dict[str, Tensor]:
    """What peft adds to the weights of the transformer once diffusers has loaded these tensors."""
    transformer = getattr(diffusers, family.transformer_class).from_config(family.transformer_config)
    transformer.load_lora_adapter(dict(tensors), adapter_name="read", **arguments)
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    return {name: module.get_delta_weight("read").detach() for name, module in layers.items()}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-6, msg=name)


# By diffusers' names


CASES = [("ltx", prefix) for prefix in ("", "transformer.", "diffusion_model.", "base_model.model.transformer.")]


@pytest.mark.parametrize("name, prefix", [*CASES, ("cogvideox", "transformer."), ("hunyuan", ""), ("wan", "")])
def test_layers_by_diffusers_names(opened: Opened, tmp_path: Path, name: str, prefix: str) -> None:
    family = opened(name)
    tensors = matrices(family, "to_q", "to_out.0", "net.2")
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    expected = loaded_deltas(family, {f"transformer.{key}": value for key, value in tensors.items()})
    agree(deltas(read_adapter(tmp_path / "a.safetensors", family)), expected)


def test_the_alpha_of_diffusers_metadata_counts(opened: Opened, tmp_path: Path) -> None:
    family = opened("ltx")
    tensors = matrices(family, "to_q", "to_k")
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=["to_q", "to_k"], alpha_pattern={"attn2.to_k": 2})
    diffusers.LTXPipeline.save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=config.to_dict())
    loaded, metadata = diffusers.LTXPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    adapter = read_adapter(tmp_path, family)
    assert {layer.scale for layer in adapter.layers.values()} == {5 / RANK, 2 / RANK}
    agree(deltas(adapter), loaded_deltas(family, loaded, metadata=metadata))


# By peft


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft(opened: Opened, tmp_path: Path, rslora: bool) -> None:
    family = opened("wan")
    transformer = diffusers.WanTransformer3DModel.from_config(family.transformer_config)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["to_q", "net.2"],
        rank_pattern={"net.2": 5},
        alpha_pattern={"1.attn2.to_q": 1.0, "attn2.to_q": 3.0},  # the first that matches counts
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(transformer, config)
    model.save_pretrained(tmp_path)
    layers = {name: each for name, each in transformer.named_modules() if isinstance(each, LoraLayer)}
    expected = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    agree(deltas(read_adapter(tmp_path, family)), expected)
    agree(deltas(read_adapter(tmp_path / "adapter_model.safetensors", family)), expected)


# By the names of the models' own repositories

WAN_BLOCK = [f"{attention}.{each}" for attention in ("self_attn", "cross_attn") for each in "qkvo"] + ["ffn.0", "ffn.2"]


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
def test_wan_by_its_own_names(opened: Opened, tmp_path: Path, style: str) -> None:
    """diffusers converts these by itself; it takes kohya's names of whole models only."""
    family = opened("wan")
    shape = lambda name: {"ffn.0": (64, 48), "ffn.2": (48, 64)}.get(name, (48, 48))  # noqa: E731
    tensors = named({f"blocks.{index}.{name}": shape(name) for index in range(2) for name in WAN_BLOCK}, style)
    save_file(tensors, tmp_path / "a.safetensors")
    converted = diffusers.WanPipeline.lora_state_dict(dict(tensors))
    agree(deltas(read_adapter(tmp_path / "a.safetensors", family)), loaded_deltas(family, converted))


@pytest.mark.parametrize("style", ["comfyui", "kohya"])
@pytest.mark.parametrize("spelling", ["Tencent", "ComfyUI"])
def test_hunyuan_by_its_own_names(opened: Opened, tmp_path: Path, style: str, spelling: str) -> None:
    """diffusers converts Tencent's names, without alphas; and fused ones of single blocks only of 3072 channels."""
    family = opened("hunyuan")
    of_tencent = {
        "img_attn_qkv": (96, 32),
        "img_attn_proj": (32, 32),
        "img_mlp.fc1": (128, 32),
        "img_mlp.fc2": (32, 128),
        "img_mod.linear": (192, 32),
        "txt_attn_qkv": (96, 32),
        "txt_attn_proj": (32, 32),
        "txt_mlp.fc1": (128, 32),
        "txt_mlp.fc2": (32, 128),
    }
    double = {f"double_blocks.{index}.{name}": shape for index in range(2) for name, shape in of_tencent.items()}
    refiner = "txt_in.individual_token_refiner.blocks.0"
    double |= {f"{refiner}.self_attn_proj": (32, 32), f"{refiner}.mlp.fc1": (128, 32), "time_in.mlp.0": (32, 256)}
    spelled = named(double, style)
    if spelling == "ComfyUI":
        for theirs, ours in {
            "attn_qkv": "attn.qkv",
            "attn_proj": "attn.proj",
            "mlp.fc1": "mlp.0",
            "mlp.fc2": "mlp.2",
            "mod.linear": "mod.lin",
            "time_in.mlp.0": "time_in.in_layer",
        }.items():
            flat = (theirs, ours) if style == "comfyui" else (theirs.replace(".", "_"), ours.replace(".", "_"))
            spelled = {name.replace(*flat): value for name, value in spelled.items()}
    save_file(spelled, tmp_path / "a.safetensors")
    converted = diffusers.HunyuanVideoPipeline.lora_state_dict(named(double, "comfyui"))
    expected = loaded_deltas(family, converted)
    if style == "kohya":
        expected = {name: delta * (ALPHA / RANK) for name, delta in expected.items()}
    agree(deltas(read_adapter(tmp_path / "a.safetensors", family)), expected)


def fused(family: Family, original: str, parts: list[str], tmp_path: Path) -> None:
    """A fused layer's delta is those of its parts, one below the other."""
    modules = dict(family.empty_transformer().named_modules())
    rows = [modules[part.partition("[")[0]].weight.shape[0] // (2 if "[" in part else 1) for part in parts]
    width = modules[parts[0].partition("[")[0]].weight.shape[1]
    tensors = named({original: (sum(rows), width)}, "kohya")
    save_file(tensors, tmp_path / "a.safetensors")
    found = deltas(read_adapter(tmp_path / "a.safetensors", family))
    lora_A, lora_B = (tensors[name] for name in tensors if name.endswith(".weight"))
    whole = (ALPHA / RANK) * (lora_B @ lora_A)
    made = []
    for part in parts:
        name, _, half = part.partition("[")
        made.append(found[name].chunk(2)[int(half[0])] if half else found[name])
    assert torch.equal(torch.cat(made), whole)
    assert set(found) == {part.partition("[")[0] for part in parts}


def test_hunyuan_single_blocks_are_split_by_the_sizes_of_their_layers(opened: Opened, tmp_path: Path) -> None:
    block = "single_transformer_blocks.1"
    parts = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    fused(opened("hunyuan"), "single_blocks.1.linear1", parts, tmp_path)


@pytest.mark.parametrize(
    "original, parts",
    [
        ("attn.qkv_x", ["attn1.to_q", "attn1.to_k", "attn1.to_v"]),
        ("attn.qkv_y", ["attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"]),
        ("attn.proj_x", ["attn1.to_out.0"]),
        ("mlp_x.w1", ["ff.net.0.proj[1", "ff.net.0.proj[0"]),
    ],
)
def test_mochi_by_its_own_names(opened: Opened, tmp_path: Path, original: str, parts: list[str]) -> None:
    block = "transformer_blocks.0"
    fused(opened("mochi"), f"blocks.0.{original}", [f"{block}.{part}" for part in parts], tmp_path)


# What is refused

LAYER = "transformer_blocks.0.attn1.to_q"


def good() -> dict[str, Tensor]:
    lora_A, lora_B = low_rank(64, 64)
    return {f"transformer.{LAYER}.lora_A.weight": lora_A, f"transformer.{LAYER}.lora_B.weight": lora_B}


def of_another_model() -> dict[str, Tensor]:
    return {name.replace("transformer_blocks", "joint_blocks"): value for name, value in good().items()}


def of_another_size() -> dict[str, Tensor]:
    return {name: torch.cat([value, value], 1) if "lora_A" in name else value for name, value in good().items()}


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "another model": (of_another_model, "of another model: LTX-Video has no layer"),
    "another size": (of_another_size, "is for a layer of 64x128, and that of LTX-Video in model.path is 64x64"),
    "a text encoder": (
        lambda: good() | {"lora_te_q.lora_down.weight": torch.ones(2, 4), "lora_te_q.lora_up.weight": torch.ones(4, 2)},
        "text encoders are not trained here",
    ),
    "DoRA": (lambda: good() | {f"transformer.{LAYER}.dora_scale": torch.ones(64)}, "this file is DoRA"),
    "DoRA of peft": (lambda: good() | {f"{LAYER}.lora_magnitude_vector": torch.ones(64)}, "this file is DoRA"),
    "LoKr": (lambda: {f"lora_unet_{LAYER}.lokr_w1": torch.ones(4, 4)}, "this file is LoKr"),
    "LoHa": (lambda: {f"lora_unet_{LAYER}.hada_w1_a": torch.ones(4, 4)}, "this file is LoHa"),
    "differences": (lambda: good() | {f"{LAYER}.diff": torch.ones(64, 64)}, "whole differences"),
    "biases": (lambda: good() | {f"{LAYER}.diff_b": torch.ones(64)}, "LoRA with biases"),
    "a whole model": (lambda: {f"{LAYER}.weight": torch.ones(64, 64)}, "is no tensor of a LoRA"),
    "half of it": (lambda: dict([next(iter(good().items()))]), "has no lora_B"),
    "not finite": (lambda: {name: value / 0 for name, value in good().items()}, "not finite"),
    "quantised": (lambda: {name: value.to(torch.int8) for name, value in good().items()}, "torch.int8"),
    "float8": (lambda: {name: value.to(torch.float8_e4m3fn) for name, value in good().items()}, "float8_e4m3fn"),
    "rank 0": (lambda: {name: value[:0] if "_A" in name else value[:, :0] for name, value in good().items()}, "is 0"),
    "alphas": (lambda: good() | {f"transformer.{LAYER}.alpha": torch.ones(4)}, "the alpha of"),
    "a complex alpha": (lambda: good() | {f"transformer.{LAYER}.alpha": torch.tensor(1 + 2j)}, "the alpha of"),
    "twice": (lambda: good() | {name[12:]: value for name, value in good().items()}, "twice"),
    "a convolution": (lambda: {name: value[..., None, None] for name, value in good().items()}, "is a convolution"),
    "nothing": (lambda: {}, "there is no LoRA"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(opened: Opened, tmp_path: Path, what: str) -> None:
    make, expected = REFUSED[what]
    save_file(make(), tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path / "a.safetensors", opened("ltx"))
    assert expected in str(error.value)
    assert error.value.problems[0].cure


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.safetensors", b"", "damaged"),
        ("a.safetensors", b"\xff" * 100, "damaged"),
        ("a.pt", b"anything", "this is a pickle"),
        ("folder/a.txt", b"", "no .safetensors file in it"),
        ("nothing here", None, "no such adapter"),
    ],
)
def test_files_that_are_none_are_refused_by_name(
    opened: Opened, tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as error:
        read_adapter(path.parent if path.suffix == ".txt" else path, opened("ltx"))
    assert error.value.problems[0].cure


def test_a_folder_of_several_files_asks_for_one(opened: Opened, tmp_path: Path) -> None:
    for name in "ab":
        save_file(good(), tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"name one of them: a\.safetensors, b\.safetensors"):
        read_adapter(tmp_path, opened("ltx"))
    assert read_adapter(tmp_path / "b.safetensors", opened("ltx")).layers.keys() == {LAYER}


def test_a_folder_of_peft_without_its_settings_is_refused(opened: Opened, tmp_path: Path) -> None:
    save_file(good(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path, opened("ltx"))


def test_settings_that_cannot_be_read_are_refused(opened: Opened, tmp_path: Path) -> None:
    save_file(good(), tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="lora_adapter_metadata cannot be read"):
        read_adapter(tmp_path / "a.safetensors", opened("ltx"))


@pytest.mark.parametrize(
    "settings, what",
    [
        ({"lora_alpha": "four"}, "the alpha of"),
        ({"lora_alpha": [4]}, "the alpha of"),
        ({"lora_alpha": 4, "alpha_pattern": ["to_q"]}, "the alpha of"),
        ({"lora_alpha": 4, "alpha_pattern": {"to_q": None}}, "the alpha of"),
        ({"lora_alpha": 4, "alpha_pattern": {"(((": 2}}, "the alpha of"),
        ({"r": 3}, "there is no lora_alpha"),
    ],
)
def test_settings_of_which_no_strength_follows_are_refused(
    opened: Opened, tmp_path: Path, settings: dict[str, object], what: str
) -> None:
    save_file(good(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=what):
        read_adapter(tmp_path, opened("ltx"))


def test_an_empty_text_is_not_the_folder_that_one_is_in(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(good(), tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="an empty text names no adapter"):
        read_adapter("", opened("ltx"))


def test_the_settings_of_dora_are_refused(opened: Opened, tmp_path: Path) -> None:
    save_file(good(), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})})
    with pytest.raises(UserError, match="DoRA"):
        read_adapter(tmp_path / "a.safetensors", opened("ltx"))


def test_an_adapter_of_the_other_expert_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    cls = family_class("wan")
    family = cls(ModelFolder(tiny_model("wan", "2.2-A14B")))
    save_file(
        {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 48)}, tmp_path / "a.safetensors", {"expert": "low_noise"}
    )
    with pytest.raises(UserError, match="of the expert 'low_noise', not of 'high'"):
        read_adapter(tmp_path / "a.safetensors", family.of_expert("high"))
