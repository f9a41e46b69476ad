"""How HTTP requests end, for the metrics: each once, under one outcome, and what is in flight adds up."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
import pytest
from fake_engine_app import CHAT, MODEL, FakeApplication, chat
from fake_meter import FakeMeter
from fastapi.testclient import TestClient
from ray.exceptions import TaskCancelledError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

from router.auth import API_KEY_VARIABLE
from router.limits import KeyLimits, Limits
from router.outcomes import Outcomes, Watched
from scheduler.metrics import (
    CONTROLLER_UP,
    HTTP_IN_FLIGHT,
    HTTP_REQUESTS,
    HTTP_STARTED,
    REQUEST_SECONDS,
    TTFT_SECONDS,
)
from scheduler.rejection import TOO_LATE, TOO_MANY, Kind, Rejection

Message = dict[str, Any]
OF_MODEL = {"model": MODEL, "tenant": "none"}
EVENTS = [("content-type", "text/event-stream; charset=utf-8")]


def begin(status: int = 200, headers: Any = ()) -> Message:
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    return {"type": "http.response.start", "status": status, "headers": encoded}


def body(text: bytes = b"", *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


class Watch:
    """Requests answered by hand, each message at its second."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.meter = FakeMeter()
        self.outcomes = Outcomes(self.meter, lambda: self.now_s)

    def answer(self, *messages: tuple[float, Message], error: BaseException | None = None) -> tuple[str, str]:
        """The outcome and reason under which the request was counted."""
        sent: list[Message] = []
        before = dict(self.meter.values)

        async def serve() -> None:
            async def send(message: Message) -> None:
                sent.append(message)

            with Watched(self.outcomes, {}) as watched:
                watched.model = MODEL
                noting = watched.noting(send)
                for at_s, message in messages:
                    self.now_s = at_s
                    await noting(message)
                if error is not None:
                    raise error

        with contextlib.suppress(asyncio.CancelledError, RuntimeError, TaskCancelledError):
            asyncio.run(serve())
        assert sent == [message for _, message in messages], "nothing is changed"
        counted = [
            dict(labels) for (name, labels), value in self.meter.values.items()
            if name == HTTP_REQUESTS.exposed and value > before.get((name, labels), 0)
        ]
        assert len(counted) == 1 and counted[0]["model"] == MODEL
        return counted[0]["outcome"], counted[0]["reason"]


def test_a_whole_stream_is_completed_with_the_times_of_its_first_chunk_and_its_end() -> None:
    watch = Watch()
    stream = (begin(headers=EVENTS), body(b"data: a\n\n", more=True), body(b"data: b\n\n", more=True), body())
    assert watch.answer(*zip((0.1, 0.5, 0.9, 1.0), stream, strict=True)) == ("completed", "")
    assert watch.meter.seconds(TTFT_SECONDS, **OF_MODEL) == [0.5]
    assert watch.meter.seconds(REQUEST_SECONDS, **OF_MODEL) == [1.0]


def test_an_answer_in_one_piece_has_no_first_token_of_its_own() -> None:
    watch = Watch()
    assert watch.answer((2.0, begin()), (2.0, body(b"{}"))) == ("completed", "")
    assert not watch.meter.seconds(TTFT_SECONDS, **OF_MODEL)
    assert watch.meter.seconds(REQUEST_SECONDS, **OF_MODEL) == [2.0]


@pytest.mark.parametrize(("status", "counted"), [
    (400, ("refused", "http_400")), (404, ("refused", "http_404")), (429, ("rejected", "other")),
    (500, ("failed", "http_500")), (503, ("unavailable", "http_503")),
])
def test_errors_count_under_one_outcome_and_have_no_times(status: int, counted: tuple[str, str]) -> None:
    watch = Watch()
    assert watch.answer((1.0, begin(status)), (1.0, body(b"{}"))) == counted
    assert not watch.meter.observed


def test_a_stream_that_ends_with_an_error_event_has_failed() -> None:
    begun = begin(headers=EVENTS), body(b"data: a\n\n", more=True)
    broken = (*begun, body(b'data: {"error": {}}\n\n', more=True), body())
    assert Watch().answer(*((0.1, one) for one in broken)) == ("failed", "error_event")
    quoted = (*begun, body(b'data: {"text": "data: {\\"error\\":"}\n\n', more=True), body())
    assert Watch().answer(*((0.1, one) for one in quoted))[0] == "completed", "a model may write about errors"


def test_a_client_that_hangs_up_is_no_failure() -> None:
    half = ((0.1, begin(headers=EVENTS)), (0.2, body(b"data: a\n\n", more=True)))
    assert Watch().answer(*half) == ("hung_up", "")
    assert Watch().answer(*half, error=asyncio.CancelledError()) == ("hung_up", "")
    assert Watch().answer(*half, error=TaskCancelledError()) == ("hung_up", ""), "as Ray says it"
    assert Watch().answer() == ("hung_up", ""), "before its body was here"
    assert Watch().answer(*half, error=RuntimeError()) == ("failed", "RuntimeError")


@pytest.mark.parametrize("error", [None, asyncio.CancelledError(), TaskCancelledError()])
def test_a_client_that_hangs_up_after_the_last_event_has_had_the_whole_answer(error: BaseException | None) -> None:
    stream = [(0.1, begin(headers=EVENTS)), (0.2, body(b"data: {}", more=True))]
    assert Watch().answer(*stream, (0.3, body(b"data: [DONE]", more=True)), error=error) == ("completed", "")
    assert Watch().answer(*stream, error=error) == ("hung_up", "")
    broken = Watch().answer(*stream, (0.3, body(b"data: [DONE]", more=True)), error=RuntimeError())
    assert broken == ("failed", "RuntimeError")


def test_what_breaks_because_the_client_has_gone_is_no_failure_either() -> None:
    watch = Watch()

    async def serve(gone: bool) -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect" if gone else "http.request"}

        async def send(message: Message) -> None:
            pass

        with Watched(watch.outcomes, {}) as watched:
            await watched.hearing(receive)()
            await watched.noting(send)(begin(headers=EVENTS))
            await watched.noting(send)(body(b'data: {"error": {}}\n\n', more=True))

    asyncio.run(serve(True))
    asyncio.run(serve(False))
    assert counted(watch.meter) == {("none", "hung_up", ""): 1, ("none", "failed", "error_event"): 1}


def test_started_is_what_ended_and_what_is_in_flight() -> None:
    watch = Watch()
    with Watched(watch.outcomes, {}):
        watch.answer((0.1, begin()), (0.1, body()))
        watch.answer((0.1, begin(500)), (0.1, body()))
        asyncio.run(watch.outcomes.tell())
        ended = sum(value for (name, _), value in watch.meter.values.items() if name == HTTP_REQUESTS.exposed)
        assert (watch.meter.value(HTTP_STARTED), ended, watch.meter.value(HTTP_IN_FLIGHT)) == (3, 2, 1)
    asyncio.run(watch.outcomes.tell())
    assert watch.meter.value(HTTP_IN_FLIGHT) == 0
    assert watch.meter.value(CONTROLLER_UP) is None, "without a controller there is no series"


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)

    def serve(**options: Any) -> tuple[FakeApplication, FakeMeter]:
        application, meter = FakeApplication(**options).stand_in(monkeypatch), FakeMeter()
        application.desk.outcomes = Outcomes(meter)
        return application, meter

    return serve


def post(application: FakeApplication, **changes: Any) -> httpx.Response:
    client = TestClient(application.app, raise_server_exceptions=False)
    return client.post(CHAT, json=chat(**changes))


def counted(meter: FakeMeter) -> dict[tuple[str, str, str], float]:
    return {
        (dict(labels)["model"], dict(labels)["outcome"], dict(labels)["reason"]): value
        for (name, labels), value in meter.values.items() if name == HTTP_REQUESTS.exposed
    }


def test_the_ingress_counts_what_it_answers(serving: Any) -> None:
    application, meter = serving()
    assert post(application).status_code == 200
    assert post(application, model="other").status_code == 404
    assert counted(meter) == {(MODEL, "completed", ""): 1, ("none", "refused", "http_404"): 1}, "no client's word"


@pytest.mark.parametrize(("reason", "word"), [(TOO_LATE, "too_late"), (TOO_MANY, "queue_full"), ("mine", "other")])
def test_an_engine_s_rejection_counts_with_its_reason(serving: Any, reason: str, word: str) -> None:
    application, meter = serving()
    rejection = Rejection(reason, 3)
    application.server.failure = OpenAIHTTPException(
        status_code=Kind.REJECTED.http_status, message=rejection.as_json(), type="rate_limit_error"
    )
    assert post(application).status_code == 429
    assert counted(meter) == {(MODEL, "rejected", word): 1}


def test_a_key_s_limit_counts_as_such(serving: Any) -> None:
    application, meter = serving(limits=Limits(keys={"anonymous": KeyLimits(requests_per_minute=1)}))
    assert [post(application).status_code for _ in range(2)] == [200, 429]
    assert counted(meter)[(MODEL, "rejected", "key_limit")] == 1
