"""Which attention kernel each family gets, and whether kernels have the gradients of torch's math backend."""

import re
from collections import Counter
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.first.bench import Bench, Failed
from benchmarks.gpu.first.tiny import bucket_of, recipe_of, scratch, tiny_family
from benchmarks.gpu.random_model import full_width, random_batch, random_weights
from finetune.engine.precision import DTYPES
from finetune.models import family_class
from finetune.models.family import Family
from finetune.models.weights import Weights
from finetune.recipe import Bucket
from finetune.training.job import build_state

MODELS = {  # the checkpoint whose widths are taken
    "ltx": "Lightricks/LTX-Video",
    "cogvideox": "zai-org/CogVideoX-2b",
    "hunyuan": "hunyuanvideo-community/HunyuanVideo",
    "mochi": "genmo/mochi-1-preview",
}
KEYS = (256, 320, 378)  # 0, 64 and 122 more than multiples of 128
MASKS = ("no mask", "bool, by key", "bool, by query and key", "bias by key")
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
LIMIT = 0.02  # of the greatest gradient: bf16 has 8 bits
WORSE = 3.0  # or times the error of the math backend in bf16
_OPERATION = re.compile(r"^aten::_scaled_dot_product_(?!.*backward)(?:attention_)?(\w+?)(?:_attention)?(?:_for_cpu)?$")


def attention(bench: Bench) -> str:
    """Kernels by the names of operations that the profiler has seen, then gradients."""
    kernels = [f"{name}: {kernels_of(bench, name)}" for name in MODELS]
    return f"{'; '.join(kernels)}. {gradients(bench)}"


def kernels_of(bench: Bench, name: str) -> str:
    """The kernels of a family's largest attention, without and with masked text."""
    family, weights, bucket = _model(bench, name)
    largest = []
    for captions in (1, 2):
        recipe = recipe_of(
            family,
            {
                "train.precision": "float32" if bench.smoke else "bf16",
                "train.micro_batch_size": captions,
                "memory.activation_checkpointing": "none",
            },
            bucket,
        )
        state = build_state(recipe, bench.runtime, family, weights)
        batch = random_batch(family, recipe, bucket, DTYPES[recipe.train.precision]).to(bench.device.torch_device)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            predictions = family.predict(state.transformer, batch.inputs)
            reduce(add, (loss.mean() for loss in batch.losses(predictions).values())).backward()
        calls = Counter[tuple[str, int, int]]()
        for event in profiled.events() or ():
            if found := _OPERATION.match(event.name):
                queries, keys = event.input_shapes[0], event.input_shapes[1]
                calls[found[1], queries[-2], keys[-2]] += 1
        if not calls:
            raise Failed(f"{name}: no attention is seen")
        (kernel, _, _) = max(calls, key=lambda call: (call[1] * call[2], call[0] != "math"))
        largest.append(kernel)
        told = ", ".join(f"{count} x {kernel} {queries}x{keys}" for (kernel, queries, keys), count in calls.items())
        bench.notes.append(f"{name}, {'captions of two lengths' if captions > 1 else 'one caption'}: {told}")
    return largest[0] if largest[0] == largest[1] else f"{largest[0]}, with captions of two lengths {largest[1]}"


def _model(bench: Bench, name: str) -> tuple[Family, Weights, Bucket]:
    """A block of each kind at full width; with `smoke` the tiny model."""
    if bench.smoke:
        family = tiny_family(bench, name)
        return family, family.transformer_weights(), bucket_of(family)
    family = full_width(MODELS[name], scratch(bench, f"attention-{name}"), 1, family_class(name))
    return family, random_weights(family, torch.bfloat16), Bucket(19 if name == "mochi" else 17, 256, 384)


def gradients(bench: Bench) -> str:
    """Compare gradients of every kernel that there is, at awkward numbers of keys; a line on all. Raises Failed."""
    worst, wrong = (0.0, ""), []
    tried, absent = Counter[str](), Counter[str]()
    for head in (64, 128):
        for keys in KEYS:
            for mask in MASKS:
                for is_low in (False, True):  # a very low logsumexp has given NaN
                    inputs = _inputs(bench, head, keys, is_low)
                    bias = _mask(bench, mask, keys)
                    exact = _gradients(*(tensor.float() for tensor in inputs), _in_float32(bias), SDPBackend.MATH)
                    rounded = _gradients(*inputs, bias, SDPBackend.MATH)
                    limit = max(LIMIT, WORSE * _error(rounded, exact))
                    for name, backend in BACKENDS.items():
                        title = f"{name}, {keys} keys of {head}, {mask}{', low' if is_low else ''}"
                        try:
                            found = _gradients(*inputs, bias, backend)
                        except RuntimeError as error:
                            if "No available kernel" in str(error) or "No viable backend" in str(error):
                                absent[name] += 1
                            else:
                                wrong.append(f"{title}: {str(error).partition(chr(10))[0]}")
                            continue
                        tried[name] += 1
                        error = _error(found, exact)
                        if not all(gradient.isfinite().all() for gradient in found):
                            wrong.append(f"{title}: not finite")
                        elif not is_low and error > limit:
                            wrong.append(f"{title}: {error:.1e} off")
                        if not is_low:
                            worst = max(worst, (error, title))
    bench.notes.append(f"gradients compared: {dict(tried)}; no such kernel: {dict(absent)}")
    if wrong:
        bench.notes += wrong
        raise Failed(f"{len(wrong)} of {sum(tried.values())} gradients are wrong: {'; '.join(wrong[:3])}")
    return f"Gradients of {sum(tried.values())} cases are at most {worst[0]:.1%} of the greatest off ({worst[1]}), none NaN"


def _inputs(bench: Bench, head: int, keys: int, is_low: bool) -> list[Tensor]:
    """Queries, keys and values (2, 4, length, head) in bf16; if `is_low`, products of queries and keys are far below 0."""
    generator = torch.Generator().manual_seed(keys)
    offset = 8.0 if is_low else 0.0
    shapes = ((200 if keys == KEYS[0] else keys, -offset), (keys, offset), (keys, 0.0))
    drawn = [torch.randn(2, 4, length, head, generator=generator) + shift for length, shift in shapes]
    return [tensor.to(bench.device.torch_device, torch.bfloat16) for tensor in drawn]


def _mask(bench: Bench, kind: str, keys: int) -> Tensor | None:
    """The mask of a batch of two, whose second sample has half of the keys."""
    if kind == "no mask":
        return None
    queries = 200 if keys == KEYS[0] else keys
    valid = torch.ones(2, 1, 1, keys, dtype=torch.bool, device=bench.device.torch_device)
    valid[1, :, :, keys // 2 :] = False
    if kind == "bias by key":
        return (1 - valid.to(torch.bfloat16)) * -10000.0
    return valid if kind == "bool, by key" else valid.expand(2, 1, queries, keys).contiguous()


def _in_float32(bias: Tensor | None) -> Tensor | None:
    return bias.float() if bias is not None and bias.is_floating_point() else bias


def _gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: SDPBackend | None) -> list[Tensor]:
    """Gradients of queries, keys and values in float32, for the same gradient of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    if backend is None:
        output = scaled_dot_product_attention(*leaves, attn_mask=bias)
    else:
        with sdpa_kernel(backend):
            output = scaled_dot_product_attention(*leaves, attn_mask=bias)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).to(output.device, torch.bfloat16).to(output.dtype)
    output.backward(gradient)
    return [leaf.grad.float() for leaf in leaves]  # type: ignore[union-attr]  # leaves of this graph


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The greatest difference, over the greatest gradient of the same tensor."""
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(found, exact, strict=True))
