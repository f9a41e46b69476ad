"""The `headrace` command against a server with the application's own rules."""

from __future__ import annotations

import functools
import json
import shlex
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from synthetic_engine import SyntheticEngine
from typer.testing import CliRunner

from cluster import cli as cluster_cli
from cluster import render
from headrace import cli
from router.admin import AdminError, ThresholdsUpdate, plan_update
from scheduler.messages import Apply
from scheduler.thresholds import SegmentThreshold, Thresholds

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGURED = Thresholds(
    policy="nested_wait", segments=(SegmentThreshold(end_output_tokens=64, total=4),), max_running=40,
    token_budget=900,
)
Result = tuple[int, str, str]


class Server:
    """The control endpoints over engines that judge what they are offered."""

    def __init__(self) -> None:
        self.engines = {name: SyntheticEngine(CONFIGURED, engine_id=name) for name in ("left", "right")}
        self.unreachable: set[str] = set()
        self.model_of_gone = "m"
        self.puts: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self.answer: httpx.Response | None = None
        self.events: list[dict[str, Any]] = [
            {"at_unix_s": 1.7e9, "replica": "left", "old_version": 3, "new_version": 4, "accepted": True,
             "reason": "1.20 requests/s of 3.40 possible [no bottleneck]", "old": {}, "new": {"version": 4}},
        ]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        if self.answer is not None:
            return self.answer
        route = (request.method, request.url.path)
        if route == ("GET", "/admin/state"):
            return httpx.Response(200, json=self.state())
        if route == ("GET", "/admin/events"):
            return httpx.Response(200, json={"events": self.events, "controller": self.state()["controller"]})
        if route == ("GET", "/admin/thresholds"):
            return httpx.Response(200, json={"replicas": {name: self.entry(name) for name in self.engines}})
        assert route == ("PUT", "/admin/thresholds")
        return self.put(json.loads(request.content))

    def entry(self, name: str) -> dict[str, Any]:
        if name in self.unreachable:
            return {"error": "no answer within 5 s"}
        return self.engines[name].report(None).shown()["thresholds"]  # type: ignore[no-any-return]

    def put(self, body: dict[str, Any]) -> httpx.Response:
        self.puts.append(body)
        try:
            telemetry = {name: engine.report(None) for name, engine in self.engines.items()}
            planned = plan_update(ThresholdsUpdate.model_validate(body), telemetry)
        except AdminError as error:
            return httpx.Response(error.status_code, json={"error": {"message": str(error)}})
        acks = {
            name: self.engines[name].active.offer(Apply(thresholds=wanted, automatic=False))
            for name, wanted in planned.items()
        }
        results = {
            name: {"accepted": ack.accepted, "version": ack.active_version, "reason": ack.reason}
            for name, ack in acks.items()
        }
        return httpx.Response(200, json={"replicas": results})

    def state(self) -> dict[str, Any]:
        report = self.engines["left"].report(None).shown()
        report["gauges"] = None
        known = {
            "rate_rps": 4.25, "finished_seen": 200, "time_model": {"d0_s": 0.01, "r2": 0.987},
            "fluid": {"load": 0.4125, "iteration_time_s": 0.01907, "memory_tokens": 18554.2,
                      "kv_capacity_tokens": 137000},
            "forecast": {
                "bottleneck": "TPOT target", "goodput_rps": 3.75, "capacity_rps": 3.8, "queue_limit": 9, "cold": False,
                "rate_rps": {"value": 4.25, "low": 4.0, "high": 4.5}, "iteration_s": None, "survival_samples": 198.0,
            },
            "decision": "settled [for now]",
        }
        unknown = {"time_model": None, "fluid": None, "forecast": None, "decision": "not seen yet"}
        return {
            "application": "headrace", "at_unix_s": 1.7e9,
            "replicas": {
                "left": {"model": "m", "reachable": True} | report | known,
                "right": {"model": "m", "reachable": True} | report | unknown,
                "gone": {"model": self.model_of_gone, "reachable": False, "reason": "did not answer [telemetry]"},
            },
            "controller": {"alive": False, "reason": "the controller does not answer"},
        }

    def active(self, name: str) -> Thresholds:
        return self.engines[name].active.current().thresholds


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    client = functools.partial(httpx.Client, transport=httpx.MockTransport(server))
    monkeypatch.setattr(httpx, "Client", client)
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)
    monkeypatch.delenv("HEADRACE_URL", raising=False)
    yield server


@pytest.fixture
def headrace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command as the shell does: exit code, stdout, stderr."""
    monkeypatch.setattr(cluster_cli, "out", Console(width=300))

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        code = stop.value.code
        assert code is None or isinstance(code, int)
        return code or 0, captured.out, captured.err

    return run


def test_version_is_the_installed_one(headrace: Any) -> None:
    assert headrace("--version")[:2] == (0, f"headrace {version('headrace')}\n")


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("up", "down", "status", "events", "thresholds", "plan", "bench", "doctor", "model"):
        assert f" {command} " in result.stdout
    nested = CliRunner().invoke(cli.app, ["thresholds", "--help"]).stdout
    for command in ("get", "set", "pin", "auto"):
        assert f" {command} " in nested


def test_an_unknown_command_is_asked_wrongly(headrace: Any) -> None:
    code, out, err = headrace("serv")
    assert (code, out) == (2, "")
    assert "serv" in err


def test_a_broken_configuration_is_asked_wrongly(headrace: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("aplications: []")
    for command in ("up", "down"):
        code, out, err = headrace(command, str(path))
        assert (code, out) == (2, "")
        assert "aplications: no such key" in err
        assert "did you mean applications?" in err


def test_status_fits_80_columns(
    server: Server, headrace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_cli, "out", Console(width=80))
    _, out, _ = headrace("status")
    assert "…" not in out
    for heading in ("preempted", "rejected", "time model R²", "bottleneck", "queue limit", "known from", "198 outputs"):
        assert heading in out


def test_status_names_the_models_when_there_are_several(server: Server, headrace: Any) -> None:
    assert "left (m)" not in headrace("status")[1]
    server.model_of_gone = "another"
    _, out, _ = headrace("status")
    assert "left (m): settled" in out and "gone (another): not reachable" in out


def test_set_merges_into_the_active_thresholds_and_pins_them(server: Server, headrace: Any) -> None:
    code, out, _ = headrace(
        "thresholds", "set", "max_running=32", "segments=[{end_output_tokens: 128, total: 8}]", "--json"
    )
    assert code == 0
    for name in ("left", "right"):
        assert server.active(name) == replace(
            CONFIGURED, version=1, max_running=32, pinned=True, reason="set by an operator",
            segments=(SegmentThreshold(end_output_tokens=128, total=8),),
        )
    answer = json.loads(out)["replicas"]
    assert answer.keys() == {"left", "right"}
    assert answer["left"] == {"accepted": True, "version": 1, "reason": "set by an operator"}


def test_set_reads_values_as_yaml(server: Server, headrace: Any) -> None:
    code, _, _ = headrace("thresholds", "set", "max_running=null", "max_hold_s=0.5", "token_budget=1000", "--no-pin")
    assert code == 0
    left = server.active("left")
    assert (left.max_running, left.max_hold_s, left.token_budget, left.pinned) == (None, 0.5, 1000, False)


def test_set_changes_one_replica_only(server: Server, headrace: Any) -> None:
    assert headrace("thresholds", "set", "max_running=7", "--replica", "right")[0] == 0
    assert server.active("right").max_running == 7
    assert server.active("left") == CONFIGURED


def test_set_keeps_what_another_operator_changed_meanwhile(
    server: Server, headrace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = server.entry

    def read_before_another_change(name: str) -> dict[str, Any]:
        entry, active = read(name), server.active(name)
        changed = replace(active, version=active.version + 1, token_budget=500)
        server.engines[name].active.offer(Apply(thresholds=changed, automatic=False))
        return entry

    monkeypatch.setattr(server, "entry", read_before_another_change)
    assert headrace("thresholds", "set", "max_running=7")[0] == 0
    for name in ("left", "right"):
        assert (server.active(name).token_budget, server.active(name).max_running) == (500, 7)
    assert len(server.puts) == 1, "all replicas are changed or none"


def test_another_policy_for_all_is_one_request_that_keeps_each_replica_s_other_values(
    server: Server, headrace: Any
) -> None:
    headrace("thresholds", "set", "token_budget=500", "--replica", "left")
    server.puts.clear()
    assert headrace("thresholds", "set", "policy=fcfs")[0] == 0
    assert [put["replica"] for put in server.puts] == [None], "so that new replicas get it too"
    assert [server.active(name).policy for name in ("left", "right")] == ["fcfs", "fcfs"]
    assert (server.active("left").token_budget, server.active("right").token_budget) == (500, CONFIGURED.token_budget)


def test_set_leaves_the_version_to_the_server(server: Server, headrace: Any) -> None:
    headrace("thresholds", "set", "max_running=7", "--replica", "left")
    headrace("thresholds", "set", "max_running=8", "--replica", "left")
    assert server.active("left").version == 2
    assert all("version" not in put["thresholds"] for put in server.puts)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_running=0", "thresholds.max_running = 0"),
        ("max_running=100000", "max_num_seqs = 512"),
        ("max_runing=3", "did you mean max_running?"),
        ("max_hold_s=61", "seconds from 0 to 60"),
        ("mode=strict", "serving"),
    ],
)
def test_set_prints_the_server_s_error(server: Server, headrace: Any, setting: str, said: str) -> None:
    code, out, err = headrace("thresholds", "set", setting)
    assert (code, out) == (1, "")
    assert "HTTP 400: replica left: " in err
    assert said in err
    assert server.active("left") == CONFIGURED


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_running", "'max_running' is not KEY=VALUE"),
        ("=3", "'=3' is not KEY=VALUE"),
        ("types=[", "the value of types is not YAML"),
        ("max_hold_s=.nan", "the value of max_hold_s"),
        ("reason=2026-01-01", "the value of reason"),
    ],
)
def test_set_with_a_malformed_setting_is_asked_wrongly(
    server: Server, headrace: Any, setting: str, said: str
) -> None:
    code, _, err = headrace("thresholds", "set", setting)
    assert code == 2
    assert said in err
    assert server.puts == []


def test_set_on_an_unknown_replica_lists_the_known_ones(server: Server, headrace: Any) -> None:
    code, _, err = headrace("thresholds", "set", "max_running=3", "--replica", "middle")
    assert code == 1
    assert "'middle' does not exist; the replicas are left, right" in err


def test_set_changes_nothing_when_a_replica_does_not_answer(server: Server, headrace: Any) -> None:
    server.unreachable = {"right"}
    code, _, err = headrace("thresholds", "set", "max_running=3")
    assert code == 1
    assert "replica right does not answer" in err
    assert "no answer within 5 s" in err
    assert server.puts == []


def test_set_without_replicas_fails(server: Server, headrace: Any) -> None:
    server.engines = {}
    code, _, err = headrace("thresholds", "set", "max_running=3")
    assert code == 1
    assert "no replica is running yet" in err


def test_pin_and_auto(server: Server, headrace: Any) -> None:
    code, out, _ = headrace("thresholds", "pin", "--replica", "left")
    assert code == 0
    assert "pinned by an operator" in out
    assert server.active("left").pinned
    assert not server.active("right").pinned
    assert server.active("left").same_rule(CONFIGURED)
    assert headrace("thresholds", "auto")[0] == 0
    assert not server.active("left").pinned
    assert server.active("left").version == 2


def test_pin_of_an_unknown_replica_is_rejected_by_the_server(server: Server, headrace: Any) -> None:
    code, _, err = headrace("thresholds", "pin", "--replica", "middle")
    assert code == 1
    assert "HTTP 404: replica = 'middle' does not exist; the replicas are left, right" in err


def test_get_shows_active_thresholds_and_silent_replicas(server: Server, headrace: Any) -> None:
    server.unreachable = {"right"}
    code, out, _ = headrace("thresholds", "get")
    assert code == 0
    left = next(line for line in out.splitlines() if "left" in line)
    for part in ("nested_wait", "to 64: 4", "40", "900", "0.25 s", "auto"):
        assert part in left
    assert "no answer within 5 s" in out


def test_get_json_is_the_server_s_answer(server: Server, headrace: Any) -> None:
    code, out, _ = headrace("thresholds", "get", "--json")
    assert code == 0
    assert json.loads(out)["replicas"]["left"] == json.loads(json.dumps(asdict(CONFIGURED)))


def test_status_shows_replicas_equilibrium_and_a_dead_controller(server: Server, headrace: Any) -> None:
    code, out, _ = headrace("status")
    assert code == 0
    lines = out.splitlines()
    (row,) = [line for line in lines if "left" in line and "nested_wait" in line]
    assert "0 of 40" in row
    (fluid,) = [line for line in lines if "left" in line and "0.41" in line]
    for part in ("4.25", "0.019 s", "18554", "137000", "0.987"):
        assert part in fluid
    assert "left: settled [for now]" in out
    (plan,) = [line for line in lines if "left" in line and "TPOT target" in line]
    for part in ("4.25 ± 0.25", "3.75", "3.80", "198 outputs"):
        assert part in plan
    assert "not reachable: did not answer [telemetry]" in out
    assert "controller: the controller does not answer" in out
    assert "running" not in lines[-1]


def test_events_name_the_replica_the_versions_and_the_reason(server: Server, headrace: Any) -> None:
    code, out, _ = headrace("events")
    assert code == 0
    (event,) = [line for line in out.splitlines() if "left" in line]
    for part in ("2023-11-1", "3 → 4", "yes", "1.20 requests/s of 3.40 possible [no bottleneck]"):
        assert part in event
    assert json.loads(headrace("events", "--json")[1])["events"][0]["new"] == {"version": 4}


def test_events_say_when_no_controller_could_tell_of_any(server: Server, headrace: Any) -> None:
    server.events = []
    assert headrace("events")[:2] == (0, "the controller does not answer\n")
    console = Console(width=300)
    with console.capture() as capture:
        for table in render.events_table({"events": [], "controller": {"alive": True}}):
            console.print(table)
    assert capture.get() == "no change of thresholds yet\n"


def test_status_shows_a_living_controller() -> None:
    state = Server().state() | {"controller": {"alive": True, "period_s": 5.0, "passes": 3}}
    console = Console(width=300)
    with console.capture() as capture:
        for table in render.status_tables(state):
            console.print(table)
    assert "controller: running, every 5 s" in capture.get()


def test_status_names_a_replica_of_another_speed() -> None:
    state = Server().state()
    name = next(name for name, one in state["replicas"].items() if one["reachable"])
    state["replicas"][name] |= {"deviation": {"text": "runs 1.9 times slower than its siblings"}}
    console = Console(width=300)
    with console.capture() as capture:
        for table in render.status_tables(state):
            console.print(table)
    assert f"{name} runs 1.9 times slower than its siblings" in capture.get()


def test_status_json_is_the_state(server: Server, headrace: Any) -> None:
    code, out, _ = headrace("status", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(server.state()))


@pytest.mark.parametrize("command", [("status",), ("thresholds", "get"), ("thresholds", "set", "max_running=3")])
def test_nothing_listening_says_how_to_start(
    headrace: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.delenv("HEADRACE_URL", raising=False)
    with socket.socket() as bound:  # bound and not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        code, out, err = headrace(*command, "--url", url)
    assert (code, out) == (1, "")
    assert f"nothing answers at {url}" in err
    assert "headrace up" in err
    assert "--url" in err


@pytest.mark.parametrize("url", ["localhost:8000", "http://localhost:port", "http://[::1"])
def test_a_malformed_url_is_one_line_and_no_traceback(headrace: Any, url: str) -> None:
    code, out, err = headrace("status", "--url", url)
    assert (code, out) == (1, "")
    assert url in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(200, text="<html>"), "answered HTTP 200 and no JSON"),
        (httpx.Response(404, json={"error": "nothing here"}), "HTTP 404"),
        (httpx.Response(404, json=["nothing"]), "HTTP 404"),
        (httpx.Response(200, json=["nothing"]), "is not a Headrace application"),
        (httpx.Response(401, json={"detail": "invalid or missing API key"}), "invalid or missing API key"),
        (httpx.Response(503, json={"error": {"message": "no replica is running yet"}}), "no replica is running yet"),
    ],
)
def test_any_other_answer_is_one_line_and_no_traceback(
    server: Server, headrace: Any, answer: httpx.Response, said: str
) -> None:
    server.answer = answer
    code, out, err = headrace("status")
    assert (code, out) == (1, "")
    assert said in err


def test_the_api_key_goes_along(server: Server, headrace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    headrace("status")
    monkeypatch.setenv("HEADRACE_API_KEY", "sk-of-this-test")
    _, out, err = headrace("status")
    assert "authorization" not in server.headers[0]
    assert server.headers[1]["authorization"] == "Bearer sk-of-this-test"
    assert "sk-of-this-test" not in out + err


def test_up_without_its_model_names_the_path(
    headrace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    path = tmp_path / "x.yaml"
    path.write_text(
        "applications: [{args: {llm_configs: [{model_loading_config: {model_id: m, model_source: ./nowhere}}], "
        "headrace: {controller: {profile: cpu-smollm2}}}}]\nray: {address: auto}\n"
    )
    code, _, err = headrace("up", str(path))
    assert code == 2
    assert "model_source = 'nowhere' of m does not exist" in err


def test_the_readme_s_plan_command_runs(headrace: Any) -> None:
    line = "plan --type rate=50,prompt=58,output=147 --d0 0.0112 --d1 4.24e-7 --d2 0 --kv-tokens 137000 --json"
    code, out, err = headrace(*shlex.split(line))
    assert (code, err) == (0, "")
    assert json.loads(out)["stable"] is True
