"""The state of an application in plain sentences: healthy? how loaded? what limits it? what changed? how many replicas?

The only place that puts the state into words; the dashboard and `headrace status --watch` show what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import bdtrc

from router.dashboard.changed import change_in_words
from router.dashboard.oddities import Oddity, Replica, oddities_of
from scheduler.estimation.intervals import FALSE_ALARM

_LEVELS = ("ok", "note", "warning", "bad")
_TITLES = {"ok": "Healthy", "note": "Healthy", "warning": "Needs a look", "bad": "In trouble"}
_LEAST_JUDGED = 20
_TIMEOUT_S = 10.0
_FULL = 0.999
_HIGH_LOAD = 0.85
_ROW = ("model", "reachable", "running", "waiting", "held", "kv_used_fraction", "preemptions", "rate_rps", "decision")
_LIMITS = {
    "memory": (
        "KV cache", "It is full before anything else. More GPU memory for it, or shorter contexts, would help."
    ),
    "slots": (
        "slots", "As many requests run as may. A larger max_num_seqs, or max_running where it is set, would help."
    ),
    "token budget": ("token budget", "An iteration is full of tokens. A larger max_num_batched_tokens would help."),
    "TPOT target": (
        "TPOT target", "With larger batches, tokens would come more slowly than this target allows. A faster GPU, or a "
        "looser target, would help."
    ),
    "TTFT target": (
        "TTFT target", "Some prompts take longer than it allows even without a wait. A looser target would help."
    ),
    "latency target": (
        "latency target", "Some answers take longer than it allows even without a wait. A looser target would help."
    ),
}
"""Each limit of the fluid plan: its name, and what it means once it is reached."""


def overview(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state`, as `/admin/state` with the controller's `overview` and the `models`' settings, in sentences; JSON-ready.

    health: {level: ok, note, warning or bad; title; sentences, the worst first}. models: by model what `_of_model`
    returns. changes: the latest events in words, the newest first. replicas: a row each, with its oddities.
    """
    controller, replicas = state["controller"], state["replicas"]
    found: dict[str, list[Oddity]] = {}
    for model in _models(state):
        of_it = {name: one for name, one in replicas.items() if one["model"] == model}
        found |= oddities_of(of_it, state["models"].get(model, {}).get("engine_timeout_s", _TIMEOUT_S))
    return {
        "application": state["application"], "at_unix_s": state["at_unix_s"],
        "health": _health(state, found),
        "models": {model: _of_model(state, model) for model in _models(state)},
        "changes": [change_in_words(one, state["at_unix_s"]) for one in reversed(controller.get("changes", ()))],
        "replicas": {name: _row(one, found[name]) for name, one in replicas.items()},
        "controller": {
            key: controller.get(key) for key in ("alive", "reason", "period_s", "started_unix_s", "passes", "pins")
        },
        "front_door": state["front_door"],
    }


def _models(state: Mapping[str, Any]) -> list[str]:
    return sorted({*state.get("models", ()), *(one["model"] for one in state["replicas"].values())})


def _health(state: Mapping[str, Any], found: Mapping[str, Sequence[Oddity]]) -> dict[str, Any]:
    overloads = [one for model in _models(state) for one in _of_load(state, model)]
    said = [*overloads, *_of_controller(state["controller"]), *_of_replicas(state, found)]
    for model in _models(state):
        said += _of_targets(state, model)
    said.sort(key=lambda one: -_LEVELS.index(one[0]))
    level = said[0][0] if said else "ok"
    sentences = [text for _, text in said]
    if level in ("ok", "note"):
        sentences.insert(0, _all_answer(state))
    title = "Overloaded" if level == "warning" and overloads else _TITLES[level]
    return {"level": level, "title": title, "sentences": sentences}


def _all_answer(state: Mapping[str, Any]) -> str:
    count = len(state["replicas"])
    answer = "The only replica answers" if count == 1 else f"All {count} replicas answer"
    recent = _recent(state["replicas"].values())
    if recent["completed"] < _LEAST_JUDGED:
        return f"{answer}; {recent['completed'] or 'no'} requests have finished lately."
    return f"{answer}; {recent['good'] / recent['completed']:.0%} of the requests that finished lately were in time."


def _of_replicas(state: Mapping[str, Any], found: Mapping[str, Sequence[Oddity]]) -> list[tuple[str, str]]:
    replicas, said = state["replicas"], list[tuple[str, str]]()
    if not replicas:
        return [("bad", "There is no replica: nothing is served. They may be starting; see headrace doctor.")]
    answering = {one["model"] for one in replicas.values() if one["reachable"]}
    if not answering:
        return [("bad", "No replica answers: nothing is served.")]
    said += [
        ("bad", f"No replica of {model} answers: its requests fail.") for model in _models(state)
        if model not in answering
    ]
    for name, oddities in found.items():
        for one in oddities:
            level = "warning" if one.name == "silent" and replicas[name]["model"] in answering else one.level
            said.append((level, f"Replica {name} is {_predicate(one.name)}: {one.text[0].lower()}{one.text[1:]}"))
    return said


def _predicate(name: str) -> str:
    return "hard to predict" if name == "poor fit" else name


def _of_controller(controller: Mapping[str, Any]) -> list[tuple[str, str]]:
    if controller["alive"]:
        return []
    reason = str(controller["reason"])
    if "off in the configuration" in reason:
        return [("note", "Automatic tuning is off in the configuration; thresholds stay as they are.")]
    said = "The controller does not answer. Requests are served; nothing adjusts the thresholds until it is back."
    return [("warning", said)]


def _of_load(state: Mapping[str, Any], model: str) -> list[tuple[str, str]]:
    load = _of_model(state, model)["load"]
    if load["level"] not in ("warning", "bad"):
        return []
    return [(load["level"], load["sentence"] if len(_models(state)) == 1 else f"{model}: {load['sentence']}")]


def _of_targets(state: Mapping[str, Any], model: str) -> list[tuple[str, str]]:
    recent = _recent(one for one in state["replicas"].values() if one["model"] == model)
    completed, missed = recent["completed"], recent["completed"] - recent["good"]
    accepted = _accepted(state, model)
    by_chance = float(bdtrc(missed - 1, completed, accepted)) if missed else 1.0
    if completed < _LEAST_JUDGED or by_chance > FALSE_ALARM:
        return []
    return [("warning", f"{missed / completed:.0%} of the requests of {model} that finished lately missed a target; "
                        f"{accepted:.0%} is accepted.")]


def _accepted(state: Mapping[str, Any], model: str) -> float:
    forecasts = [one.get("forecast") for one in state["replicas"].values() if one["model"] == model]
    return max((one["miss_probability"] for one in forecasts if one), default=0.01)


def _recent(replicas: Any) -> dict[str, float]:
    counts = [one.get("recent") or {} for one in replicas]
    names = ("seconds", "arrivals", "admitted", "rejected", "completed", "good", "audited", "audited_met")
    return {name: sum(count.get(name, 0) for count in counts) for name in names}


def _of_model(state: Mapping[str, Any], model: str) -> dict[str, Any]:
    """One model: `load`, `limit`, `one_more` and `wanted`, each with a `sentence` and a `headline` of few words;
    targets, recent counts, and the plan that they come from (None: not known)."""
    replicas = [one for one in state["replicas"].values() if one["model"] == model]
    prospects = state["controller"].get("prospects", {}).get(model)
    plan = prospects["now"] if isinstance(prospects, dict) else None
    unknown = prospects if isinstance(prospects, str) else "the controller does not answer"
    recent = _recent(replicas)
    return {
        "replicas": len(replicas), "answering": sum(one["reachable"] for one in replicas),
        "targets": next((one["targets"] for one in replicas if one.get("targets")), None),
        "policies": sorted({one["thresholds"]["policy"] for one in replicas if one["reachable"]}),
        "recent": recent, "plan": plan,
        "load": _load(plan, unknown), "limit": _limit(plan, unknown), "one_more": _one_more(prospects, unknown),
        "wanted": _wanted(state["controller"], model, len(replicas)),
        "audit": _audit(recent),
    }


def _not_known(why: str) -> dict[str, Any]:
    return {"headline": "not known", "sentence": f"Not known: {why}."}


def _load(plan: Mapping[str, Any] | None, unknown: str) -> dict[str, Any]:
    if plan is None:
        return _not_known(unknown) | {"level": "note", "share": None}
    offered, capacity = plan["offered_rps"], plan["capacity_rps"]
    if plan["reason"]:
        sentence = f"The TPOT target cannot be met: {plan['reason']}."
        return {"headline": "target out of reach", "level": "bad", "share": None, "sentence": sentence}
    if not offered:
        able = f" The replicas can serve about {rate(capacity)}." if capacity else ""
        return {"headline": "idle", "level": "ok", "share": 0.0, "sentence": f"No request has come lately.{able}"}
    if not capacity:
        return _not_known("no limit is reached at any load yet") | {"level": "note", "share": None}
    share = offered / capacity
    said = f"{rate(offered)} arrive; {capacity:.3g} can be served{_within(plan)}"
    if share > 1:
        return {
            "headline": f"{share:.1f} × capacity", "level": "warning", "share": share,
            "sentence": f"{said}. The rest is rejected at once, so that the others are in time.",
        }
    level = "note" if share > _HIGH_LOAD else "ok"
    return {"headline": f"{share:.0%} of capacity", "level": level, "share": share, "sentence": f"{said}."}


def _within(plan: Mapping[str, Any]) -> str:
    return " within the targets" + (" (by a guess of output lengths)" if plan["cold"] else "")


def _limit(plan: Mapping[str, Any] | None, unknown: str) -> dict[str, Any]:
    if plan is None:
        return _not_known(unknown) | {"name": None, "reached": False}
    name = plan["bottleneck"]
    if name in _LIMITS:
        headline, sentence = _LIMITS[name]
        return {"name": name, "reached": True, "headline": headline, "sentence": sentence}
    first = plan["limit"]
    if plan["capacity_rps"] and first in _LIMITS:
        sentence = f"The first limit will be the {_LIMITS[first][0]}, at about {rate(plan['capacity_rps'])}."
        return {"name": first, "reached": False, "headline": "nothing yet", "sentence": sentence}
    return {"name": None, "reached": False, "headline": "nothing", "sentence": "No limit is near."}


def _one_more(prospects: Any, unknown: str) -> dict[str, Any]:
    if not isinstance(prospects, dict):
        return _not_known(unknown) | {"gain_rps": None}
    now, more, less = prospects["now"], prospects["one_more"], prospects["one_less"]
    offered, good = now["offered_rps"], now["goodput_rps"]
    gain = more["goodput_rps"] - good
    guessed = " Output lengths are still guessed." if now["cold"] else ""
    if gain > max(0.01 * offered, 0.005):
        sentence = (
            f"{good:.3g} of the {rate(offered)} offered are expected in time; with {more['replicas']} replicas, "
            f"{more['goodput_rps']:.3g}."
        )
        return {"gain_rps": gain, "headline": f"+{gain:.2g} good requests/s", "sentence": sentence + guessed}
    spare = less is not None and bool(offered) and less["goodput_rps"] >= _FULL * good
    extra = f" {less['replicas']} would carry it too." if spare else ""
    if in_vain := offered - good > 0.02 * offered:
        sentence = f"More replicas would not help: {1 - good / offered:.0%} of the requests cannot meet the targets."
    else:
        sentence = "Every request offered is expected in time as it is." if offered else "There is no load now."
    if more["capacity_rps"] and now["capacity_rps"] and not in_vain:
        sentence += f" Capacity would be {rate(more['capacity_rps'])} instead of {rate(now['capacity_rps'])}."
    return {"gain_rps": gain, "headline": "nothing now", "sentence": sentence + extra + guessed}


def _wanted(controller: Mapping[str, Any], model: str, present: int) -> dict[str, Any]:
    """The decision on the number of replicas, before Serve's bounds; `replicas` is None where there is none."""
    decision = controller.get("scaling", {}).get(model)
    if decision is None:
        why = "only under the policy fluid, after the first pass" if controller["alive"] else controller["reason"]
        return _not_known(str(why)) | {"replicas": None}
    number, reason = decision["replicas"], str(decision["reason"])
    headline = "no change" if not decision["decided"] else f"{number}, as now" if number == present else f"{number}"
    return {"replicas": number, "headline": headline, "sentence": f"{reason[0].upper()}{reason[1:]}."}


def _audit(recent: Mapping[str, float]) -> dict[str, Any]:
    """The two error rates of the rejections, over the recent requests; None: no such request.

    wrong_rejections: of the requests that the policy would reject, those that are in time when served all the same.
    wrong_admissions: of the admitted ones that completed, those that missed a target.
    """
    audited, admitted = recent["audited"], recent["completed"] - recent["audited"]
    met = recent["good"] - recent["audited_met"]
    return {
        "audited": audited,
        "wrong_rejections": recent["audited_met"] / audited if audited else None,
        "wrong_admissions": max(0.0, 1 - met / admitted) if admitted > 0 else None,
    }


def _row(one: Replica, oddities: Sequence[Oddity]) -> dict[str, Any]:
    row = {name: one.get(name) for name in _ROW} | {"oddities": [odd._asdict() for odd in oddities]}
    if not one["reachable"]:
        return row | {"reason": one["reason"]}
    thresholds, fluid = one["thresholds"], one["thresholds"]["fluid"] or {}
    forecast = one.get("forecast") or {}
    return row | {
        "version": thresholds["version"], "policy": thresholds["policy"], "pinned": thresholds["pinned"],
        "max_running": thresholds["max_running"], "token_budget": thresholds["token_budget"],
        "queue_limit": fluid.get("queue_limit"), "rejected": one["counters"]["rejected"],
        "completed": one["counters"]["completed"], "capacity_rps": forecast.get("capacity_rps"),
        "max_num_seqs": one["limits"]["max_num_seqs"],
        "max_num_batched_tokens": one["limits"]["max_num_batched_tokens"],
    }


def rate(rate_rps: float) -> str:
    """Requests per second, with three digits."""
    return f"{rate_rps:.3g} requests/s" if rate_rps < 100 else f"{rate_rps:.0f} requests/s"
