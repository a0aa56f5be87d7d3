"""The run behind a published row, repeated on the simulated accelerator with the same tensors resident and the same casts.

It does what cogvideox-factory's scripts of autumn 2024 did (training/cogvideox_text_to_video_{lora,sft}.py, accelerate in
float16). T5, transformer and VAE are loaded onto the GPU. Training uses precomputed latents and embeddings. Validation runs
the pipeline with the transformer in training, while training's allocations are still cached. Testing loads a new pipeline
while the old transformer and the optimizer are still in memory.
"""

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import MethodType

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import T5EncoderModel

from benchmarks.memory.autocast import HALF, region, simulated_autocast
from benchmarks.memory.optimizers import AdamW8bitStorages, OffloadedStorages
from benchmarks.memory.published import Row
from finetune.models.published import CONFIGS, T5_XXL
from finetune.models.tiny import t5_tokenizer
from finetune.planning.accelerator import Accelerator
from finetune.planning.device import register
from finetune.planning.trace import Trace

TOKENS, TEXT_WIDTH = 226, 4096
LATENTS = (13, 16, 60, 90)  # of 49x480x720
STEPS = 2
OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 1e-3}
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Figures:
    """Peak bytes of reserved memory in each part of the run, and how long the simulation took.

    The published columns are running maxima: before_validation is the maximum of loading and training, and after_validation
    that of loading, training and validation.
    """

    loaded: int
    training: int
    validation: int
    testing: int
    seconds: float


class Reference:
    """The simulation of one row's run."""

    def __init__(self, row: Row, accelerator: Accelerator) -> None:
        self.row, self.device, self.allocator = row, register(), accelerator.trace.allocator
        self.scheduler = CogVideoXDPMScheduler.from_pretrained(CONFIGS / row.model, subfolder="scheduler")

    def run(self) -> Figures:
        """Simulate all parts of the run."""
        start = time.perf_counter()
        loaded = self._load()
        training = self._part(self._train)
        validation = self._part(self._validate)
        testing = self._part(self._test)
        return Figures(loaded, training, validation, testing, time.perf_counter() - start)

    def _load(self) -> int:
        text_encoder = self._on_device(new_text_encoder())
        self.transformer = self._on_device(self._new_transformer(), trained=torch.float32)
        vae = self._on_device(self._new_vae())
        if self.row.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        trained = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        self.optimizer = {
            "adamw": lambda: torch.optim.AdamW(trained, foreach=True, **OPTIONS),
            "adamw_8bit_bnb": lambda: AdamW8bitStorages(trained),
            "adamw_cpu_offload": lambda: OffloadedStorages(trained, foreach=True, **OPTIONS),
        }[self.row.optimizer]()
        _in_half(self.transformer)
        self._release()
        loaded = self.allocator.reserved
        del text_encoder, vae
        self._release()
        return loaded

    def _train(self) -> None:
        """Make two steps in one scope, so that a step's tensors live until those of the next step replace them.

        In full finetuning the first step updates nothing, because float16's initial loss scale of 65536 overflows. The published
        rows show it: with optimizer state in the backward pass, 5b with 8 bits and batch 4 would take 67.4 GiB without any
        fragmentation, but 66.6 were reserved. Adapters of rank 16 and 64 agree with optimizer state in the second step.
        """
        self.transformer.train()
        size, device = self.row.batch_size, self.device
        alphas = self.scheduler.alphas_cumprod.to(device)
        for step in range(STEPS):
            moments = torch.empty(size, 2 * LATENTS[1], LATENTS[0], *LATENTS[2:], dtype=HALF).to(device)
            text = torch.empty(size, TOKENS, TEXT_WIDTH, dtype=HALF).to(device)
            latents = _sample(moments)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (size,), device=device)
            rotary = self._rotary()
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            output = self.transformer(
                hidden_states=noisy,
                encoder_hidden_states=text,
                timestep=timesteps,
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
            predicted = self.scheduler.get_velocity(output, noisy, timesteps)
            weights = (1 / (1 - alphas[timesteps])).view(-1, 1, 1, 1, 1)
            loss = torch.mean((weights * (predicted - latents) ** 2).reshape(size, -1), dim=1).mean()
            loss.backward()
            self._clip()
            if self.row.method == "lora" or step > 0:
                self.optimizer.step()
            self.optimizer.zero_grad()

    def _clip(self) -> None:
        gradients = [p.grad for p in self.transformer.parameters() if p.grad is not None]
        for _ in range(2):  # the norm is logged before and after clipping
            for gradient in gradients:
                gradient.detach().norm(2)
        if gradients:
            torch._foreach_mul_(gradients, torch.ones((), device=self.device))

    def _rotary(self) -> tuple[Tensor, Tensor] | None:
        if not self.transformer.config.use_rotary_positional_embeddings:
            return None
        tokens = LATENTS[0] * (LATENTS[2] // 2) * (LATENTS[3] // 2)
        return tuple(torch.empty(tokens, self.transformer.config.attention_head_dim).to(self.device) for _ in range(2))

    def _validate(self) -> None:
        self._generate(self._on_device(new_text_encoder()), self._on_device(self._new_vae()), self.transformer)
        self._release()

    def _test(self) -> None:
        self._cast(self.transformer, HALF)  # it stays in memory, and so does the optimizer
        text_encoder, vae = self._on_device(new_text_encoder()), self._on_device(self._new_vae())
        self._generate(text_encoder, vae, self._on_device(self._new_transformer()))

    def _generate(self, text_encoder: nn.Module, vae: nn.Module, transformer: nn.Module) -> None:
        pipeline = CogVideoXPipeline(
            tokenizer=t5_tokenizer(TOKENS),
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer.eval(),
            scheduler=self.scheduler,
        )
        pipeline.set_progress_bar_config(disable=True)
        vae.enable_slicing()
        vae.enable_tiling()
        # Two denoising steps have the same peak as fifty.
        pipeline(
            "a cat", height=480, width=720, num_frames=49, num_inference_steps=2, guidance_scale=6.0, output_type="pt"
        )

    def _part(self, run) -> int:
        self.allocator.reset_peak()
        run()
        return self.allocator.peak_reserved

    def _release(self) -> None:
        gc.collect()
        self.allocator.empty_cache()

    def _on_device(self, module: nn.Module, trained: torch.dtype = HALF) -> nn.Module:
        """Move a module to the device in float16, parameter by parameter like `Module.to`, and an adapter after its model.

        Args:
            trained: the dtype to which trained parameters are cast afterwards.
        """
        parameters = list(_parameters(module))
        made: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
        for is_adapter in (False, True):
            for owner, name, parameter in parameters:
                if ("lora_" in name) == is_adapter and parameter not in made:
                    on_device = torch.empty_like(parameter, dtype=HALF, device=self.device)
                    made[parameter] = nn.Parameter(on_device, parameter.requires_grad)
                if parameter in made:
                    owner._parameters[name.split(".")[-1]] = made[parameter]
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                dtype = HALF if buffer.is_floating_point() else buffer.dtype
                owner._buffers[name] = torch.empty_like(buffer, dtype=dtype, device=self.device)
        return self._cast(module, trained).eval()

    def _cast(self, module: nn.Module, trained: torch.dtype) -> nn.Module:
        """Cast the trained parameters to another dtype, in place."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained)
        return module

    def _new_transformer(self) -> nn.Module:
        """The transformer on meta, with an adapter for LoRA. Only trained parameters require gradients."""
        config = CogVideoXTransformer3DModel.load_config(CONFIGS / self.row.model, subfolder="transformer")
        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel.from_config(config).requires_grad_(self.row.method == "full")
            if self.row.method == "lora":
                rank = self.row.rank
                transformer.add_adapter(
                    LoraConfig(r=rank, lora_alpha=64, init_lora_weights=True, target_modules=TARGETS)
                )
            return transformer

    def _new_vae(self) -> nn.Module:
        config = AutoencoderKLCogVideoX.load_config(CONFIGS / self.row.model, subfolder="vae")
        with torch.device("meta"):
            return AutoencoderKLCogVideoX.from_config(config).requires_grad_(False)


def _sample(moments: Tensor) -> Tensor:
    """Sample latents (B, F, C, H, W) from moments (B, 2C, F, H, W)."""
    mean, logvar = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0))
    latents = (mean + deviation * torch.randn_like(mean)) * 0.7
    return latents.permute(0, 2, 1, 3, 4).to(memory_format=torch.contiguous_format, dtype=HALF)


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owning module, full name, parameter) of each parameter. A tied parameter comes once for each of its owners."""
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            yield owner, f"{prefix}.{name}", parameter


def new_text_encoder() -> nn.Module:
    """The encoder of T5 v1.1 XXL, on meta."""
    with torch.device("meta"):
        return T5EncoderModel(T5_XXL).requires_grad_(False)


def _in_half(transformer: nn.Module) -> None:
    """Run the forward pass in autocast and return float32, as accelerate does for models in mixed precision."""
    forward = transformer.forward

    def run(_: nn.Module, *arguments: object, **keywords: object) -> tuple[Tensor, ...]:
        with region():
            result = forward(*arguments, **keywords)
        return tuple(each.float() for each in result)

    transformer.forward = MethodType(run, transformer)


def reproduce(row: Row) -> Figures:
    """Simulate a row's run. Call it in a process of its own, because torch keeps the simulated device registered."""
    register()
    trace = Trace()
    accelerator = Accelerator(trace, Trace())
    with accelerator, simulated_autocast(), torch.autograd.set_multithreading_enabled(False):
        return Reference(row, accelerator).run()


if __name__ == "__main__":
    print(json.dumps(asdict(reproduce(Row.parse(json.loads(sys.argv[1]))))))
