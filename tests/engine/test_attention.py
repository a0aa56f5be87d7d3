"""The kernel of attention is the one that the recipe names, wherever blocks are computed, and what is learnt stays the same."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import FLOAT32
from every_family import FIRST, TRANSFORMERS, Model, title
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.engine.attention import explained
from finetune.engine.weights.loading import plain_name
from finetune.recipe import load_recipe
from finetune.training.job import Job
from finetune.training.run import train

ONE = "train.micro_batch_size=1"  # captions of one clip are not padded, and not masked
FLASH, SOFTMAX = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_safe_softmax"
BACKWARD = {FLASH: f"{FLASH}_backward", SOFTMAX: "aten::_softmax_backward_data"}
CASES = [
    pytest.param(model, kernel, id=f"{title(model)} {kernel}", marks=[] if model in TRANSFORMERS else pytest.mark.full)
    for model in FIRST
    for kernel in ("math", "flash")
    if kernel == "math" or "ltx" not in model[0]
]
over_kernels = pytest.mark.parametrize("model, kernel", CASES)
BuildJob = Callable[..., Job]


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """torch's switches are the process's."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


class Kernels(TorchDispatchMode):
    """How often each operation that attention ends in is computed over at least so many tokens."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.tokens, self.found = job.state.family.tokens(job.prepared.train[0].bucket), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.name() in (FLASH, SOFTMAX, *BACKWARD.values()) and arguments[0].shape[-2] >= self.tokens:
            self.found[function.name()] += 1
        return function(*arguments, **(keywords or {}))


def kernels_of_a_step(job: Job) -> Counter:
    with Kernels(job) as kernels:
        job.step(0, [job.micro_batches()[0]])
    return kernels.found


@over_kernels
def test_forward_recomputation_and_backward_take_the_kernel_that_is_named(
    build_job: BuildJob, family_recipe: Callable[..., Path], model: Model, kernel: str
) -> None:
    chosen = kernels_of_a_step(build_job(ONE, f"memory.attention={kernel}", recipe_file=family_recipe(*model)))
    expected = kernels_of_a_step(
        build_job(ONE, recipe_file=family_recipe(*model))
    )  # a CPU's default is its flash kernel
    forward = SOFTMAX if kernel == "math" else FLASH
    assert expected[FLASH] == 2 * expected[BACKWARD[FLASH]] > 0
    assert chosen == {forward: expected[FLASH], BACKWARD[forward]: expected[BACKWARD[FLASH]]}


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_blocks_that_keep_activations_take_it_too(build_job: BuildJob, mode: str) -> None:
    found = kernels_of_a_step(build_job("memory.attention=math", f"memory.activation_checkpointing={mode}"))
    assert found[FLASH] == 0
    assert found[BACKWARD[SOFTMAX]] == 4  # two blocks, which attend to the video and to the caption


def results(job: Job) -> dict[str, Tensor]:
    """The prediction for a batch, and the gradients of all that is trained."""
    transformer = job.state.transformer
    prediction = job.state.family.predict(transformer, job.micro_batches()[0].inputs)["video"]
    prediction.backward(torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1)))
    trained = {plain_name(name): p for name, p in transformer.named_parameters() if p.requires_grad}
    return {"prediction": prediction.detach()} | {name: p.grad.full_tensor() for name, p in trained.items()}


@over_kernels
def test_gradients_are_those_of_the_default(
    build_job: BuildJob, family_recipe: Callable[..., Path], model: Model, kernel: str
) -> None:
    full = ["train.method=full", "memory.layout=shard", ONE]
    found = results(build_job(*full, f"memory.attention={kernel}", recipe_file=family_recipe(*model)))
    expected = results(build_job(*full, recipe_file=family_recipe(*model)))
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    modules: dict[str, float] = defaultdict(float)  # a bias' gradient cancels over tokens, where its weight's does not
    for name, value in expected.items():
        module = name.rpartition(".")[0]
        modules[module] = max(modules[module], float(value.abs().max()))
    for name, value in expected.items():
        scale = modules[name.rpartition(".")[0]]
        if float(value.abs().max()) < 1e-6 * largest:  # a bias of keys: softmax leaves nothing of it but rounding
            assert float(found[name].abs().max()) < 1e-6 * largest, name
        elif model[0] == "wan" and (".attn2." in name or ".norm2." in name):
            # Wan attends to 512 text tokens that are zeros but for a few: what equal keys give to queries' gradients cancels.
            assert float((found[name] - value).abs().max()) < 1e-5 * largest, name
        else:
            assert float((found[name] - value).abs().max()) <= FLOAT32 * scale, name


def operations(call: Callable[[], Any]) -> tuple[Any, set[str]]:
    """The result, and names of the operations that are computed, in compiled graphs, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    return result, {event.key for event in profile.key_averages()}


@pytest.mark.timeout(600)
def test_compiled_graphs_take_it(build_job: BuildJob, family_recipe: Callable[..., Path]) -> None:
    """With gradients and without: in training, and in the held-out loss, which comes first here as in a run."""
    losses = {}
    for kernel in ("math", "auto"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = ["memory.compile=true", f"memory.attention={kernel}", "optimizer.lr=1e-3"]
        job = build_job(*options, recipe_file=family_recipe("cogvideox"))
        batch, losses[kernel] = job.micro_batches()[0], []
        for call in (job.heldout_loss, partial(job.step, 0, [batch])):
            result, found = operations(call)
            losses[kernel].append(result.loss)
            assert (FLASH in found) == (kernel == "auto")
            assert any("softmax" in name for name in found) == (kernel == "math")
        assert torch._dynamo.utils.counters["graph_break"] == {}
    assert losses["math"] == pytest.approx(losses["auto"], rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory.offload=true"],
        ["memory.low_bit=int8", "memory.offload_activations=true"],
        ["memory.layout=shard", "memory.activation_checkpointing=every_n"],
    ],
)
def test_it_goes_with_other_savers(build_job: BuildJob, overrides: list[str]) -> None:
    plain, chosen = (build_job(*overrides, f"memory.attention={kernel}") for kernel in ("auto", "math"))
    expected, found = (job.step(0, [job.micro_batches()[0]]) for job in (plain, chosen))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert chosen.state.transformer.state_dict().keys() == plain.state.transformer.state_dict().keys()


def test_samples_take_it_and_the_efficient_kernel_beside_a_flash_kernel(
    build_job: BuildJob, family_recipe: Callable[..., Path]
) -> None:
    """A pipeline pads its prompts, and the flash kernel of a GPU takes no mask."""
    recipe, cuda = family_recipe("hunyuan"), torch.backends.cuda
    for kernel, without_gradients in (("flash", (True, True)), ("math", (False, False))):
        job = build_job(ONE, f"memory.attention={kernel}", recipe_file=recipe)
        seen: list[tuple[bool, bool, bool]] = []
        for block in job.state.transformer.transformer_blocks:
            block.attn.register_forward_pre_hook(
                lambda *_, seen=seen: seen.append(
                    (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
                )
            )
        inputs = job.micro_batches()[0].inputs
        job.state.family.predict(job.state.transformer, inputs)
        with torch.no_grad():
            job.state.family.predict(job.state.transformer, inputs)
        first, *_, last = seen
        assert first == (kernel == "flash", False, kernel == "math")
        assert last[:2] == without_gradients
        assert (cuda.math_sdp_enabled(), cuda.flash_sdp_enabled()) == (True, True)  # after the call


@pytest.mark.parametrize(
    "name, overrides, stays",
    [
        ("hunyuan", [ONE], True),
        ("hunyuan", ["train.micro_batch_size=2"], False),
        ("mochi", ["train.micro_batch_size=2"], False),
        ("mochi", [ONE, "memory.compile=true"], False),
        ("ltx", ["train.micro_batch_size=2"], True),
    ],
)
def test_torch_does_not_choose_cudnn_where_padding_is_masked(
    build_job: BuildJob, family_recipe: Callable[..., Path], name: str, overrides: list[str], stays: bool
) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    build_job(*overrides, recipe_file=family_recipe(name))
    assert torch.backends.cuda.cudnn_sdp_enabled() == stays


def test_what_the_refiner_of_hunyuan_attends_to_is_not_masked_either(
    build_job: BuildJob, family_recipe: Callable[..., Path]
) -> None:
    job, masks = build_job(ONE, recipe_file=family_recipe("hunyuan")), []

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.name() == FLASH:
                masks.append((keywords or {}).get("attn_mask"))
            return function(*arguments, **(keywords or {}))

    with Masks():
        job.step(0, [job.micro_batches()[0]])
    assert masks
    assert all(mask is None for mask in masks)


def test_a_kernel_that_cannot_take_what_it_is_given_is_named(
    recipe_file: Path, runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No CPU has the memory-efficient kernel; that is known before, but what a model gives to a kernel may not be."""
    monkeypatch.setattr("finetune.training.run.check_cpu", lambda *_: [])
    with pytest.raises(Exception, match='"efficient" cannot compute the attention of this model') as caught:
        train(load_recipe(recipe_file, ["memory.attention=efficient"]), runtime)
    assert str(caught.value).startswith("memory.attention: ")
    assert 'set it to "auto"' in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    assert explained(RuntimeError("CUDA error"), "flash") is None
    assert explained(RuntimeError("No available kernel. Aborting execution."), "auto") is None
    assert explained(RuntimeError("No available kernel. Aborting execution."), "cudnn") is not None
