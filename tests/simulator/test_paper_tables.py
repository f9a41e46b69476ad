"""The page of the paper's experiments: the models it scales, and sentences computed from runs and published figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.model.fluid import solve_fluid
from scheduler.model.profiles import load_profile
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

EVIDENCE = Path(__file__).parents[2] / "benchmarks" / "evidence"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(EVIDENCE.parents[1])}


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    import paper_sweeps
    import paper_tables

    return paper_sweeps, paper_tables


def test_the_scaled_model_has_the_published_capacity_of_long_answers(evidence, tmp_path):
    """The authors find p512d1000 stable up to 4.0 to 4.5 /s on Llama-3-8B; Llama-2-7B is far beyond capacity there."""
    sweeps, _ = evidence
    paths = sweeps.write_profiles(tmp_path)
    mix = open_workload(WorkloadConfig(lengths="p512d1000", requests=1, rate_rps=1.0)).mix()

    def capacity(name):
        profile = load_profile(paths[name])
        return solve_fluid(mix, profile.time_model, profile.kv_capacity_tokens).critical_rate_scale

    assert 4.0 < capacity(sweeps.LLAMA3) < 5.0
    assert 2.0 < capacity(sweeps.LLAMA2) < 2.3
    assert load_profile(paths[sweeps.DECODE_ONLY]).time_model.d2_s_per_prefill_token == 0


def test_sentences_come_from_the_cells(evidence):
    sweeps, tables = evidence
    waiting = next(sweep for sweep in sweeps.SWEEPS if sweep.name == "waiting")
    cells = {
        (baseline.label, 8.0): {"latency_mean_s": mean, "preemptions": 0, "requests": 10}
        for baseline, mean in zip(waiting.baselines, (0.4, 0.42, 0.5, 0.6), strict=True)
    }
    read = " ".join(tables.read_waiting(cells))
    assert "theirs: +9% at 8." in read
    assert "WAIT-CP against WAIT-CP, gate off: +5% at 8." in read
    assert "groups of 2 against cap alone: +20% at 8." in read


@pytest.mark.engine
def test_a_page_without_runs_has_dashes_beside_the_published_figures(tmp_path):
    command = [sys.executable, EVIDENCE / "paper_tables.py", "--out", tmp_path, "--runs", tmp_path / "runs"]
    subprocess.run([*command, "--workers", "0"], check=True, timeout=120, capture_output=True, env=ENVIRONMENT)
    text = (tmp_path / "paper-tables.md").read_text()
    assert "Llama-3-8B with 479,232 KV tokens" in text
    assert "| 22 | 1000 | – | – | – | 0.98 | 0.95 | 1.09 | 1.06 |" in text
    assert "Against Sarathi" not in text
