"""Cached prompt tokens of waiting requests, looked up in vLLM's block manager and remembered for a few iterations.

Part of the fence around vLLM's non-public surface (`KVCacheManager.get_computed_blocks`, `get_blocks`,
`KVCacheBlock.ref_cnt`):
`tests/scheduler/test_vllm_seam.py` fails when an upgrade moves it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request

_ASK_AGAIN = 16
"""Iterations until a prompt is looked up again: the cache changes, but a lookup walks all blocks of a prompt."""


class PrefixHits:
    """Cached prompt tokens of waiting requests, and the ones of them in blocks that other requests hold.

    A cached block that no request holds may be evicted, so a request that reuses it adds memory.
    """

    def __init__(self, kv_cache_manager: Any, block_tokens: int, enabled: bool | None) -> None:
        self._manager, self._block_tokens, self._enabled = kv_cache_manager, block_tokens, bool(enabled)
        self._step = 0
        self._known: dict[str, tuple[int, int, int]] = {}

    def step(self) -> None:
        """Another iteration is scheduled."""
        self._step += 1

    def of(self, request: Request) -> tuple[int, int]:
        """(cached, shared) prompt tokens of a request that has not been computed yet."""
        if not self._enabled:
            return 0, 0
        known = self._known.get(request.request_id)
        if known is not None and self._step - known[0] < _ASK_AGAIN:
            return known[1], known[2]
        blocks, found, _ = self._manager.get_computed_blocks(request)
        cached = min(found, request.num_prompt_tokens)  # a preempted request's output may be cached too
        held = sum(1 for block in blocks.blocks[0] if block.ref_cnt > 0) if cached else 0
        self._known[request.request_id] = (self._step, cached, min(held * self._block_tokens, cached))
        return cached, min(held * self._block_tokens, cached)

    def shared_now(self, request_id: str, cached_tokens: int) -> int:
        """The cached tokens of a request that has just started, as far as they are in blocks that others hold too."""
        if not self._enabled or not cached_tokens:
            return 0
        self._known.pop(request_id, None)
        blocks = self._manager.get_blocks(request_id).blocks[0][: cached_tokens // self._block_tokens]
        return sum(1 for block in blocks if block.ref_cnt > 1) * self._block_tokens

    def forget(self, request_id: str) -> None:
        """A request has left."""
        self._known.pop(request_id, None)
