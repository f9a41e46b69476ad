"""What the controller keeps of a change of thresholds: a pin, or its release. No HTTP and no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from router.admin import ThresholdsUpdate
from scheduler.thresholds import Thresholds, thresholds_as_dict

NOT_KEPT = "the pin is not kept for new replicas, since the controller does not answer"


class KeptPin(NamedTuple):
    """A call of the controller: its method (pin or release), the fields of the pin, whole models or single engines."""

    method: str
    pin: dict[str, Any]
    models: Sequence[str] = ()
    engines: Sequence[str] = ()


def kept_pins(
    update: ThresholdsUpdate, taken: Mapping[str, Thresholds], model_of: Mapping[str, str], author: Mapping[str, Any]
) -> Iterator[KeptPin]:
    """The calls that record an update.

    taken: the new thresholds by engine, where they were accepted; model_of: the models of the engines. An update of
    all replicas is for the models, whose new replicas get the values of their first engine; one of a replica is for it
    alone.
    """
    if update.replica is not None:
        for engine, thresholds in taken.items():
            yield _kept(thresholds, author, engines=(engine,))
        return
    for model in sorted({model_of[engine] for engine in taken}):
        engines = [engine for engine in sorted(taken) if model_of[engine] == model]
        yield _kept(taken[engines[0]], {**author, "given_to": tuple(engines)}, models=(model,))


def _kept(thresholds: Thresholds, fields: Mapping[str, Any], **about: Sequence[str]) -> KeptPin:
    if not thresholds.pinned:
        return KeptPin("release", {"thresholds": {}} | dict(fields), **about)
    ends_s = thresholds.valid_for_s
    until = {} if ends_s is None else {"until_unix_s": fields["at_unix_s"] + ends_s}
    return KeptPin("pin", {"thresholds": thresholds_as_dict(thresholds), **fields, **until}, **about)
