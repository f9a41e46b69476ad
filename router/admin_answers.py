"""Answers of the control endpoints: an error, and the state of the whole application."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from replicas.ranks import EngineAddress
from router.front_door import FrontDoor
from router.refusal import shortened
from router.replica_watch import Report
from scheduler.messages import Telemetry
from scheduler.openai_error import error_body

_LONGEST_ERROR = 600
"""Of an operator's request, whose parts are bounded one by one."""


def refused(status_code: int, message: str, results: Mapping[str, Any] | None = None) -> JSONResponse:
    """An error in OpenAI's form; results: what each replica said."""
    body = error_body(status_code, shortened(message, _LONGEST_ERROR))
    return JSONResponse(body if results is None else body | {"replicas": results}, status_code=status_code)


def state_of(
    engines: Mapping[str, EngineAddress], telemetry: Mapping[str, Telemetry | Exception],
    watched: Mapping[str, Report], controller: Mapping[str, Any], front_door: FrontDoor,
) -> dict[str, Any]:
    """The body of `/admin/state` without the application's name: each engine's own report beside what the controller
    knows of it; those without a report with the reason."""
    known = controller.get("replicas", {})
    replicas = {}
    for name, report in telemetry.items():
        replicas[name] = {"model": engines[name].model_id, "reachable": isinstance(report, Telemetry)}
        if isinstance(report, Telemetry):
            unknown: dict[str, Any] = dict.fromkeys(("time_model", "fluid", "forecast"))
            empty = unknown | {"decision": controller.get("reason", "not seen yet")}
            replicas[name] |= report.shown() | known.get(name, empty)
        else:
            age_s = watched[name].age_s if name in watched else None
            replicas[name] |= {"reason": str(report), "last_answer_age_s": age_s}
    return {
        "at_unix_s": time.time(),
        "replicas": replicas,
        "controller": {key: value for key, value in controller.items() if key != "replicas"},
        "front_door": {"rejected": front_door.rejected, "ingresses": front_door.ingresses},
    }
