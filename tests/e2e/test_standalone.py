"""The scheduler alone under vLLM's own server, without Ray.

Started as a module: that is what `vllm serve` runs, and the CPU build's `vllm` command does not find its own version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from cluster_process import MODEL, free_port, running, until

from cluster.model import prepare_bundled_model

pytestmark = pytest.mark.timeout(600)


def test_vllm_serve_takes_the_scheduler_and_its_settings(tmp_path: Path) -> None:
    prepare_bundled_model(MODEL)
    port = free_port()
    settings = {"headrace": {"thresholds": {"policy": "wait", "types": [{"name": "all", "n": 4}], "max_hold_s": 0.1}}}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--served-model-name", "m",
        "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "512", "--dtype", "float32", "--enforce-eager",
        "--scheduler-cls", "headrace.HeadraceScheduler", "--additional-config", json.dumps(settings),
    ]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    log = tmp_path / "vllm.log"
    with log.open("w") as out, running(subprocess.Popen(command, stdout=out, stderr=out, env=environment)) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:

            def healthy() -> bool:
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    return client.get("/health").status_code == 200
                except httpx.TransportError:
                    return False

            until(healthy, 240.0, lambda: log.read_text()[-4000:])
            body = {"model": "m", "prompt": "One, two, three,", "max_tokens": 5, "temperature": 0,
                    "vllm_xargs": {"expected_output_tokens": 5}}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert "four" in answer.json()["choices"][0]["text"]
        assert "HeadraceScheduler" in log.read_text()
