"""`Limits`: what one request and one key may ask for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Limits(BaseModel):
    """The limits of one model. Each has a default that a well-meant request does not reach."""

    model_config = ConfigDict(extra="forbid", frozen=True)
