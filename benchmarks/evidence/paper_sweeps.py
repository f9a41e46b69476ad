"""The experiments of arXiv 2504.11320 that paper_tables.py repeats, and the figures published for them.

Published figures are from the paper (v4) and, where the paper gives only a curve or names no model, from its authors'
repository (docs/progress, papers/revision_tables.tex, scripts/plot_figure_*.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.model.profiles import load_profile

LLAMA2 = "a100-llama2-7b-vidur"
LLAMA3, DECODE_ONLY = "llama3-8b-estimate", "llama3-8b-decode-only"
LLAMA3_KV_TOKENS = 479_232
PARAMETERS_BILLION = {LLAMA2: 6.74, LLAMA3: 8.03}
KV_HEADS_SHARE = 1 / 4
"""Llama-3-8B has 8 KV heads where Llama-2-7B has 32, so that a token's KV cache is a quarter."""

SARATHI: dict[str, Any] = {"policy": "sarathi"}
V0: dict[str, Any] = {"policy": "vllm-v0", "max_num_seqs": 128}
VLLM: dict[str, Any] = {"policy": "vllm"}
WAIT: dict[str, Any] = {"policy": "wait"}
NESTED: dict[str, Any] = {"policy": "nested-wait"}


def capped(cap: int, budget: int = 512) -> dict[str, Any]:
    """No threshold: at most `cap` running, `budget` tokens an iteration."""
    return {"policy": "fcfs", "cap": cap, "token_budget": budget, "max_num_seqs": max(512, cap)}


def wait_cp(cap: int, chunk: int, *, wait_gate: bool) -> dict[str, Any]:
    """What the authors ran: a cap spread over stages, prompts in chunks, a token gate; `wait_gate`: theirs."""
    return {
        "policy": "wait-cp", "cap": cap, "counts": "by_cap", "prefill_chunk_tokens": chunk, "wait_gate": wait_gate,
    }  # fmt: skip


@dataclass(frozen=True)
class Simulated:
    """A column of ours; options of the simulation, or by rate where they differ."""

    label: str
    options: dict[str, Any]
    by_rate: dict[float, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A column of theirs: mean latency in seconds, or text, by rate."""

    label: str
    values: dict[float, float | str]


@dataclass(frozen=True)
class Sweep:
    """One experiment. requests by rate. compare: (ours, theirs), their distance is reported. about: their settings."""

    name: str
    title: str
    lengths: str
    model: str
    requests: dict[float, int]
    baselines: tuple[Simulated, ...]
    published: tuple[Published, ...]
    compare: tuple[tuple[str, str], ...] = ()
    about: str = ""


def write_profiles(folder: Path) -> dict[str, str]:
    """Profiles that only these sweeps use, written to `folder`: name to path, and to the name of a shipped one."""
    folder.mkdir(parents=True, exist_ok=True)
    time_model = load_profile(LLAMA2).time_model
    heavier = PARAMETERS_BILLION[LLAMA3] / PARAMETERS_BILLION[LLAMA2]
    scaled = {
        "d0_s": time_model.d0_s, "d1_s_per_kv_token": time_model.d1_s_per_kv_token * KV_HEADS_SHARE,
        "d2_s_per_prefill_token": time_model.d2_s_per_prefill_token * heavier,
        "d3_s_per_decode_token": time_model.d3_s_per_decode_token * heavier, "floor_s": time_model.floor_s * heavier,
    }  # fmt: skip
    paths = {LLAMA2: LLAMA2}
    for name, changes in ((LLAMA3, {}), (DECODE_ONLY, {"d2_s_per_prefill_token": 0.0})):
        content = {
            "name": name, "description": "Llama-3-8B on one A100 80GB, scaled from Llama-2-7B", "law": scaled | changes,
            "kv_capacity_tokens": LLAMA3_KV_TOKENS, "provenance": ["benchmarks/evidence/paper_sweeps.py"],
        }  # fmt: skip
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        paths[name] = str(path)
    return paths


def counts(requests: int, *rates: float, more: dict[float, int] | None = None) -> dict[float, int]:
    return dict.fromkeys(rates, requests) | (more or {})


SINGLE_LLAMA2 = {
    "Sarathi": (0.409, 0.437, 0.469, 0.505, 0.545, 0.593, 0.646, 0.705, 0.773, 0.862, 0.985, 1.255, 2.668),
    "WAIT": (0.394, 0.422, 0.451, 0.484, 0.523, 0.568, 0.619, 0.676, 0.744, 0.830, 0.951, 1.206, 1.735),
}  # fmt: skip
MIX_LLAMA3 = {
    "Sarathi": (0.654, 0.701, 0.756, 0.820, 0.894, 0.980, 1.083, 1.213, 1.389, 1.760, 4.059, 8.408, 13.538),
    "Nested WAIT": (0.614, 0.651, 0.696, 0.749, 0.811, 0.883, 0.979, 1.119, 1.349, 1.562, 2.359, 5.664, 10.543),
}  # fmt: skip
LMSYS_LLAMA2 = {
    "Sarathi": (1.688, 2.081, 3.141, 4.130, 4.748, 9.486, 14.790, 18.969, 22.153, 24.670, 26.852, 28.591, 30.100,
                31.505, 32.529),
    "Nested WAIT": (1.688, 2.080, 3.010, 4.097, 4.707, 5.523, 10.065, 14.128, 17.424, 20.084, 22.241, 24.065, 25.620,
                    26.974, 28.162),
}  # fmt: skip
ABLATION_RATES = (8, 10, 12, 14, 15, 16, 18, 19, 20, 21, 22, 23)
ABLATION_CAPS = dict(zip(ABLATION_RATES, (4, 6, 6, 7, 9, 10, 10, 11, 14, 12, 14, 14), strict=True))
ABLATION_CHUNKS = dict(
    zip(ABLATION_RATES, (128, 160, 224, 352, 160, 224, 224, 224, 224, 320, 192, 192), strict=True)
)
NO_WAIT = (0.507, 0.514, 0.563, 0.612, 0.630, 0.883, 1.630, 1.717, 2.049, 2.276, 2.654, 3.843)
WITH_WAIT = (0.554, 0.590, 0.618, 0.653, 0.681, 0.866, 1.539, 1.594, 1.959, 2.257, 2.654, 3.843)


def column(label: str, rates: Any, values: Any) -> Published:
    return Published(label, dict(zip(map(float, rates), values, strict=True)))


def waiting(n: int) -> dict[float, dict[str, Any]]:
    """The ablation's cap at each rate, and groups of n; n = 1 is a cap alone."""
    group = {"policy": "wait", "types": [{"name": "all", "n": n}], "max_hold_s": 1.0, "token_budget": 512}
    return {
        float(rate): (capped(cap) if n == 1 else group | {"max_running": cap}) for rate, cap in ABLATION_CAPS.items()
    }


def ablation(*, wait_gate: bool) -> dict[float, dict[str, Any]]:
    """The authors' own setting at each rate, with their wait gate or without."""
    return {float(r): wait_cp(ABLATION_CAPS[r], ABLATION_CHUNKS[r], wait_gate=wait_gate) for r in ABLATION_RATES}


SWEEPS = (
    Sweep(
        "waiting", "Waiting or not, under the same cap (the paper's waiting ablation)", "p512d20", LLAMA2,
        counts(500, 8, 12, 15, 19, more={22: 1000, 23: 1000}),
        (Simulated("WAIT-CP, gate off", {}, ablation(wait_gate=False)),
         Simulated("WAIT-CP", {}, ablation(wait_gate=True)),
         Simulated("cap alone", {}, waiting(1)), Simulated("groups of 2", {}, waiting(2))),
        (column("threshold only", ABLATION_RATES, NO_WAIT), column("WAIT", ABLATION_RATES, WITH_WAIT)),
        about="the same cap and chunk for both at each rate (4 to 14 running, 128 to 352 tokens).",
    ),
    Sweep(
        "long", "Long answers (figure of p512d1000, table of restarts)", "p512d1000", LLAMA3,
        {1.0: 60, 2.0: 100, 3.0: 200, 4.0: 300, 4.5: 300, 5.0: 300},
        (Simulated("vllm-v0, 128 slots", V0), Simulated("sarathi, 512 slots", SARATHI),
         Simulated("WAIT-CP, cap 120", wait_cp(120, 256, wait_gate=False))),
        (Published("vLLM", {4.5: 53.8}),
         Published("Sarathi", {3.0: 20.4, 3.5: 23.6, 4.0: "30.2 (2.88 % restarts)", 4.5: 41.7, 5.0: 59.9}),
         Published("WAIT", {3.0: 19.7, 3.5: 23.3, 4.0: "26.4 (0 %)", 4.5: 32.3, 5.0: 50.5})),
        (("sarathi, 512 slots", "Sarathi"), ("WAIT-CP, cap 120", "WAIT")),
        "Llama-3-8B, 479 232 KV tokens, N = 2 000, the best setting at each rate; WAIT-CP with caps of 92 to 120, "
        "wait gate off from 3.5 /s on. At 2.5 /s and less all three are within 1 % (11.7 to 17.5 s).",
    ),
    Sweep(
        "single", "One type (figure of p512d20), Llama-2-7B", "p512d20", LLAMA2,
        counts(500, 12, 16, 19, more={22: 1000, 23: 1500, 24: 1500}),
        (Simulated("sarathi, 256 slots", SARATHI | {"max_num_seqs": 256}),
         Simulated("WAIT-CP, cap 20", wait_cp(20, 256, wait_gate=True)), Simulated("wait, solved", WAIT)),
        (*(column(f"{name}, N = 5 000", range(12, 25), values) for name, values in SINGLE_LLAMA2.items()),
         Published("ours before, sarathi", {19: 0.74, 22: 1.09, 23: 1.64}),
         Published("ours before, cap 21", {19: 0.73, 22: 1.06, 23: 1.36})),
        (("sarathi, 256 slots", "Sarathi, N = 5 000"), ("WAIT-CP, cap 20", "WAIT, N = 5 000")),
        "Llama-2-7B, means over all requests; Sarathi with chunks of 512 and 256 slots, WAIT-CP with chunks of 256, "
        "wait gate on, a cap of 20 (30 at 24 /s). N = 10 000: 4.23 and 1.85 s at 24, 11.09 and 2.99 at 25, 18.63 and "
        "4.69 at 26. 'Ours before': this page's earlier runs, profile `a100-llama2-7b`, N = 3 000, three seeds.",
    ),
    Sweep(
        "single-llama3", "One type, as published: Llama-3-8B", "p512d20", LLAMA3,
        counts(500, 16, more={20: 800, 22: 1500, 23: 1500}),
        (Simulated("vllm-v0, 128 slots", V0), Simulated("sarathi, 512 slots", SARATHI),
         Simulated("WAIT-CP, cap 21", wait_cp(21, 256, wait_gate=False))),
        (Published("vLLM, paper (N = 10 000)", {16: 1.18, 20: 3.693, 22: "18.23 (15.69)", 23: "26.78 (23.26)"}),
         Published("Sarathi, paper (N = 10 000)", {16: 0.633, 20: 0.963, 22: "1.85 (1.98)", 23: "5.08 (8.94)"}),
         Published("WAIT, paper (N = 10 000)", {16: 0.590, 20: 0.799, 22: "1.03 (1.01)", 23: "1.29 (1.25)"})),
        (("sarathi, 512 slots", "Sarathi, paper (N = 10 000)"), ("WAIT-CP, cap 21", "WAIT, paper (N = 10 000)")),
        "Llama-3-8B, middle half of the requests; at 22 and 23 /s N = 5 000, in brackets a run of 10 000. vLLM with "
        "128 slots and 4 096 tokens, Sarathi with 512 slots, WAIT-CP with chunks of 256, a cap of 21, wait gate off.",
    ),
    Sweep(
        "lmsys", "lmsys-chat-1m lengths, 10 to 150 /s", "lmsys", LLAMA2,
        counts(300, 10, 30, more={50: 600, 60: 1000, 80: 1000, 100: 1000, 150: 1000}),
        (Simulated("sarathi, 256 slots", SARATHI | {"max_num_seqs": 256}), Simulated("cap 300", capped(300, 2048)),
         Simulated("vllm, 512 slots", VLLM), Simulated("nested-wait, solved", NESTED)),
        tuple(column(f"{name}, N = 5 000", range(10, 151, 10), values) for name, values in LMSYS_LLAMA2.items()),
        about="Llama-2-7B, N = 5 000, middle half; Sarathi with 256 slots; WAIT-CP's best setting at each rate: from "
        "60 /s on one segment, chunks of 128 and a cap of 300.",
    ),
    Sweep(
        "decode-only", "Decode only (p630d20, d2 = 0: the disaggregated experiment)", "p630d20", DECODE_ONLY,
        counts(1000, 100, 300, 500),
        (Simulated("vllm, 128 slots", VLLM | {"max_num_seqs": 128, "token_budget": 65_536}),
         Simulated("vllm, 720 slots", VLLM | {"max_num_seqs": 720, "token_budget": 65_536}),
         Simulated("cap 720", capped(720, 65_536) | {"max_num_seqs": 720})),
        (Published("WAIT against vLLM", {100.0: "−45 %", 500.0: "−55 %"}),),
        about="Llama-3-8B; vLLM with 128 slots, WAIT with a limit of 720 running.",
    ),
    Sweep(
        "mix", "Two types (0.7 p512d20 + 0.3 p512d50), Llama-3-8B as published", "0.7:p512d20+0.3:p512d50", LLAMA3,
        counts(500, 12, 16, 19, more={21: 1000, 22: 1500, 23: 1500}),
        (Simulated("vllm-v0, 128 slots", V0), Simulated("sarathi, 512 slots", SARATHI),
         Simulated("WAIT-CP, cap 30", wait_cp(30, 128, wait_gate=False))),
        (Published("vLLM, paper (N = 10 000)", {16: "(1.585)", 20: "(6.16)", 22: "56.70 (25.66)", 23: "80.25 (34.96)"}),
         *(column(f"{name}, paper", range(12, 25), values) for name, values in MIX_LLAMA3.items())),
        (("sarathi, 512 slots", "Sarathi, paper"), ("WAIT-CP, cap 30", "Nested WAIT, paper")),
        "Llama-3-8B; Sarathi with 512 slots; WAIT-CP with chunks of 192 and a cap of 20 up to 19 /s (26 at 20), "
        "chunks of 128 and a cap of 30 from 21 on.",
    ),
)  # fmt: skip

HORIZON = Sweep(
    "horizon", "Horizon check: the mean of the first N requests", "0.7:p512d20+0.3:p512d50", LLAMA3,
    {22.0: 5_000, 23.0: 5_000},
    (Simulated("sarathi, 512 slots", SARATHI), Simulated("WAIT-CP, cap 30", wait_cp(30, 128, wait_gate=False))), (),
)  # fmt: skip
HORIZONS = (1_000, 2_000, 5_000)
PUBLISHED_HORIZON = {
    (22.0, "sarathi, 512 slots"): {2_000: 2.24, 20_000: 12.66}, (22.0, "WAIT-CP, cap 30"): {2_000: 2.02, 20_000: 3.30},
    (23.0, "sarathi, 512 slots"): {2_000: 3.31, 20_000: 35.46}, (23.0, "WAIT-CP, cap 30"): {2_000: 2.44, 20_000: 24.26},
}  # fmt: skip
