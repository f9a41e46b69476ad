"""`fluid` on a real engine with n-gram speculation: plain vLLM's text, and several tokens a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_process import CHECKOUT, MODEL

from cluster.model import prepare_bundled_model

pytestmark = pytest.mark.timeout(600)


def test_fluid_with_ngram_speculation_says_what_plain_vllm_says(tmp_path: Path) -> None:
    prepare_bundled_model(MODEL)
    result = tmp_path / "result.json"
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(CHECKOUT),
    }
    script = Path(__file__).with_name("speculating_vllm.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(MODEL), str(result)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    report = json.loads(result.read_text())
    assert report["ours"] == report["plain"] and len(report["ours"]) == report["completed"] == 4
    assert report["stalled"] == [], "every decoding request is in every iteration"
    assert report["gained"] / report["steps"] > 1.3, "prompts that repeat themselves are easy to predict"
    assert 1 < report["computed"] / report["steps"] <= 4
    # The controller believes it the more, the more steps it has seen.
    assert 1 < report["tokens_per_step"] < report["gained"] / report["steps"]
    assert 1 < report["computed_per_step"] < report["computed"] / report["steps"]
