"""The page of the faults and the soak, and what it concludes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TITLES = {"kill-engine-core": "kill −9 of an engine core", "scale": "scale 2 → 1 → 2"}
SPLIT = {"requests": 5, "complete": 3, "rejected": 0, "errors": 1, "errors_within": 1, "cut": 1, "lost": 0, "hung": 0,
         "failed": 2}
NEW = dict.fromkeys(SPLIT, 0) | {"requests": 40, "complete": 40}


def result(fault, stack, load, **changes):
    return {
        "fault": fault, "stack": stack, "load": load, "capacity_rps": 2.4, "in_flight": SPLIT, "new": NEW,
        "goodput_before_rps": 1.68, "seconds_to_90": 4, "share_kept": 0.97, "replaced_s": 21.5,
    } | changes


@pytest.fixture
def faults_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "evidence"))
    import faults_page

    return faults_page


def made(faults_page, results, soak=None):
    text = faults_page.page(results, soak, TITLES, ttft_s=5.0, tpot_s=0.5)
    said = text.split(sys.modules["page_tables"].BEGIN)[1].split(sys.modules["page_tables"].END)[0]
    return text, " ".join(said.split())


def test_a_row_for_each_fault_and_stack(faults_page):
    text, said = made(faults_page, [
        result("scale", "ray", 0.7, new=NEW | {"errors": 3, "hung": 1}), result("kill-engine-core", "headrace", 0.7),
        result("kill-engine-core", "headrace", 1.5, seconds_to_90=None),
    ])
    assert "| kill −9 of an engine core | Headrace | 5 | 3 | 1 | 1 | 0 | 0 | 40 | 0 | 0 | 0 | 0 | 0 | 1.68 | 4" in text
    assert text.index("## At 0.7") < text.index("## At 1.5")
    assert "Headrace: of 10 requests in flight 4 did not finish, of 80 new ones 0 failed, 2 were silently cut" in said
    assert "Ray Serve LLM: of 5 requests in flight 2 did not finish, of 40 new ones 4 failed, 1 were" in said
    assert "New requests to Headrace failed after none." in said
    assert "at most 4 s (kill −9 of an engine core at 0.7), and not while the run lasted after" in said


def test_what_does_not_apply_says_why(faults_page):
    text, said = made(faults_page, [
        {"fault": "scale", "stack": "headrace", "load": 0.7, "capacity_rps": 2.4, "na": "it has one replica"},
        result("kill-engine-core", "headrace", 0.7, new=NEW | {"errors": 2}, unhealthy="no\nanswer"),
    ])
    assert "| scale 2 → 1 → 2 | Headrace | n/a |" in text and "Headrace: it has one replica." in text
    assert "no answer; started anew" in text
    assert said.startswith("1 fault in Headrace at 0.7 of capacity")
    assert "failed after kill −9 of an engine core at 0.7 (2)" in said


def test_a_page_is_continued_with_newer_runs(faults_page):
    before = [result("scale", "headrace", 0.7, replaced_s=1.0), result("scale", "headrace", 1.5)]
    newer = result("scale", "headrace", 0.7, replaced_s=2.0, capacity_rps=3.1, requests=[{"sent_s": 1.0}])
    found = faults_page.merged(before, [newer])
    assert [(one["load"], one["replaced_s"]) for one in found] == [(0.7, 2.0), (1.5, 21.5)]
    assert not any("requests" in one for one in found)
    said = "1 stands for\n2.4 requests/s (Headrace at 1.5); 3.1 requests/s (Headrace at 0.7);"
    assert said in made(faults_page, found)[0]


def test_the_soak(faults_page):
    slope = {"mib_per_hour": 3.0, "low": 1.0, "high": 5.0, "mean_mib": 200.0, "minutes": 25.0}
    soak = {
        "minutes": 45.1, "quiet_minutes": 15.0, "load": 1.5, "capacity_rps": 2.4, "sent": 12, "struck": [{}], "left": {
            "exit_code": 0, "processes": [], "shared_memory": [], "sockets": [], "files": ["a", "b"]},
        "account": {"complete": 10, "silently cut": 0, "lost": 1, "hung": 0, "unaccounted": 1},
        "slopes": {"Serve proxy 12": slope, "GCS 9": slope | {"low": -1.0}},
    }
    text, said = made(faults_page, [result("scale", "headrace", 1.5)], soak)
    assert "the last 15 minutes without any" in text
    assert "| Serve proxy 12 | 25 | 200 | +3.0 | +1.0 | +5.0 |" in text
    assert "In the soak 2 of 12 requests ended in neither" in said
    assert "memory grew in 1 of 2 processes; 2 things were left" in said
