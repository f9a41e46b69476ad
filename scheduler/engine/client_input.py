"""The fields of a request beside its prompt: the declared output length and the tenant.

They come from outside (OpenAI's `vllm_xargs`, vLLM's `SamplingParams.extra_args`) and are read in the engine's loop,
where an exception ends the engine: an invalid value counts as not given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scheduler.engine.fair_queue import DEFAULT_TENANT, Tenant
from scheduler.settings import (
    EXPECTED_OUTPUT_TOKENS,
    LARGEST_TENANT_WEIGHT,
    LONGEST_TENANT_NAME,
    TENANT,
    TENANT_WEIGHT,
    TURNED_AWAY,
)

_MOST_TURNED_AWAY = 1_000_000

if TYPE_CHECKING:
    from vllm.v1.request import Request


def declared_output_tokens(request: Request) -> int | None:
    """The declared output length in tokens; None if there is none."""
    declared = _number(_extra_args(request).get(EXPECTED_OUTPUT_TOKENS))
    return int(declared) if declared is not None and declared >= 1 else None


def declared_lengths(request: Request, longest: int) -> tuple[int | None, int | None]:
    """The expected output length and the limit max_tokens, if below a context of `longest` tokens; None: not declared.
    """
    params = request.sampling_params
    if params is None:
        return None, None
    declared = declared_output_tokens(request)
    most: int = params.max_tokens
    bound = most if most < longest - request.num_prompt_tokens else None
    return (None if declared is None else min(declared, most)), bound


def turned_away(request: Request) -> int:
    """Requests that the ingress has rejected before this one; meaningful only behind an ingress."""
    count = _extra_args(request).get(TURNED_AWAY)
    return count if type(count) is int and 0 < count < _MOST_TURNED_AWAY else 0


def tenant_of(request: Request) -> Tenant:
    """The tenant that the ingress wrote into a request; meaningful only behind an ingress."""
    extra = _extra_args(request)
    name, weight = extra.get(TENANT), _number(extra.get(TENANT_WEIGHT, 1.0))
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_TENANT_NAME:
        return DEFAULT_TENANT
    if weight is None or not 0 < weight <= LARGEST_TENANT_WEIGHT:
        return DEFAULT_TENANT
    return Tenant(name, float(weight))


def _extra_args(request: Request) -> Mapping[str, Any]:
    extra = request.sampling_params.extra_args if request.sampling_params is not None else None
    return extra if isinstance(extra, dict) else {}


def _number(value: object) -> int | float | None:
    """A finite number, or None; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None
