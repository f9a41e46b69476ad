"""The image for CPUs, built without Docker by the Dockerfile's own instructions, and run: not as root, with no network
and with a root that cannot be written. It takes minutes, gigabytes and root."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_builder import Builder, Image, Running, debootstrap_is_near
from image_file import stages_of

from headrace import __version__

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(1800)]
URL = "http://127.0.0.1:8000"
QUESTION = "What is the capital of France?"
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
START = (
    "ulimit -n 65536; "
    "ray start --head --block --num-cpus=0 --dashboard-host=0.0.0.0 --dashboard-agent-listen-port=52365"
)
"""How KubeRay starts a head, and below how it asks whether one is alive."""
PROBE = (
    "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success && "
    "wget --tries 1 -T 10 -q -O- http://localhost:8265/api/gcs_healthz | grep success"
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if os.geteuid() != 0 or not debootstrap_is_near():
        pytest.skip("building the image without Docker needs root and Debian's packages")
    folder = tmp_path_factory.mktemp("image")
    wheels = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    try:
        builder = Builder(folder, stages_of(), {"TORCH_BACKEND": "", "UV_FIND_LINKS": wheels} if wheels else {})
        yield builder.build("cpu")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ask(running: Running, **more: object) -> str:
    """What the model says."""
    message = {"role": "user", "content": QUESTION}
    body = json.dumps({"model": "smollm2-135m", "temperature": 0, "max_tokens": 24, "messages": [message], **more})
    header, data = "--header=Content-Type: application/json", f"--post-data={body}"
    done = running.run(["wget", "-q", "-O-", header, data, f"{URL}/v1/chat/completions"])
    assert done.returncode == 0, done.stderr + running.log
    return str(json.loads(done.stdout)["choices"][0]["message"]["content"])


def test_it_is_not_root_and_has_what_it_needs_and_no_tool_to_build(image: Image) -> None:
    assert image.run(["id", "-u", "-n"], alone=True) == "headrace\n"
    assert image.run(["headrace", "--version"], alone=True) == f"headrace {__version__}\n"
    assert image.run(["bash", "-lc", "command -v headrace ray serve vllm"], alone=True).split() == [
        f"/opt/headrace/bin/{name}" for name in ("headrace", "ray", "serve", "vllm")
    ]
    assert image.run(["bash", "-c", "command -v wget grep pgrep tini | wc -l"], alone=True) == "4\n"
    assert image.run(["bash", "-c", "command -v cc gcc make git curl pip uv || true"], alone=True) == ""
    assert {path.name for path in (image.root / "opt/headrace/share/headrace").iterdir()} == {
        "rules.yaml", "grafana-dashboard.json",
    }


def test_nothing_in_it_belongs_to_its_user_but_its_home(image: Image) -> None:
    found = "find / -xdev -writable -not -type l -not -path '/home/headrace*' 2>/dev/null"
    writable = image.run(["bash", "-c", f"{found}; true"])  # some folders cannot be read
    assert set(writable.split()) == {"/tmp", "/var/tmp", "/run/lock"}


def test_it_is_small(image: Image) -> None:
    files = [path.lstat() for path in image.root.rglob("*")]
    assert sum(one.st_size for one in files) / 2**30 < 3.6


def test_it_serves_and_its_health_check_says_so(image: Image, tmp_path: Path) -> None:
    with Running(image, image.command, tmp_path / "log", writable=("/tmp", image.env["HOME"])) as running:
        assert running.run(image.health).returncode != 0
        running.wait_for(image.health)
        running.wait_for(["wget", "-q", "-O-", f"{URL}/readyz"])
        assert "Paris" in ask(running)
        made = ask(running, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER}})
        assert "n" in json.loads(made)
        assert "Headrace" in running.run(["wget", "-q", "-O-", f"{URL}/dashboard/"]).stdout
        assert running.stop() == 0


def test_kuberay_can_start_it_and_probe_it(image: Image, tmp_path: Path) -> None:
    head = Image(image.root, image.env, image.workdir, image.user)
    with Running(head, ["/bin/bash", "-lc", "--", START], tmp_path / "log") as running:
        assert running.wait_for(["bash", "-c", PROBE]).count("success") == 2
        assert running.run(["pgrep", "-f", "^ray::ServeReplica"]).returncode == 1, "no replica is there to wait for"
        running.wait_for(["bash", "-c", "ray status | grep --after-context=1 Active: | grep '1 node'"])
