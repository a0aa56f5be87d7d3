"""What a loader's worker is given can be sent to a process that is not forked, where that is how processes start."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from every_family import every_family

from finetune.data.loader import Sample
from finetune.models import family_class
from finetune.models.folder import ModelFolder
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings


@every_family
def test_a_family_sent_to_a_worker_makes_the_same_batch(
    tiny_model: Callable[..., Path], model: tuple[str, str | None]
) -> None:
    family = family_class(model[0])(ModelFolder(tiny_model(*model)))
    bucket = Bucket(13 if model[0] == "mochi" else 17, 64, 96)
    encoded = family.example(bucket, torch.float32)
    assemble = partial(family.batch, objective=family.objective(ObjectiveSettings()))
    ours, theirs = (
        each([Sample(encoded, bucket, 25.0, torch.Generator().manual_seed(1))])
        for each in (assemble, pickle.loads(pickle.dumps(assemble)))
    )
    for (name, one), (_, other) in zip(ours.terms.items(), theirs.terms.items(), strict=True):
        assert torch.equal(one.target, other.target), name
    assert torch.equal(ours.inputs["hidden_states"], theirs.inputs["hidden_states"])
