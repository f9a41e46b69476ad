"""docs/reference/http.md: the endpoints as the ingress registers them, and the keys of what they take and answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from tools.docs.keys import Key, keys_of

Table = Callable[[list[Key]], str]
_INTRODUCTION = """\
Paths below `/v1`, `/tokenize` and `/detokenize` are Ray Serve LLM's, which is vLLM's OpenAI-compatible server; how
Headrace adds to them is in [sending requests](../requests.md). A running application shows all of them at `/docs` and
`/openapi.json`. `/admin/*` asks for the operator's key when one is set, `/healthz` and `/readyz` for none
([security](../security.md)).
"""


def page(generated: str, taken: Table, answered: Table) -> str:
    """The page; `taken` and `answered` write a table of keys."""
    from fastapi import FastAPI

    from router import ingress
    from router.admin import ThresholdsUpdate
    from router.live_settings import SettingsUpdate
    from scheduler.messages import Counters, Gauges
    from scheduler.thresholds import EngineLimits, Thresholds

    owner = next(one for one in vars(ingress).values() if inspect.isclass(one) and "admin_state" in vars(one))
    rows = []
    for name, register in (*ingress.HEALTH_ENDPOINTS.items(), *ingress.ADMIN_ENDPOINTS.items()):
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        endpoint = getattr(owner, name)
        register(app)(_without_self)
        rows += [(route.path, method, _first(endpoint)) for route in app.routes
                 for method in sorted(getattr(route, "methods", ()))]
    lines = [f"| `{method} {path}` | {said} |" for path, method, said in rows if (method, path) != ("HEAD", "")]
    bodies = {ThresholdsUpdate: "`PUT /admin/thresholds`", SettingsUpdate: "`PUT /admin/settings`"}
    answers = {Gauges: "requests and memory now", Counters: "`counters`", EngineLimits: "`limits`",
               Thresholds: "`thresholds`"}
    parts = [
        "# HTTP reference\n", generated, "", _INTRODUCTION, "| endpoint | what |\n|---|---|", *lines, "",
        "## What an endpoint takes\n",
    ]
    for body, where in bodies.items():
        parts += [f"### {where}\n", taken(keys_of(body))]
    parts += [
        "## What `GET /admin/state` answers\n",
        "`application`, `at_unix_s`, `controller`, `front_door`, and `replicas`: by name, with `model`, `reachable` "
        "and the objects below. A replica that does not answer has `reason` and `last_answer_age_s` in their place. "
        "`time_model`, `fluid` and `forecast` are null until the controller has enough to go by; `decision` says "
        "why.\n",
    ]
    for answer, where in answers.items():
        parts += [f"### {where[0].upper()}{where[1:]}\n", answered(keys_of(answer))]
    return "\n".join(parts)


def _without_self() -> None:
    """Stands for an endpoint while its path is read."""


def _first(endpoint: Any) -> str:
    return " ".join((inspect.getdoc(endpoint) or "").split())
