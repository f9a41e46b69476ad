"""Every combination of the three targets beside each engine setting that people use, on vLLM's real scheduler.

Two runs for each combination of targets, with opposite settings: every pair of a combination and a setting is in one of
them, and the settings are paired with one another by an orthogonal array.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations as pairs_of
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from scheduler.model.profiles import load_profile
from scheduler.thresholds import EngineLimits
from scheduler.tuning.fluid_plan import solve_fluid_params
from scheduler.tuning.slo import Slo
from simulator.config import simulation_config
from simulator.output.metrics import good_requests
from simulator.output.rows import REJECTED
from simulator.output.run_files import read_run
from simulator.run import simulate
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

PROFILE, LENGTHS, KV_TOKENS = "a100-llama2-7b", "p700~1d120~0.7", 137_216
TARGETS = {"ttft_s": 2.0, "tpot_s": 0.06, "latency_s": 12.0}
SETTINGS = {
    "max_num_seqs": (32, 1024), "token_budget": (512, 16_384), "block_tokens": (16, 128),
    "async_scheduling": (False, True),
}
LIGHT, HEAVY = 0.4, 2.0
REQUESTS = {LIGHT: 150, HEAVY: 250}


class Case(NamedTuple):
    """targets: those that are given, by name; load: of what the solver takes for capacity."""

    targets: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]
    load: float

    def __str__(self) -> str:
        return "-".join([*self.targets, *(str(value) for _, value in self.settings), str(self.load)])


def cases() -> list[Case]:
    """For each combination of targets a row of an orthogonal array at a light load, its opposite at twice capacity."""
    rows = []
    for number, present in enumerate(product((False, True), repeat=3)):
        names = tuple(name for name, kept in zip(TARGETS, present, strict=True) if kept)
        a, b, c = ((3 * number + 1) >> bit & 1 for bit in range(3))
        levels = (a, b, c, a ^ b ^ c)
        for load, flip in ((LIGHT, 0), (HEAVY, 1)):
            chosen = {
                name: values[level ^ flip] for (name, values), level in zip(SETTINGS.items(), levels, strict=True)
            }
            if chosen["token_budget"] < chosen["max_num_seqs"]:
                chosen["max_num_seqs"] = chosen["token_budget"]  # vLLM takes no more slots than tokens
            rows.append(Case(names, tuple(chosen.items()), load))
    return rows


class Outcome(NamedTuple):
    """A run's summary, and which requests were rejected and which met their targets, by order of arrival."""

    summary: dict[str, Any]
    rejected: frozenset[int]
    good: frozenset[int]


def capacity_rps(case: Case) -> float:
    settings = dict(case.settings)
    limits = EngineLimits(
        kv_capacity_tokens=KV_TOKENS, block_tokens=settings["block_tokens"], max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=settings["token_budget"], max_model_len=4096,
    )
    mix = open_workload(WorkloadConfig(lengths=LENGTHS, requests=1, rate_rps=1.0, max_total_tokens=4096)).mix()
    targets = Slo(**{name: TARGETS[name] for name in case.targets})
    return solve_fluid_params(mix, load_profile(PROFILE).time_model, limits, targets).capacity_rps


@cache
def outcome(case: Case, policy: str) -> Outcome:
    options = {
        "policy": policy, "profile": PROFILE, "lengths": LENGTHS, "requests": REQUESTS[case.load],
        "kv_tokens": KV_TOKENS, "rate_rps": case.load * capacity_rps(case), "period_s": 1.0, "window": (0.2, 1.0),
        "seed": 1,
        **dict(case.settings), **{f"slo_{name}": TARGETS[name] for name in case.targets},
    }
    config = simulation_config(options)
    with TemporaryDirectory() as folder:
        summary = simulate(config, folder=Path(folder))
        table = read_run(Path(folder)).requests()
    rows = table.select(["index", "outcome"]).to_pylist()
    rejected = frozenset(row["index"] for row in rows if row["outcome"] == REJECTED)
    return Outcome(summary, rejected, good_requests(table, config.window, config.slo))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_no_request_is_stranded_and_goodput_is_at_least_plain_vllms(case: Case) -> None:
    ours, plain = outcome(case, "fluid"), outcome(case, "vllm")
    assert ours.summary["stranded"] == ours.summary["unfinished"] == 0
    assert ours.summary["completed"] + ours.summary["rejected"] == REQUESTS[case.load]
    if case.load == LIGHT:
        assert not ours.rejected & plain.good
    assert len(ours.good) >= 0.9 * len(plain.good)
    assert ours.good
    if not case.targets:
        assert not ours.rejected


def test_every_pair_of_targets_and_settings_is_covered() -> None:
    combinations = {case.targets for case in cases()}
    assert len(combinations) == 8
    for names in combinations:
        settings = [dict(case.settings) for case in cases() if case.targets == names]
        for name, values in SETTINGS.items():
            seen = {one[name] for one in settings}
            assert seen == set(values) or (name == "max_num_seqs" and seen == {32, 512}), (names, name)
    for (one, values), (other, others) in pairs_of(SETTINGS.items(), 2):
        seen_pairs = {(dict(case.settings)[one], dict(case.settings)[other]) for case in cases()}
        if "max_num_seqs" not in (one, other):
            assert seen_pairs == set(product(values, others))
