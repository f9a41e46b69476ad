"""What a workload is made from: its options, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from simulator.workload.arrivals import parse_arrivals
from simulator.workload.lengths import parse_lengths
from simulator.workload.sessions import are_sessions, parse_sessions
from simulator.workload.traces import TraceFormat


class WorkloadConfig(BaseModel):
    """What to run.

    Either `lengths` (see `simulator.workload.lengths.parse_lengths`, and `simulator.workload.sessions.parse_sessions`
    for conversations) or `trace` (see `simulator.workload.traces.open_trace`).
    `arrivals` is a process (see `simulator.workload.arrivals.parse_arrivals`) of mean rate `rate_rps`, or "replay" for
    the trace's own times, which `rate_rps` then stretches to that mean rate. `requests` None is the whole trace.
    Requests of more than `max_total_tokens` (prompt + output; no replica could run them), with prompts of more than
    `max_prompt_tokens` and of less than `min_output_tokens` are left out before anything else, so they do not lower the
    rate of a process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: str | None = None
    trace: Path | None = None
    trace_format: TraceFormat = "auto"
    tokenizer: Path | None = None
    arrivals: str = "poisson"
    rate_rps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    requests: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    max_total_tokens: Annotated[int, Field(ge=2)] | None = None
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    min_output_tokens: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.lengths is None) == (self.trace is None):
            raise ValueError(f"lengths is {self.lengths!r} and trace is {self.trace!r}; give exactly one of them")
        if self.lengths is not None and self.requests is None:
            raise ValueError("requests is None; with lengths it must say how many")
        if self.lengths is not None and self.replays:
            raise ValueError("arrivals is 'replay'; that needs a trace")
        if self.rate_rps is None and not self.replays:
            raise ValueError("rate_rps is None; only arrivals 'replay' has a rate of its own")
        return self

    @field_validator("lengths")
    @classmethod
    def _lengths_are_known(cls, lengths: str | None) -> str | None:
        if lengths is not None:
            _ = parse_sessions(lengths) if are_sessions(lengths) else parse_lengths(lengths)
        return lengths

    @field_validator("arrivals")
    @classmethod
    def _arrivals_are_known(cls, arrivals: str) -> str:
        if arrivals != "replay":
            parse_arrivals(arrivals)
        return arrivals

    @property
    def replays(self) -> bool:
        """Whether requests arrive when the trace says."""
        return self.arrivals == "replay"
