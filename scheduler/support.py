"""The supported combinations of policy and engine setting: one table for the code, its tests and docs/policies.md.

A "no" in the table is rejected before an engine starts, by the configuration and by `HeadraceScheduler`, and later when
thresholds of another policy are offered. To lift a guard, change its cell here and in that page's table
(`support_matrix` prints it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scheduler.thresholds import POLICY_NAMES, Thresholds
from scheduler.tuning.slo import NO_SLO, Slo


class UnsupportedSetting(ValueError):
    """An engine setting under which the policy would be wrong; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """The engine settings that decide which policies are supported, read from vLLM's config or engine arguments.

    controller: False where no controller tunes thresholds to `targets`.
    """

    data_parallel_across_nodes: bool = False
    speculative_decoding: bool = False
    kv_transfer: bool = False
    targets: Slo = NO_SLO
    controller: bool = True

    @classmethod
    def from_vllm_config(cls, config: Any, targets: Slo, *, controller: bool = True) -> EngineSetup:
        """The setup of an engine that is about to start. Source: vLLM's VllmConfig.

        The placement of other data-parallel ranks is not checked here: only a replica has to reach all of them.
        """
        return cls(
            speculative_decoding=config.num_speculative_tokens > 0,
            kv_transfer=config.kv_transfer_config is not None,
            targets=targets, controller=controller,
        )

    @classmethod
    def from_engine_args(
        cls, engine_args: Mapping[str, Any], targets: Slo, *, controller: bool = True
    ) -> EngineSetup:
        """The setup of a configuration. Source: vLLM's AsyncEngineArgs; the engine start checks the rest."""
        return cls(
            data_parallel_across_nodes=ranks_in(engine_args) > 1
            and any(engine_args.get(key) not in here for key, here in DATA_PARALLEL_HERE.items()),
            speculative_decoding=any(engine_args.get(key) is not None for key in SPECULATIVE_ARGS),
            kv_transfer=any(engine_args.get(key) is not None for key in KV_TRANSFER_ARGS),
            targets=targets, controller=controller,
        )


SPECULATIVE_ARGS = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
KV_TRANSFER_ARGS = ("kv_transfer_config", "kv_offloading_size")
DATA_PARALLEL_HERE: Mapping[str, tuple[Any, ...]] = {
    "data_parallel_size_local": (None,), "data_parallel_rank": (None,), "data_parallel_start_rank": (None,),
    "data_parallel_backend": (None, "mp"), "data_parallel_hybrid_lb": (None, False),
    "data_parallel_external_lb": (None, False),
}
"""By engine argument: the values with which all data-parallel ranks are processes of the replica that starts them."""


def ranks_in(engine_args: Mapping[str, Any]) -> int:
    """How many engines vLLM starts in a replica with these engine arguments: one for each data-parallel rank."""
    size = engine_args.get("data_parallel_size")
    return size if isinstance(size, int) and size > 1 else 1


@dataclass(frozen=True, slots=True)
class Answer:
    """allowed: whether an engine starts; text: the table's cell."""

    allowed: bool
    text: str


YES, NO, UNTESTED = Answer(True, "yes"), Answer(False, "no"), Answer(True, "untested")


def _yes(note: str) -> Answer:
    return Answer(True, f"yes; {note}")


InUse = Callable[[EngineSetup, Thresholds], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row.

    in_use: whether a setup has the setting (None: irrelevant to every policy); answers: by policy, `YES` unless given;
    because, instead: the two halves of the error message for an unsupported combination.
    """

    name: str
    in_use: InUse | None = None
    answers: Mapping[str, Answer]
    because: str = ""
    instead: str = ""

    def answer(self, policy: str) -> Answer:
        """The table's cell for a policy."""
        return self.answers.get(policy, YES)


def _all_policies(answer: Answer) -> dict[str, Answer]:
    return dict.fromkeys(POLICY_NAMES, answer)


def _has(field: str) -> InUse:
    return lambda setup, thresholds: bool(getattr(setup, field))


SETTINGS: tuple[Setting, ...] = (
    Setting(name="tensor parallel", answers={}),
    Setting(name="data parallel within a replica", answers=_all_policies(_yes("not tried on GPUs"))),
    Setting(
        name="data parallel across nodes", in_use=_has("data_parallel_across_nodes"), answers=_all_policies(NO),
        because="a replica reaches the engines on its own machine only",
        instead="give data_parallel_size alone, or leave it at 1 and run as many replicas",
    ),
    Setting(
        name="pipeline parallel",
        answers=dict.fromkeys(("wait", "nested_wait", "wait_cp"), _yes("holds count iterations")),
    ),
    Setting(
        name="KV transfer (P/D, offloading)", in_use=_has("kv_transfer"),
        answers=dict.fromkeys(("fcfs", "wait", "nested_wait", "wait_cp"), UNTESTED) | {"fluid": NO},
        because="the policy does not see requests whose KV is still being loaded, nor prompts computed elsewhere",
        instead="leave kv_transfer_config and kv_offloading_size out, or take policy fcfs",
    ),
    Setting(
        name="targets with `controller.enabled: false`",
        in_use=lambda setup, thresholds: setup.targets != NO_SLO and not setup.controller,
        answers=_all_policies(NO),
        because="no controller would follow the targets and the cold start's prior would stay active",
        instead="leave controller.enabled at true, or leave the targets out",
    ),
    Setting(
        name="speculative decoding", in_use=_has("speculative_decoding"), answers={"wait_cp": NO},
        because="the policy takes an iteration for one token of every request",
        instead="leave speculative decoding out, or take another policy",
    ),
    Setting(name="prefix caching", answers={}),
    Setting(name="structured output", answers={}),
    Setting(name="LoRA", answers={}),
    Setting(name="several choices (n > 1)", answers={}),
)


def policy_in_effect(thresholds: Thresholds) -> str:
    """The policy whose column counts: with segments, `wait` holds requests at boundaries as `nested_wait` does."""
    return "nested_wait" if thresholds.policy == "wait" and thresholds.segments else thresholds.policy


def require_supported(setup: EngineSetup, thresholds: Thresholds) -> None:
    """Check that the engine supports the thresholds' policy.

    Raises:
        UnsupportedSetting: in one sentence, the combination that is not supported and what to do.
    """
    policy = policy_in_effect(thresholds)
    for setting in SETTINGS:
        if setting.in_use is None or setting.answer(policy).allowed or not setting.in_use(setup, thresholds):
            continue
        named = "any policy" if not any(setting.answer(name).allowed for name in POLICY_NAMES) else f"policy {policy}"
        raise UnsupportedSetting(
            f"{setting.name} is not supported with {named}, since {setting.because}: {setting.instead}"
        )


def support_matrix() -> str:
    """The table as docs/policies.md shows it, in Markdown."""
    lines = [("", *(f"`{policy}`" for policy in POLICY_NAMES)), ("---",) * (1 + len(POLICY_NAMES))]
    lines += [(row.name, *(row.answer(policy).text for policy in POLICY_NAMES)) for row in SETTINGS]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
