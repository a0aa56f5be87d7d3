"""The published checkpoints at full size, on the meta device: blocks, parameters, adapters, shards, a batch."""

import gc
import inspect
import re
from collections.abc import Callable
from functools import cache

import diffusers
import pytest
import torch
from full_size import CHECKPOINTS, CONFIGS, PAIRS, Checkpoint, open_full_size
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from finetune.data.loader import Sample
from finetune.engine.parallel import parallelize
from finetune.models.adapters import lora
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.text_mask import MARK
from finetune.recipe import Bucket
from finetune.recipe.schema import Lora, Memory, ObjectiveSettings, Train
from finetune.recipe.validation import Prompt
from finetune.runtime import distributed

COMPONENTS = [(checkpoint, part) for checkpoint in CHECKPOINTS for part in ("transformer", "vae", "scheduler")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Family]:
    return cache(lambda name, checkpoint: open_full_size(name, checkpoint, tmp_path_factory.mktemp(checkpoint)))


@pytest.fixture
def family(request: pytest.FixtureRequest, opened: Callable[[str, str], Family]) -> Family:
    return opened(*request.param)


@pytest.fixture
def facts(request: pytest.FixtureRequest) -> Checkpoint:
    """What is published of the checkpoint that `family` is opened on."""
    return CHECKPOINTS[request.node.callspec.params["family"][1]]


each_family = pytest.mark.parametrize("family", PAIRS, indirect=True, ids="-".join)
each_checkpoint = pytest.mark.parametrize(
    "family", [(facts.families[0], name) for name, facts in CHECKPOINTS.items()], indirect=True, ids="-".join
)
KINDS = [
    ("cogvideox", "cogvideox-2b"),
    ("hunyuan", "hunyuanvideo"),
    ("ltx", "ltx-video"),
    ("mochi", "mochi-1-preview"),
    ("wan", "wan2.1-t2v-1.3b"),
]
one_of_each_kind = pytest.mark.parametrize("family", KINDS, indirect=True, ids="-".join)
each_checkpoint_or_kind = pytest.mark.parametrize(
    "family",
    [
        pytest.param(pair, id="-".join(pair), marks=[] if pair in KINDS else pytest.mark.full)
        for pair in ((facts.families[0], name) for name, facts in CHECKPOINTS.items())
    ],
    indirect=True,
)


@cache
def adapted(family: Family) -> dict[str, LoraLayer]:
    """The layers that get an adapter of rank 128, by name."""
    transformer = family.empty_transformer().requires_grad_(False)
    with torch.device("meta"):
        lora.add(transformer, family, Lora(rank=128, alpha=128), seed=0)
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == lora_parameters(layers)
    return layers


def lora_parameters(layers: dict[str, LoraLayer]) -> int:
    weights = [part[lora.ADAPTER].weight for layer in layers.values() for part in (layer.lora_A, layer.lora_B)]
    return sum(weight.numel() for weight in weights)


# The configs


def test_every_folder_of_configs_is_tested() -> None:
    assert {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} == set(CHECKPOINTS)


@pytest.mark.parametrize("checkpoint, part", COMPONENTS)
def test_diffusers_knows_every_key_of_a_config(checkpoint: str, part: str) -> None:
    folder = ModelFolder(CONFIGS / checkpoint)
    config = folder.config(part)
    assert config["_class_name"] == folder.class_name(part)
    known = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters
    assert {key for key in config if not key.startswith("_")} <= set(known)


@each_family
def test_a_family_trains_the_pipeline_that_a_checkpoint_is_saved_as(family: Family) -> None:
    assert family.refusal(family.folder) is None
    assert set(family.components) <= set(family.folder.index)
    assert family.folder.class_name("transformer") == family.transformer_class


@pytest.mark.parametrize(
    "family, pipeline_class",
    [
        (("ltx", "ltx-video"), "LTXPipeline"),
        (("ltx_i2v", "ltx-video"), "LTXImageToVideoPipeline"),
        (("ltx", "ltx-video-0.9.1"), "LTXPipeline"),
        (("ltx", "ltx-video-0.9.5"), "LTXConditionPipeline"),
        (("ltx_i2v", "ltx-video-0.9.7"), "LTXConditionPipeline"),
    ],
    indirect=["family"],
    ids=str,
)
def test_ltx_generates_with_the_condition_pipeline_from_0_9_5_on(family: Family, pipeline_class: str) -> None:
    assert family.pipeline_class == pipeline_class


# The transformers


@each_checkpoint
def test_every_block_is_found(family: Family, facts: Checkpoint) -> None:
    transformer = family.empty_transformer()
    assert {name: len(getattr(transformer, name)) for name in family.block_lists} == facts.blocks


@each_checkpoint
def test_it_has_the_published_number_of_parameters(family: Family, facts: Checkpoint) -> None:
    published = facts.billions
    billions = sum(parameter.numel() for parameter in family.empty_transformer().parameters()) / 1e9
    assert f"{billions:.{len(published.partition('.')[2])}f}" == published


# The adapter


@each_checkpoint_or_kind
def test_an_adapter_touches_every_block_and_nothing_else(family: Family, facts: Checkpoint) -> None:
    places = [re.match(r"(\w+)\.(\d+)\.", name) for name in adapted(family)]
    assert all(places)
    found = {(place[1], int(place[2])) for place in places if place}
    assert found == {(name, i) for name, count in facts.blocks.items() for i in range(count)}


@pytest.mark.parametrize(
    "family, count",
    [
        # Each attention has to_q, to_k, to_v and to_out.0, each width -> width: 2 x rank x width parameters a layer.
        (("cogvideox", "cogvideox-2b"), 30 * 4 * 2 * 128 * 1920),
        (("cogvideox", "cogvideox-5b"), 42 * 4 * 2 * 128 * 3072),
        (("ltx", "ltx-video"), 28 * 2 * 4 * 2 * 128 * 2048),  # self- and cross-attention, on text projected to 2048
        (("ltx", "ltx-video-0.9.7"), 48 * 2 * 4 * 2 * 128 * 4096),
        (("hunyuan15", "hunyuanvideo-1.5-480p-t2v"), 54 * 4 * 2 * 128 * 2048),
        (("mochi", "mochi-1-preview"), 48 * 4 * 2 * 128 * 3072),
        (("wan", "wan2.1-t2v-1.3b"), 30 * 2 * 4 * 2 * 128 * 1536),
        (("wan_i2v", "wan2.1-flf2v-14b"), 40 * 2 * 4 * 2 * 128 * 5120),  # not add_k_proj and add_v_proj, of images
    ],
    indirect=["family"],
    ids=str,
)
def test_an_adapter_has_as_many_parameters_as_its_projections_call_for(family: Family, count: int) -> None:
    assert lora_parameters(adapted(family)) == count


@pytest.mark.parametrize("family", [("hunyuan", "hunyuanvideo")], indirect=True, ids=["hunyuanvideo"])
def test_hunyuans_adapter_is_explained_layer_by_layer(family: Family) -> None:
    layers = adapted(family)
    double = 20 * ["to_q", "to_k", "to_v", "to_out.0"]  # the video's; the text's are add_q_proj, ..., to_add_out
    single = 40 * ["to_q", "to_k", "to_v"]  # attention's output goes through proj_out with the MLP's: no to_out
    width = 24 * 128  # heads x head size
    assert len(layers) == len(double) + len(single) == 200
    assert lora_parameters(layers) == len(double + single) * 128 * (width + width) == 157_286_400


# Sharding


@each_checkpoint_or_kind
def test_every_block_is_a_sharded_unit_of_its_own(
    family: Family, facts: Checkpoint, runtime: distributed.Runtime
) -> None:
    check_shards(family, facts, runtime, "full")
    gc.collect()  # units hold each other, and have reserved tens of GB, though none is touched: this worker could not fork


@one_of_each_kind
def test_every_block_is_a_sharded_unit_with_an_adapter_too(
    family: Family, facts: Checkpoint, runtime: distributed.Runtime
) -> None:
    check_shards(family, facts, runtime, "lora")
    gc.collect()


def check_shards(family: Family, facts: Checkpoint, runtime: distributed.Runtime, method: str) -> None:
    with torch.device("meta"):
        memory = Memory(layout="shard")
        transformer = parallelize(family.empty_transformer(), family, Train(method=method), Lora(), memory, runtime)
    blocks = [block for name in family.block_lists for block in getattr(transformer, name)]
    assert len(blocks) == sum(facts.blocks.values())
    assert all(isinstance(block, FSDPModule) for block in blocks)
    units = [module for module in transformer.modules() if isinstance(module, FSDPModule)]
    others = [unit for unit in units if unit not in blocks]
    if (
        transformer._keep_in_fp32_modules
    ):  # then the root is the unit of these, and what else is not in blocks has its own
        assert others[0] is transformer
        assert not {module for block in blocks for module in block.modules()} & set(others)
    else:
        assert others == [transformer]
    assert parameters(transformer) - sum(map(parameters, blocks)) < 0.1 * parameters(transformer)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# What a run reads of the configs


@each_family
def test_the_published_configs_are_enough_for_a_batch(family: Family) -> None:
    bucket = Bucket(13 if family.name == "mochi" else 17, 64, 96)
    text = {"text": {name: torch.zeros(1, 1) for name in family.text_arguments}}
    sample = Sample(
        encoded=family.example(bucket, torch.float32) | text,
        bucket=bucket,
        fps=25.0,
        generator=torch.Generator(),
        stratum=(0, 1),
        image_dropped=False,
    )
    batch = family.batch([sample, sample], family.objective(ObjectiveSettings()))
    assert batch.only.target.shape[0] == 2
    accepted = inspect.signature(getattr(diffusers, family.transformer_class).forward).parameters
    assert set(batch.inputs) - {MARK} <= set(accepted)


@each_family
def test_the_published_configs_are_enough_for_sampling(family: Family) -> None:
    prompt = Prompt(text="a", guidance=3.0)
    arguments, components = family.sampling_arguments(prompt), family.prompt_components(prompt)
    pipeline = getattr(diffusers, family.pipeline_class)
    assert set(arguments) <= set(inspect.signature(pipeline.__call__).parameters)
    assert set(components) <= set(inspect.signature(pipeline.__init__).parameters)
    scale = components["guider"].guidance_scale if "guider" in components else arguments["guidance_scale"]
    assert scale == 3.0
