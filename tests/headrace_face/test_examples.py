"""The examples run: the openai client against a server that rejects and streams, a user's own policy, vLLM's flags."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PIECES = ("The ", "sea ", "is ", "wide.")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The example of the given name, imported as a script beside it would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


class Completions(ThreadingHTTPServer):
    """Rejects the first `rejections` completions with HTTP 429, then streams; `bodies` are what it was asked."""

    daemon_threads = True

    def __init__(self, rejections: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rejections = rejections
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Completions

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if len(self.server.bodies) <= self.server.rejections:
            said = {"message": "rejected: the queue is full", "type": "rate_limit_error", "code": 429}
            self._answer(429, {"error": said}, {"Retry-After": str(6 + len(self.server.bodies))})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in PIECES:
            self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict[str, Any]) -> None:
        whole = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny"} | data
        self.wfile.write(f"data: {json.dumps(whole)}\n\n".encode())

    def _answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Completions]:
    with Completions(request.param) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(example: ModuleType, server: Completions) -> tuple[list[str], list[float]]:
    """What `ask` shows, and how long it waits between attempts."""
    from openai import OpenAI

    shown: list[str] = []
    slept: list[float] = []
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        example.ask(client, "tiny", "The sea?", expected_output_tokens=9, show=shown.append, sleep=slept.append)
    return shown, slept


@pytest.mark.parametrize("example", ["openai_client"], indirect=True)
@pytest.mark.parametrize("server", [0, 2], indirect=True)
@pytest.mark.slow
def test_the_client_streams_and_waits_as_long_as_it_is_told(example: ModuleType, server: Completions) -> None:
    shown, slept = asked(example, server)
    assert tuple(shown) == PIECES
    assert slept == [7.0, 8.0][: server.rejections]
    assert len(server.bodies) == server.rejections + 1
    assert all(body["expected_output_tokens"] == 9 and body["stream"] for body in server.bodies)


@pytest.mark.parametrize("example", ["openai_client"], indirect=True)
@pytest.mark.parametrize("server", [3], indirect=True)
def test_the_client_gives_up_after_its_attempts(example: ModuleType, server: Completions) -> None:
    from openai import RateLimitError

    with pytest.raises(RateLimitError, match="the queue is full"):
        asked(example, server)
    assert len(server.bodies) == example.ATTEMPTS == 3


@pytest.mark.parametrize("server", [0], indirect=True)
@pytest.mark.slow
def test_the_client_runs_as_a_script(server: Completions) -> None:
    command = [sys.executable, str(EXAMPLES / "openai_client.py"), "The sea?", "--url", server.url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "".join(PIECES) + "\n"), run.stderr
    assert server.bodies[0]["model"] == "tiny"


@pytest.mark.engine
@pytest.mark.parametrize("example", ["own_policy"], indirect=True)
def test_a_policy_of_ones_own_decides_in_the_simulated_engine(example: ModuleType) -> None:
    summaries = example.simulate_beside_fcfs()
    for summary in summaries.values():
        assert summary["completed"] == summary["requests"] == 300
    assert summaries["leave-room"]["preemptions"] < 0.7 * summaries["fcfs"]["preemptions"]


@pytest.mark.engine
@pytest.mark.parametrize("example", ["own_policy"], indirect=True)
def test_a_policy_of_ones_own_leaves_room_and_feeds_an_idle_engine(example: ModuleType) -> None:
    from scheduler.policies import QueueView, Snapshot, Waiting
    from scheduler.thresholds import UNKNOWN_TYPE, Thresholds

    def admitted(prompts: list[int], used_tokens: int, released: int = 0) -> int:
        waiting = [Waiting(prompt_tokens=tokens, since_s=0.0) for tokens in prompts]
        view = QueueView(len(waiting), 0.0, heads=lambda: iter(waiting))
        snapshot = Snapshot(
            now_s=0.0, waiting={UNKNOWN_TYPE: view}, released=released, running=(), kv_used_tokens=used_tokens,
            kv_capacity_tokens=1000,
        )
        return example.LeaveRoom(Thresholds()).decide(snapshot).admit.get(UNKNOWN_TYPE, 0)

    assert admitted([100, 100, 100], used_tokens=600, released=1) == 2
    assert admitted([300], used_tokens=600, released=1) == 0
    assert admitted([900, 50], used_tokens=0) == 1


def test_a_configuration_names_a_scheduler_of_ones_own() -> None:
    from pydantic import ValidationError

    from cluster.config import AppConfig

    def with_headrace(**settings: str) -> AppConfig:
        entry = {"model_loading_config": {"model_id": "m"}, "accelerator_config": {"kind": "cpu"}}
        headrace = settings | {"controller": {"profile": "cpu-smollm2"}}
        return AppConfig.model_validate({"llm_configs": [entry], "headrace": headrace})

    assert with_headrace().settings_of("m").scheduler == "headrace.HeadraceScheduler"
    own = with_headrace(scheduler="own_policy.OwnScheduler")
    from cluster.app import llm_config

    config = llm_config(own.llm_configs[0], own.settings_of("m"))
    assert config.engine_kwargs["scheduler_cls"] == "own_policy.OwnScheduler"
    with pytest.raises(ValidationError, match="scheduler"):
        with_headrace(scheduler="own_policy:OwnScheduler")


STANDALONE = EXAMPLES / "standalone_vllm.sh"


def test_the_standalone_script_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(STANDALONE)]).returncode == 0
    assert os.access(STANDALONE, os.X_OK)
    without_model = subprocess.run([str(STANDALONE)], capture_output=True, text=True)
    assert without_model.returncode == 1
    assert "MODEL" in without_model.stderr


def test_vllm_s_own_parser_takes_the_standalone_script_s_flags(tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from scheduler.settings import SchedulerSettings

    fake = tmp_path / "vllm"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROFILE": "cpu-smollm2", "TPOT_S": "0.5"}
    run = subprocess.run(
        [str(STANDALONE), "org/model", "--port", "8123"], env=environment, capture_output=True, text=True, check=True
    )
    command, *flags = json.loads(run.stdout)
    assert command == "serve"
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    assert (args.model_tag, args.port, args.scheduler_cls) == ("org/model", 8123, "headrace.HeadraceScheduler")
    settings = SchedulerSettings.from_additional_config(args.additional_config)
    assert settings.thresholds.policy == "fluid"
    assert args.middleware == ["headrace.RejectionMiddleware"] and settings.has_own_controller
    assert (settings.first_profile, settings.targets.ttft_s, settings.targets.tpot_s) == ("cpu-smollm2", 3.0, 0.5)
