"""The policies that can be simulated, by name: vLLM's own, the paper's and other projects' baselines, Headrace's.

A baseline is a scheduler class with the engine settings it needs; Headrace's own policies all run the
`HeadraceScheduler` of serving, under different thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simulator.scenario.admission_baselines import AdmissionRule, dynamo_busy, llm_d_utilisation, queued_tokens

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

DEFAULT_TOKEN_BUDGET = 2048


@dataclass(frozen=True, slots=True)
class Baseline:
    """scheduler: where its class is, "module:Class". policy: the policy our scheduler runs, None for others.

    token_budget: tokens an iteration unless the user says otherwise; engine_args: vLLM settings it cannot do without.
    declares: its clients declare output lengths. rule: the admission rule before the engine. about: one line of text.
    """

    about: str
    scheduler: str
    policy: str | None = None
    token_budget: int = DEFAULT_TOKEN_BUDGET
    engine_args: dict[str, Any] = field(default_factory=dict)
    declares: bool = False
    rule: AdmissionRule | None = None

    def scheduler_class(self) -> type[Scheduler]:
        """The class itself; importing it imports vLLM."""
        from importlib import import_module

        module, _, name = self.scheduler.partition(":")
        loaded: type[Scheduler] = getattr(import_module(module), name)
        return loaded


_VLLM = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
_OURS = "scheduler.vllm_scheduler:HeadraceScheduler"

BASELINES: dict[str, Baseline] = {
    "vllm": Baseline("vLLM V1 as it comes: first come first served, chunked prefill", _VLLM),
    "vllm-v0": Baseline(
        "whole prompts first, decodes only when none can enter, 1 % of memory kept free (vLLM V0)",
        "simulator.engine.vllm_v0:VllmV0Scheduler", token_budget=4096,
        engine_args={"enable_chunked_prefill": False, "watermark": 0.01},
    ),
    "vllm-watermark": Baseline("V1 with 5 % of memory kept free", _VLLM, engine_args={"watermark": 0.05}),
    "vllm-queue": Baseline("V1 with max_num_queued_tokens = target TTFT × prefill rate", _VLLM, rule=queued_tokens),
    "llm-d": Baseline("V1 behind llm-d's utilisation rule (queue 5, KV 0.8)", _VLLM, rule=llm_d_utilisation),
    "dynamo": Baseline("V1 behind Dynamo's busy thresholds (KV 0.85, prefill 10 000)", _VLLM, rule=dynamo_busy),
    "sarathi": Baseline("chunked prefill with 512 tokens an iteration (Sarathi)", _VLLM, token_budget=512),
    "fcfs": Baseline("Headrace's scheduler in vLLM's order, with an optional cap", _OURS, policy="fcfs"),
    "wait": Baseline("WAIT with solved thresholds; clients declare lengths", _OURS, policy="wait", declares=True),
    "fluid": Baseline("as many requests within the targets as the hardware allows", _OURS, policy="fluid"),
    "wait-cp": Baseline("what WAIT's authors ran: caps on segments, chunks, a token gate", _OURS, policy="wait_cp"),
    "nested-wait": Baseline("Nested WAIT with solved thresholds; lengths unknown", _OURS, policy="nested_wait"),
}
