"""A scheduling policy of your own: admit while the KV cache is below a given share, and always into an idle engine.

Serve by it with `scheduler: own_policy.OwnScheduler` in a configuration's `headrace`, or with
`vllm serve MODEL --scheduler-cls own_policy.OwnScheduler` (this folder on PYTHONPATH). As a script it simulates
the policy beside `fcfs`: `python examples/own_policy.py`.
"""

from __future__ import annotations

from headrace import Decision, HeadraceScheduler, Policy, Snapshot, Thresholds

FULL = 0.8


class LeaveRoom(Policy):
    """Admit in order of arrival while prompts fit below a share of the KV cache, so that outputs can grow."""

    name = "leave_room"

    def decide(self, snapshot: Snapshot) -> Decision:
        room = FULL * snapshot.kv_capacity_tokens - snapshot.kv_used_tokens
        room -= sum(request.kv_tokens for request in snapshot.released_requests)  # admitted, but not running yet
        admit: dict[str, int] = {}
        for type_name, waiting in snapshot.waiting.items():
            for request in waiting.heads():
                room -= request.tokens_to_compute
                if room < 0 and (admit or not snapshot.idle):  # an idle engine must run something
                    break
                admit[type_name] = admit.get(type_name, 0) + 1
        return Decision(admit=admit)


class OwnScheduler(HeadraceScheduler):
    """vLLM's scheduler under that policy, whatever policy the thresholds name."""

    def make_policy(self, thresholds: Thresholds) -> Policy:
        return LeaveRoom(thresholds)


def simulate_beside_fcfs() -> dict[str, dict[str, float]]:
    """Summaries of both by name, on an A100 with little KV memory (see docs/simulator.md)."""
    from simulator.config import simulation_config
    from simulator.run import simulate
    from simulator.scenario.baselines import BASELINES, Baseline

    BASELINES["leave-room"] = Baseline("a policy of one's own", "own_policy:OwnScheduler", policy="fcfs")
    common = {"lengths": "p100d300", "rate_rps": 8.0, "requests": 300, "kv_tokens": 6_000, "seed": 1}
    return {name: simulate(simulation_config(common | {"policy": name})) for name in ("fcfs", "leave-room")}


if __name__ == "__main__":
    for name, summary in simulate_beside_fcfs().items():
        print(f"{name}: {summary['preemptions']} preemptions, mean latency {summary['latency_mean_s']:.1f} s")
