"""What one request, and one API key, may ask for. No HTTP and no Ray.

The defaults stop what can only be a mistake or an attack; rates are unlimited unless set. Each ingress replica counts
for itself and allows an equal share of a key's limits, so that together they allow what is configured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from router.auth import ANONYMOUS, OPERATOR
from scheduler.config_errors import did_you_mean

MIB = 1024 * 1024
MAX_WAIT_S = 600.0
"""How long a request may wait for its first token unless its model's settings say otherwise."""
_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class KeyLimits(BaseModel):
    """Of one key; None: no limit. Below `keys`, what is left out is as for all keys.

    concurrent_requests: requests under way at once. requests_per_minute: requests, of which a whole minute's may come
    at once.
    tokens_per_minute: prompt and output tokens, counted when a request comes: token ids as they are, text by its length
    (four bytes a token), and `max_tokens` for each choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrent_requests: _Count | None = 1024
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None


class Limits(KeyLimits):
    """Of each request, and of each key: every tenant, the operator, and all requests without a key together.

    Of these, choices and max_tokens, prompt_tokens and front_door may differ by model; the others are for all.

    choices: most answers to one request, `n` times the number of prompts. max_tokens: most output tokens of a choice,
    also where a request states none.
    prompt_tokens: most tokens of prompts given as token ids (text is bounded by body_bytes, and by the engine's
    max_model_len). body_bytes: largest body, as received. header_bytes: largest headers, as received.
    json_depth: most nested objects and arrays. body_s: longest time for the whole body; chunk_s: longest time between
    two pieces of it.
    keys: other limits for a tenant by its name, for "operator" or for "anonymous".
    cors_origins: web origins whose pages may call /v1 from a browser; never /admin.
    front_door: reject in the ingress while the queues of all replicas are full.
    """

    choices: _Count = 16
    max_tokens: _Count | None = None
    prompt_tokens: _Count | None = None
    body_bytes: _Count = 8 * MIB
    header_bytes: _Count = 32 * 1024
    json_depth: Annotated[int, Field(ge=1, le=190)] = 64
    body_s: _Seconds = 60.0
    chunk_s: _Seconds = 10.0
    keys: Mapping[str, KeyLimits] = Field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()
    front_door: bool = True

    def of_key(self, holder: str) -> KeyLimits:
        """The limits of one key, by its holder's name: its own, and the general ones where it has none."""
        own = self.keys.get(holder)
        if own is None:
            return self
        return own.model_copy(
            update={name: getattr(self, name) for name in KeyLimits.model_fields.keys() - own.model_fields_set}
        )

    def wrong_holders(self, tenants: Iterable[str]) -> dict[str, str]:
        """Names in `keys` that no key has, and what is wrong with each. tenants: the names of all."""
        known = [*tenants, OPERATOR, ANONYMOUS]
        return {
            name: f"no tenant has this name; allowed here: {', '.join(known)}{did_you_mean(name, known)}"
            for name in self.keys if name not in known
        }

    @field_serializer("keys")
    def _only_what_is_given(self, keys: Mapping[str, KeyLimits]) -> dict[str, Any]:
        """Also where it is a default, which is not the general limit."""
        return {name: limits.model_dump(exclude_unset=True) for name, limits in keys.items()}


FOR_ALL = Limits.model_fields.keys() - {"choices", "max_tokens", "prompt_tokens", "front_door"}
"""Limits that no model has of its own: they are checked before the model is known, or counted for a key."""
DEFAULT_LIMITS = Limits()
NO_OTHERS: Mapping[str, Limits] = {}
