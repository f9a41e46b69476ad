"""What the chart renders for kind, on a real Ray: KubeRay's steps by hand, on one machine.

A head without CPUs and a worker, as the chart's RayService has them; `serveConfigV2` put to Ray's dashboard, as the
operator does; then the probes, `helm test`, the container that follows KEDA, and a worker's preStop, each by its very
command. Ports are free ones, since a pod has its own and this machine may not.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psutil
import pytest
import ray
from chart_examples import CHART, CI, Values
from chart_render import containers, objects, of_kind, pod_specs, serve_config
from cluster_process import MODEL, free_port, until
from helm_python import Chart

from cluster import haproxy
from cluster.model import prepare_bundled_model

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
RAY = str(Path(sys.executable).with_name("ray"))
OF_THE_IMAGE = {"HOME", "HF_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"}
"""Variables whose folders only the image has."""
ON_A_BUSY_MACHINE = {"RAY_raylet_start_wait_time_s": "120"}
DRAIN_S = 20
READY_S = 300.0


def values(port: int) -> Values:
    """The chart's own values for kind, with a model that is on this machine, and KEDA."""
    (entry,) = CI["cpu-kind"]["models"]
    entry = entry | {
        "model_loading_config": entry["model_loading_config"] | {"model_source": str(MODEL)},
        "runtime_env": {"env_vars": entry["runtime_env"]["env_vars"] | {"OMP_NUM_THREADS": "1"}},
    }
    return CI["cpu-kind"] | {
        "models": [entry], "service": {"port": port}, "autoscaling": {"mode": "keda"},
        "headrace": CI["cpu-kind"]["headrace"] | {"drain_s": DRAIN_S},
    }


class RayByHand:
    """Ray's head and one worker, with what the chart renders."""

    def __init__(self, chart: Chart, folder: Path) -> None:
        names = ("serve", "gcs", "dashboard", "client", "agent", "metrics", "worker agent", "worker metrics")
        self.ports = {name: free_port() for name in names}
        self.manifests = objects(chart, values(self.ports["serve"]))
        (self.service,) = of_kind(self.manifests, "RayService")
        (secret,) = of_kind(self.manifests, "Secret")
        self.secret = {key: base64.b64decode(text).decode() for key, text in secret["data"].items()}
        self.folder = folder
        self.address = f"{ray.util.get_node_ip_address()}:{self.ports['gcs']}"
        self.dashboard = f"http://127.0.0.1:{self.ports['dashboard']}"
        self.url = f"http://127.0.0.1:{self.ports['serve']}"
        self.operator = httpx.Client(
            base_url=self.dashboard, timeout=60, trust_env=False,
            headers={"X-Ray-Authorization": f"Bearer {self.secret['auth_token']}"},
        )
        """KubeRay's."""
        self.started: list[subprocess.Popen[bytes]] = []
        self.names: set[str] = set()

    def start(self) -> None:
        """The head and one worker, as KubeRay starts them."""
        cluster = self.service["spec"]["rayClusterConfig"]
        self._start(
            "head", containers(self.service)[0], cluster["headGroupSpec"]["rayStartParams"],
            lambda: self._answers(f"{self.dashboard}/api/gcs_healthz"),
            "--head", f"--port={self.ports['gcs']}", f"--ray-client-server-port={self.ports['client']}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.ports['dashboard']}",
            f"--dashboard-agent-listen-port={self.ports['agent']}", f"--temp-dir={self.folder}",
        )
        self._start(
            "worker", containers(self.service)[1], cluster["workerGroupSpecs"][0]["rayStartParams"],
            lambda: len(self.nodes()) == 2,
            f"--address={self.address}", "--num-cpus=8",
            f"--dashboard-agent-listen-port={self.ports['worker agent']}",
        )

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """A container's variables, those from the Secret too."""
        given = {}
        for entry in container.get("env", []):
            if entry["name"] not in OF_THE_IMAGE:
                place = entry.get("valueFrom", {}).get("secretKeyRef")
                given[entry["name"]] = self.secret[place["key"]] if place else entry["value"]
        assert self.service["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"
        given |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.secret["auth_token"]}  # as KubeRay does
        # As the image has them; the chart switches HAProxy on.
        given |= {name: value for name, value in haproxy.environment().items() if "ENABLE" not in name}
        return os.environ | given | ON_A_BUSY_MACHINE | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHART.parents[1])}

    def _start(
        self, name: str, container: dict[str, Any], parameters: dict[str, str], is_there: Callable[[], bool],
        *options: str,
    ) -> None:
        """`ray start` until it is there; begun again when it ends, as Kubernetes does (on a busy machine it may)."""
        metrics = self.ports["metrics" if name == "head" else "worker metrics"]
        parameters = parameters | {"metrics-export-port": str(metrics)}
        command = [
            RAY, "start", "--block", "--object-store-memory=200000000",
            *(f"--{key}={value}" for key, value in parameters.items()), *options,
        ]
        log = self.folder / f"{name}.log"

        def there() -> bool:
            if not self.started or name not in self.names or self.started[-1].poll() is not None:
                self.names.add(name)
                with log.open("w") as file:
                    self.started.append(subprocess.Popen(
                        command, env=self.environment(container), stdout=file, stderr=file, process_group=0
                    ))
            return is_there()

        until(there, 240, self.log)

    @staticmethod
    def _answers(url: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url, trust_env=False).status_code == 200
        return False

    def log(self) -> str:
        serve = self.folder.glob("session_2*/logs/serve/controller_*.log")
        return "\n".join(path.read_text()[-3000:] for path in [*self.folder.glob("*.log"), *serve])

    def here(self, script: str, *, worker: bool = False) -> str:
        """A script of the chart with this machine's ports and address."""
        agent = self.ports["worker agent" if worker else "agent"]
        for there, own in (
            (":52365/", f":{agent}/"), (":8265/", f":{self.ports['dashboard']}/"),
            ("http://demo-headrace-serve-svc:", "http://127.0.0.1:"),
        ):
            script = script.replace(there, own)
        return script

    def run(self, command: list[str], container: dict[str, Any], *, worker: bool = False) -> int:
        """The exit status of a command of the chart, in the environment of its container."""
        environment = self.environment(container) | {"RAY_ADDRESS": self.address}
        environment["PATH"] = f"{Path(RAY).parent}:{environment['PATH']}"
        given = [self.here(word, worker=worker) for word in command]
        return subprocess.run(given, env=environment, timeout=240, check=False, capture_output=True).returncode

    def deploy(self) -> None:
        """What KubeRay's operator does with serveConfigV2."""
        answer = self.operator.put("/api/serve/applications/", json=serve_config(self.service))
        assert answer.status_code == 200, answer.text

    def deployed(self) -> dict[str, Any]:
        answer = self.operator.get("/api/serve/applications/").json()
        return dict(answer["applications"].get("headrace", {}))

    def nodes(self) -> list[dict[str, Any]]:
        """The living ones, by Ray's state API."""
        with contextlib.suppress(httpx.HTTPError, ValueError, TypeError):
            answer = self.operator.get("/api/v0/nodes").json()
            return [one for one in answer["data"]["result"]["result"] if one["state"] == "ALIVE"]
        return []

    def stop(self) -> None:
        for process in reversed(self.started):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] \
                if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(family, timeout=20)
            for member in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


@pytest.fixture(scope="module")
def by_hand(chart: Chart) -> Iterator[RayByHand]:
    prepare_bundled_model(MODEL)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path, as sockets need
        by_hand = RayByHand(chart, Path(folder))
        try:
            by_hand.start()
            yield by_hand
        finally:
            by_hand.stop()


def probe(container: dict[str, Any], kind: str) -> list[str]:
    return list(container[kind]["exec"]["command"])


def test_a_worker_is_alive_before_it_is_ready(by_hand: RayByHand) -> None:
    head, worker = containers(by_hand.service)
    for kind in ("livenessProbe", "readinessProbe"):
        until(lambda kind=kind: by_hand.run(probe(head, kind), head) == 0, 60, by_hand.log)  # type: ignore[misc]
    until(lambda: by_hand.run(probe(worker, "livenessProbe"), worker, worker=True) == 0, 60, by_hand.log)
    assert by_hand.run(probe(worker, "readinessProbe"), worker, worker=True) != 0, "Ray Serve does not run yet"


def test_the_rendered_configuration_is_deployed_and_answers(by_hand: RayByHand) -> None:
    by_hand.deploy()
    until(lambda: by_hand.deployed().get("status") == "RUNNING", READY_S, lambda: json.dumps(by_hand.deployed()))
    _, worker = containers(by_hand.service)
    until(lambda: by_hand.run(probe(worker, "readinessProbe"), worker, worker=True) == 0, 60, by_hand.log)
    (replica,) = by_hand.deployed()["deployments"]["HeadraceServer:smollm2-135m"]["replicas"]
    (head,) = [node["node_id"] for node in by_hand.nodes() if node["is_head_node"]]
    assert replica["node_id"] != head, "the head has no CPUs for replicas"


def test_helm_test_passes_with_the_generated_key_and_with_no_other(by_hand: RayByHand) -> None:
    (pod,) = of_kind(by_hand.manifests, "Pod")
    (container,) = pod["spec"]["containers"]
    assert by_hand.run(container["command"], container) == 0
    key = by_hand.secret["api-key"]
    by_hand.secret["api-key"] = "another"
    try:
        assert by_hand.run(container["command"], container) != 0
    finally:
        by_hand.secret["api-key"] = key


def test_without_the_key_nothing_is_open_but_health(by_hand: RayByHand) -> None:
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/v1/models", 401), ("/admin/state", 401)):
        assert httpx.get(f"{by_hand.url}{path}", timeout=30, trust_env=False).status_code == status, path


def test_ray_asks_for_the_token(by_hand: RayByHand) -> None:
    assert httpx.get(f"{by_hand.dashboard}/api/serve/applications/", trust_env=False).status_code == 401
    assert by_hand.operator.get("/api/serve/applications/").status_code == 200


def test_the_metrics_port_has_our_series(by_hand: RayByHand) -> None:
    url = f"http://127.0.0.1:{by_hand.ports['worker metrics']}/metrics"
    until(lambda: "ray_headrace_engine_up" in httpx.get(url, timeout=30, trust_env=False).text, 90)


def test_ray_serve_follows_the_number_that_keda_sets(by_hand: RayByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = load_scaler(by_hand, monkeypatch)
    (folder,) = [one for one in of_kind(by_hand.manifests, "ConfigMap") if "targets.json" in one["data"]]
    targets = json.loads(folder["data"]["targets.json"])
    (deployment,) = targets.values()
    assert scaler.present()[deployment] == 1
    config = by_hand.deployed()["deployments"][deployment]["deployment_config"]
    assert config.get("autoscaling_config") is None, "Ray Serve's own rule would undo KEDA's number"
    for number in (2, 1):
        monkeypatch.setattr(scaler, "wanted", lambda namespace, name, number=number: number)
        scaler.step("llm", targets)
        until(lambda number=number: scaler.present()[deployment] == number, 30, by_hand.log)  # type: ignore[misc]
    until(lambda: by_hand.deployed()["deployments"][deployment]["status"] == "HEALTHY", READY_S, by_hand.log)


def load_scaler(by_hand: RayByHand, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("RAY_DASHBOARD", by_hand.dashboard)
    monkeypatch.setenv("RAY_AUTH_TOKEN", by_hand.secret["auth_token"])
    spec = importlib.util.spec_from_file_location("scaler_on_ray", CHART / "files" / "scaler.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stopping_worker_finishes_its_requests_first(by_hand: RayByHand) -> None:
    """preStop ends after the request that was under way and before the time that Kubernetes gives it."""
    answers: list[tuple[int, str]] = []
    tokens = 150
    body = {
        "model": "smollm2-135m", "prompt": "once upon a time", "temperature": 0, "stream": True,
        "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True,
    }
    begun = threading.Event()

    def ask() -> None:
        headers = {"Authorization": f"Bearer {by_hand.secret['api-key']}"}
        with httpx.stream(
            "POST", f"{by_hand.url}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False
        ) as answer:
            lines = []
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()
            answers.append((answer.status_code, "\n".join(lines)))

    client = threading.Thread(target=ask, daemon=True)
    client.start()
    assert begun.wait(60)
    _, worker = containers(by_hand.service)
    (node,) = [one["node_id"] for one in by_hand.nodes() if not one["is_head_node"]]
    command: list[str] = worker["lifecycle"]["preStop"]["exec"]["command"]
    # In a pod the node is the pod's; on this machine there are two.
    given = [word.replace("ray drain-node", f"ray drain-node --node-id {node}") for word in command]
    assert given != command
    began_s = time.monotonic()
    assert by_hand.run(given, worker) == 0
    assert time.monotonic() - began_s < pod_specs(by_hand.service)[1]["terminationGracePeriodSeconds"]
    client.join(60)
    assert not client.is_alive()
    ((status, text),) = answers
    assert status == 200 and '"finish_reason":"length"' in text and text.rstrip().endswith("data: [DONE]")
    assert '"error"' not in text
