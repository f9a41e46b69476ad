"""Cached prompt tokens of waiting requests, looked up in vLLM's block manager and remembered for a few iterations.

Part of the fence around vLLM's non-public surface (`KVCacheManager.get_computed_blocks`, `get_blocks`,
`kv_cache_config`, `BlockPool.get_cached_block`, `KVCacheBlock.ref_cnt`, `Request.block_hashes`):
`tests/scheduler/test_vllm_seam.py` fails when an upgrade moves it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.v1.request import Request

_ASK_AGAIN, _WALK_AGAIN = 16, 64
"""Iterations until it is asked again whether a prompt's last cached block still is the last one, and until all of its
blocks are walked again, which takes long for a long prompt."""


class _Known(NamedTuple):
    """What was found in which iteration, and in which one all blocks were walked."""

    asked: int
    walked: int
    cached: int
    shared: int


class PrefixHits:
    """Cached prompt tokens of waiting requests, and the ones of them in blocks that other requests hold.

    A cached block that no request holds may be evicted, so a request that reuses it adds memory.
    """

    def __init__(self, kv_cache_manager: Any, block_tokens: int, enabled: bool | None) -> None:
        self._manager, self._block_tokens, self._enabled = kv_cache_manager, block_tokens, bool(enabled)
        self._step = 0
        self._known: dict[str, _Known] = {}
        self._one_group = self._enabled and len(kv_cache_manager.kv_cache_config.kv_cache_groups) == 1

    def step(self) -> None:
        """Another iteration is scheduled."""
        self._step += 1

    def of(self, request: Request) -> tuple[int, int]:
        """(cached, shared) prompt tokens of a request that has not been computed yet."""
        if not self._enabled:
            return 0, 0
        known = self._known.get(request.request_id)
        if known is None or self._step - known.asked >= _ASK_AGAIN:
            if known and self._step - known.walked < _WALK_AGAIN and self._is_last(request, known.cached):
                known = _Known(self._step, known.walked, known.cached, known.shared)
            else:
                known = self._walked(request)
            self._known[request.request_id] = known
        return known.cached, known.shared

    def _walked(self, request: Request) -> _Known:
        blocks, found, _ = self._manager.get_computed_blocks(request)
        cached = min(found, request.num_prompt_tokens)  # a preempted request's output may be cached too
        held = sum(1 for block in blocks.blocks[0] if block.ref_cnt > 0) if cached else 0
        return _Known(self._step, self._step, cached, min(held * self._block_tokens, cached))

    def _is_last(self, request: Request, cached_tokens: int) -> bool:
        """Whether the block that ends at `cached_tokens` is still cached and the next one still is not.

        A prompt's blocks are evicted from its end, so that those before are there too. With several kinds of layers
        a hit depends on more than that.
        """
        if not self._one_group:
            return False
        next_block, hashes = cached_tokens // self._block_tokens, request.block_hashes
        return (not next_block or self._is_cached(hashes[next_block - 1])) and (
            next_block >= len(hashes) or not self._is_cached(hashes[next_block])
        )

    def _is_cached(self, block_hash: Any) -> bool:
        return self._manager.block_pool.get_cached_block(block_hash, [0]) is not None

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
