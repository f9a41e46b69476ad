"""The files of the dashboard: served without a key, under a strict policy, and nothing else with them."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from fake_dashboard import Made, app_of
from fastapi.testclient import TestClient

from router.auth import API_KEY_VARIABLE
from router.dashboard import files as dashboard_files

STATIC = files("router.dashboard") / "static"


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-operator")
    return TestClient(app_of(Made()))


def test_the_page_needs_no_key_and_all_data_does(http: TestClient) -> None:
    page = http.get("/dashboard")
    assert page.status_code == 200 and page.url.path == "/dashboard/" and "<title>Headrace</title>" in page.text
    for path in ("overview", "history"):
        assert http.get(f"/admin/{path}").status_code == 401
        assert http.get(f"/admin/{path}", headers={"authorization": "Bearer sk-operator"}).status_code == 200
    for path in ("/dashboards", "/dashboard.json", "/dashboardx/page.js"):
        assert http.get(path).status_code == 401, "only what is below /dashboard/ is open"


def test_every_file_is_served_under_the_policy_and_asked_for_again_costs_nothing(http: TestClient) -> None:
    for name in dashboard_files._TYPES:
        answer = http.get(f"/dashboard/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"] == dashboard_files._TYPES[name]
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = http.get(f"/dashboard/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert http.head("/dashboard/").status_code == 200


@pytest.mark.parametrize("path", ["static", "../overview.py", "%2e%2e/overview.py", "uplot", "__init__.py", "x.js"])
def test_nothing_else_is(http: TestClient, path: str) -> None:
    assert http.get(f"/dashboard/{path}").status_code in (401, 404)


def test_no_file_is_forgotten_and_none_reaches_beyond_the_server() -> None:
    served = set(dashboard_files._TYPES)
    there = {one.name for one in STATIC.iterdir() if one.is_file()}
    there |= {f"uplot/{one.name}" for one in (STATIC / "uplot").iterdir()} - {"uplot/README.md"}
    assert there == served
    page = (STATIC / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^#"]+)"', page)) <= served
    ours = [name for name in served if not name.startswith("uplot/")]
    for name in ours:
        text = (STATIC / name).read_text()
        assert not re.findall(r"https?://(?!www\.w3\.org/)", text), name
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text), name
    assert "style=" not in page and not re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=", page), "no inline code or style"


def test_a_page_below_a_root_path_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    http = TestClient(app_of(Made()), root_path="/x")
    assert http.get("/x/dashboard", follow_redirects=False).headers["location"] == "/x/dashboard/"
