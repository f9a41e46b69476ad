"""Faults under load, docs/evidence/faults.md, from the runs of `python -m benchmarks.faults`.

    python benchmarks/evidence/faults_page.py --runs runs/faults [--soak runs/soak/soak.json] [--out docs/evidence]

The results lie in faults.json beside the page too, where newer ones replace older ones, so that the page can be
continued without the runs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from conclusions import faults
from page_tables import BEGIN, END, with_conclusion

STACK_NAMES = {"headrace": "Headrace", "ray": "Ray Serve LLM"}
OF_GROUP = {"errors": "errors", "silently cut": "cut", "hung": "hung", "lost": "lost"}
HEAD = (
    "fault", "stack", "in flight", "finished", *OF_GROUP, "new", *(f"new: {name}" for name in OF_GROUP), "rejected",
    "goodput before /s", "to 90 % s", "kept", "replaced s",
)
ONLY_IN_RUNS = ("requests", "goodput_by_second")
SLOPES = ("process", "minutes", "mean MiB", "MiB per hour", "low", "high")
INTRODUCTION = """\
Made by `make faults`: SmolLM2-135M-Instruct on vLLM's CPU engine, two replicas, {cores} cores shared by client, HTTP
and engines; `ray.serve.llm` with the same engines and replicas beside Headrace, where it was run. 1 stands for
{capacity};
it is about what two replicas of Headrace complete on the machine of the run while far more is offered. Only runs of one
capacity compare in goodput. Requests of `0.5:p16d16+0.5:p32d32`, evenly spaced, open loop; each asks for an exact
number of tokens, so that every output that is cut is seen. One fault after 20 s.

In flight: sent before the fault and not ended; of them, finished with all tokens, and the rest by what the client
got. Errors: an HTTP error or an error event in the stream. Silently cut: looks complete and is not. Hung: nothing
within 30 s of when the request was due. Lost: the connection broke, with neither an answer nor an error. New: sent from
the fault on. Rejected: HTTP 429, of both. Goodput: complete, first token within {ttft_s:g} s and at most {tpot_s:g} s
per further token, by the second in which a request was due. To 90 %: seconds from the fault until the goodput of the
next 10 s is 90 % of that before (0: it never fell so far; –: not while the run lasted). Kept: goodput from the fault
to the end of the run, over that before. Replaced: seconds until as many processes of every kind run as before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/faults"))
    parser.add_argument("--soak", type=Path, default=Path("runs/soak/soak.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    args = parser.parse_args()
    from benchmarks.faults.__main__ import results
    from benchmarks.faults.faults import FAULTS
    from benchmarks.faults.stack_config import TARGETS

    kept = args.out / "faults.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"faults": [], "soak": None}
    soak = json.loads(args.soak.read_text()) if args.soak.exists() else before["soak"]
    found = merged(before["faults"], results(args.runs))
    kept.write_text(json.dumps({"faults": found, "soak": soak}, indent=1) + "\n", encoding="utf-8")
    titles = {name: fault.title for name, fault in FAULTS.items()}
    text = page(found, soak, titles, ttft_s=TARGETS.ttft_s, tpot_s=TARGETS.tpot_s)
    (args.out / "faults.md").write_text(text, encoding="utf-8")


def merged(before: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result for each stack, load and fault, the newer one; without single requests and seconds."""
    found = {(one["stack"], one["load"], one["fault"]): one for one in (*before, *new)}
    return [{key: value for key, value in found[at].items() if key not in ONLY_IN_RUNS} for at in sorted(found)]


def page(
    results: list[dict[str, Any]], soak: dict[str, Any] | None, titles: dict[str, str], *, ttft_s: float, tpot_s: float
) -> str:
    """The whole page. titles: of the faults by name, in the order of the rows."""
    introduction = INTRODUCTION.format(
        cores=os.cpu_count(), capacity=_capacities(results), ttft_s=ttft_s, tpot_s=tpot_s
    )
    parts = ["# Faults", "", BEGIN + END, introduction]
    for load in sorted({one["load"] for one in results}):
        found = {(one["fault"], one["stack"]): one for one in results if one["load"] == load}
        shown = [found[key] for name in titles for key in ((name, "headrace"), (name, "ray")) if key in found]
        parts += ["", f"## At {load:g} of capacity", "", *_table(HEAD, (_row(one, titles) for one in shown))]
        parts += list(_notes(shown, titles))
    return with_conclusion("\n".join(parts + (_soak(soak) if soak else [])) + "\n", faults)


def _capacities(results: list[dict[str, Any]]) -> str:
    """Requests/s that 1 stands for; of which stack and load, where they were run on machines of different speeds."""
    groups: dict[float, set[str]] = {}
    for one in results:
        groups.setdefault(one["capacity_rps"], set()).add(f"{STACK_NAMES[one['stack']]} at {one['load']:g}")
    if len(groups) == 1:
        return f"{next(iter(groups)):g} requests/s"
    return "; ".join(f"{rps:g} requests/s ({', '.join(sorted(names))})" for rps, names in sorted(groups.items()))


def _row(one: dict[str, Any], titles: dict[str, str]) -> list[str]:
    begun = [titles[one["fault"]], STACK_NAMES[one["stack"]]]
    if "na" in one:
        return [*begun, "n/a", *[""] * (len(HEAD) - 3)]
    flying, new = one["in_flight"], one["new"]
    counts = [flying["requests"], flying["complete"], *(flying[key] for key in OF_GROUP.values()), new["requests"]]
    counts += [*(new[key] for key in OF_GROUP.values()), flying["rejected"] + new["rejected"]]
    return [
        *begun, *map(str, counts), f"{one['goodput_before_rps']:.2f}", _cell(one["seconds_to_90"], ".0f"),
        _cell(one["share_kept"], ".2f"), _cell(one["replaced_s"], ".0f"),
    ]


def _notes(shown: list[dict[str, Any]], titles: dict[str, str]) -> Iterator[str]:
    """What the runs say beside their counts: why a fault does not apply, and stacks that did not get healthy."""
    said = []
    for one in shown:
        where = f"{titles[one['fault']]}, {STACK_NAMES[one['stack']]}"
        if "na" in one:
            said.append(f"- {where}: {one['na']}.")
        if one.get("unhealthy"):
            said.append(f"- {where}: {' '.join(one['unhealthy'].split())}; started anew.")
    if said:
        yield from ("", *said)


def _soak(soak: dict[str, Any]) -> list[str]:
    """The account, the slopes, and what was left."""
    counts = [[name, str(count)] for name, count in soak["account"].items()]
    slopes = [
        [name, f"{one['minutes']:.0f}", f"{one['mean_mib']:.0f}", *(f"{one[key]:+.1f}" for key in (
            "mib_per_hour", "low", "high"))]
        for name, one in soak["slopes"].items()
    ]
    left = soak["left"]
    kinds = {"processes": "processes", "shared_memory": "shared-memory segments", "sockets": "sockets",
             "files": "temporary files"}
    return [
        "", "## Soak", "",
        f"Made by `make soak`: {soak['minutes']:.0f} minutes of Headrace at {soak['load']:g} of capacity"
        f" ({soak['capacity_rps']:g} requests/s), {len(soak['struck'])} faults, one a minute at most"
        f"{_quiet(soak)}. Sent: {soak['sent']}.", "",
        *_table(("outcome", "requests"), counts), "",
        "Memory that each process has for itself, of those that lived long enough; a straight line fitted to samples "
        "after the process's first minutes, with its 95 % interval.", "",
        *_table(SLOPES, slopes), "", "Left after the stop:", "",
        *_table(("left behind", "number"), [[name, str(len(left[key]))] for key, name in kinds.items()]),
    ]


def _quiet(soak: dict[str, Any]) -> str:
    minutes = soak.get("quiet_minutes")
    return f", the last {minutes:.0f} minutes without any" if minutes else ""


def _table(head: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    import sys

    sys.path.append(str(Path(__file__).resolve().parents[2]))
    main()
