"""HAProxy as Ray configures it, and what we change of it, on Ray's real template and with the real HAProxy."""

from __future__ import annotations

import os
import re
import socketserver
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from fake_server import FakeServer
from ray.serve._private import constants
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from cluster import haproxy
from cluster.config import HttpOptions, load_config
from cluster.ports import free_port
from cluster.ray_environment import prepare

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.skipif(haproxy.script() is None, reason="HAProxy is not installed with Ray here")


@pytest.fixture
def written(tmp_path) -> Path:
    """The file that Ray writes for a Serve which all machines reach, its pages of counters at 9101 and 8404."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=8000), socket_path=str(tmp_path / "admin.sock"),
        server_state_base=str(tmp_path), server_state_file=str(tmp_path / "server-state"),
    )
    path = tmp_path / "haproxy.cfg"
    HAProxyApi(config, config_file_path=str(path))._generate_config_file_internal()
    return path


def binds(text: str) -> set[str]:
    return set(re.findall(r"^\s*bind (\S+)", text, re.MULTILINE))


def test_counters_are_for_this_machine_alone_and_the_server_for_all(written):
    assert binds(written.read_text()) == {":9101", "*:8000", "*:8404"}, "Ray has moved them"
    assert binds(haproxy.adjusted(written.read_text())) == {"127.0.0.1:9101", "*:8000", "127.0.0.1:8404"}


def test_only_this_user_gives_haproxy_orders(written):
    assert " mode 666 level admin" in written.read_text(), "Ray has changed it"
    sockets = re.findall(r"stats socket \S+ mode (\d+)", haproxy.adjusted(written.read_text()))
    assert sockets == ["600"]


def test_headers_have_a_limit_of_time_unless_ray_sets_one(written):
    assert "timeout http-request" not in written.read_text(), "Ray sets it itself now"
    once = haproxy.adjusted(written.read_text())
    assert once.count(f"timeout http-request {haproxy.HEADERS_S}s") == once.count("option http-buffer-request") == 1
    assert haproxy.adjusted(once) == once


def test_before_an_application_is_known_a_client_is_told_to_try_again(written):
    assert "return status 404" in written.read_text(), "Ray has changed it"
    waiting = haproxy.adjusted(written.read_text())
    assert "return status 503 hdr Retry-After 1" in waiting and "status 404" not in waiting
    serving = written.read_text().replace("    default_backend", "    use_backend app if is_app\n    default_backend")
    assert "return status 404" in haproxy.adjusted(serving)


def test_haproxy_takes_the_adjusted_file_from_the_script_that_ray_starts(written):
    started = haproxy.script()
    environment = os.environ | haproxy.environment()
    asked = subprocess.run([started, "-c", "-f", written], env=environment, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    assert "127.0.0.1:8404" in written.read_text()


def test_every_variable_is_one_that_ray_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(haproxy, "LONGEST_FOLDER", 1000)
    source = Path(constants.__file__).read_text()
    variables = haproxy.environment(tmp_path, [1, 2])
    assert len(variables) == 13
    assert [name for name in variables if f'"{name}"' not in source] == []


FRONT = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option redispatch 1
    retry-on {retry_on}
frontend front
    bind 127.0.0.1:{port}
    default_backend ingresses
backend ingresses
    balance roundrobin
    server dying 127.0.0.1:{dying}
    server living 127.0.0.1:{living}
"""


class Dying(socketserver.StreamRequestHandler):
    """Closes the connection without a byte, as an ingress that is killed does."""

    def handle(self) -> None:
        self.request.recv(1)


@pytest.mark.parametrize("retry_on, whole", [("conn-failure", False), (None, True)])
def test_a_request_of_an_ingress_that_dies_is_tried_at_another(tmp_path, retry_on, whole):
    retry_on = retry_on or haproxy.environment()["RAY_SERVE_HAPROXY_RETRY_ON"]
    port = free_port("")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dying) as dying, FakeServer() as living:
        threading.Thread(target=dying.serve_forever, daemon=True).start()
        path = tmp_path / "front.cfg"
        of_living = living.url.rpartition(":")[2]
        path.write_text(FRONT.format(retry_on=retry_on, port=port, dying=dying.server_address[1], living=of_living))
        with subprocess.Popen([haproxy.script(), "-db", "-f", path], env=os.environ | haproxy.environment()) as front:
            try:
                body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
                http = httpx.Client(transport=httpx.HTTPTransport(retries=20), trust_env=False)
                answers = [http.post(f"http://127.0.0.1:{port}/v1/completions", json=body) for _ in range(4)]
            finally:
                front.terminate()
        dying.shutdown()
    assert all(one.status_code == 200 for one in answers) is whole


def test_a_folder_too_deep_for_sockets_is_not_used(tmp_path):
    deep = tmp_path / "a-folder-with-a-long-name"
    assert not [value for value in haproxy.environment(deep).values() if str(deep) in value]


def test_without_haproxy_ray_keeps_its_own_proxy(tmp_path, monkeypatch):
    monkeypatch.setattr(haproxy.sysconfig, "get_path", lambda _: str(tmp_path))
    assert haproxy.script() is None and haproxy.environment() == {}


@pytest.mark.parametrize("local, wanted, given, expected", [
    (True, True, None, "1"), (True, False, None, None), (False, True, None, None), (True, True, "0", "0"),
])
def test_a_local_ray_has_it_unless_the_configuration_or_the_user_says_otherwise(
    monkeypatch, local, wanted, given, expected
):
    monkeypatch.setattr(os, "environ", {} if given is None else {"RAY_SERVE_ENABLE_HA_PROXY": given})
    prepare(local=local, with_haproxy=wanted)
    assert os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == expected


@pytest.mark.parametrize("host, expected", [
    ("127.0.0.1", True), ("0.0.0.0", True), ("::1", False), ("10.1.2.3", False),
])
def test_haproxy_needs_an_address_that_reaches_127_0_0_1(host, expected):
    config = load_config(CONFIGS / "local.yaml", with_engine=False)
    config = config.model_copy(update={"http_options": HttpOptions(host=host)})
    assert config.with_haproxy is expected


def test_the_image_and_the_documentation_say_the_same():
    environment = haproxy.environment()
    names = ("HAPROXY_HARD_STOP_AFTER", "DIRECT_INGRESS_MIN_DRAINING_PERIOD", "PROXY_HEALTH_CHECK_PERIOD")
    for name in (f"RAY_SERVE_{name}_S" for name in names):
        said = re.compile(rf"{name}={environment[name]}\b")
        for place in ("Dockerfile", "docs/operate/ray-cluster.md"):
            assert said.search((CONFIGS.parent / place).read_text()), (name, place)
    tried = re.compile(rf"""HAPROXY_RETRY_ON=['"]{environment["RAY_SERVE_HAPROXY_RETRY_ON"]}['"]""")
    for place in ("Dockerfile", "docs/operate/ray-cluster.md"):
        assert tried.search((CONFIGS.parent / place).read_text()), place
