"""Engines and replicas that die or freeze under load: nothing new fails, and what is cut never looks complete.

Real Ray, real engines with a worker process of their own, and the openai client. The cluster heals between the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cluster_process import MODEL, ClusterProcess, until
from openai import AsyncOpenAI, OpenAIError

from cluster.model import prepare_bundled_model

pytestmark = pytest.mark.timeout(900)
MODEL_ID = "smollm2-135m"
EVERY_S = 0.7
HEAL_S = 150.0


@dataclass
class Asked:
    """One request: when it began and ended (monotonic seconds), the chunks it got, and its error, if any."""

    at_s: float
    kind: str
    chunks: int = 0
    ended_s: float = 0.0
    finished: bool = False
    error: str = ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    prepare_bundled_model(MODEL)
    process = ClusterProcess(
        tmp_path_factory.mktemp("faults"), llm={"engine_kwargs": {"distributed_executor_backend": "mp"}},
        headrace={"engine_timeout_s": 10},
    )
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


class Load:
    """A request every 0.7 s: chats and completions, streamed and not."""

    def __init__(self, url: str) -> None:
        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)
        self.asked: list[Asked] = []
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        asking = asyncio.create_task(self._ask_on())
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.gather(*self._tasks)

    async def _ask_on(self) -> None:
        for kind in itertools.cycle(("chat stream", "completion stream", "chat", "completion")):
            self._tasks.append(asyncio.create_task(self._ask(kind)))
            await asyncio.sleep(EVERY_S)

    async def _ask(self, kind: str) -> None:
        asked = Asked(time.monotonic(), kind)
        self.asked.append(asked)
        common = {"model": MODEL_ID, "max_tokens": 24, "temperature": 0, "stream": kind.endswith("stream"),
                  "extra_body": {"ignore_eos": True}}
        try:
            if kind.startswith("chat"):
                message = {"role": "user", "content": "Tell me about the sea."}
                answer = await self._client.chat.completions.create(messages=[message], **common)
            else:
                answer = await self._client.completions.create(prompt="The sea is", **common)
            if not common["stream"]:
                asked.finished = answer.choices[0].finish_reason == "length"
            else:
                async for chunk in answer:
                    asked.chunks += 1
                    asked.finished |= chunk.choices[0].finish_reason == "length"
        except (OpenAIError, OSError) as error:
            asked.error = f"{type(error).__name__}: {error}"
        except Exception as error:  # httpx's, from a stream that breaks
            asked.error = f"{type(error).__name__}: {error}"
        asked.ended_s = time.monotonic()


def replicas(cluster: ClusterProcess) -> list[psutil.Process]:
    return [one for one in cluster.children() if "HeadraceServer" in title(one)]


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()) or process.name()
    return ""


def engine_core(replica: psutil.Process) -> psutil.Process:
    return next(one for one in replica.children(recursive=True) if "EngineCore" in title(one))


def engine_worker(replica: psutil.Process) -> psutil.Process:
    return next(one for one in replica.children(recursive=True) if "Worker" in title(one))


def ready(cluster: ClusterProcess) -> int:
    return int(cluster.http.get("/readyz").json()["ready"])


def fault(
    cluster: ClusterProcess, of: Callable[[psutil.Process], psutil.Process], signal_number: int
) -> tuple[list[Asked], float, float]:
    """Requests around a fault at one process; when it happened, and when the replica's process had ended."""

    async def scenario() -> tuple[list[Asked], float, float]:
        load = Load(cluster.url)
        async with load.running():
            await asyncio.sleep(6)
            victim = replicas(cluster)[0]
            family = [victim, *victim.children(recursive=True)]
            at_s = time.monotonic()
            os.kill(of(victim).pid, signal_number)
            await asyncio.to_thread(
                until, lambda: not any(one.is_running() and one.status() != "zombie" for one in family), 40,
                lambda: f"alive: {[title(one) for one in family if one.is_running()]}",
            )
            gone_s = time.monotonic()
            await asyncio.sleep(6)
            await asyncio.to_thread(until, lambda: ready(cluster) == 2, HEAL_S)
            await asyncio.sleep(4)
        return load.asked, at_s, gone_s

    until(lambda: ready(cluster) == 2, HEAL_S)
    return asyncio.run(scenario())


def check(asked: list[Asked], at_s: float) -> None:
    new = [one for one in asked if one.at_s > at_s]
    assert len(new) > 10
    assert [one for one in new if one.error or not one.finished] == []
    assert [one for one in asked if not one.finished and not one.error] == [], "a cut answer looks complete"
    cut = [one for one in asked if one.error]
    assert all(one.chunks for one in cut), "what had given nothing to the client was tried elsewhere"
    assert all("failed" in one.error for one in cut), cut


@pytest.mark.parametrize(
    "of", [engine_core, pytest.param(engine_worker, marks=pytest.mark.long)], ids=["core", "worker"]
)
def test_a_killed_engine(cluster: ClusterProcess, of: Callable[[psutil.Process], psutil.Process]) -> None:
    asked, at_s, gone_s = fault(cluster, of, signal.SIGKILL)
    check(asked, at_s)
    assert gone_s - at_s < 5


@pytest.mark.long
def test_a_killed_replica(cluster: ClusterProcess) -> None:
    asked, at_s, _ = fault(cluster, lambda replica: replica, signal.SIGKILL)
    check(asked, at_s)


@pytest.mark.long
def test_a_frozen_engine(cluster: ClusterProcess) -> None:
    asked, at_s, gone_s = fault(cluster, engine_core, signal.SIGSTOP)
    check(asked, at_s)
    assert 10 <= gone_s - at_s < 20


def test_nothing_is_left(cluster: ClusterProcess, tmp_path: Path) -> None:
    until(lambda: ready(cluster) == 2, HEAL_S)
    _, leftovers = cluster.stop()
    assert leftovers == []
