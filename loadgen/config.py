"""One measurement of a server, written down: what is sent, where to, and what counts as good."""

from __future__ import annotations

import sys
from itertools import takewhile
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scheduler.config_errors import UsageError, describe
from scheduler.tuning.slo import NO_SLO, Slo
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import SimRequest, open_workload

_AS_MANY_AS_COME = sys.maxsize


class BenchError(UsageError):
    """A measurement that cannot be made as asked; the message names the option, the value and what is allowed."""


class BenchConfig(BaseModel):
    """Everything that a measurement's load depends on.

    url: the server's, without /v1. model: the id to ask for; None: the first that the server lists. label: what
    `headrace report` calls the run; None: the model. duration_s: arrivals stop then; None: after `workload.requests`.
    warmup: the first so many requests are sent but not measured. timeout_s: a request without its last token so long
    after its arrival is given up. declare_lengths: requests declare their output lengths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    workload: WorkloadConfig
    slo: Slo = NO_SLO
    model: str | None = None
    label: str | None = None
    duration_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=0, ge=0)
    timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    declare_lengths: bool = False


def bench_config(*, workload: dict[str, Any], **options: Any) -> BenchConfig:
    """A configuration from the command's options; None is an option left out.

    Raises:
        BenchError: for a value out of range and for options that do not go together.
    """
    given = {name: value for name, value in workload.items() if value is not None}
    duration_s = options.get("duration_s")
    if duration_s is not None and "requests" in given:
        raise BenchError("--requests and --duration both say when to stop; give one of them")
    if duration_s is None and "requests" not in given and "trace" not in given:
        raise BenchError("neither --requests nor --duration is given; one of them must say when to stop")
    if duration_s is not None and given.get("arrivals") != "replay":
        given["requests"] = _AS_MANY_AS_COME
    try:
        return BenchConfig.model_validate(
            {"workload": given} | {name: value for name, value in options.items() if value is not None}
        )
    except ValidationError as error:
        raise BenchError(describe(error, BenchConfig)) from error


class OfferedLoad(NamedTuple):
    """The requests of one measurement, with the workload's name, its mean rate, and notes for the reader."""

    requests: list[SimRequest]
    name: str
    rate_rps: float
    notes: tuple[str, ...]


def draw_load(config: BenchConfig, max_model_len: int | None) -> OfferedLoad:
    """All requests, drawn before the first is sent. Requests longer than the model's context are left out and noted.

    Raises:
        BenchError: the trace cannot be read, or nothing is left to measure.
    """
    wanted = config.workload
    if max_model_len is not None:
        most = min(wanted.max_total_tokens or max_model_len, max_model_len)
        wanted = wanted.model_copy(update={"max_total_tokens": most})
    until_s = float("inf") if config.duration_s is None else config.duration_s
    try:
        workload = open_workload(wanted)
        requests = list(takewhile(lambda request: request.arrival_s < until_s, workload.requests()))
        rate_rps = wanted.rate_rps or workload.mix().rate_rps
    except OSError as error:
        raise BenchError(f"cannot read {wanted.trace}: {error.strerror or error}") from error
    except ValueError as error:
        raise BenchError(str(error)) from error
    if len(requests) <= config.warmup:
        raise BenchError(f"--warmup = {config.warmup}, but there are only {len(requests)} requests; none is measured")
    return OfferedLoad(requests, workload.name, rate_rps, workload.notes())
