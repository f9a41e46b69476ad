"""Every known model_type against transformers: the parameters that it builds, on torch's meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scheduler.model.language_model import known_model_types, language_model

SMALL = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 512, "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {
    "num_key_value_heads": 8, "n_routed_experts": 8, "first_k_dense_replace": 1, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 256, "decoder_sparse_step": 2},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "mlp_only_layers": [1]},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v2": EXPERTS | LATENT | {"n_shared_experts": 2, "q_lora_rank": None},
    "deepseek_v3": EXPERTS | LATENT | {"n_shared_experts": 1, "q_lora_rank": 96, "n_group": 2, "topk_group": 1},
    "gpt_neox": {"num_key_value_heads": 8},
}
ALONE = {
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 8, "vocab_size": 1000, "n_positions": 512},
    "opt": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_dim": 512, "vocab_size": 1000,
        "max_position_embeddings": 512, "word_embed_proj_dim": 256,
    },
}
NOT_IN_TRANSFORMERS = {"kimi_k2"}  # DeepSeek-V3's shape; its code comes with its weights


@pytest.mark.parametrize("model_type", sorted(set(known_model_types()) - NOT_IN_TRANSFORMERS))
def test_parameters_are_those_that_transformers_builds(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **ALONE.get(model_type) or SMALL | OWN.get(model_type, {}))
    with torch.device("meta"):
        built = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
    # As the engine has it, and as a config.json leaves it: without what the class has by default.
    for given in (config.to_dict(), config.to_diff_dict() | {"model_type": model_type}):
        counted = language_model(given).parameters
        assert 0.994 * built < counted <= built, "biases and norms are the rest, in so small a model up to 0.6 %"
