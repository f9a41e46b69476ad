"""The scheduler alone under vLLM's own server, without Ray: rejections, learning, metrics, and a clean end.

Started as a module: that is what `vllm serve` runs, and the CPU build's `vllm` command does not find its own version.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cluster_process import MODEL, free_port, running, until
from openai import AsyncOpenAI, OpenAI, RateLimitError
from prometheus_client.parser import text_string_to_metric_families

from cluster.model import prepare_bundled_model
from scheduler.engine.channel import FOLDER
from scheduler.rejection import REJECTION_KEY, Rejection

pytestmark = pytest.mark.timeout(600)
TARGETS = {"ttft_s": 5.0, "tpot_s": 2.0}
"""So that a machine that is busy with other things can meet them, but not for a whole burst at once."""
SETTINGS = {"headrace": {"targets": TARGETS, "controller": {"period_s": 1.0, "min_finished": 8}}}
ANSWER_TOKENS, BURST = 24, 48


class Server:
    """`vllm serve` with our scheduler and middleware, in a folder for temporary files of its own."""

    def __init__(self, log: Path) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="hr-"))
        self.log, self.port = log, free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--served-model-name", "m",
            "--port", str(self.port), "--host", "127.0.0.1", "--max-model-len", "512", "--dtype", "float32",
            "--enforce-eager", "--num-gpu-blocks-override", "160", "--max-num-seqs", "16",
            "--scheduler-cls", "headrace.HeadraceScheduler", "--middleware", "headrace.RejectionMiddleware",
            "--additional-config", json.dumps(SETTINGS),
        ]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO", "TMPDIR": str(self.temporary),
        }
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)
        self.process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)

    def said(self) -> str:
        return self.log.read_text()[-4000:]

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.said()
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health").status_code == 200
        return False

    def engine(self) -> dict[str, Any]:
        """The state of the one engine."""
        engines: dict[str, Any] = self.http.get("/headrace/state").json()["engines"]
        assert list(engines) == ["0"], engines
        return dict(engines["0"])

    def metrics(self) -> dict[str, float]:
        """The sum of each metric's samples, by name."""
        answer = self.http.get("/metrics", headers={"Accept-Encoding": "gzip"})
        assert answer.status_code == 200
        totals: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                totals[sample.name] += sample.value
        return totals

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    prepare_bundled_model(MODEL)
    server = Server(tmp_path_factory.mktemp("alone") / "vllm.log")
    with running(server.process):
        until(server.is_healthy, 240.0, server.said)
        yield server
    shutil.rmtree(server.temporary, ignore_errors=True)


def prompt(number: int) -> list[Any]:
    return [{"role": "user", "content": f"{number}: write about the sea, and about ships. " * 4}]


async def _ask(client: AsyncOpenAI, number: int) -> tuple[str, Any]:
    """What became of one chat request; every other one is streamed, every third has two choices."""
    options: Any = {
        "model": "m", "messages": prompt(number), "max_tokens": ANSWER_TOKENS, "temperature": 0.7,
        "n": 2 if number % 3 == 0 else 1, "extra_body": {"ignore_eos": True},
    }
    try:
        if number % 2:
            answer = await client.chat.completions.create(**options)
            return "served", [choice.message.content for choice in answer.choices]
        texts = [""] * options["n"]
        async for chunk in await client.chat.completions.create(**options, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return "served", texts
    except RateLimitError as error:
        return "rejected", error


def burst(server: Server, numbers: range) -> list[tuple[str, Any]]:
    async def all_at_once() -> list[tuple[str, Any]]:
        url = f"http://127.0.0.1:{server.port}/v1"
        async with httpx.AsyncClient(trust_env=False, timeout=300) as http:
            client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)
            return list(await asyncio.gather(*(_ask(client, number) for number in numbers)))

    return asyncio.run(all_at_once())


def has_learnt(server: Server) -> bool:
    state = server.engine()
    return state["thresholds"]["version"] > 0 and not state["from_config"] and state["time_model"] is not None


def test_it_learns_from_what_it_measures(server: Server) -> None:
    """Without a profile: the first requests are admitted as they come, then the thresholds follow the model."""
    assert server.engine()["thresholds"]["fluid"] is None and server.engine()["from_config"]
    assert {outcome for outcome, _ in burst(server, range(3))} == {"served"}
    until(lambda: burst(server, range(3)) and has_learnt(server), 120.0, lambda: f"{server.engine()}\n{server.said()}")
    state = server.engine()
    assert state["thresholds"]["policy"] == "fluid" and state["thresholds"]["fluid"]["tpot_s"] == TARGETS["tpot_s"]
    assert 0.001 < state["time_model"]["d0_s"] + state["time_model"]["floor_s"] < 5.0
    assert state["controller"]["alive"] and state["controller"]["events"][0]["old_version"] == 0


def test_beyond_capacity_each_request_is_served_whole_or_gets_429(server: Server) -> None:
    until(lambda: has_learnt(server), 30.0, server.said)
    answers = burst(server, range(100, 100 + BURST))
    served = [texts for outcome, texts in answers if outcome == "served"]
    rejected = [error for outcome, error in answers if outcome == "rejected"]
    assert served and rejected, server.engine()
    assert all(text for texts in served for text in texts), "no answer is empty"
    for error in rejected:
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert error.type == "rate_limit_error" and str(error.body["message"]).startswith("rejected: ")
    state, metrics = server.engine(), server.metrics()
    assert state["counters"]["rejected"] >= len(rejected), "one for each choice"
    assert metrics["headrace_rejected_total"] == state["counters"]["rejected"]
    assert metrics["headrace_thresholds_version"] > 0 and metrics["headrace_capacity_rate"] > 0
    assert metrics["headrace_bottleneck"] == 1.0 and "vllm:num_requests_running" in metrics


def test_a_stop_string_like_our_mark_is_no_rejection(server: Server) -> None:
    mark = Rejection("made by a client", 7).as_json()
    assert REJECTION_KEY in mark
    with httpx.Client(trust_env=False, timeout=60) as http:
        client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", http_client=http)
        answer = client.completions.create(
            model="m", prompt="One, two, three,", max_tokens=5, temperature=0, stop=[mark],
            extra_body={"vllm_xargs": {"expected_output_tokens": 5}},
        )
        assert "four" in answer.choices[0].text
        echoed = client.completions.create(model="m", prompt=mark, max_tokens=3, temperature=0, echo=True)
        assert echoed.choices[0].text.startswith(mark)
        response = client.responses.create(model="m", input="Say a word.", max_output_tokens=16)
        assert response.output_text


@pytest.mark.long
def test_a_killed_controller_is_started_again_while_requests_are_served(server: Server) -> None:
    until(lambda: server.engine()["controller"]["alive"], 30.0, server.said)
    version, pid = server.engine()["thresholds"]["version"], server.engine()["controller"]["pid"]
    os.kill(pid, signal.SIGKILL)
    answers = [burst(server, range(number, number + 1))[0] for number in (200, 202)]
    assert [outcome for outcome, _ in answers] == ["served", "served"], (
        [str(getattr(said, "body", said)) for _, said in answers], server.engine()
    )
    assert server.engine()["thresholds"]["version"] >= version

    def another() -> bool:
        controller = server.engine()["controller"]
        return bool(controller["alive"] and controller["pid"] != pid)

    until(another, 60.0, server.said)
    assert "the controller process ended with exit code -9" in server.log.read_text()


@pytest.mark.long
def test_after_sigterm_nothing_is_left(server: Server) -> None:
    family = server.family()
    shared = {
        mapped.path for member in family for mapped in member.memory_maps() if mapped.path.startswith("/dev/shm/")
    }
    assert any("scheduler.alone.controller" in member.cmdline() for member in family)
    assert list(server.temporary.glob(f"{FOLDER}-*"))
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [member.cmdline() for member in alive] == []
    assert list(server.temporary.glob(f"*{FOLDER}*")) == []
    assert [path for path in shared if Path(path).exists()] == []
