"""The control endpoints of the ingress: what each asks of the replicas and the controller, and what it answers."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_dashboard import PLAN
from fake_store import FakeStore
from synthetic_engine import SyntheticEngine

from cluster.live import SettingsJudge
from replicas import questions, served
from replicas.actor_calls import ReplicaUnavailable
from replicas.ranks import ServedModel
from router.admin import ThresholdsUpdate
from router.dashboard.prediction import PredictionRequest
from router.front_door import NO_REPORTS
from router.gate import open_desk
from router.limits import DEFAULT_LIMITS
from router.live_settings import SettingsOffice
from router.replica_watch import ReplicaWatch, Report
from scheduler.messages import Apply
from scheduler.rejection import Rejection
from scheduler.thresholds import Thresholds
from scheduler.wire import answer_of, read_question

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")

CONFIGURED = Thresholds(policy="nested_wait", max_running=40)
EVENT = {"at_unix_s": 1.7e9, "replica": "a", "old_version": 0, "new_version": 1}


class Controller:
    """Stands for the controller's actor handle."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.arguments: tuple[Any, ...] = ()
        self.answers: dict[str, Any] = {
            "state": {"passes": 3, "period_s": 5.0, "replicas": {"a": {"decision": "settled"}}},
            "events": {"events": [EVENT]},
        }

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._answer(method, *arguments))

    def _answer(self, method: str, *arguments: Any) -> Any:
        self.asked.append(method)
        self.arguments = arguments
        answer: Future[Any] = Future()
        given = self.answers[method]
        (answer.set_exception if isinstance(given, Exception) else answer.set_result)(given)
        return SimpleNamespace(future=lambda: answer)


def office() -> SettingsOffice:
    """The settings of both models, as deployed."""
    found = SettingsOffice(FakeStore(), SettingsJudge({"m": {}, "n": {}}), lambda _: None)
    found.settings = {model: {"targets": {"tpot_s": 0.5}, "controller": {"profile": "cpu-smollm2"}} for model in "mn"}
    return found


class Application:
    """An ingress over two replicas that judge what they are offered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from router import ingress as ingress_module
        from router.in_flight import InFlight

        self.engines = {name: SyntheticEngine(CONFIGURED, engine_id=name) for name in "ab"}
        self.calls: list[tuple[str, str, Any]] = []
        self.listed = 0
        self.silent: set[str] = set()
        self.later: set[str] = set()
        self.controller = Controller()
        monkeypatch.setattr(questions, "call_replica", self.call_replica)
        monkeypatch.setattr(served, "replica_ids", self.replica_ids)
        self.ingress = object.__new__(ingress_module.HeadraceIngress)
        self.ingress._app_name = "headrace"
        self.ingress._models = {f"HeadraceServer:{model}": ServedModel(model) for model in "mn"}
        self.ingress._in_flight = InFlight()
        self.ingress._controller, self.ingress._keeper = self.controller, None
        self.ingress.replica_watch = ReplicaWatch(self.ingress._list_engines, questions.ask_stats)
        self.ingress._office = office()
        self.ingress.desk = open_desk((), DEFAULT_LIMITS, {}, NO_REPORTS, {})

    def replica_ids(self, app_name: str) -> dict[str, str]:
        assert app_name == "headrace"
        self.listed += 1
        deployments = {"a": "HeadraceServer:m", "b": "HeadraceServer:n"}
        return {name: f"SERVE_REPLICA::headrace#{deployments[name]}#{name}" for name in self.engines}

    async def call_replica(
        self, actor_name: str, method: str, *, rank: int, timeout_s: float = 5.0, **arguments: Any
    ) -> bytes:
        name = actor_name.rpartition("#")[2]
        self.calls.append((name, method, arguments.get("cursor")))
        if name in self.silent:
            raise ReplicaUnavailable(f"replica {name} did not answer {method}")
        if name in self.later:
            return b'{"schema": 2}'
        engine = self.engines[name]
        if method != "apply_thresholds":
            return answer_of(engine.stats() if method == "stats" else engine.report(**arguments))
        offer = read_question(arguments["offer"])
        assert isinstance(offer, Apply)
        return answer_of(engine.active.offer(offer))

    def watched(self) -> list[Report]:
        return list(self.ingress.replica_watch.latest().values()) or [Report("", "", None, "not listed yet", None)]

    def ask(self, endpoint: str, *arguments: Any) -> tuple[int, dict[str, Any]]:
        response = asyncio.run(getattr(self.ingress, endpoint)(*arguments))
        return response.status_code, json.loads(response.body)

    def put(self, **body: Any) -> tuple[int, dict[str, Any]]:
        return self.ask("put_thresholds", ThresholdsUpdate.model_validate(body))

    def asked(self) -> list[tuple[str, Any]]:
        """Methods and cursors, of all replicas alike."""
        return sorted({(method, cursor) for _, method, cursor in self.calls})


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Application:
    return Application(monkeypatch)


def test_readiness_is_known_from_the_watch_alone(application: Application) -> None:
    application.later = {"b"}

    async def main() -> list[Any]:
        watching = asyncio.create_task(application.ingress.replica_watch.run())
        answers = [await application.ingress.readyz()]
        while not all(report.is_ready for report in application.watched()):
            await asyncio.sleep(0.01)
        watching.cancel()
        asked = len(application.calls)
        answers.append(await application.ingress.readyz())
        assert len(application.calls) == asked
        return answers

    before, after = asyncio.run(main())
    assert (before.status_code, json.loads(before.body)["ready"]) == (503, 0)
    assert (after.status_code, json.loads(after.body)) == (200, {
        "status": "ready", "ready": 2, "replicas": 2, "models_without_replica": [],
    })
    assert application.asked() == [("stats", None)]


def test_a_stopping_ingress_turns_requests_away_and_finishes_those_in_flight(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

    from router import ingress as ingress_module
    from router.attempts import Attempts

    async def chunks(self: Any, **_: Any) -> Any:
        for number in "012":
            yield number

    monkeypatch.setattr(ingress_module.OpenAiIngress, "_get_response", chunks)
    ingress, body = application.ingress, SimpleNamespace(request_id="r", model="m")
    ingress._attempts = Attempts()

    async def stop_while_one_runs() -> None:
        running = ingress._get_response(body=body, call_method="chat")
        assert await anext(running) == "0"
        assert await ingress.stop_admitting() == 1
        with pytest.raises(OpenAIHTTPException) as error:
            await anext(ingress._get_response(body=body, call_method="chat"))
        rejection = Rejection.from_json(error.value.message)
        assert error.value.status_code == 503 and rejection and "the server is stopping" in rejection.text
        assert [chunk async for chunk in running] == ["1", "2"]
        assert await ingress.stop_admitting() == 0

    asyncio.run(stop_while_one_runs())
    assert application.ask("readyz")[0] == 503, "a load balancer sends no more"
    assert application.calls == []


def test_a_controller_that_ray_has_restarted_is_told_the_settings_in_force(application: Application) -> None:
    """Ray gives it the arguments with which the first one was started."""
    ingress, controller = application.ingress, application.controller
    ingress._untold, ingress._controller_since_unix_s = asyncio.Event(), 0.0
    ingress._outcomes = SimpleNamespace(controller_up=False)

    def is_told_after(since_unix_s: float) -> bool:
        controller.answers["keep_running"] = since_unix_s
        ingress._untold.clear()
        assert asyncio.run(ingress._keeps_running(controller))
        return bool(ingress._untold.is_set())

    assert is_told_after(10.0) and not is_told_after(10.0)
    assert is_told_after(20.0), "another process"
    ingress._office.settings = {}
    assert not is_told_after(30.0), "before this ingress knows any settings it has none to tell"


def test_each_model_has_its_own_longest_wait(application: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    from router import ingress as ingress_module

    waits: list[float | None] = []

    class Attempts:
        async def answer(self, send: Any, request_id: str, max_wait_s: float | None) -> Any:
            waits.append(max_wait_s)
            yield "x"

    ingress = application.ingress
    ingress._attempts = Attempts()
    ingress._office.settings = {"m": {"max_wait_s": 5.0}, "n": {"max_wait_s": None}, "o": {}}
    ingress.desk = open_desk((), DEFAULT_LIMITS, {}, NO_REPORTS, ingress._office.settings)
    monkeypatch.setattr(
        ingress_module, "_get_serve_request_context", lambda: SimpleNamespace(_internal_request_id="r")
    )

    async def ask(model: str) -> None:
        body = SimpleNamespace(request_id="r", model=model)
        async for _ in ingress._get_response(body=body, call_method="chat"):
            pass

    for model in ("m", "m:adapter", "n", "o"):
        asyncio.run(ask(model))
    assert waits == [5.0, 5.0, None, 600.0]


def test_thresholds_are_asked_for_without_records(application: Application) -> None:
    application.silent = {"b"}
    status, body = application.ask("get_thresholds")
    assert (status, body["replicas"]["a"]["max_running"]) == (200, 40)
    assert body["replicas"]["b"] == {"error": "replica b did not answer telemetry"}
    assert application.asked() == [("telemetry", None)]


def test_an_update_lists_the_replicas_once_and_asks_each_once(application: Application) -> None:
    status, body = application.put(thresholds={"max_running": 8})
    assert status == 200
    assert {name: ack["version"] for name, ack in body["replicas"].items()} == {"a": 1, "b": 1}
    assert application.listed == 1
    assert sorted(application.calls) == [
        (name, method, None) for name in "ab" for method in ("apply_thresholds", "telemetry")
    ]
    expected = replace(CONFIGURED, version=1, max_running=8, pinned=True, reason="set by an operator")
    assert [engine.active.current().thresholds for engine in application.engines.values()] == [expected] * 2


def test_an_update_of_a_replica_of_another_release_changes_nothing(application: Application) -> None:
    application.later = {"b"}
    status, body = application.put(thresholds={"max_running": 8})
    assert status == 503
    assert "replica b cannot be set from here: the replica speaks schema version 2" in body["error"]["message"]
    assert application.engines["a"].active.current().thresholds == CONFIGURED


def test_the_state_has_no_events_and_names_what_cannot_be_read(application: Application) -> None:
    application.later = {"b"}
    status, state = application.ask("admin_state")
    assert status == 200
    assert state.keys() == {"application", "at_unix_s", "replicas", "controller", "front_door"}
    assert state["front_door"] == {"rejected": 0, "ingresses": 1}
    assert state["controller"] == {"alive": True, "passes": 3, "period_s": 5.0}
    assert state["replicas"]["a"]["decision"] == "settled"
    assert {name: replica["model"] for name, replica in state["replicas"].items()} == {"a": "m", "b": "n"}
    assert not state["replicas"]["b"]["reachable"]
    assert "speaks schema version 2" in state["replicas"]["b"]["reason"]
    assert application.controller.asked == ["state"]
    assert application.asked() == [("telemetry", None)]


def test_events_come_from_the_controller_alone(application: Application) -> None:
    assert application.ask("admin_events") == (200, {"events": [EVENT], "controller": {"alive": True}})
    assert application.controller.asked == ["events"]
    assert application.calls == [] and application.listed == 0


def test_events_say_when_the_controller_does_not_answer(application: Application) -> None:
    application.controller.answers["events"] = RuntimeError("restarting")
    status, body = application.ask("admin_events")
    assert (status, body["events"], body["controller"]["alive"]) == (200, [], False)
    assert "the controller does not answer" in body["controller"]["reason"]
    application.ingress._controller = None
    assert application.ask("admin_events")[1]["controller"]["reason"].startswith("automatic tuning is off")


def test_the_overview_is_one_question_to_the_controller_and_one_to_each_replica(application: Application) -> None:
    application.silent = {"b"}
    prospects = {"now": PLAN, "one_more": PLAN, "one_less": None}
    application.controller.answers["overview"] = {
        "passes": 3, "period_s": 5.0, "prospects": {"m": prospects, "n": "no replica has reported yet"}, "changes": [],
        "replicas": {"a": {"decision": "settled", "recent": {"completed": 3, "good": 3}, "still_s": 0.0}},
    }
    status, found = application.ask("admin_overview")
    assert status == 200 and application.controller.asked == ["overview"]
    assert "No replica of n answers: its requests fail." in found["health"]["sentences"]
    assert found["replicas"]["b"]["oddities"][0]["name"] == "silent"
    assert found["models"]["m"]["load"]["share"] > 1 and found["models"]["n"]["load"]["headline"] == "not known"
    application.ingress._controller = None
    status, found = application.ask("admin_overview")
    assert status == 200 and found["controller"]["alive"] is False


def test_the_history_is_the_controller_s_or_nothing(application: Application) -> None:
    points = {"started_unix_s": 7.0, "replicas": {"a": {"model": "m", "at_unix_s": [5.0]}}}
    application.controller.answers["history"] = points
    assert application.ask("admin_history", 4.0) == (
        200, {"replicas": points["replicas"], "controller": {"alive": True, "started_unix_s": 7.0}}
    )
    assert application.controller.arguments == (4.0,)
    application.controller.answers["history"] = RuntimeError("restarting")
    status, body = application.ask("admin_history", 4.0)
    assert (status, body["replicas"], body["controller"]["alive"]) == (200, {}, False)


def predict(application: Application, **asked: Any) -> tuple[int, dict[str, Any]]:
    return application.ask("admin_predict", PredictionRequest.model_validate(asked))


def test_a_prediction_is_the_controller_s_for_the_values_as_they_would_apply(application: Application) -> None:
    application.controller.answers["predict"] = {"now": PLAN, "then": dict(PLAN, goodput_rps=9.0)}
    status, body = predict(application, model="m", thresholds={"max_running": 8}, settings={"targets": {"ttft_s": 3}})
    assert status == 200 and body["sentence"].startswith("More requests would be in time")
    model, values = application.controller.arguments
    assert (model, values["max_running"], values["targets"]["ttft_s"]) == ("m", 8, 3.0)
    assert application.asked() == [("telemetry", None)], "nothing is applied"
    assert {name for name, _, _ in application.calls} == {"a"}, "only the model's engines are asked"


@pytest.mark.parametrize(("asked", "status", "said"), [
    ({}, 400, "model is missing; the models are m, n"),
    ({"model": "x"}, 404, "model = 'x' does not exist"),
    ({"model": "m", "thresholds": {"max_running": 0}}, 400, "thresholds.max_running = 0 is not allowed"),
    ({"model": "m", "settings": {"targets": {"tpot_s": 0}}}, 400, "tpot_s"),
    ({"model": "n", "thresholds": {"max_running": 3}}, 503, "replica b does not answer"),
])
def test_a_wrong_prediction_is_refused_in_a_sentence(
    application: Application, asked: dict[str, Any], status: int, said: str
) -> None:
    application.silent = {"b"}
    code, body = predict(application, **asked)
    assert code == status and said in body["error"]["message"]
    assert application.controller.asked == []


def test_a_prediction_needs_a_controller_that_knows_something(application: Application) -> None:
    application.controller.answers["predict"] = {"reason": "no replica has reported yet"}
    assert predict(application, model="m")[0] == 409
    application.controller.answers["predict"] = RuntimeError("restarting")
    code, body = predict(application, model="m")
    assert code == 503 and "the controller does not answer" in body["error"]["message"]
