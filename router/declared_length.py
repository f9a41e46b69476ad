"""Moves a declared output length from the request body to `vllm_xargs`, where the scheduler reads it."""

from __future__ import annotations

from typing import Any

from router.errors import bad_request
from scheduler.settings import EXPECTED_OUTPUT_TOKENS


def move_declared_length(body: Any) -> None:
    """Move `expected_output_tokens` (OpenAI `extra_body`) into `vllm_xargs`, which vLLM hands to its scheduler.

    Raises:
        an HTTP 400 in OpenAI's form, when it is not a whole number of tokens >= 1.
    """
    if not hasattr(body, "vllm_xargs"):
        return  # embeddings and the like: nothing is generated
    xargs = body.vllm_xargs or {}
    extra = body.model_extra or {}
    if EXPECTED_OUTPUT_TOKENS not in extra and EXPECTED_OUTPUT_TOKENS not in xargs:
        return
    declared = extra.get(EXPECTED_OUTPUT_TOKENS, xargs.get(EXPECTED_OUTPUT_TOKENS))
    if isinstance(declared, bool) or not isinstance(declared, int) or declared < 1:
        raise bad_request(
            f"{EXPECTED_OUTPUT_TOKENS} = {declared!r} is not allowed; allowed: a whole number of tokens >= 1"
        )
    body.vllm_xargs = xargs | {EXPECTED_OUTPUT_TOKENS: declared}
