"""What the layers of diffusers' transformers are called in the models' own repositories, which ComfyUI and other trainers follow.

Each table goes from an original layer to diffusers': one, or several where the original is one fused matrix, whose rows are
those of the layers named, one after the other. "{}" is the number of a block. `name[1/2]` is the second half of a layer's rows.
The facts are from diffusers' own scripts that convert these checkpoints, and from the modules of ComfyUI.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Layers = Mapping[str, tuple[str, ...]]


class Rows(NamedTuple):
    """Rows of one of diffusers' layers: all, or one of so many equal parts."""

    layer: str
    part: int = 0
    parts: int = 1


def rows_of(written: str) -> Rows:
    """What `name` or `name[1/2]` in a table says."""
    name, bracket, part = written.partition("[")
    index, _, count = part.rstrip("]").partition("/")
    return Rows(name, int(index), int(count)) if bracket else Rows(name)


def original_of(layer: str, layers: Layers) -> tuple[str, tuple[Rows, ...]] | None:
    """(the original layer that one of diffusers' is in, the rows that it is made of); None if the table has none."""
    block = re.search(r"\.(\d+)\.", layer)
    # A layer outside of the blocks may have a number in its name, too.
    known_as = [(layer, "")] + ([(layer.replace(block[0], ".{}.", 1), block[1])] if block else [])
    for pattern, index in known_as:
        for original, ours in layers.items():
            if pattern in (rows_of(each).layer for each in ours):
                return original.replace("{}", index), tuple(rows_of(each.replace("{}", index)) for each in ours)
    return None


def _joint_attention(original: str, ours: str) -> dict[str, tuple[str, ...]]:
    """The layers of a block with two streams, of video and of text."""
    return {
        f"{original}.img_mod.lin": (f"{ours}.norm1.linear",),
        f"{original}.img_attn.qkv": tuple(f"{ours}.attn.to_{each}" for each in "qkv"),
        f"{original}.img_attn.proj": (f"{ours}.attn.to_out.0",),
        f"{original}.img_mlp.0": (f"{ours}.ff.net.0.proj",),
        f"{original}.img_mlp.2": (f"{ours}.ff.net.2",),
        f"{original}.txt_mod.lin": (f"{ours}.norm1_context.linear",),
        f"{original}.txt_attn.qkv": tuple(f"{ours}.attn.add_{each}_proj" for each in "qkv"),
        f"{original}.txt_attn.proj": (f"{ours}.attn.to_add_out",),
        f"{original}.txt_mlp.0": (f"{ours}.ff_context.net.0.proj",),
        f"{original}.txt_mlp.2": (f"{ours}.ff_context.net.2",),
    }


def _text_refiner(original: str, ours: str) -> dict[str, tuple[str, ...]]:
    """The module that HunyuanVideo refines text with."""
    block, our_block = f"{original}.individual_token_refiner.blocks.{{}}", f"{ours}.token_refiner.refiner_blocks.{{}}"
    return {
        f"{original}.input_embedder": (f"{ours}.proj_in",),
        f"{original}.t_embedder.in_layer": (f"{ours}.time_text_embed.timestep_embedder.linear_1",),
        f"{original}.t_embedder.out_layer": (f"{ours}.time_text_embed.timestep_embedder.linear_2",),
        f"{original}.c_embedder.in_layer": (f"{ours}.time_text_embed.text_embedder.linear_1",),
        f"{original}.c_embedder.out_layer": (f"{ours}.time_text_embed.text_embedder.linear_2",),
        f"{block}.adaLN_modulation.1": (f"{our_block}.norm_out.linear",),
        f"{block}.self_attn.qkv": tuple(f"{our_block}.attn.to_{each}" for each in "qkv"),
        f"{block}.self_attn.proj": (f"{our_block}.attn.to_out.0",),
        f"{block}.mlp.0": (f"{our_block}.ff.net.0.proj",),
        f"{block}.mlp.2": (f"{our_block}.ff.net.2",),
    }


_FINAL = {
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear[1/2]", "norm_out.linear[0/2]"),  # shift and scale change places
}
_SINGLE, _OUR_SINGLE = "single_blocks.{}", "single_transformer_blocks.{}"
HUNYUAN: Layers = {
    **_joint_attention("double_blocks.{}", "transformer_blocks.{}"),
    f"{_SINGLE}.linear1": (*(f"{_OUR_SINGLE}.attn.to_{each}" for each in "qkv"), f"{_OUR_SINGLE}.proj_mlp"),
    f"{_SINGLE}.linear2": (f"{_OUR_SINGLE}.proj_out",),
    f"{_SINGLE}.modulation.lin": (f"{_OUR_SINGLE}.norm.linear",),
    **_text_refiner("txt_in", "context_embedder"),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    **_FINAL,
}
HUNYUAN15: Layers = {
    **_joint_attention("double_blocks.{}", "transformer_blocks.{}"),
    **_text_refiner("txt_in", "context_embedder"),
    "time_in.in_layer": ("time_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_embed.timestep_embedder.linear_2",),
    **_FINAL,
}
# Parts of names as Tencent's repositories have them -> as ComfyUI has them, above. Dots and underscores are alike here.
HUNYUAN_SPELLINGS: Mapping[str, str] = {
    "mlp_fc1": "mlp_0",
    "mlp_fc2": "mlp_2",
    "mod_linear": "mod_lin",
    "modulation_linear": "modulation_lin",
    "in_mlp_0": "in_in_layer",
    "in_mlp_2": "in_out_layer",
    "embedder_mlp_0": "embedder_in_layer",
    "embedder_mlp_2": "embedder_out_layer",
    "embedder_linear_1": "embedder_in_layer",
    "embedder_linear_2": "embedder_out_layer",
}

# Parts of names as above -> as in the LoRAs of Tencent's repositories: ComfyUI knows both, diffusers only these.
HUNYUAN_LORA_SPELLINGS: Mapping[str, str] = {
    "_attn.qkv": "_attn_qkv",
    "_attn.proj": "_attn_proj",
    "_mlp.0": "_mlp.fc1",
    "_mlp.2": "_mlp.fc2",
    "_mod.lin": "_mod.linear",
    ".modulation.lin": ".modulation.linear",
}

_MOCHI, _OUR_MOCHI = "blocks.{}", "transformer_blocks.{}"
MOCHI: Layers = {
    f"{_MOCHI}.mod_x": (f"{_OUR_MOCHI}.norm1.linear",),
    f"{_MOCHI}.mod_y": (f"{_OUR_MOCHI}.norm1_context.linear",),
    f"{_MOCHI}.mod.y": (
        f"{_OUR_MOCHI}.norm1_context.linear_1",
    ),  # the same layer, which diffusers calls so in the last block
    f"{_MOCHI}.attn.qkv_x": tuple(f"{_OUR_MOCHI}.attn1.to_{each}" for each in "qkv"),
    f"{_MOCHI}.attn.qkv_y": tuple(f"{_OUR_MOCHI}.attn1.add_{each}_proj" for each in "qkv"),
    f"{_MOCHI}.attn.proj_x": (f"{_OUR_MOCHI}.attn1.to_out.0",),
    f"{_MOCHI}.attn.proj_y": (f"{_OUR_MOCHI}.attn1.to_add_out",),
    # The gate comes first there, and second in diffusers' SwiGLU.
    f"{_MOCHI}.mlp_x.w1": (f"{_OUR_MOCHI}.ff.net.0.proj[1/2]", f"{_OUR_MOCHI}.ff.net.0.proj[0/2]"),
    f"{_MOCHI}.mlp_x.w2": (f"{_OUR_MOCHI}.ff.net.2",),
    f"{_MOCHI}.mlp_y.w1": (f"{_OUR_MOCHI}.ff_context.net.0.proj[1/2]", f"{_OUR_MOCHI}.ff_context.net.0.proj[0/2]"),
    f"{_MOCHI}.mlp_y.w2": (f"{_OUR_MOCHI}.ff_context.net.2",),
}
MOCHI_LORA_SPELLINGS: Mapping[str, str] = {".mod.y": ".mod_y"}

WAN: Layers = {
    **{
        f"blocks.{{}}.{original}.{theirs}": (f"blocks.{{}}.{ours}.{projection}",)
        for original, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for theirs, projection in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}.items()
    },
    "blocks.{}.cross_attn.k_img": ("blocks.{}.attn2.add_k_proj",),
    "blocks.{}.cross_attn.v_img": ("blocks.{}.attn2.add_v_proj",),
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "head.head": ("proj_out",),
}

LTX: Layers = {
    "patchify_proj": ("proj_in",),
    "adaln_single.emb.timestep_embedder.linear_1": ("time_embed.emb.timestep_embedder.linear_1",),
    "adaln_single.emb.timestep_embedder.linear_2": ("time_embed.emb.timestep_embedder.linear_2",),
    "adaln_single.linear": ("time_embed.linear",),
}
"""Layers of blocks have the same names in LTX-Video's repository and in diffusers."""

# By diffusers' class: the parts of other tensors' names that diffusers has changed when it took a model up, in its form and in the
# original, in the order in which they are put back (convert_ltx_transformer_checkpoint_to_diffusers and
# convert_wan_transformer_to_diffusers in diffusers' single_file_utils.py). These transformers have no fused tensors.
PARTS_OF_NAMES: dict[str, Sequence[tuple[str, str]]] = {
    "LTXVideoTransformer3DModel": (("norm_q.", "q_norm."), ("norm_k.", "k_norm.")),
    "WanTransformer3DModel": (
        ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
        ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
        ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".norm_added_k.", ".norm_k_img."),
        (".norm2.", ".norm_of_text."),
        (".norm3.", ".norm2."),
        (".norm_of_text.", ".norm3."),
    ),
}
