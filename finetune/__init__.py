"""LoRA and full finetuning of video diffusion transformers in plain PyTorch."""

__version__ = "0.1.0"
