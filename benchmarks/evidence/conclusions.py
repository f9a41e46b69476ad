"""What each evidence page concludes, computed from the page's own tables.

    python benchmarks/evidence/conclusions.py [--out docs/evidence]

writes the conclusion of every page anew from the tables that it holds, where the runs behind them are gone. A page's
generator does the same when it writes the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from page_tables import Table, listed, number, percent, titled, with_conclusion

BEYOND = (1.2, 1.5, 2.0, 3.0)
RULES = ("vllm", "vllm-queue", "vllm-watermark", "dynamo", "llm-d")
NOT_RUN = "Too little has been run for a conclusion."
LEVEL = 0.03
"""Two goodputs on a trace that differ by less are level: which requests are served is chance."""


def change(several: list[Table]) -> str:
    """While load, lengths or the hardware change."""
    goodput, settles = titled(several, "Goodput"), titled(several, "How fast")
    names = goodput.column("scenario")
    over = {name: x for name, x in zip(names, goodput.numbers("fluid / static"), strict=True) if x is not None}
    if not over:
        return NOT_RUN
    level = [name for name, x in over.items() if abs(x - 1) <= LEVEL]
    ahead = [f"{name} ({x:.2f})" for name, x in over.items() if x - 1 > LEVEL]
    met = sum(x >= 1.10 for x in over.values())
    cycles = [x or 0 for x in settles.numbers("all")]
    slow = [f"{name} at {at} ({cycle:g})" for name, at, cycle in zip(
        settles.column("scenario"), settles.column("change at"), cycles, strict=True
    ) if cycle > 2]
    lost = sum(x or 0 for x in goodput.numbers("fluid: preemptions"))
    return (
        f"`fluid` has {min(over.values()):.2f} to {max(over.values()):.2f} times the goodput of the best static "
        f"setting: level with it, within {percent(LEVEL, '.0')}, in {listed(level)}, ahead in {listed(ahead)}. The "
        f"required 1.10 is met in {met} of {len(over)} scenarios. "
        f"Its parameters settle within two control cycles of 5 s after {len(cycles) - len(slow)} of {len(cycles)} "
        f"lasting changes; slower: {listed(slow)}. Afterwards no parameter moves by more than "
        f"{max(x or 0 for x in settles.numbers('swing afterwards')):g} % from cycle to cycle. "
        f"Preemptions: {lost:g}."
    )


def overload(several: list[Table]) -> str:
    """Goodput below, at and beyond capacity."""
    required = titled(several, "What is required")
    missed = [row for row in required.rows if row[-1] == "no"]
    loads = [table for table in several if table.head[0] == "load" and "fluid / own bound" in table.head]
    named = [table for table in loads if "strict-wait" in table.head]
    bound = [(x, f"{t.title} at load {at:g}") for t in named for at, x in t.pairs("load", "fluid / own bound")]
    static = [(x, f"{t.title} at load {at:g}") for t in named for at, x in t.pairs("load", "fluid / static")]
    shares = [
        (theirs / ours, f"{rule} on {t.title} at load {at:g}") for t in named
        for rule in RULES if rule in t.head for at, theirs in t.pairs("load", rule) if at in BEYOND
        for ours in [dict(t.pairs("load", "fluid"))[at]]
    ]
    if not (bound and static and shares):
        return NOT_RUN
    behind = sum(share < 0.5 for share, _ in shares)
    return (
        f"From load 1 to 3 `fluid` serves {min(bound)[0]:.2f} to {max(bound)[0]:.2f} of the fluid bound within both "
        f"targets (least: {min(bound)[1]}), and {min(static)[0]:.2f} to {max(static)[0]:.2f} times the goodput of the "
        f"best static setting (most: {max(static)[1]}). "
        f"Of the rules that others ship, {behind} of {len(shares)} runs beyond capacity have less than half of its "
        f"goodput; the best has {max(shares)[0]:.2f} of it ({max(shares)[1]}). "
        f"{len(required.rows) - len(missed)} of {len(required.rows)} requirements are met; missed: "
        + listed([f"{row[0]} ({row[2]}, asked {row[1]}; {row[3]})" for row in missed]) + "."
    )


def routing(several: list[Table]) -> str:
    """Our router beside those of other projects, in goodput, TTFT and prefix hits; and with several ingresses."""
    said = [_beside_other_routers(table) if "router" in table.head else _with_ingresses(table) for table in several]
    return " ".join(filter(None, said)) or NOT_RUN


def _beside_other_routers(table: Table) -> str:
    names, loads = table.column("router"), table.numbers("load")
    goodput, p99, hits = (table.numbers(name) for name in ("goodput /s", "TTFT p99 (s)", "prefix hits"))
    parts = []
    for load in dict.fromkeys(loads):
        at = [place for place, one in enumerate(loads) if one == load and goodput[place] is not None]
        ours = [place for place in at if names[place] == "`fluid`"]
        others = [place for place in at if place not in ours]
        if not ours or not others:
            continue
        best = max(others, key=lambda place: goodput[place] or 0.0)
        fastest = min(others, key=lambda place: p99[place] or 0.0)
        part = (
            f"at load {load:g} goodput {(goodput[ours[0]] or 0) / (goodput[best] or 1):.2f} and p99 TTFT "
            f"{(p99[ours[0]] or 0) / (p99[fastest] or 1):.2f} times those of the best of {len(others)} others, "
            f"{names[best]} and {names[fastest]}"
        )
        most = max(others, key=lambda place: hits[place] or 0.0)
        if hits[most]:
            part += f", prefix hits {(hits[ours[0]] or 0) / (hits[most] or 1):.2f} times those of {names[most]}"
        parts.append(part)
    return f"{table.title}: {'; '.join(parts)}." if parts else ""


def _with_ingresses(table: Table) -> str:
    goodput, p99 = table.pairs("ingresses", "goodput /s"), table.pairs("ingresses", "TTFT p99 (s)")
    alone = [x for count, x in p99 if count == 1]
    if not alone or len(alone) == len(p99):
        return ""
    worst, at = max((x, count) for count, x in p99)
    rates = [x for _, x in goodput]
    return (
        f"{table.title}: goodput {min(rates):.2f} to {max(rates):.2f}/s; p99 TTFT at most "
        f"{worst / min(alone):.2f} times that of one ingress at its best, with {at:g}."
    )


def autoscaling(several: list[Table]) -> str:
    """Our decision beside the rules of others, at misses that are no higher, and beside the oracle."""
    said = []
    for table in (one for one in several if "replica-hours" in one.head):
        hours, late = table.numbers("replica-hours"), table.numbers("late or rejected")
        runs = [
            (name.strip("`"), cost, missed)
            for name, cost, missed in zip(table.column("rule"), hours, late, strict=True)
            if cost is not None and missed is not None
        ]
        ours = [run for run in runs if run[0].startswith("fluid")]
        others = [run for run in runs if run[0].startswith(("ongoing", "slo"))]
        oracle = next((run for run in runs if run[0] == "oracle"), None)
        if not ours or not others or oracle is None:
            continue
        parts = []
        for name, cost, missed in ours:
            against = f"`{name}` takes {cost / oracle[1]:.2f} times the oracle's replica-hours and misses {missed:g} % "
            against += f"(the oracle {oracle[2]:g} %)"
            level = [run for run in others if run[2] <= missed]
            if level:
                best = min(level, key=lambda run: run[1])
                against += f", {cost / best[1]:.2f} times those of `{best[0]}`, the best other that misses no more"
            else:
                fewest = min(others, key=lambda run: run[2])
                against += f"; no other misses so few, the nearest `{fewest[0]}` {fewest[2]:g} % at "
                against += f"{fewest[1] / cost:.2f} times ours"
            parts.append(against)
        said.append(f"{table.title}: {'; '.join(parts)}.")
    return " ".join(said) or NOT_RUN


def past_capacity(several: list[Table]) -> str:
    """WAIT and Nested WAIT beside fcfs, beyond capacity."""
    (table,) = several
    ratios = {policy: [x or 0 for x in table.numbers(f"{policy} / fcfs")] for policy in ("wait", "nested-wait")}
    preempted = {policy: [x or 0 for x in table.numbers(f"{policy}: preemptions")] for policy in ("fcfs", *ratios)}
    below = [
        f"{policy} on {name} at load {load}" for policy, values in ratios.items()
        for name, load, ratio in zip(table.column("workload"), table.column("load"), values, strict=True)
        if ratio < 0.99
    ]
    more = [
        f"{policy} on {name} at load {load}" for policy in ratios
        for name, load, own, fcfs in zip(
            table.column("workload"), table.column("load"), preempted[policy], preempted["fcfs"], strict=True
        ) if own > fcfs
    ]
    return (
        f"WAIT serves {min(ratios['wait']):.3f} to {max(ratios['wait']):.3f} and Nested WAIT "
        f"{min(ratios['nested-wait']):.3f} to {max(ratios['nested-wait']):.3f} times the requests that first "
        f"come, first served does. More than 1 % below it: {listed(below)}. More preemptions than it: "
        f"{listed(more)}; in all {sum(preempted['fcfs']):.0f} with fcfs, {sum(preempted['wait']):.0f} with WAIT and "
        f"{sum(preempted['nested-wait']):.0f} with Nested WAIT."
    )


def real_traffic(several: list[Table]) -> str:
    """Traffic as real engines see it, over all workloads."""
    grids = [table for table in several if "prefix hits" in table.head]
    ours = [(table, row) for table in grids for row in table.rows if row[0] == "`fluid`"]
    if not ours:
        return NOT_RUN

    def of(row: tuple[str, ...], name: str) -> float:
        return number(row[grids[0].head.index(name)]) or 0.0

    shares = [(of(row, "goodput") / of(row, "bound"), f"{table.title} at load {row[1]}") for table, row in ours]
    short = [where for share, where in shares if share < 0.9]
    served = [(of(row, "miss TPOT"), f"{table.title} at load {row[1]}") for table, row in ours]
    plain = [of(row, "goodput") for table in grids for row in table.rows if row[0] == "`vllm`" and of(row, "load") > 1]
    text = (
        f"`fluid` has at least 0.9 of the fluid bound in {len(shares) - len(short)} of {len(shares)} rows; less on "
        f"{listed(short)}. Of the requests that it serves at most "
        f"{max(of(row, 'miss TTFT') for _, row in ours):g}% miss the TTFT and {max(served)[0]:g}% the TPOT target "
        f"({max(served)[1]}). "
    )
    return text + f"Beyond capacity plain vLLM has a goodput of at most {max(plain):.2f} requests/s." if plain else text


def strict_or_serving(several: list[Table]) -> str:
    """The literal rule beside the serving mode."""
    cases = [table for table in several if "strict: never scheduled" in table.head]
    slower, against, late, gains = [], [], [], []
    for table in cases:
        columns = [table.numbers(f"{rule}: latency / TTFT") for rule in ("vllm", "serving", "strict")]
        for at, vllm, serving, strict in zip(table.numbers("load"), *columns, strict=True):
            assert at is not None and vllm and serving and strict
            where = f"{table.title} at load {at:g}"
            slower.append((at, strict / serving, where))
            against.append((strict / serving - 1, where))
            if at <= 0.8:
                late.append((serving - vllm, where))
            gains.append((1 - serving / vllm, where))
    lowest = [ratio for at, ratio, _ in slower if at == min(at for at, _, _ in slower)]
    starved = [int(x or 0) for table in cases for x in table.numbers("strict: never scheduled")]
    return (
        f"At {min(at for at, _, _ in slower):g} of capacity the paper's literal rule takes {min(lowest):.0f} to "
        f"{max(lowest):.0f} times the latency of the serving mode; the best it does against it is "
        f"{percent(min(against)[0])} ({min(against)[1]}). It leaves {min(starved)} to {max(starved)} requests "
        "unscheduled when arrivals end. "
        f"Up to 0.8 of capacity the serving mode is at most {max(late)[0]:.2f} s slower than plain vLLM. Its largest "
        f"gain is {percent(max(gains)[0], '.0')} ({max(gains)[1]}), its largest loss {percent(-min(gains)[0], '.0')} "
        f"({min(gains)[1]})."
    )


def fidelity(several: list[Table]) -> str:
    """The simulator beside the real engine."""
    table = several[0]
    apart = dict(zip(table.column("measure (s)"), table.numbers("difference"), strict=True))
    means = [x or 0.0 for name, x in apart.items() if "mean" in name]
    tails = [x or 0.0 for name, x in apart.items() if "p99" in name]
    return (
        f"Mean latency, TTFT and TPOT in the simulator differ from the real engine's by {min(means):+.1f} to "
        f"{max(means):+.1f} %, the 99th percentiles by {min(tails):+.1f} to {max(tails):+.1f} %."
    )


def paper_tables(several: list[Table]) -> str:
    """The paper's experiments with today's scheduler; nothing of a section without runs."""
    said = []
    for title, ours, base, what in (
        ("One type (figure", "WAIT-CP, cap 20", "sarathi, 256 slots", "with one type on Llama-2-7B"),
        ("Long answers", "WAIT-CP, cap 120", "sarathi, 512 slots", "with long outputs"),
        ("Two types", "WAIT-CP, cap 30", "sarathi, 512 slots", "with two types"),
    ):
        if apart := _apart(titled(several, title), ours, base):
            lower = [rate for rate, x in apart.items() if x < 0]
            said.append(f"{_of(lower, apart)} {what}" + (f" (up to {max(lower):g} /s)" if lower else ""))
    if not said:
        return NOT_RUN
    text = (
        "The mean latency under WAIT-CP, the scheduler that the authors ran, is below Sarathi's at "
        + listed(said) + ". "
    )
    cap = _apart(titled(several, "lmsys-chat-1m"), "cap 300", "sarathi, 256 slots")
    if cap:
        text += f"On lmsys-chat-1m lengths a cap of 300 lowers it at {_of([r for r, x in cap.items() if x < 0], cap)}. "
    gate = _apart(titled(several, "Waiting or not"), "groups of 2", "cap alone")
    if gate:
        text += f"Waiting for groups of 2 raises it at {_of([r for r, x in gate.items() if x > 0], gate)}."
    return text


def _of(some: list[float], apart: dict[float, float]) -> str:
    return f"{len(some)} of {len(apart)} rates"


def _apart(table: Table, ours: str, base: str) -> dict[float, float]:
    """Mean latency of one column less that of another, relative, by rate."""
    theirs = dict(table.pairs("rate /s", base))
    return {rate: x / theirs[rate] - 1 for rate, x in table.pairs("rate /s", ours) if rate in theirs}


def a100_law(several: list[Table]) -> str:
    """Where the A100's iteration-time model comes from."""
    errors, capacity, terms = (
        titled(several, "Errors"), titled(several, "What it changes"), titled(several, "The model")
    )
    mean, largest = (errors.column(name) for name in ("mean", "largest"))
    name, (old, new) = "d1, µs per KV token", (0, 1)
    d1 = terms.numbers(name)
    rows = [(row[0], number(row[1]), number(row[2])) for row in capacity.rows]
    shifts = [(b / a - 1, lengths) for lengths, a, b in rows if a and b]
    return (
        f"Fitted to Vidur's published iteration times, the model errs by {mean[new]} on average and {largest[new]} at "
        f"most, where the hand-made profile errs by {mean[old]} and {largest[old]}; a KV token costs {d1[new]:g} µs "
        f"instead of {d1[old]:g}. "
        f"Fluid capacity changes by {percent(min(shifts)[0])} ({min(shifts)[1]}) to {percent(max(shifts)[0])} "
        f"({max(shifts)[1]})."
    )


def theory(several: list[Table]) -> str:
    """The theory on the paper's own model."""
    said = []
    slopes = next((table for table in several if table.head[:2] == ("curve", "slope")), None)
    if slopes:
        off = max(
            abs((a or 0.0) - (b or 0.0)) for a, b in zip(slopes.numbers("slope"), slopes.numbers("theory"), strict=True)
        )
        said.append(f"Throughput gaps fall with ζ with the paper's exponents, at most {off:.2f} off.")
    overflow = next((table for table in several if "≤ δ" in table.head), None)
    if overflow:
        held = overflow.column("≤ δ").count("yes")
        said.append(f"Nested WAIT's memory bound holds in {held} of {len(overflow.rows)} cases.")
    memory = next((table for table in several if "published M*, tokens" in table.head), None)
    if memory:
        rates = "λ, requests/s"
        published, computed = (dict(memory.pairs(rates, name)) for name in ("published M*, tokens", "computed"))
        off = max(abs(computed[rate] / tokens - 1) for rate, tokens in published.items())
        said.append(f"Equilibrium memory differs from the published figures by at most {off:.3%}.")
    return " ".join(said)


def faults(several: list[Table]) -> str:
    """Faults in a running cluster, and the soak."""
    rows = [
        (dict(zip(table.head, row, strict=True)), table.title.removeprefix("At ").removesuffix(" of capacity"))
        for table in several if "new: lost" in table.head for row in table.rows
    ]
    ours = [(row, load) for row, load in rows if row["stack"] == "Headrace" and row["in flight"] != "n/a"]
    if not ours:
        return NOT_RUN
    bad = ("errors", "silently cut", "hung", "lost")
    kinds = len({row["fault"] for row, _ in ours} - {"no fault"})
    text = f"{kinds} fault{'s' * (kinds != 1)} in Headrace at {listed(sorted({at for _, at in ours}))} of capacity. "
    for name, seen in (("Headrace", ours), ("Ray Serve LLM", [
        (row, load) for row, load in rows if row["stack"] != "Headrace" and row["in flight"] != "n/a"
    ])):
        if seen:
            flying, new, cut = (
                sum(number(row[key]) or 0 for row, _ in seen for key in keys) for keys in (
                    bad, [f"new: {key}" for key in bad], ("silently cut", "new: silently cut"))
            )
            text += (
                f"{name}: of {sum(number(row['in flight']) or 0 for row, _ in seen):g} requests in flight "
                f"{flying:g} did not finish, of {sum(number(row['new']) or 0 for row, _ in seen):g} new ones "
                f"{new:g} failed, {cut:g} were silently cut. "
            )
    failing = [
        f"{row['fault']} at {load} ({count:g})" for row, load in ours
        if (count := sum(number(row[f"new: {key}"]) or 0 for key in bad))
    ]
    slowest = max(((number(row["to 90 % s"]) or 0, f"{row['fault']} at {at}") for row, at in ours), default=(0, ""))
    never = [f"{row['fault']} at {load}" for row, load in ours if number(row["to 90 % s"]) is None]
    text += f"New requests to Headrace failed after {listed(failing)}. Its goodput was back at 90 % after at most "
    text += f"{slowest[0]:g} s ({slowest[1]})"
    return text + (f", and not while the run lasted after {listed(never)}. " if never else ". ") + _soak(several)


def _soak(several: list[Table]) -> str:
    account = next((table for table in several if table.head == ("outcome", "requests")), None)
    if account is None:
        return ""
    counts = dict(zip(account.column("outcome"), account.numbers("requests"), strict=True))
    missing = sum(counts[name] or 0 for name in ("silently cut", "lost", "hung", "unaccounted"))
    slopes = next(table for table in several if "MiB per hour" in table.head)
    growing = sum((low or 0) > 0 for low in slopes.numbers("low"))
    left = next(table for table in several if "left behind" in table.head)
    return (
        f"In the soak {missing:g} of {sum(x or 0 for x in counts.values()):g} requests ended in neither all their "
        f"tokens, a stated error nor a rejection; memory grew in {growing} of {len(slopes.rows)} processes; "
        f"{sum(x or 0 for x in left.numbers('number')):g} things were left after the stop."
    )


def estimates(several: list[Table]) -> str:
    """Profiles from first principles, beside known ones."""
    terms, errors, memory = titled(several, "Terms"), titled(several, "Errors"), titled(several, "The published table")
    plans = titled(several, "A plan beside")
    published = [
        abs(off) for name, off in zip(terms.column("profile"), terms.numbers("off by"), strict=True)
        if off is not None and "estimate" not in name
    ]
    off = [abs(x or 0.0) for x in memory.numbers("off by")]
    at_plan = [row for row in plans.rows if number(row[2]) == 1]
    late = [(number(row[6]) or 0.0) + (number(row[7]) or 0.0) for row in at_plan]
    slow = [number(row[8]) or 0.0 for row in at_plan]
    return (
        f"On an A100 every term of Llama-2-7B is within {max(published):g} % of the published laws, M* and the rate at "
        f"which memory is full within {max(off):g} %, and the published iteration times are met with a mean error of "
        f"{errors.column('mean')[0]} and {errors.column('largest')[0]} at most. At the rate that a plan allows, up to "
        f"{max(late):g} % of the simulated requests have no first token in time, and up to {max(slow):g} % of the "
        f"served ones miss the TPOT target. Estimates for other accelerators are checked against nothing."
    )


CONCLUSIONS: dict[str, Callable[[list[Table]], str]] = {
    "a100-law.md": a100_law, "autoscaling.md": autoscaling, "change.md": change, "estimates.md": estimates,
    "faults.md": faults, "fidelity.md": fidelity, "overload.md": overload, "paper-tables.md": paper_tables,
    "real-traffic.md": real_traffic,
    "past-capacity.md": past_capacity, "routing.md": routing, "strict-or-serving.md": strict_or_serving,
    "theory.md": theory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    args = parser.parse_args()
    for name, conclude in CONCLUSIONS.items():
        page = args.out / name
        page.write_text(with_conclusion(page.read_text(encoding="utf-8"), conclude), encoding="utf-8")


if __name__ == "__main__":
    main()
