"""How many tokens a KV cache holds; the fence around vLLM's non-public `get_kv_cache_capacity`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

REQUEST_TOKENS = 1024
"""Of a request for which the tokens are counted where it matters how long it is."""


def kv_capacity_tokens(vllm_config: VllmConfig, kv_cache: KVCacheConfig, block_tokens: int) -> int:
    """Tokens of requests that fit at a time.

    Layers of several kinds (full attention beside sliding windows, as in Gemma 3 and gpt-oss, or beside recurrent
    states) take blocks of their own from one pool: a token within the windows needs one of each, a later one fewer.
    This is then of decoding requests of REQUEST_TOKENS. vLLM's own figure is of requests as long as the context, and
    too high for usual ones.
    """
    tokens = (vllm_config.cache_config.num_gpu_blocks or 0) * block_tokens
    if len(kv_cache.kv_cache_groups) < 2:
        return tokens
    usual = copy.copy(vllm_config)
    usual.model_config, usual.scheduler_config = copy.copy(usual.model_config), copy.copy(usual.scheduler_config)
    usual.model_config.max_model_len = min(REQUEST_TOKENS, usual.model_config.max_model_len)
    usual.scheduler_config.max_num_batched_tokens = 1  # more of a window is held while a prompt is computed
    return min(tokens, int(get_kv_cache_capacity(usual, kv_cache)[0]))
