"""Latency targets (SLO) and whether one request alone can meet them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from scheduler.model.iteration_time import IterationTimeModel, require_number

_Target = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets (SLO); None: no target.

    ttft_s: from a request's arrival to its first token. tpot_s: mean time per further token of a request.
    latency_s: from its arrival to its last token.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    ttft_s: _Target = None
    tpot_s: _Target = None
    latency_s: _Target = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "latency_s"):
            value = getattr(self, name)
            if value is not None:
                require_number(name, value, allow_zero=False)

    def delivered_within(self, delivery_s: float) -> Slo:
        """The targets for the engine when its tokens take `delivery_s` seconds to their clients."""
        ttft_s, latency_s = (
            None if target_s is None else target_s - delivery_s for target_s in (self.ttft_s, self.latency_s)
        )
        return Slo(ttft_s, self.tpot_s, latency_s)


NO_SLO = Slo()


class UnreachableTarget(ValueError):
    """A target below the time of one request alone; the message names it, its value and what is allowed."""


def is_reachable(targets: Slo, time_model: IterationTimeModel) -> bool:
    """Whether one request of one token, alone on a replica, meets every target."""
    try:
        require_reachable(targets, time_model)
    except UnreachableTarget:
        return False
    return True


def require_reachable(targets: Slo, time_model: IterationTimeModel) -> None:
    """Check that one request of one token, alone on a replica, meets every target.

    Raises:
        UnreachableTarget: it does not, so no request can.
    """
    first_s, next_s = time_model.iteration_s(1.0, 0.0, 1.0), time_model.iteration_s(0.0, 1.0, 1.0)
    for name, alone_s, what in (
        ("ttft_s", first_s, "the first token"), ("tpot_s", next_s, "a token"), ("latency_s", first_s, "an answer"),
    ):
        target_s = getattr(targets, name)
        if target_s is not None and target_s < alone_s:
            raise UnreachableTarget(
                f"targets.{name} = {target_s:g} is below the {alone_s:.4g} s that {what} takes one request alone; "
                f"allowed: at least that"
            )
