"""Greedy answers with n-gram speculation, by vLLM's own scheduler and by ours: python speculating_vllm.py MODEL RESULT.

One engine after the other in this process, so that the scheduler is within reach. The result, as JSON: the answers of
both, decoding requests that an iteration of ours left out, and what a controller makes of our telemetry.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams

from scheduler.messages import Report
from scheduler.model.profiles import load_profile
from scheduler.thresholds import Thresholds
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo

PROFILE, TTFT_S, TPOT_S = "cpu-smollm2", 120.0, 10.0
"""Targets that no machine misses: what is looked at is which tokens come, not when."""
SETTINGS = {
    "profile": PROFILE, "targets": {"ttft_s": TTFT_S, "tpot_s": TPOT_S}, "thresholds": {"policy": "fluid"},
    "controller": None,
}
PROMPTS = (
    "Repeat this line exactly, many times: the quick brown fox jumps over the lazy dog, and again it jumps.",
    "Say hello, hello, hello, hello, hello, hello and never stop saying hello.",
    "What is the capital of France?",
    "Copy: A B C D E F G. A B C D E F G. A B C D E F G. A B C D E F G. Continue.",
)
OUTPUT_TOKENS = 48


def answers(model: str, stalled: list[str], **ours: Any) -> tuple[list[str], Any]:
    """What the engine says, and its scheduler; `stalled` takes the decoding requests that an iteration leaves out."""
    llm = LLM(
        model, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=256, dtype="float32", enforce_eager=True,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        },
        **ours,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        decoding = [request.request_id for request in scheduler.running if not request.is_prefill_chunk]
        output = schedule(*args, **kwargs)
        stalled.extend(name for name in decoding if name not in output.num_scheduled_tokens)
        return output

    scheduler.schedule = watched
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in PROMPTS], params, use_tqdm=False)
    assert all(output.finished for output in outputs)
    return [output.outputs[0].text for output in outputs], scheduler


def what_is_learnt(scheduler: Any) -> dict[str, Any]:
    """What a controller makes of this engine's telemetry."""
    telemetry = scheduler.telemetry(Report())
    settings = TuningSettings(targets=Slo(TTFT_S, TPOT_S))
    model = ReplicaModel(settings, load_profile(PROFILE).time_model, Thresholds(policy="fluid"))
    model.observe(telemetry)
    params, counters = model.propose().thresholds.fluid, telemetry.counters
    assert params is not None
    return {
        "steps": counters.decode_steps, "gained": counters.decode_gained_tokens,
        "computed": counters.decode_computed_tokens, "tokens_per_step": params.tokens_per_step,
        "computed_per_step": params.computed_per_step, "completed": counters.completed,
    }


def main() -> None:
    model, result, stalled = sys.argv[1], Path(sys.argv[2]), []
    plain = answers(model, [])[0]
    gc.collect()
    ours, scheduler = answers(
        model, stalled, scheduler_cls="scheduler.vllm_scheduler.HeadraceScheduler",
        additional_config={"headrace": SETTINGS},
    )
    result.write_text(json.dumps({"plain": plain, "ours": ours, "stalled": stalled, **what_is_learnt(scheduler)}))


if __name__ == "__main__":
    main()
