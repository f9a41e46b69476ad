"""The front door of a real cluster under overload: 429 at once, bad bodies, keys that leak nowhere."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_process import MODEL, ClusterProcess, until

from cluster.model import prepare_bundled_model

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
MODEL_ID, KEY = "smollm2-135m", "sk-operator-of-the-front-door"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """One replica of few slots, with targets."""
    prepare_bundled_model(MODEL)
    process = ClusterProcess(
        tmp_path_factory.mktemp("door"), env={"HEADRACE_API_KEY": KEY},
        llm={"deployment_config": {"num_replicas": 1}, "engine_kwargs": {"max_num_seqs": 4}},
        headrace={"targets": {"ttft_s": 3.0, "tpot_s": 0.5}, "controller": {"period_s": 2.0}},
    )
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, float, httpx.Response]:
    begun = time.perf_counter()
    answer = await client.post(COMPLETIONS, headers=HEADERS, json={
        "model": MODEL_ID, "prompt": f"{number}: a story of the sea. ", "max_tokens": 48, "ignore_eos": True,
    })
    return answer.status_code, time.perf_counter() - begun, answer


def test_most_rejections_of_an_overload_come_from_the_front_door(cluster: ClusterProcess) -> None:
    async def scenario() -> list[tuple[int, float, httpx.Response]]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=200, trust_env=False) as client:
            for number in range(6):  # what the controller needs to know the outputs' lengths
                await ask(client, number)
            tasks = []
            for number in range(300):
                tasks.append(asyncio.create_task(ask(client, number)))
                await asyncio.sleep(0.1)
            return list(await asyncio.gather(*tasks))

    before = cluster.state()["front_door"]["rejected"]
    answers = asyncio.run(scenario())
    assert {status for status, *_ in answers} == {200, 429}
    rejected = [(seconds, answer) for status, seconds, answer in answers if status == 429]
    here = [seconds for seconds, answer in rejected if "the queues of all replicas are full" in answer.text]
    sys.stderr.write(
        f"{len(answers)} requests, {len(rejected)} rejected, {len(here)} of them at the front door; time to its 429: "
        f"median {1e3 * statistics.median(here):.1f} ms, most {1e3 * max(here):.1f} ms\n"
    )
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for _, answer in rejected)
    assert len(here) >= 0.5 * len(rejected) > 20
    assert cluster.state()["front_door"]["rejected"] - before >= len(here)
    assert statistics.median(here) < 0.25, "a busy machine; the engine itself takes seconds"


def test_the_queue_has_room_again_once_it_is_quiet(cluster: ClusterProcess) -> None:
    def answered() -> bool:
        return cluster.http.post(COMPLETIONS, json={
            "model": MODEL_ID, "prompt": "x", "max_tokens": 2}).status_code == 200

    until(answered, 60.0)
    assert answered() and answered()


BODIES: list[dict[str, Any]] = [
    {"expected_output_tokens": 10**30}, {"n": 200}, {"max_tokens": -1}, {"prompt": ["x"] * 200}, {"prompt": [-1]},
    {"prompt": [10**9]}, {"temperature": -3}, {"logit_bias": {"999999999": 1}}, {"stop_token_ids": [2**40]},
    {"prompt": "x" * 40_000}, {"structured_outputs": {"regex": "("}}, {"structured_outputs": {"grammar": "((("}},
    {"structured_outputs": {"json": "{"}}, {"priority": 2**62}, {"seed": 2**63 - 1}, {"min_tokens": 10**9},
    {"stop": ["x" * 100_000]}, {"truncate_prompt_tokens": -5}, {"logprobs": 10**6}, {"prompt_logprobs": 10**6},
    {"model": "m" * 5000},
]


def test_no_bad_request_makes_a_5xx_or_kills_the_engine(cluster: ClusterProcess) -> None:
    found = {}
    for fields in BODIES:
        answer = cluster.http.post(COMPLETIONS, json={"model": MODEL_ID, "prompt": "x", "max_tokens": 1} | fields)
        found[str(fields)[:60]] = (answer.status_code, answer.text[:300])
        if answer.status_code >= 400:
            assert len(answer.json()["error"]["message"]) <= 200
    assert {name: said for name, said in found.items() if said[0] >= 500} == {}
    surrogate = b'{"model": "%s", "prompt": "\\ud800"}' % MODEL_ID.encode()
    for content, kind in ((surrogate, "application/json"), (b"{}", "text/plain")):
        answer = cluster.http.post(CHAT, content=content, headers={"content-type": kind})
        assert answer.status_code in (400, 415)
    assert cluster.http.post(COMPLETIONS, json={
        "model": MODEL_ID, "prompt": "x", "max_tokens": 1}).status_code == 200


def test_the_key_is_nowhere_in_ray_s_logs_or_answers(cluster: ClusterProcess) -> None:
    open_client = httpx.Client(base_url=cluster.url, trust_env=False, timeout=30)
    for path in ("/admin/state", "/v1/models", "/docs", "/openapi.json"):
        answer = open_client.get(path)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert open_client.get("/healthz").status_code == 200
    assert KEY not in cluster.log.read_text()
    (session,) = {
        Path(argument.partition("=")[2]) for process in cluster.children() for argument in process.cmdline()
        if argument.startswith("--session-dir=")
    }
    leaks = subprocess.run(
        ["grep", "-rl", KEY, str(session / "logs")], capture_output=True, text=True, check=False
    ).stdout
    assert leaks == ""


def test_headrace_up_does_not_serve_beyond_this_machine_without_a_key(cluster: ClusterProcess, tmp_path: Path) -> None:
    config = tmp_path / "open.yaml"
    config.write_text(cluster.config.read_text().replace("host: 127.0.0.1", "host: 0.0.0.0"))
    done = subprocess.run(
        [sys.executable, "-c", "from headrace.cli import main; main()", "up", str(config)], capture_output=True,
        text=True, timeout=120, check=False,
    )
    assert done.returncode == 1 and "--insecure" in done.stderr and "HEADRACE_API_KEY" in done.stderr
