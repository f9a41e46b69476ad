"""A small application on a real Serve, with replicas that only count: a replica hears of its stop, and finishes."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from cluster.shutdown import finish_requests
from replicas.actor_calls import INGRESS_CLASS, SERVER_CLASS, ingress_ids, replica_ids
from replicas.draining import Draining
from scheduler.messages import Ack, Drain
from scheduler.wire import answer_of, read_question

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")
from ray import serve  # noqa: E402

APP = "counting"
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(400)


class Engine:
    """The channel of an engine that notes what it is told, and ends what runs when told so."""

    def __init__(self, record: Path) -> None:
        self.record = record
        self.ended = asyncio.Event()

    async def ask(self, question: bytes, *, timeout_s: float) -> bytes:
        asked = read_question(question)
        assert isinstance(asked, Drain)
        with self.record.open("a") as record:
            record.write("all\n" if asked.end else "waiting\n")
        if asked.end:
            self.ended.set()
        return answer_of(Ack(accepted=True, active_version=-1))


class Server:
    """Counts, a number every 0.1 s; `begun` and `ended` as `HeadraceServer` has them."""

    async def __init__(self, record: str) -> None:  # type: ignore[misc]  # Serve awaits it
        from replicas.ray_patches import on_graceful_shutdown

        self.engine = Engine(Path(record) / serve.get_replica_context().replica_id.unique_id)
        self.draining = Draining([self.engine])
        loop = asyncio.get_running_loop()
        on_graceful_shutdown(lambda within_s: loop.call_soon_threadsafe(self.draining.begin, within_s))

    async def count(self, to: int) -> AsyncGenerator[Any, None]:
        if self.draining.begun:
            yield "recalled"
            return
        for number in range(to):
            if self.engine.ended.is_set():
                yield "cut"
                return
            yield number
            await asyncio.sleep(0.1)

    async def drain(self, within_s: float) -> None:
        self.draining.begin(within_s)


api = FastAPI()


@serve.ingress(api)
class Ingress:
    """Passes on what the servers count."""

    def __init__(self, servers: Any) -> None:
        from router.in_flight import InFlight

        self.servers, self.in_flight = servers, InFlight()

    async def count(self, to: int) -> AsyncGenerator[Any, None]:
        with self.in_flight.request("r"):
            async for number in self.servers.options(stream=True).count.remote(to):
                yield number

    async def stop_admitting(self) -> int:
        self.in_flight.close()
        return self.in_flight.count


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas do not find the tests' modules
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each replica's engine has been told, a file each."""
    return tmp_path_factory.mktemp("told")


def deploy(record: Path) -> Any:
    same = {
        "ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_wait_loop_s": 0.2, "graceful_shutdown_timeout_s": 300,
        "max_ongoing_requests": 100,
    }
    server = serve.deployment(Server).options(name=f"{SERVER_CLASS}:m", num_replicas=2, **same)
    ingress = serve.deployment(Ingress).options(name=INGRESS_CLASS, **same)
    return serve.run(ingress.bind(server.bind(str(record))), name=APP, route_prefix="/")


class Stream(threading.Thread):
    """One request and what came of it."""

    def __init__(self, app: Any, to: int) -> None:
        super().__init__(daemon=True)
        self.app, self.to = app, to
        self.got: list[Any] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for number in self.app.options(stream=True).count.remote(self.to):
                self.got.append(number)
        except Exception as error:
            self.error = error

    def done(self) -> list[Any]:
        self.join(120)
        assert self.error is None, self.error
        return self.got


def begun(streams: list[Stream]) -> None:
    deadline_s = time.monotonic() + 120
    while not all(stream.got for stream in streams):
        assert time.monotonic() < deadline_s, [stream.error for stream in streams]
        time.sleep(0.02)


def told(record: Path) -> list[str]:
    return [path.read_text() for path in sorted(record.iterdir())]


def test_a_replica_that_serve_stops_is_told_at_once_and_its_streams_finish(cluster: None, record: Path) -> None:
    app = deploy(record)
    streams = [Stream(app, 300) for _ in range(8)]
    begun(streams)
    assert told(record) == []
    deleted = threading.Thread(target=serve.delete, args=(APP,), daemon=True)
    deleted.start()
    while not told(record):
        assert all(stream.is_alive() for stream in streams), "the replica is not told while its streams run"
        time.sleep(0.02)
    assert [stream.done() for stream in streams] == [list(range(300))] * 8
    deleted.join(120)
    assert told(record) == ["waiting\n"] * 2


def test_an_operator_s_stop_finishes_what_runs_turns_new_requests_away_and_cuts_the_rest(
    cluster: None, record: Path
) -> None:
    """Asked again, once the short streams have finished."""
    before = told(record)
    app = deploy(record)
    assert len(replica_ids(APP)) == 2 and len(ingress_ids(APP)) == 1
    short, endless = [Stream(app, 200) for _ in range(3)], [Stream(app, 100_000) for _ in range(2)]
    begun([*short, *endless])
    said: list[str] = []
    late: list[Stream] = []

    def at_once() -> bool:
        if not late:
            late.append(Stream(app, 1))
        return not any(stream.is_alive() for stream in [*short, *late])

    assert finish_requests(APP, 300.0, said.append, at_once) == 2
    assert said[0] == "finishing 5 requests, at most 300 s; Ctrl-C again ends at once"
    assert said[-1] == "ended 2 requests before they were complete"
    assert [stream.done() for stream in short] == [list(range(200))] * 3
    assert [stream.done()[-1] for stream in endless] == ["cut"] * 2
    assert "OpenAIHTTPException" in str(late[0].error) and late[0].got == []
    assert sorted(told(record)) == sorted([*before, *["waiting\nall\n"] * 2])
