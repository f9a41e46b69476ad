"""Write docs/reference/ from the code: `python -m tools.docs.reference`. With --check only say what is out of date."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from tools.docs.keys import Key, keys_of, summary_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "reference"
COMMAND = "python -m tools.docs.reference"
_GENERATED = f"<!-- Generated from the code by `{COMMAND}`; change the code's docstrings instead. -->"
_NO_KEYS = {"survival", "time_model"}
"""Objects that only a program writes; the page says what they are, not their keys."""


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the configuration page. path: where the object stands, as a reader writes it."""

    path: str
    owner: type
    also: str = ""


def sections() -> list[Section]:
    """The objects of a configuration file in the order of the file; each class once."""
    from cluster.config import ClusterConfig
    from cluster.settings import HeadraceSettings
    from scheduler.settings import SchedulerSettings

    found: list[Section] = []
    seen: set[type] = set()

    def visit(path: str, owner: type) -> None:
        if owner in seen:
            return
        seen.add(owner)
        found.append(Section(path, owner))
        for key in keys_of(owner):
            if key.inner and key.name not in _NO_KEYS:
                many = {"list": "[]", "mapping": ".NAME", "": ""}[key.many]
                is_named_alone = owner is ClusterConfig or path in ("applications[]", "args")
                below = key.name if is_named_alone else f"{path}.{key.name}"
                visit(f"{below}{many}", key.inner)

    seen.add(HeadraceSettings)  # the entry's own `headrace` has all but `tenants`, and comes later
    visit("the file", ClusterConfig)
    seen.discard(HeadraceSettings)
    at = next(number for number, one in enumerate(found) if one.path == "llm_configs[].headrace")
    found[at:at + 1] = [Section("headrace", HeadraceSettings)]
    visited = [Section(one.path.replace("llm_configs[].headrace", "headrace"), one.owner) for one in found]
    tenants = next(key for key in keys_of(HeadraceSettings) if key.name == "tenants")
    assert tenants.inner
    return [
        *visited, Section("headrace.tenants[]", tenants.inner),
        Section("additional_config.headrace", SchedulerSettings),
    ]


def configuration_page() -> str:
    """docs/reference/configuration.md."""
    parts = [
        "# Configuration reference\n", _GENERATED, "",
        "Every key of the file that `headrace up`, `serve deploy` and KubeRay read, as the code has it. How they work "
        "together: [the configuration](../configuration.md). Unknown keys are errors; where a key has no default, "
        "“required” stands there. The keys of `headrace` may stand beside `llm_configs`, for all models, and in an "
        "entry of it, for that model; only `tenants`, `tracing` and most of `limits` are for all. Most of them change "
        "[without a restart](../operate/live-changes.md).\n",
    ]
    places = {section.owner: section.path for section in sections()}
    for section in sections():
        parts.append(f"## `{section.path}`\n" if section.path != "the file" else "## The file\n")
        if summary := summary_of(section.owner):
            parts.append(f"{_null(_sentence(summary))}\n")
        if section.path == "additional_config.headrace":
            parts.append("What [plain `vllm serve`](../with-vllm-alone.md) takes in `--additional-config`; in a "
                         "cluster Headrace writes it.\n")
        parts.append(_table(keys_of(section.owner), places))
    return "\n".join(parts)


def simulation_page() -> str:
    """docs/reference/simulation.md."""
    from simulator.config import SimulationConfig
    from simulator.workload.config import WorkloadConfig

    places = {SimulationConfig: "simulation", WorkloadConfig: "workload"}
    return "\n".join([
        "# Simulation reference\n", _GENERATED, "",
        "What a simulation can be told: as options of [`headrace simulate`](command-line.md#headrace-simulate) where "
        "there is one, as `--set KEY=VALUE`, and as keys of `base` and `grid` in a sweep's file, where the targets are "
        "`slo_ttft_s`, `slo_tpot_s` and `slo_latency_s`, and the workload's keys stand beside the others. "
        "[The simulator](../simulator.md) says how it works.\n",
        "## Simulation\n", _table(keys_of(SimulationConfig), places),
        "## Workload\n", _table(keys_of(WorkloadConfig), places),
    ])


def _answer_table(keys: list[Key]) -> str:
    rows = (f"| `{key.name}` | {key.unit} | {_null(key.meaning)} |" for key in keys)
    return "\n".join(["| key | unit | meaning |", "|---|---|---|", *rows, ""])


def _table(keys: list[Key], places: dict[type, str]) -> str:
    lines = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for key in keys:
        kind = key.kind.replace(" or null", ", or null")
        if key.inner in places:
            path = places[key.inner]
            anchor = re.sub(r"[^\w-]", "", path.lower())
            kind = kind.replace("object", f"[object](#{anchor})", 1)
        default = f"`{key.default}`" if key.default not in ("", "required", "empty") else key.default
        cells = (f"`{key.name}`", kind, default, key.unit, _null(key.meaning))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _null(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def command_line_page() -> str:
    """docs/reference/command-line.md."""
    import typer

    from headrace.cli import app

    parts = [
        "# Command-line reference\n", _GENERATED, "",
        "Exit code 0: success; 1: failure; 2: wrong usage. Commands that ask a running application find it at `--url`, "
        "or at `HEADRACE_URL`; with keys configured they send `HEADRACE_API_KEY`.\n",
    ]
    for path, command in _commands("headrace", typer.main.get_command(app)):
        parts.append(f"## {path}\n" if path == "headrace" else f"### {path}\n")
        parts.append(f"{_sentence(' '.join((command.help or '').split()))}\n")
        if usage := _usage(path, command):
            parts.append(f"```text\n{usage}\n```\n")
        rows = [_parameter(one) for one in command.params if not getattr(one, "hidden", False)]
        if rows:
            parts += ["| option | default | meaning |\n|---|---|---|", *rows, ""]
    return "\n".join(parts)


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(f"{path} {name}", inner)


def _usage(path: str, command: Any) -> str:
    if getattr(command, "commands", None):
        return f"{path} COMMAND …"
    arguments = [_argument(one) for one in command.params if one.param_type_name == "argument"]
    return " ".join([path, *arguments, "[OPTIONS]"])


def _argument(one: Any) -> str:
    name = (one.metavar or one.name or "").upper() + ("…" if one.nargs == -1 else "")
    return name if one.required else f"[{name}]"


def _parameter(one: Any) -> str:
    names = _argument(one) if one.param_type_name == "argument" else ", ".join([*one.opts, *one.secondary_opts])
    shows_value = one.param_type_name == "option" and not one.is_flag
    names = f"`{names}`" + (f" {_type_in_words(one)}" if shows_value else "")
    default = one.default() if callable(one.default) else one.default
    missing = default is None or default is False or default in ((), "") or "Sentinel" in type(default).__name__
    value = str(default).lower() if default is True else str(default)
    shown = "required" if one.required else "" if missing else f"`{value}`"
    help_text = " ".join((getattr(one, "help", None) or "").split())
    if envvar := getattr(one, "envvar", None):
        help_text += f" (environment: `{envvar}`)"
    return f"| {names} | {shown} | {help_text} |".replace("…|", "…\\|")


def _type_in_words(one: Any) -> str:
    words = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}
    annotation = one.type_descriptor.annotation
    inner = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    limits = [f"≥ {one.min}"] * (one.min is not None) + [f"≤ {one.max}"] * (one.max is not None)
    return words.get(inner, getattr(inner, "__name__", "TEXT").upper()) + (f" ({', '.join(limits)})" if limits else "")


def http_page() -> str:
    """docs/reference/http.md."""
    from tools.docs.http_reference import page

    return page(_GENERATED, lambda keys: _table(keys, {}), _answer_table)


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page, "simulation.md": simulation_page, "command-line.md": command_line_page,
    "http.md": http_page,
}


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    old = []
    for name, page in PAGES.items():
        file, text = FOLDER / name, page()
        if not file.is_file() or file.read_text("utf-8") != text:
            old.append(name)
            if not check:
                file.write_text(text, "utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(old) or 'nothing'}")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
