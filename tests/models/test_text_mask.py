"""Attention has no mask where no text token is padding, and the results are those of the pipeline's masked attention."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from closeness import assert_close_to_scale
from torch import Tensor, nn

from finetune.checks.model import open_family
from finetune.data.loader import read_sample
from finetune.models.family import Family
from finetune.models.text_mask import MARK, cut
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import seeds
from finetune.training.job import Job

FAMILIES = pytest.mark.parametrize("name", ["hunyuan", "hunyuan15", "hunyuan_i2v", "mochi"])
BuildJob = Callable[..., Job]


@contextmanager
def attention_masks(tokens: int) -> Iterator[list[bool]]:
    """Whether each attention over at least this many tokens was given a mask."""
    found, attend = [], nn.functional.scaled_dot_product_attention

    def recorded(query: Tensor, *arguments: object, **keywords: object) -> Tensor:
        if query.shape[-2] >= tokens:
            found.append(keywords.get("attn_mask") is not None)
        return attend(query, *arguments, **keywords)

    nn.functional.scaled_dot_product_attention = recorded
    torch.nn.functional.scaled_dot_product_attention = recorded
    try:
        yield found
    finally:
        nn.functional.scaled_dot_product_attention = attend
        torch.nn.functional.scaled_dot_product_attention = attend


def lengths(job: Job, micro_step: int) -> list[int]:
    """How many tokens the captions of a micro-batch have."""
    keys = []
    for position in job.split.positions(micro_step):
        item = job.prepared.train[job.order.plan(0).items[position]]
        drawn = torch.rand((), generator=seeds.generator(job.recipe.train.seed, "image", 0, position)).item()
        dropped = item.windows[0][0].text_alone if drawn < job.recipe.data.image_dropout else None
        keys.append(dropped or item.keys["text"])
    return [int(job.prepared.cache.read("text", key)["encoder_attention_mask"].sum()) for key in keys]


@FAMILIES
def test_a_clip_by_itself_is_attended_to_without_a_mask(
    build_job: BuildJob, family_recipe: Callable[..., Path], name: str
) -> None:
    job = build_job("train.micro_batch_size=1", "data.caption_dropout=0", recipe_file=family_recipe(name))
    batch = job.micro_batches()[0]
    assert batch.inputs["encoder_hidden_states"].shape[1] == lengths(job, 0)[0]
    video = job.state.family.tokens(job.prepared.train[0].bucket)
    with attention_masks(video) as masked:
        job.step(0, [batch])
    assert masked
    assert not any(masked)


@FAMILIES
def test_captions_of_different_lengths_have_a_mask(
    build_job: BuildJob, family_recipe: Callable[..., Path], name: str
) -> None:
    job = build_job(
        "train.micro_batch_size=4",
        "train.global_batch_size=4",
        "data.caption_dropout=0",
        recipe_file=family_recipe(name),
    )
    batch = job.micro_batches()[0]
    assert len(set(lengths(job, 0))) > 1
    assert batch.inputs["encoder_hidden_states"].shape[1] == max(lengths(job, 0))
    with attention_masks(job.state.family.tokens(job.prepared.train[0].bucket)) as masked:
        job.step(0, [batch])
    assert masked
    assert all(masked)


def results(family: Family, transformer: nn.Module, inputs: dict[str, object]) -> dict[str, Tensor]:
    """The prediction, and the gradients of all weights for the same gradient of it."""
    transformer.zero_grad()
    prediction = family.predict(transformer, inputs)["video"]
    prediction.backward(torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1)))
    gradients = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    return {"prediction": prediction.detach(), **copy.deepcopy(gradients)}


@FAMILIES
@pytest.mark.parametrize("clips", [1, 3])
def test_results_are_those_of_padded_text_in_diffusers_own_attention(
    family_recipe: Callable[..., Path], runtime, name: str, clips: int
) -> None:
    recipe = load_recipe(family_recipe(name), ["memory.compile=true"])
    family = open_family(recipe)
    prepared = prepare(recipe, family, runtime)
    items = prepared.train[:clips]

    def inputs(keeps_length: bool) -> dict[str, object]:
        family.keeps_text_length = keeps_length
        samples = [read_sample(item, prepared.cache, seeds.generator(index)) for index, item in enumerate(items)]
        return dict(family.batch(samples, family.training_objective(recipe.objective)).inputs)

    theirs = inputs(keeps_length=True)
    assert theirs.pop(MARK) is False
    if theirs.get("image_embeds", 0) is None:
        theirs["image_embeds"] = torch.zeros(clips, 729, family.transformer_config["image_embed_dim"])
    adapted = family.adapt_transformer(diffusers_transformer(family))
    expected = results(family, diffusers_transformer(family), theirs)
    found = results(family, adapted, inputs(keeps_length=False))
    expected = {name: value for name, value in expected.items() if name in found or value.any()}
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        if (
            float(value.abs().max()) < 1e-6 * largest
        ):  # a bias of keys: softmax leaves nothing of its gradient but rounding
            assert float(found[key].abs().max()) < 1e-6 * largest
        else:
            assert_close_to_scale(found[key], value)


def diffusers_transformer(family: Family) -> nn.Module:
    import diffusers

    return getattr(diffusers, family.transformer_class).from_pretrained(family.folder.path, subfolder="transformer")


@FAMILIES
def test_a_pipelines_call_is_masked_whatever_was_trained_before(
    build_job: BuildJob, family_recipe: Callable[..., Path], name: str
) -> None:
    job = build_job("train.micro_batch_size=1", "data.caption_dropout=0", recipe_file=family_recipe(name))
    batch = job.micro_batches()[0]
    job.step(0, [batch])
    arguments = dict(batch.inputs)
    del arguments[MARK]
    with attention_masks(job.state.family.tokens(job.prepared.train[0].bucket)) as masked, torch.no_grad():
        job.state.transformer(**arguments, return_dict=False)
    assert masked
    assert all(masked)


@pytest.mark.parametrize(
    "valid, keep, length, needed",
    [
        ([[1, 1, 0, 0]], False, 2, False),
        ([[1, 1, 0, 0], [1, 1, 0, 0]], False, 2, False),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], False, 3, True),
        ([[1, 1, 1, 1]], False, 4, False),
        ([[1, 1, 0, 0]], True, 4, True),
        ([[1, 1, 1, 1]], True, 4, False),
        ([[0, 1, 1, 0]], False, 4, True),  # padding that does not come last stays
        ([[0, 0, 0, 0]], False, 4, True),
        ([[0, 0, 0, 0], [1, 0, 0, 0]], False, 1, True),
    ],
)
def test_text_is_cut_to_the_longest_caption(valid: list[list[int]], keep: bool, length: int, needed: bool) -> None:
    mask = torch.tensor(valid)
    text = {"encoder_hidden_states": torch.randn(*mask.shape, 3), "encoder_attention_mask": mask, "pooled": mask}
    shorter, is_needed = cut(text, keep)
    assert torch.equal(shorter["encoder_hidden_states"], text["encoder_hidden_states"][:, :length])
    assert torch.equal(shorter["encoder_attention_mask"], mask[:, :length])
    assert shorter["pooled"] is mask
    assert is_needed == needed
