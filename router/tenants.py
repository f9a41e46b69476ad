"""Tenants: weighted shares of the replicas, and how a request carries its tenant to the engine's scheduler."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from scheduler.settings import LARGEST_TENANT_WEIGHT, LONGEST_TENANT_NAME, TENANT, TENANT_WEIGHT


class TenantConfig(BaseModel):
    """One tenant. While several tenants have waiting requests, each is served in proportion to its weight.

    api_key_env: environment variable of the ingress with the tenant's key; no key is part of a configuration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=LONGEST_TENANT_NAME)]
    weight: Annotated[float, Field(gt=0, le=LARGEST_TENANT_WEIGHT, allow_inf_nan=False)] = 1.0
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def sign(body: Any, tenant: TenantConfig | None) -> None:
    """Put the tenant into `vllm_xargs`, overwriting anything the client sent."""
    if not hasattr(body, "vllm_xargs"):
        return  # embeddings and the like
    xargs = {key: value for key, value in (body.vllm_xargs or {}).items() if key not in (TENANT, TENANT_WEIGHT)}
    if tenant is not None:
        xargs |= {TENANT: tenant.name, TENANT_WEIGHT: tenant.weight}
    body.vllm_xargs = xargs or None
