"""The whole line on a real Ray, real Ray Serve, the real vLLM engine on the CPU and a real model, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cluster_process import CHECKOUT, HEADRACE, MODEL, ClusterProcess, until
from openai import AsyncOpenAI, OpenAI

from cluster.model import prepare_bundled_model

pytestmark = pytest.mark.timeout(900)
MODEL_ID = "smollm2-135m"
TOPICS = (
    "the sea", "bread", "rain", "chess", "mountains", "a clock", "trains", "honey", "winter", "a bridge", "salt",
    "owls", "paper", "the moon", "glass", "a garden", "wheels", "music", "stone", "a library",
)
PROMPTS = [
    {"content": f"{ask} {topic}.", "max_tokens": 32 + 6 * (index % 9)}
    for ask in ("Write a sentence about", "List three facts about")
    for index, topic in enumerate(TOPICS)
]


@pytest.fixture(scope="module")
def plain_answers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What plain vLLM answers to PROMPTS, greedily."""
    prepare_bundled_model(MODEL)
    folder = tmp_path_factory.mktemp("plain")
    prompts, answers = folder / "prompts.json", folder / "answers.json"
    prompts.write_text(json.dumps(PROMPTS))
    script = Path(__file__).with_name("plain_vllm.py")
    subprocess.run([sys.executable, script, MODEL, prompts, answers], check=True, env=_engine_environment())
    return list(json.loads(answers.read_text()))


def _engine_environment() -> dict[str, str]:
    import os

    return os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, plain_answers: list[str]) -> Iterator[ClusterProcess]:
    """Two replicas. Plain vLLM has finished before, so that the two never share the cores."""
    controller = {"period_s": 2.0, "min_finished": 10}
    process = ClusterProcess(tmp_path_factory.mktemp("cluster"), headrace={"controller": controller})
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


@pytest.fixture(autouse=True)
def automatic_again(cluster: ClusterProcess) -> Iterator[None]:
    """Every test leaves the cluster untouched by operators."""
    yield
    if cluster.process.poll() is None:
        cluster.put({"thresholds": {"policy": "fcfs"}})
        cluster.put({"auto": True})


CHANGES: list[dict[str, Any]] = [
    {"policy": "wait", "types": [{"name": "all", "n": 8}], "max_hold_s": 0.3},
    {"policy": "fcfs", "max_running": 3},
    {"policy": "nested_wait", "max_hold_s": 0.2,
     "segments": [{"end_output_tokens": 8, "total": 32}, {"end_output_tokens": 64, "total": 168}]},
    {"policy": "wait", "types": [{"name": "short", "n": 2, "max_output_tokens": 24}, {"name": "long", "n": 3}]},
    {"policy": "fcfs", "token_budget": 64},
] * 2


def test_forty_streams_survive_ten_changes_of_thresholds(cluster: ClusterProcess, plain_answers: list[str]) -> None:
    async def scenario() -> list[list[str]]:
        client = AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=600, max_retries=0)
        changed = asyncio.Event()

        async def forty_streams_until_all_is_changed() -> list[list[str]]:
            rounds = [await asyncio.gather(*(_stream(client, prompt) for prompt in PROMPTS))]
            while not changed.is_set():  # a machine that changes slowly has them all the same while streams run
                rounds.append(await asyncio.gather(*(_stream(client, prompt) for prompt in PROMPTS)))
            return rounds

        async with httpx.AsyncClient(base_url=cluster.url, timeout=60, trust_env=False) as admin:
            streams = asyncio.create_task(forty_streams_until_all_is_changed())
            versions: dict[str, int] = {}
            for change in CHANGES:
                answer = await admin.put("/admin/thresholds", json={"thresholds": change})
                assert answer.status_code == 200, answer.text
                state = await asyncio.to_thread(cluster.state)
                for name, result in answer.json()["replicas"].items():
                    assert result["accepted"]
                    assert result["version"] > versions.get(name, 0)
                    versions[name] = result["version"]
                    assert state["replicas"][name]["thresholds"]["version"] == result["version"]
                    assert state["replicas"][name]["thresholds"]["policy"] == change["policy"]
            changed.set()
            return await streams

    for answers in asyncio.run(scenario()):
        assert answers == plain_answers
    replicas = cluster.state()["replicas"].values()
    assert sum(replica["preemptions"] for replica in replicas) == 0
    assert all(replica["counters"]["completed"] > 0 for replica in replicas), "one replica did nothing"


async def _stream(client: AsyncOpenAI, prompt: dict[str, Any]) -> str:
    chunks = await client.chat.completions.create(
        model=MODEL_ID, messages=[{"role": "user", "content": prompt["content"]}], stream=True, temperature=0.0,
        max_tokens=prompt["max_tokens"],
    )
    text, ended = "", False
    async for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        ended = ended or chunk.choices[0].finish_reason is not None
    assert ended, "the stream broke off"
    return text


def test_wait_admits_groups_of_eight_and_bounds_the_hold_of_the_ninth(cluster: ClusterProcess) -> None:
    names = list(cluster.state()["replicas"])
    chosen, other = names[0], names[1]
    hold_s = 4.0
    wait = {"policy": "wait", "types": [{"name": "all", "n": 8}], "max_hold_s": hold_s}
    assert cluster.put({"replica": chosen, "thresholds": wait}).status_code == 200
    # The other replica has one slot, taken, so the router sends every request to the chosen one.
    assert cluster.put({"replica": other, "thresholds": {"policy": "fcfs", "max_running": 1}}).status_code == 200

    async def scenario() -> None:
        client = AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=600, max_retries=0)

        def request(max_tokens: int, stream: bool = False) -> Any:
            return client.completions.create(
                model=MODEL_ID, prompt="Once upon a time", max_tokens=max_tokens, temperature=0.0, stream=stream,
                extra_body={"ignore_eos": True, "expected_output_tokens": max_tokens},
            )

        busy = []
        while not all(r["running"] for r in cluster.state()["replicas"].values()):
            assert len(busy) < 8, "one replica gets everything"
            busy.append(asyncio.create_task(request(1500)))
            await _eventually(
                lambda s: sum(s[name]["running"] for name in names) == len(busy), cluster, "the next one running"
            )
        await asyncio.sleep(2.5)  # the routing statistics of the full replica are refreshed every second
        first = cluster.state()["replicas"]
        before = first[chosen]
        group = [asyncio.create_task(request(120)) for _ in range(9)]

        def eight_and_one(replicas: dict[str, Any]) -> bool:
            arrived = {name: replicas[name]["counters"]["arrivals"] - first[name]["counters"]["arrivals"]
                       for name in names}
            # On a busy machine Serve may pass a request on to the next best replica; another one takes its place.
            if arrived[chosen] < 9 and sum(arrived.values()) == len(group) < 20:
                group.append(asyncio.create_task(request(120)))
            return bool(replicas[chosen]["running"] == before["running"] + 8 and replicas[chosen]["held"] == 1)

        seen = await _eventually(eight_and_one, cluster, "eight running and the ninth held")
        assert seen[chosen]["waiting"] == 1
        for task in busy:
            task.cancel()  # a request that strayed to the full replica waits for its slot
        await asyncio.gather(*group)
        after = cluster.state()["replicas"][chosen]
        assert after["counters"]["held"] - before["counters"]["held"] == 9
        held_s = after["counters"]["hold_s"] - before["counters"]["hold_s"]
        # The eight are held until the last of them has come, which takes seconds on a busy machine.
        assert hold_s <= held_s < 8 * hold_s, "the ninth was held for its longest hold, the eight for less"
        await asyncio.gather(*busy, return_exceptions=True)

    asyncio.run(scenario())


async def _eventually(condition: Any, cluster: ClusterProcess, what: str, timeout_s: float = 60.0) -> dict[str, Any]:
    last: dict[str, Any] = {}
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60, trust_env=False) as admin:
        while asyncio.get_running_loop().time() < deadline:
            last = (await admin.get("/admin/state")).json()["replicas"]
            if condition(last):
                return last
            await asyncio.sleep(0.05)
    raise AssertionError(f"never {what}: {json.dumps(last, indent=1)}")


def test_the_controller_tunes_from_what_it_sees(cluster: ClusterProcess) -> None:
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    for index in range(40):
        client.completions.create(
            model=MODEL_ID, prompt=f"Number {index}", max_tokens=4 + index % 5, temperature=0.0,
            extra_body={"ignore_eos": True},
        )

    def tuned() -> dict[str, Any] | None:
        state = cluster.state()
        solved = [r for r in state["replicas"].values() if r["fluid"] and not r["from_config"]]
        return state if solved and cluster.events() else None

    state = until(tuned, 60.0, lambda: json.dumps(cluster.state(), indent=1))
    assert "events" not in state
    event = cluster.events()[-1]
    assert event["reason"]
    assert event["new"] != event["old"]
    assert state["controller"]["alive"]
    replica = next(r for r in state["replicas"].values() if r["fluid"])
    assert replica["time_model"]["records"] > 32
    assert replica["fluid"]["load"] > 0
    assert replica["thresholds"]["fluid"]["capacity_rps"] > 0
    assert replica["forecast"]["rate_rps"]["high"] > 0
    assert replica["forecast"]["bottleneck"] in ("memory", "nothing"), "no targets are set"


def test_serving_goes_on_without_the_controller_and_a_new_one_takes_over(cluster: ClusterProcess) -> None:
    first = until(lambda: cluster.state()["controller"].get("started_unix_s"), 60.0)
    changed = cluster.http.put("/admin/settings", json={"settings": {"controller": {"period_s": 4.25}}})
    assert changed.status_code == 200, changed.text
    for kill in (_crash_controller, _kill_controller_for_good):
        kill(cluster)
        answer = cluster.http.post(
            "/v1/completions", json={"model": MODEL_ID, "prompt": "One, two,", "max_tokens": 4, "temperature": 0}
        )
        assert answer.status_code == 200, answer.text

        def another(before: float = first) -> float | None:
            controller = cluster.state()["controller"]
            replaced = controller["alive"] and controller["started_unix_s"] != before and controller["passes"] > 0
            has_settings = replaced and controller["period_s"] == 4.25
            return float(controller["started_unix_s"]) if has_settings else None

        first = until(another, 60.0, lambda: json.dumps(cluster.state()["controller"]))
    cluster.http.put("/admin/settings", json={"settings": {"controller": {"period_s": None}}})


def _crash_controller(cluster: ClusterProcess) -> None:
    actors = [p for p in cluster.children() if p.name().startswith("ray::Controller")]
    assert len(actors) == 1, actors
    actors[0].kill()


def _kill_controller_for_good(cluster: ClusterProcess) -> None:
    """`ray.kill`: Ray itself will not restart it."""
    script = (
        "import os; os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0'\n"
        "import ray\n"
        "ray.init(address='auto', logging_level='ERROR', log_to_driver=False)\n"
        "ray.kill(ray.get_actor('controller:headrace', namespace='headrace'))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


BAD_REQUESTS: list[tuple[str, dict[str, Any], int, str]] = [
    ("no such model", {"json": {"model": "gpt-9", "prompt": "hi"}}, 404, "gpt-9"),
    ("malformed JSON", {"content": b'{"model": "smol', "headers": {"Content-Type": "application/json"}}, 400, "JSON"),
    ("prompt longer than the model", {"json": {"model": MODEL_ID, "prompt": "word " * 5000}}, 400, "2048"),
    ("negative max_tokens", {"json": {"model": MODEL_ID, "prompt": "hi", "max_tokens": -5}}, 400, "max_tokens"),
    ("a declared length of zero",
     {"json": {"model": MODEL_ID, "prompt": "hi", "expected_output_tokens": 0}}, 400, "expected_output_tokens"),
    ("a declared length in words",
     {"json": {"model": MODEL_ID, "prompt": "hi", "expected_output_tokens": "long"}}, 400, "expected_output_tokens"),
]
BAD_UPDATES: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown policy", {"thresholds": {"policy": "lifo"}}, 400, "nested_wait"),
    ("n of zero", {"thresholds": {"policy": "wait", "types": [{"name": "all", "n": 0}]}}, 400, "types[0].n"),
    ("more than memory holds", {"thresholds": {"policy": "wait", "types": [{"name": "all", "n": 5000}]}}, 400, "64"),
    ("a hold that is not a number", {"thresholds": {"max_hold_s": "NaN"}}, 400, "max_hold_s"),
    ("a negative hold", {"thresholds": {"max_hold_s": -1}}, 400, "max_hold_s"),
    ("a typo", {"thresholds": {"max_in_servise": 3}}, 400, "max_in_servise"),
    ("the literal rule", {"thresholds": {"policy": "wait", "mode": "strict"}}, 400, "strict"),
    ("an old version", {"thresholds": {"version": 1}}, 409, "version"),
    ("no such replica", {"replica": "unknown", "pin": True}, 404, "unknown"),
    ("nothing to do", {}, 400, "thresholds"),
]


def test_bad_input_is_answered_and_disturbs_nobody(cluster: ClusterProcess) -> None:
    cluster.put({"thresholds": {"policy": "fcfs"}})
    cluster.put({"thresholds": {"policy": "fcfs"}})
    versions = {name: r["thresholds"]["version"] for name, r in cluster.state()["replicas"].items()}
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL_ID, prompt="Once upon a time", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    text = next(chunks).choices[0].text
    for what, request, status, named in BAD_REQUESTS:
        answer = cluster.http.post("/v1/completions", **request)
        assert answer.status_code == status, f"{what}: {answer.text}"
        assert named in answer.json()["error"]["message"], f"{what}: {answer.text}"
    for what, body, status, named in BAD_UPDATES:
        answer = cluster.put(body)
        assert answer.status_code == status, f"{what}: {answer.text}"
        assert named in answer.json()["error"]["message"], f"{what}: {answer.text}"
    text += "".join(chunk.choices[0].text for chunk in chunks)
    assert len(text) > 200
    assert versions == {name: r["thresholds"]["version"] for name, r in cluster.state()["replicas"].items()}


def test_endpoints_as_openai_defines_them(cluster: ClusterProcess) -> None:
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    answer = client.chat.completions.create(
        model=MODEL_ID, temperature=0.0, max_tokens=24,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert cluster.http.get("/healthz").json() == {"status": "ok"}
    assert cluster.http.get("/readyz").json()["ready"] == 2


def test_the_command_line_against_a_running_cluster(cluster: ClusterProcess) -> None:
    def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(HEADRACE), *arguments, "--url", cluster.url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    state = json.loads(headrace("status", "--json").stdout)
    name = next(iter(state["replicas"]))
    assert name in headrace("status").stdout
    events = headrace("events", "--json")
    assert json.loads(events.stdout)["controller"]["alive"], events.stderr
    done = headrace("thresholds", "set", "policy=fcfs", "max_running=5", "--replica", name, "--json")
    assert json.loads(done.stdout)["replicas"][name]["accepted"], done.stderr
    active = json.loads(headrace("thresholds", "get", "--json").stdout)["replicas"][name]
    assert (active["policy"], active["max_running"], active["pinned"]) == ("fcfs", 5, True)
    rejected = headrace("thresholds", "set", "max_running=0", "--replica", name)
    assert rejected.returncode == 1
    assert "max_running" in rejected.stderr
    assert headrace("thresholds", "auto").returncode == 0
    assert not json.loads(headrace("thresholds", "get", "--json").stdout)["replicas"][name]["pinned"]


def test_everything_listens_on_localhost_only(cluster: ClusterProcess) -> None:
    family = [psutil.Process(cluster.process.pid), *cluster.children()]
    listening = {
        (connection.laddr.ip, process.name())
        for process in family
        if process.is_running()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert {entry for entry in listening if entry[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == set()


def test_ctrl_c_ends_everything(cluster: ClusterProcess) -> None:
    code, leftovers = cluster.stop()
    assert code == 0, cluster.log.read_text()
    assert leftovers == []
    assert CHECKOUT.exists()
