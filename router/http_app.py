"""The FastAPI app of the ingress: Ray's request ids and metrics, our errors, our gate in front of everything.

In place of `ray.llm`'s `init()`, whose CORS opens every path to every web page and whose error handlers repeat
exceptions to clients. The fence around its non-public names.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from ray.llm._internal.serve.core.ingress.middleware import SetRequestIdMiddleware
from ray.llm._internal.serve.observability.metrics.fast_api_metrics import add_http_metrics_middleware, metrics_lifespan

from router.dashboard.files import serve_dashboard
from router.errors import speak_openai
from router.gate import Desk, Gate

TITLE = "Headrace"
_DOCS, _OPENAPI = "/docs", "/openapi.json"


def http_app(desk: Callable[[], Desk]) -> FastAPI:
    """The app without its endpoints. desk: found when a request comes, in the process that serves it."""
    app = FastAPI(
        title=TITLE, version=version("headrace"), lifespan=metrics_lifespan, docs_url=None, redoc_url=None,
        openapi_url=None,
    )
    speak_openai(app)
    add_http_metrics_middleware(app)
    app.add_middleware(SetRequestIdMiddleware)
    app.add_middleware(Gate, desk=desk)  # the last one added is the first one passed

    serve_dashboard(app)

    @app.get(_OPENAPI, include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get(_DOCS, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url=_OPENAPI, title=TITLE)

    return app
