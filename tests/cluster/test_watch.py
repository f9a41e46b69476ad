"""`headrace status --watch`: the page's sentences in 80 columns, through trouble, until Ctrl-C."""

from __future__ import annotations

from typing import Any

from fake_dashboard import change, example
from rich.console import Console
from typer.testing import CliRunner

from cluster.client import AdminUnavailable
from cluster.watch import shown, watch
from headrace import cli
from router.dashboard.overview import overview


def text_of(parts: Any, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return captured.get()


def test_it_says_what_the_page_says_in_80_columns() -> None:
    found = overview(example().state())
    model = found["models"]["llama-3-8b"]
    wide = text_of(shown(found), width=400)
    answers = (model[key]["sentence"] for key in ("load", "limit", "one_more", "wanted"))
    for sentence in (*found["health"]["sentences"], *answers):
        assert sentence in wide
    assert found["health"]["title"] in wide and found["changes"][0]["sentence"] in wide
    narrow = text_of(shown(found))
    assert "…" not in narrow and all(len(line.rstrip()) <= 80 for line in narrow.splitlines())
    for heading in ("running", "possible /s", "tuning", "How loaded?", "One more replica?", "How many replicas?"):
        assert heading in narrow


def test_a_silent_replica_and_a_server_without_an_answer_are_shown() -> None:
    made = example()
    made.extra["8f2kq1zw"] = {"reachable": False, "reason": "gone", "last_answer_age_s": 9.0}
    said = text_of(shown(overview(made.state()), "nothing answers"))
    assert "No answer: nothing answers" in said and "silent" in said
    assert text_of(shown(None, "nothing answers")).strip() == "No answer: nothing answers"


def test_markup_of_a_model_or_a_reason_is_text() -> None:
    made = example()
    made.changes = [change(reason="[red]m[/red]")]
    assert "[red]m[/red]" in text_of(shown(overview(made.state())), width=400)


def test_it_asks_again_after_trouble_and_ends_cleanly_at_ctrl_c() -> None:
    answers = iter([AdminUnavailable("nothing answers"), overview(example().state()), KeyboardInterrupt()])

    def ask() -> dict[str, Any]:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    slept: list[float] = []
    console = Console(width=80)
    with console.capture() as captured:
        watch(ask, console, every_s=2.0, sleep=slept.append)
    assert slept == [2.0, 2.0]
    assert "How loaded?" in captured.get() and "No answer" not in captured.get(), "the last frame is the latest answer"


def test_json_is_for_programs_which_do_not_watch() -> None:
    result = CliRunner().invoke(cli.app, ["status", "--watch", "--json"])
    assert "leave out --json" in str(result.exception)
