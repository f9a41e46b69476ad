"""The dashboard in a real browser, over a cluster that is made up: what it shows, sends, keeps and survives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import NEEDS_CHROMIUM, Tab, chromium, tab_at
from fake_dashboard import EVIL, FakeDashboard, Made, change, example

from cluster.history import History
from router.auth import API_KEY_VARIABLE

pytestmark = [NEEDS_CHROMIUM, pytest.mark.slow]
READY = "document.querySelector('#health').dataset.level !== 'none'"
ONE_NUMBER = re.compile(r"\d")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def server() -> Iterator[FakeDashboard]:
    with FakeDashboard(example()) as running:
        yield running


@pytest.fixture
def tab(browser: Any, server: FakeDashboard) -> Iterator[Tab]:
    with tab_at(browser, f"{server.url}/dashboard") as found:
        found.until(READY)
        yield found


def test_it_answers_the_questions_draws_its_charts_and_stays_at_home(tab: Tab, server: FakeDashboard) -> None:
    assert tab.text("#health-title") == "Overloaded" and "m3x9c0ad is slow" in tab.text("#health-sentences")
    assert tab.text("#load .headline") == "1.2 × capacity" and "9.4 requests/s arrive" in tab.text("#load")
    assert tab.text("#limit .headline") == "KV cache"
    assert "thresholds, " in tab.text("#change") and "longest queue none → 9" in tab.text("#change")
    assert "with 3 replicas" in tab.text("#one-more")
    charts = tab.page.locator("figure")
    assert charts.count() == 9
    for place in range(9):
        assert charts.nth(place).locator("canvas").count() == 1
        assert ONE_NUMBER.search(charts.nth(place).locator(".legend").inner_text()), "each has its values in a table"
    drawn = tab.page.evaluate("""() => [...document.querySelectorAll("canvas")].every((canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size > 2;
    })""")
    assert drawn, "no chart is blank"
    assert tab.text("#replicas tbody").count("52 of 64") == 2 and "slow" in tab.text("#replicas tbody")
    assert tab.text("#events").count("anna") == 2
    assert tab.complaints == [] and tab.origins() == {server.url}


def test_new_points_move_the_charts(tab: Tab, server: FakeDashboard) -> None:
    made = server.made
    before = tab.text("#chart-requests .legend")
    made.names = made.names[:1]
    made.now_s += 30
    made.cycles(6)
    tab.until(f"document.querySelector('#chart-requests .legend').innerText !== {before!r}")
    asked = [url for url in tab.requests if "history?after=" in url]
    assert asked[0].endswith("after=0") and float(asked[-1].rpartition("=")[2]) > 1e9, "only what is new is asked for"
    assert tab.complaints == []


def test_one_long_iteration_does_not_flatten_its_chart(browser: Any) -> None:
    def blue_rows(tab: Tab) -> int:
        """The height that the measured line takes, in pixels."""
        return int(tab.page.evaluate("""() => {
            const canvas = document.querySelector("#chart-iteration canvas"), { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            const rows = new Set();
            for (let at = 0; at < data.length; at += 4) {
                if (data[at] < 40 && data[at + 2] > 140 && data[at + 3] > 200) rows.add(Math.floor(at / 4 / width));
            }
            return rows.size;
        }"""))

    heights = []
    for longest_s in (0.0, 60.0):
        made = Made(replicas=("a",))
        made.cycles(60)
        points = made.history._series["a"].points
        points[10] = points[10]._replace(iteration_s=longest_s or points[10].iteration_s)
        with FakeDashboard(made) as server, tab_at(browser, f"{server.url}/dashboard") as tab:
            tab.until("document.querySelector('#chart-iteration canvas')")
            heights.append(blue_rows(tab))
    assert heights[1] >= heights[0] > 10, heights


def test_after_a_restart_the_charts_go_on_from_what_the_page_has(tab: Tab, server: FakeDashboard) -> None:
    made = server.made
    made.history = History()
    made.names = made.names[:1]
    made.now_s += 30
    made.cycles(6)
    before = tab.text("#chart-requests .legend")
    tab.until(f"document.querySelector('#chart-requests .legend').innerText !== {before!r}")
    assert "m3x9c0ad" in tab.text("#chart-running .legend"), "the past, of the other replica too, is still there"
    assert tab.page.locator("canvas").count() == 9 and tab.complaints == []


def test_nothing_that_is_told_becomes_html(browser: Any) -> None:
    made = Made(replicas=(EVIL, "b"))
    made.model = EVIL
    made.cycles(20)
    made.changes = [change(kind="settings", model=EVIL), change(replica=EVIL, reason=EVIL, by=EVIL, kind="pin")]
    made.extra = {EVIL: {"decision": EVIL, "draining": True}, "b": {"reachable": False, "reason": EVIL}}
    with FakeDashboard(made) as server, tab_at(browser, f"{server.url}/dashboard") as tab:
        tab.until(READY)
        for place in ("#health-sentences", "#change", "#replicas tbody", "#events", "#chart-kv"):
            assert EVIL in tab.page.locator(place).text_content()
        assert tab.page.evaluate("window.stolen ?? 'safe'") == "safe"
        assert tab.page.locator("main img, main script").count() == 0
        assert tab.complaints == [] and tab.origins() == {server.url}


def test_a_change_is_predicted_before_it_is_applied(tab: Tab, server: FakeDashboard) -> None:
    form = tab.page.locator("#thresholds-form")
    predict, apply = form.get_by_role("button", name="Predict"), form.get_by_role("button", name="Apply")
    assert apply.is_disabled()
    form.get_by_label("Most running requests").fill("24")
    form.get_by_label("Your name").fill("anna")
    predict.click()
    form.get_by_text("Limit: TPOT target (now memory).").wait_for()
    assert server.made.applied == [
        ("predict", {"model": server.made.model, "thresholds": {"max_running": 24, "token_budget": None}})
    ]
    form.get_by_label("Most running requests").fill("25")
    assert apply.is_disabled(), "a prediction of other values is none of these"
    form.get_by_label("Most running requests").press("Enter")
    form.locator(".prediction table").wait_for()
    apply.click()
    form.get_by_text("In force: 8f2kq1zw version 43").wait_for()
    assert server.made.applied[-1] == ("thresholds", {
        "replica": None, "thresholds": {"max_running": 25, "token_budget": None}, "pin": True, "by": "anna",
        "reason": "",
    })
    form.get_by_label("Action").select_option("auto")
    assert not form.get_by_label("Most running requests").is_visible()
    predict.click()
    form.locator(".prediction table").wait_for()
    apply.click()
    form.get_by_text("In force").wait_for()
    assert server.made.applied[-1][1] == {"replica": None, "auto": True, "by": "anna", "reason": ""}


def test_targets_are_changed_in_their_own_units(tab: Tab, server: FakeDashboard) -> None:
    form = tab.page.locator("#targets-form")
    assert form.get_by_label("Time per further token").input_value() == "80"
    form.get_by_label("Time per further token").fill("70,5")
    form.get_by_label("Time to first token").fill("soon")
    form.get_by_role("button", name="Predict").click()
    form.get_by_text("soon is not a number").wait_for()
    assert server.made.applied == []
    form.get_by_label("Time to first token").fill("")
    form.get_by_role("button", name="Predict").click()
    form.locator(".prediction table").wait_for()
    form.get_by_role("button", name="Apply").click()
    form.get_by_text("Applied.").wait_for()
    assert server.made.applied[-1] == ("settings", {
        "settings": {"targets": {"ttft_s": None, "tpot_s": 0.0705, "latency_s": None}}, "model": server.made.model,
        "by": "", "reason": "",
    })


def test_it_says_when_the_controller_or_the_server_is_away_and_comes_back(tab: Tab, server: FakeDashboard) -> None:
    server.made.alive = False
    tab.page.get_by_text("The controller does not answer. Requests are served").wait_for()
    assert tab.text("#change .headline") == "not known" and tab.page.locator("canvas").count() == 9
    assert tab.text("#events").count("anna") == 2, "what was known stays"
    server.made.fails = True
    tab.page.get_by_role("heading", name="No answer").wait_for()
    assert "the server is stopping" in tab.text("#health-sentences")
    assert "what was known last" in tab.text("#health-sentences")
    server.made.fails, server.made.alive = False, True
    tab.page.get_by_role("heading", name="Overloaded").wait_for()
    assert tab.page.locator("body.stale").count() == 0


def test_the_key_is_asked_for_once_and_stays_in_the_tab(browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-operator")
    with FakeDashboard(example()) as server, tab_at(browser, f"{server.url}/dashboard") as tab:
        dialog = tab.page.get_by_role("dialog")
        dialog.get_by_label("Key").wait_for()
        assert "8f2kq1zw" not in tab.page.content() and tab.text("#load .headline") == "–"
        dialog.get_by_label("Key").fill("wrong")
        dialog.get_by_label("Key").press("Enter")
        tab.page.get_by_text("The server does not take this key.").wait_for()
        dialog.get_by_label("Key").fill("sk-operator")
        dialog.get_by_label("Key").press("Enter")
        tab.until(READY)
        tab.page.reload()
        tab.until(READY)
        assert not dialog.is_visible(), "a reload of the tab keeps it"
        kept = "[localStorage.length, document.cookie, Object.values(sessionStorage).join()]"
        assert tab.page.evaluate(kept) == [0, "", "sk-operator"]
        assert not [url for url in tab.requests if "sk-operator" in url]
        tab.page.get_by_role("button", name="Forget the key").click()
        dialog.get_by_label("Key").wait_for()
        assert tab.page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling_and_text_stands_out(
    browser: Any, server: FakeDashboard, scheme: str
) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    with tab_at(browser, f"{server.url}/dashboard", **options) as tab:
        tab.until(READY)
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        colours = tab.page.evaluate("""() => {
            const root = getComputedStyle(document.documentElement), canvas = document.createElement("canvas");
            const paint = canvas.getContext("2d", { willReadFrequently: true });
            const parts = (name) => { paint.fillStyle = root.getPropertyValue(name).trim(); paint.fillRect(0, 0, 1, 1);
                return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3); };
            const names = ["--page", "--card", "--ink", "--quiet", "--ok", "--note", "--warning", "--bad", "--accent",
                "--on-accent", "--target", ...Array.from({ length: 8 }, (_, place) => `--c${place}`)];
            return Object.fromEntries(names.map((name) => [name, parts(name)]));
        }""")
        assert (_luminance(colours["--page"]) < 0.2) == (scheme == "dark")
        for name in ("--ink", "--quiet", "--ok", "--note", "--warning", "--bad"):
            for ground in ("--page", "--card"):
                assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        assert _contrast(colours["--on-accent"], colours["--accent"]) >= 4.5
        for name in ("--target", *(f"--c{place}" for place in range(8))):
            assert _contrast(colours[name], colours["--card"]) >= 3.0, f"{name} is a line"


def test_a_keyboard_and_a_screen_reader_reach_everything(tab: Tab) -> None:
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.textContent") == "To the summary"
    seen = []
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        seen.append(tab.page.evaluate("document.activeElement.name || document.activeElement.className"))
    assert {"scroll", "ttft_s", "tpot_ms", "replica", "action", "max_running", "do"} <= set(seen)
    unlabelled = "[...document.querySelectorAll('main input, main select')].filter((one) => !one.labels.length).length"
    assert tab.page.evaluate(unlabelled) == 0
    tree = tab.page.locator("main").aria_snapshot()
    assert 'heading "Overloaded"' in tree and "row" in tree and "offered" in tree
    assert tab.page.evaluate("[...document.querySelectorAll('canvas')].every((one) => one.closest('[aria-hidden]'))")


def test_with_several_models_one_is_chosen(browser: Any) -> None:
    made = example()
    made.extra["m3x9c0ad"] = {"model": "other"}
    with FakeDashboard(made) as server, tab_at(browser, f"{server.url}/dashboard") as tab:
        tab.until(READY)
        assert "8f2kq1zw" in tab.text("#replicas tbody") and "m3x9c0ad" not in tab.text("#replicas tbody")
        tab.page.get_by_label("Model").select_option("other")
        assert "m3x9c0ad" in tab.text("#replicas tbody") and "8f2kq1zw" not in tab.text("#replicas tbody")
        assert tab.text("#load .headline") == "not known"


def _luminance(colour: list[int]) -> float:
    parts = [one / 255 for one in colour]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: list[int], other: list[int]) -> float:
    """As WCAG 2 has it."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)
