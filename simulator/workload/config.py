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
    """What arrives: either `lengths` or `trace`.

    lengths: such as p512d20, or sessions:… for conversations. trace: a file. trace_format: of the file; auto: by its
    name and columns. tokenizer: a folder, to count the tokens of a trace of texts; None: estimated.
    arrivals: a process, or "replay" for the trace's own times. rate_rps: the process's mean rate; a replay is stretched
    to it. requests: how many; None: the whole trace. seed: of lengths and arrivals.
    max_total_tokens: requests of more (prompt and output) are left out. max_prompt_tokens: requests with longer prompts
    are left out. min_output_tokens: requests with shorter outputs are left out; all three before anything else, so that
    they do not lower a process's rate.
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
