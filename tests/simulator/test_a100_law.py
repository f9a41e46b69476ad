"""The fitted profile is what its command fits, and its page is written from the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.model.profiles import load_profile

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence" / "a100_law.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}


@pytest.mark.slow
def test_profile_and_page_come_from_the_fit(tmp_path):
    fitted = "import json, a100_law; print(json.dumps(a100_law.profile()))"
    command = [sys.executable, "-c", fitted]
    found = subprocess.run(command, check=True, capture_output=True, cwd=SCRIPT.parent, timeout=60, env=ENVIRONMENT)
    profile = json.loads(found.stdout)
    shipped = load_profile("a100-llama2-7b-vidur")
    assert tuple(profile["provenance"]) == shipped.provenance
    assert [profile["law"][term] for term in ("d0_s", "d1_s_per_kv_token", "d2_s_per_prefill_token", "floor_s")] == [
        shipped.time_model.d0_s, shipped.time_model.d1_s_per_kv_token, shipped.time_model.d2_s_per_prefill_token,
        shipped.time_model.floor_s,
    ]  # fmt: skip
    assert "95 % interval" in shipped.provenance[1]

    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], check=True, timeout=60, env=ENVIRONMENT)
    text = (tmp_path / "a100-law.md").read_text()
    assert "| p512d1000 | 1.73 (compute) | 2.16 (memory) |" in text
    assert "Azure" not in text.split("## What it changes")[1].split("|\n\n")[0]
