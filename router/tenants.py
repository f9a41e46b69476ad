"""Tenants: weighted shares of the replicas, and how a request carries its tenant to the engine's scheduler."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scheduler.settings import LARGEST_TENANT_WEIGHT, LONGEST_TENANT_NAME, TENANT, TENANT_WEIGHT, TURNED_AWAY

_OURS = (TENANT, TENANT_WEIGHT, TURNED_AWAY)


class TenantConfig(BaseModel):
    """One tenant. While several tenants have waiting requests, each is served in proportion to its weight.

    name: of the tenant, in metrics and status. weight: its share, against the others' weights.
    api_key_env: environment variable with the tenant's key; api_key_file: or a file with it, re-read while it serves.
    One of the two; no key is part of a configuration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=LONGEST_TENANT_NAME)]
    weight: Annotated[float, Field(gt=0, le=LARGEST_TENANT_WEIGHT, allow_inf_nan=False)] = 1.0
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    api_key_file: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if (self.api_key_env is None) == (self.api_key_file is None):
            raise ValueError("give api_key_env or api_key_file: one of them names where the tenant's key is")
        return self


def is_signed(body: Any) -> bool:
    """Whether the engine's scheduler reads what `sign` writes; embeddings and the like have no place for it."""
    return hasattr(body, "vllm_xargs")


def sign(body: Any, tenant: TenantConfig | None, turned_away: int = 0) -> None:
    """Put the tenant, and how many requests the ingress rejected before each of the engine's requests that this one
    becomes, into `vllm_xargs`, overwriting anything the client sent."""
    if not is_signed(body):
        return
    xargs = {key: value for key, value in (body.vllm_xargs or {}).items() if key not in _OURS}
    if turned_away:
        xargs[TURNED_AWAY] = turned_away
    if tenant is not None:
        xargs |= {TENANT: tenant.name, TENANT_WEIGHT: tenant.weight}
    body.vllm_xargs = xargs or None
