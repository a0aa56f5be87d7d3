"""launch/kubernetes.yaml is what Kubeflow Trainer's own models take, with no key that they do not know.

The models pass over keys that they do not know. So what they have read is compared with what is written.
"""

import copy

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from processes import ROOT

MANIFEST = yaml.safe_load((ROOT / "launch" / "kubernetes.yaml").read_text())
PODS = "spec runtimePatches 0 trainingRuntimeSpec template spec replicatedJobs 0 template spec template spec"


def read(manifest: dict) -> dict:
    """What the models know of a manifest; raises if they refuse it."""
    job = TrainerV1alpha1TrainJob.from_dict(manifest)
    assert job is not None
    return job.to_dict()


def test_the_models_know_every_key_of_the_manifest() -> None:
    assert read(MANIFEST) == MANIFEST
    assert MANIFEST["spec"]["trainer"]["numNodes"] == 2
    assert MANIFEST["spec"]["trainer"]["numProcPerNode"] == 8


@pytest.mark.parametrize(
    "place, name",
    [
        ("spec trainer", "numNode"),
        ("spec trainer env 0", "vale"),
        (PODS, "terminationGracePeriod"),
        (f"{PODS} containers 0 volumeMounts 0", "mountpath"),
    ],
)
def test_a_misspelt_key_is_found(place: str, name: str) -> None:
    broken = copy.deepcopy(MANIFEST)
    inner = broken
    for step in place.split():
        inner = inner[int(step) if step.isdecimal() else step]
    inner[name] = "2"
    assert read(broken) != broken


def test_a_number_of_another_kind_is_refused() -> None:
    broken = copy.deepcopy(MANIFEST)
    broken["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        read(broken)
