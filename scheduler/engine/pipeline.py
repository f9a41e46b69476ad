"""Pipeline parallelism as vLLM schedules it: the running requests that the next iteration advances.

Each call of `schedule()` composes one batch, which passes all stages in turn; meanwhile the engine core composes
further batches (`VllmConfig.max_concurrent_batches`), one per stage. A request with a token under way is not in them:
it advances once in `depth` iterations, and the running requests form `depth` groups that take turns.

Part of the fence around vLLM's non-public surface: `tests/scheduler/test_vllm_seam.py` fails when an upgrade moves it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request


def pipeline_depth(vllm_config: Any) -> int:
    """Iterations from one step of a request to the next.

    With asynchronous scheduling vLLM's V1 model runner puts every running request into every batch, and the first stage
    waits for the last one's token: an iteration then passes all stages, and the depth is 1.
    """
    stages: int = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1 and vllm_config.scheduler_config.async_scheduling and not vllm_config.use_v2_model_runner:
        return 1
    return stages


def coming(running: list[Request], step: int) -> list[Request]:
    """The requests that iteration number `step` advances: the ones without a token under way."""
    return [
        request for request in running
        if step >= request.next_decode_eligible_step
        and request.num_computed_tokens < request.num_tokens + request.num_output_placeholders
    ]


def has_more_than_its_share(advancing: list[Request], running: list[Request], depth: int) -> bool:
    """Whether the next iteration decodes for more requests than the average one."""
    decoding = sum([not request.is_prefill_chunk for request in running])
    return sum([not request.is_prefill_chunk for request in advancing]) * depth > decoding
