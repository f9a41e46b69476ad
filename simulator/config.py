"""The configuration of one simulation: workload, hardware, policy and targets."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from scheduler.config_errors import UsageError, describe, did_you_mean, parse_settings
from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.model.profiles import load_profile
from scheduler.tuning.slo import NO_SLO, Slo
from simulator.scenario.autoscalers import FLUID, parse_autoscaler
from simulator.scenario.baselines import BASELINES
from simulator.scenario.routers import ROUTERS, parse_speeds
from simulator.scenario.slowdown import parse_slowdown
from simulator.scenario.speculation import Speculation
from simulator.workload.clients import Retries
from simulator.workload.config import WorkloadConfig

_SOLVED_POLICIES = ("wait", "nested_wait", "wait_cp", "fluid")
_ROUTERS_OF_CHANGING = ("fluid", "power-of-two", "least-requests")
_SOLVED_FIELDS = frozenset(("types", "segments", "max_running", "fluid"))


class SimulationError(UsageError):
    """A simulation that cannot be run as asked; the message names the option, the value and what is allowed."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SimulationConfig(_Strict):
    """Everything that a result depends on.

    workload: what arrives. policy: a policy, or a baseline to compare with. profile: the iteration-time model and KV
    capacity. kv_tokens: KV capacity in place of the profile's. token_budget: vLLM's max_num_batched_tokens; None: the
    baseline's own, 2 048 for most. cap: most running requests. max_num_seqs: slots, the engine's own limit.
    max_model_len: most tokens of prompt and output together. block_tokens: size of a block of the KV cache.
    async_scheduling: an iteration is scheduled while the one before it runs, as by vLLM on GPUs. pipeline_parallel:
    vLLM's pipeline_parallel_size, stages that share the profile's model in equal parts. prefix_caching: vLLM's
    enable_prefix_caching. speculative_tokens: drafts that each decoding request has in every iteration.
    acceptance_rate: the chance of each draft to be accepted. replicas: behind the request router. router: the rule by
    which it chooses one, `fluid` as in serving or another project's. ingresses: how many of them route, each for
    itself. stats_age_s: oldest report of a replica that they go by. speeds: of the replicas, relative to the profile,
    such as `1,1,1,0.5`; over and over until each has one. declare_lengths: clients declare output lengths; None: where
    the policy needs it. give_up_s: a client leaves after so long without a first token. overflow_probability: accepted
    probability that memory overflows or that a request misses its TPOT target. period_s: seconds between two control
    cycles, which solve thresholds from telemetry. solve_once: no controller; thresholds are solved once, from the
    workload itself. law_error: mean relative error of iteration times that thresholds solved once allow for. counts:
    WAIT's and Nested WAIT's are solved for the load, or follow from `cap` alone as in the paper's experiments.
    thresholds: fields of `Thresholds` that replace these; in `--set` and in sweeps by their own names. slo: the latency
    targets. window: fractions of the arrival order between which requests are measured. slowdown: when the first
    replica is slow, as `at=60,until=180,factor=2` in virtual seconds. iteration_noise: relative standard deviation of
    iteration times around the model's (lognormal, of mean 1). until_decided: end the run once no measured request under
    way can meet the targets; latencies of unfinished requests are then not known. retries: how clients retry after a
    rejection; None: they do not. audit: number of further runs that measure whether rejections were right.
    autoscale: the rule by which the number of replicas changes, from `replicas` on; None: it does not. start_up_s:
    seconds until a replica that is started serves. min_replicas: fewest that a rule may have. max_replicas: most that a
    rule may have.
    """

    workload: WorkloadConfig
    policy: str = "vllm"
    profile: str = "a100-llama2-7b"
    kv_tokens: int | None = Field(default=None, ge=1)
    token_budget: int | None = Field(default=None, ge=1)
    cap: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=512, ge=1)
    max_model_len: int = Field(default=4096, ge=2)
    block_tokens: int = Field(default=16, ge=1)
    async_scheduling: bool = True
    pipeline_parallel: int = Field(default=1, ge=1, le=64)
    prefix_caching: bool = True
    speculative_tokens: int | None = Field(default=None, ge=1, le=64)
    acceptance_rate: float | None = Field(default=None, ge=0, le=1)
    replicas: int = Field(default=1, ge=1, le=1024)
    router: str = "fluid"
    ingresses: int = Field(default=1, ge=1, le=1024)
    stats_age_s: float = Field(default=1.0, gt=0, le=60)
    speeds: str = "1"
    declare_lengths: bool | None = None
    give_up_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    overflow_probability: float = Field(default=ACCEPTED_MISSES, gt=0, le=0.5)
    period_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    solve_once: bool = False
    law_error: float = Field(default=0.0, ge=0, le=10)
    counts: Literal["solved", "by_cap"] = "solved"
    thresholds: dict[str, Any] = Field(default_factory=dict)
    slo: Slo = NO_SLO
    window: tuple[float, float] = (0.3, 0.9)
    slowdown: str | None = None
    iteration_noise: float = Field(default=0.0, ge=0, le=2)
    until_decided: bool = False
    retries: Retries | None = None
    audit: int = Field(default=0, ge=0)
    autoscale: str | None = None
    start_up_s: float = Field(default=60.0, ge=0, le=7200)
    min_replicas: int = Field(default=1, ge=0, le=1024)
    max_replicas: int = Field(default=16, ge=1, le=1024)

    @property
    def controlled(self) -> bool:
        """Whether the shipped controller runs, as it does in serving.

        It does for a policy with solved thresholds, unless `solve_once` says otherwise or any of what it would
        solve is given: types, segments, fluid parameters, a cap (as `cap` or as max_running), or counts by the cap.
        """
        solves = BASELINES[self.policy].policy in _SOLVED_POLICIES
        given = self.cap is not None or self.counts == "by_cap" or not _SOLVED_FIELDS.isdisjoint(self.thresholds)
        return solves and not self.solve_once and not given

    @property
    def declares(self) -> bool:
        """Whether clients declare output lengths."""
        return BASELINES[self.policy].declares if self.declare_lengths is None else self.declare_lengths

    @property
    def speculation(self) -> Speculation | None:
        """A drafter of its own for each replica; None without speculative decoding."""
        if self.speculative_tokens is None or self.acceptance_rate is None:
            return None
        return Speculation(self.speculative_tokens, self.acceptance_rate, self.workload.seed)

    @field_validator("policy")
    @classmethod
    def _policy_exists(cls, name: str) -> str:
        if name not in BASELINES:
            raise ValueError(f"policy {name!r} is not known; the policies are {', '.join(BASELINES)}")
        return name

    @field_validator("router")
    @classmethod
    def _router_exists(cls, name: str) -> str:
        if name not in ROUTERS:
            raise ValueError(f"router {name!r} is not known; the routers are {', '.join(ROUTERS)}")
        return name

    @field_validator("profile")
    @classmethod
    def _profile_exists(cls, name: str) -> str:
        load_profile(name)
        return name

    @field_validator("autoscale")
    @classmethod
    def _rule_is_one(cls, autoscale: str | None) -> str | None:
        if autoscale is not None:
            parse_autoscaler(autoscale)
        return autoscale

    @model_validator(mode="after")
    def _number_can_change(self) -> Self:
        if self.autoscale is None:
            return self
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}; allowed: at most max_replicas, {self.max_replicas}")
        if parse_autoscaler(self.autoscale)[0] == FLUID and not (self.policy == "fluid" and self.controlled):
            raise ValueError(f"autoscale is {self.autoscale}; it needs the policy fluid and its controller")
        if self.router not in _ROUTERS_OF_CHANGING:
            allowed = ", ".join(_ROUTERS_OF_CHANGING)
            raise ValueError(f"router is {self.router}; with autoscale it may be {allowed}")
        return self

    @field_validator("slowdown")
    @classmethod
    def _slowdown_is_one(cls, slowdown: str | None) -> str | None:
        if slowdown is not None:
            parse_slowdown(slowdown)
        return slowdown

    @model_validator(mode="after")
    def _speeds_are_some(self) -> Self:
        parse_speeds(self.speeds, self.replicas)
        return self

    @model_validator(mode="after")
    def _decisions_come(self) -> Self:
        targets = self.slo
        if self.until_decided and targets.latency_s is None and (targets.ttft_s is None or targets.tpot_s is None):
            raise ValueError("until_decided needs slo_ttft_s and slo_tpot_s, or slo_latency_s to end the run")
        if self.audit and targets == NO_SLO:
            raise ValueError("audit needs slo_ttft_s, slo_tpot_s or slo_latency_s; none is given")
        return self

    @model_validator(mode="after")
    def _drafts_are_accepted(self) -> Self:
        if (self.speculative_tokens is None) != (self.acceptance_rate is None):
            raise ValueError("speculative_tokens and acceptance_rate go together; give both, or neither")
        if self.speculative_tokens and self.thresholds.get("mode") == "strict":
            raise ValueError("mode is strict, which counts one token an iteration; leave speculative_tokens out")
        return self

    @model_validator(mode="after")
    def _limits_are_read(self) -> Self:
        if BASELINES[self.policy].policy is not None:
            return self
        unread = sorted(self.thresholds) + (["counts"] if self.counts == "by_cap" else [])
        if unread:
            raise ValueError(
                f"policy {self.policy} is vLLM's own scheduler, which has no {', '.join(unread)}; it has max_num_seqs, "
                "token_budget and cap, the most requests that run"
            )
        return self

    @field_validator("window")
    @classmethod
    def _window_is_one(cls, window: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= window[0] < window[1] <= 1:
            raise ValueError(f"window is {window}; it must be two fractions, 0 <= from < to <= 1")
        return window


_THRESHOLD_FIELDS = (
    "mode", "types", "segments", "max_hold_s", "max_running", "fluid", "prefill_chunk_tokens", "wait_gate",
)
_PARTS = ("workload", "slo")
_SLO_FIELDS = tuple(field.name for field in fields(Slo))


def simulation_config(options: dict[str, Any]) -> SimulationConfig:
    """A configuration from flat options, the names of `headrace simulate` and of a sweep file.

    An option is a field of `SimulationConfig`, of its workload (`lengths`, `rate_rps`, …), a target (`slo_ttft_s`, …)
    or of the thresholds (`mode`, `max_hold_s`, …).

    Raises:
        SimulationError: for a name that does not exist and for a value out of range.
    """
    data: dict[str, Any] = {"workload": {}, "slo": {}, "thresholds": {}}
    for name, value in options.items():
        if name in data:  # `slo: {ttft_s: 1}`, as a sweep writes slo.ttft_s
            if not isinstance(value, dict):
                raise SimulationError(f"{name} = {value!r}: it must be a mapping")
            data[name] |= value
            continue
        holder, key = _place_of(name)
        (data[holder] if holder else data)[key] = value
    try:
        return SimulationConfig(**data)
    except ValidationError as error:
        raise SimulationError(describe(error, SimulationConfig)) from error


def options_from(settings: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as options.

    Raises:
        SimulationError: for a text without `=` and for a value that is no YAML.
    """
    try:
        return parse_settings(settings)
    except ValueError as error:
        raise SimulationError(str(error)) from error


def _place_of(name: str) -> tuple[str, str]:
    plain = name.removeprefix("workload.").removeprefix("thresholds.")
    if plain in _THRESHOLD_FIELDS:
        return "thresholds", plain
    if plain in WorkloadConfig.model_fields:
        return "workload", plain
    target = plain.removeprefix("slo_").removeprefix("slo.")
    if target != plain and target in _SLO_FIELDS:
        return "slo", target
    if plain in SimulationConfig.model_fields and plain not in _PARTS:
        return "", plain
    known = [
        *(field for field in SimulationConfig.model_fields if field not in _PARTS), *WorkloadConfig.model_fields,
        *(f"slo_{field}" for field in _SLO_FIELDS), *_THRESHOLD_FIELDS,
    ]
    hint = did_you_mean(plain, known) or f"; the options are {', '.join(known)}"
    raise SimulationError(f"no option {name!r}{hint}")
