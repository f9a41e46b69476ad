"""`/dashboard`: one static page, its script, its style and its charting library. It holds no data and needs no key.

All data comes from `/admin/*`, for which the page asks its reader for the operator's key.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

PATH = "/dashboard"
_TYPES = {
    "index.html": "text/html; charset=utf-8", "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml", "uplot/uPlot.min.css": "text/css; charset=utf-8",
    "uplot/uPlot.iife.min.js": "text/javascript; charset=utf-8", "uplot/LICENSE": "text/plain; charset=utf-8",
} | dict.fromkeys(
    ("page.js", "api.js", "charts.js", "form.js", "text.js"), "text/javascript; charset=utf-8"
)
"""Every file that is served, and nothing else is."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-cache",
}


class _File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


@cache
def _file(name: str) -> _File:
    content = files(__package__).joinpath("static", *name.split("/")).read_bytes()
    return _File(content, _TYPES[name], f'"{hashlib.sha256(content).hexdigest()[:20]}"')


def serve_dashboard(app: FastAPI) -> None:
    """Add the page to an app."""
    app.add_api_route(PATH, _to_page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route(PATH + "/{name:path}", _page, methods=["GET", "HEAD"], include_in_schema=False)


async def _to_page(request: Request) -> Response:
    """The page's own links are relative, so it is found below any root path."""
    return RedirectResponse(f"{request.scope.get('root_path', '')}{PATH}/", status_code=308, headers=HEADERS)


async def _page(request: Request, name: str) -> Response:
    name = name or "index.html"
    if name not in _TYPES:
        return Response("not found\n", status_code=404, media_type="text/plain", headers=HEADERS)
    found = _file(name)
    headers = HEADERS | {"ETag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
