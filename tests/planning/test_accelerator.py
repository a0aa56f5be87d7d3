"""The simulated device: values that are known, results that are cached, costs; each case in a process of its own."""

import pytest
from processes import run_python

BEGIN = """
import torch
from finetune.planning.accelerator import Accelerator
from finetune.planning.device import register
from finetune.planning.trace import Trace
device = register()
with Accelerator(Trace(), Trace()) as accelerator:
"""
CASES = {
    "values follow a copy": """
        x = torch.zeros(4, device=device)
        x.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert x[1].item() == 2.0
    """,
    "values are dropped when they are not known any more": """
        x = torch.ones(4, device=device)
        x.add_(torch.empty(4, device=device))
        assert x.known_values is None
    """,
    "a result depends on the default dtype": """
        made = []
        for dtype in (torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            made.append(torch.full((10000,), 1.5, device=device).dtype)
        assert made == [torch.bfloat16, torch.float32]
    """,
    "a result written into another tensor is not cached": """
        a, b = torch.zeros(100, 100, device=device), torch.zeros(100, 100, device=device)
        for _ in range(2):
            out = torch.empty(0, device=device)
            torch.add(a, b, out=out)
            assert out.shape == (100, 100)
    """,
    "views are made again as views": """
        for _ in range(3):
            x = torch.zeros(64, 256, device=device)
            y = x.view(128, 128).t()[3:]
            assert y._is_view() and y.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert (y.shape, y.stride(), y.storage_offset()) == ((125, 128), (1, 128), 3)
    """,
    "matrix products are counted as torch counts them": """
        from torch.utils.flop_counter import FlopCounterMode
        def multiply(where):
            a, b = torch.zeros(8, 64, 32, device=where), torch.zeros(8, 32, 16, device=where)
            torch.bmm(a, b)
            torch.nn.functional.linear(torch.zeros(5, 32, device=where), torch.zeros(7, 32, device=where))
        multiply(device)
        with FlopCounterMode(display=False) as counter:
            multiply("cpu")
        assert accelerator.cost.flops == counter.get_total_flops() > 0
    """,
    "attention by products keeps a float32 score of each pair of tokens, and three more while it computes them": """
        from torch.nn.attention import SDPBackend, sdpa_kernel
        def attend(dtype, *backends):
            trace = Trace()
            with Accelerator(trace, Trace()), sdpa_kernel(list(backends)):
                size = dict(device=device, dtype=dtype, requires_grad=True)
                inputs = [torch.zeros(2, 4, 1000, 64, **size), *(torch.zeros(2, 4, 512, 64, **size) for _ in range(2))]
                trace.begin()
                out = torch.nn.functional.scaled_dot_product_attention(*inputs)
                kept = sum(storage.size for storage in trace.live.values() if storage.category != "workspace")
                return kept - trace.peak().before, trace.peak()
        rows, keys, pairs = 2 * 4 * 1000 * 64, 2 * 4 * 512 * 64, 2 * 4 * 1000 * 512
        kept, peak = attend(torch.bfloat16, SDPBackend.MATH)
        assert kept == 4 * pairs + 4 * (rows + 2 * keys) + 2 * rows  # probabilities; query, key, value in float32; the output
        # Scores, their softmax, the softmax without masked rows; where scores are -inf; query, key, value; scaled query and key
        at_peak = (3 * 4 + 1) * pairs + 4 * (2 * rows + 3 * keys)
        assert peak.requested - peak.before - peak.parts["workspace"] == at_peak
        fused = attend(torch.bfloat16, SDPBackend.FLASH_ATTENTION)[0]
        assert fused == 2 * rows + 4 * 2 * 4 * 1000  # the output, and a sum of each row
        assert attend(torch.bfloat16, SDPBackend.CUDNN_ATTENTION)[0] == fused
        assert attend(torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION)[0] == 2 * rows + 4 * 2 * 4 * 1024  # rounded up to 32
    """,
    "copies are counted by their direction": """
        x = torch.zeros(1000, 1000, device=device)
        host = torch.empty(4_000_000, dtype=torch.uint8).view(torch.float32).view(1000, 1000)
        host.copy_(x)
        assert (accelerator.cost.to_host, accelerator.cost.to_device) == (4_000_000, 0)
        x.copy_(host)
        assert (accelerator.cost.to_host, accelerator.cost.to_device) == (4_000_000, 4_000_000)
    """,
    "a copy that makes its target is counted, too": """
        torch.zeros(1000, 1000).to(device)
        assert accelerator.cost.to_device == 4_000_000
        assert accelerator.cost.to_host == 0
    """,
    "a layer norm copies what is not in order": """
        x = torch.zeros(512, 1024, device=device).t()
        before = accelerator.trace.allocator.allocated
        y = torch.nn.functional.layer_norm(x, (512,))
        assert accelerator.trace.allocator.peak_allocated - before >= 2 * 512 * 1024 * 4
        assert accelerator.trace.allocator.allocated - before < 2 * 512 * 1024 * 4
    """,
    "what the CPU computes takes nothing of the device": """
        host = torch.empty(4_000_000, dtype=torch.uint8).view(torch.float32).view(1000, 1000)
        torch.softmax(host.t(), -1) @ host
        assert accelerator.trace.allocator.peak_allocated == 0
        assert accelerator.cost.flops == 0
    """,
}


@pytest.mark.parametrize("case", CASES)
def test_the_simulated_device(case: str) -> None:
    body = "\n".join(line[4:] for line in CASES[case].splitlines())
    done = run_python(["-c", BEGIN + body])
    assert done.returncode == 0, done.stderr
