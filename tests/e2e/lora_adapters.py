"""LoRA adapters for a checkpoint of the Llama architecture, with random weights, as `peft` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8


def write_adapter(folder: Path, checkpoint: Path, *, seed: int, size: float = 0.3) -> None:
    """An adapter of rank 8 on every layer's query projection. size: standard deviation of its weights."""
    model = json.loads((checkpoint / "config.json").read_text())
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = size * torch.randn(RANK, width, generator=generator)
        weights[f"{name}.lora_B.weight"] = size * torch.randn(width, RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(checkpoint), "bias": "none",
        "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
