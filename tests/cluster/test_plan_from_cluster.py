"""`headrace plan --from`: the traffic, the law and the targets that a running cluster has in /admin/state."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic_engine import LIMITS, SyntheticEngine
from typer.testing import CliRunner

from headrace import cli
from replicas.ranks import EngineAddress
from router.admin_answers import state_of
from scheduler.messages import Apply
from scheduler.model.profiles import load_profile
from scheduler.thresholds import Thresholds
from scheduler.tuning.engine_tuner import EngineTuner
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo

A100 = load_profile("a100-llama2-7b").time_model
PAIRS = [(900, output) for output in (50, 150, 250, 350, 450)]
Serve = Callable[[dict[str, Any]], str]


def state(*, requests: bool = True, models: tuple[str, ...] = ("m", "m")) -> dict[str, Any]:
    """/admin/state of replicas that have each seen 2.5 requests per second of these lengths, and were tuned."""
    telemetry, known, engines = {}, {}, {}
    for number, model in enumerate(models):
        engine = SyntheticEngine(Thresholds(policy="fluid"), replace(LIMITS, max_num_seqs=256))
        if requests:
            engine.traffic(PAIRS, every_s=0.4, seconds=200)
        tuner = EngineTuner(TuningSettings(targets=Slo(3.0, 0.08)), A100, Thresholds(policy="fluid"))
        push = tuner.next_push(report := engine.report(), tuner.learn(report), now_s=0.0)
        assert push.thresholds is not None and engine.active.offer(Apply(thresholds=push.thresholds)).accepted
        name = f"r{number}"
        telemetry[name], known[name] = engine.report(None), tuner.shown | {"decision": ""}
        engines[name] = SimpleNamespace(model_id=model)
    door: Any = SimpleNamespace(rejected=0, ingresses=1)
    addresses: dict[str, EngineAddress] = engines  # type: ignore[assignment]
    return state_of(addresses, telemetry, {}, {"alive": True, "replicas": known}, door)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves a state over HTTP and returns the URL."""
    servers: list[HTTPServer] = []

    def start(found: dict[str, Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(found).encode()
                self.send_response(200 if self.path == "/admin/state" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def planned(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_a_cluster_s_own_estimates_make_the_plan(serve: Serve) -> None:
    plan = planned("--from", serve(state()))
    (one,) = plan["sizing"]["candidates"]
    assert plan["sizing"]["offered_rps"] == pytest.approx(5.0, rel=0.1), "of both replicas together"
    assert plan["sizing"]["targets"] == {"ttft_s": 3.0, "tpot_s": 0.08, "latency_s": None}
    assert one["name"] == "m, as it runs" and one["kv_capacity_tokens"] == 137_000
    assert plan["types"][0]["prompt_tokens"] == 900
    assert plan["types"][0]["output_tokens"] == pytest.approx(250, rel=0.05)
    stated = planned(
        *(part for pair in PAIRS for part in ("--type", f"rate=1,prompt={pair[0]},output={pair[1]}")),
        "--profile", "a100-llama2-7b", "--ttft", "3", "--tpot", "0.08",
    )["sizing"]["candidates"][0]
    assert one["most_rps"] == pytest.approx(stated["most_rps"], rel=0.08), "as the same traffic, stated"
    assert one["replicas"] == stated["replicas"]


def test_a_rate_targets_and_another_device_replace_the_cluster_s(serve: Serve, tmp_path: Any) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11_008, "vocab_size": 32_000,
    }))
    url = serve(state())
    plan = planned(
        "--from", url, "--rate", "50", "--tpot", "0.05", "--model-config", str(config), "--accelerator", "h100"
    )
    (one,) = plan["sizing"]["candidates"]
    assert plan["sizing"]["targets"] == {"ttft_s": 3.0, "tpot_s": 0.05, "latency_s": None}
    assert one["name"] == "h100:1" and plan["sizing"]["offered_rps"] == 50
    assert one["most_rps"] > planned("--from", url)["sizing"]["candidates"][0]["most_rps"]


@pytest.mark.parametrize(("found", "more", "said"), [
    (lambda: {"replicas": {}}, (), "no estimates yet: no replica is tuned"),
    (lambda: state(requests=False), (), "no request has arrived there lately; give --rate"),
    (lambda: state(models=("a", "b")), (), "several models; give --model, one of a, b"),
    (lambda: state(models=("a", "b")), ("--model", "c"), "'c' is not served there; allowed: a, b"),
    (lambda: state(), ("--rate", "-1"), "--rate = -1.0 is not allowed"),
])
def test_a_state_that_does_not_tell_is_one_sentence(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    found: Callable[[], dict[str, Any]], more: tuple[str, ...], said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["headrace", "plan", "--from", serve(found()), *more])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert re.search(re.escape(said), captured.err.replace("\n", " "))


def test_one_of_several_models_is_planned_alone(serve: Serve) -> None:
    plan = planned("--from", serve(state(models=("a", "b", "b"))), "--model", "b")
    assert plan["sizing"]["offered_rps"] == pytest.approx(5.0, rel=0.1)
