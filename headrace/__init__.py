"""The public names. They stay the same when the modules behind them move.

Each is imported on first use, so that `import headrace` loads neither Ray nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.app import build
    from scheduler.alone.middleware import RejectionMiddleware
    from scheduler.engine.channel import ChannelClient
    from scheduler.fluid_params import FluidParams
    from scheduler.model.iteration_time import IterationTimeModel
    from scheduler.model.profiles import load_profile
    from scheduler.policies import Decision, Policy, Snapshot
    from scheduler.thresholds import Thresholds, parse_thresholds
    from scheduler.tuning.slo import Slo
    from scheduler.vllm_scheduler import HeadraceScheduler

    __version__: str

__all__ = [
    "ChannelClient",
    "Decision",
    "FluidParams",
    "HeadraceScheduler",
    "IterationTimeModel",
    "Policy",
    "RejectionMiddleware",
    "Slo",
    "Snapshot",
    "Thresholds",
    "__version__",
    "build",
    "load_profile",
    "parse_thresholds",
]

_MODULE_OF = {
    "ChannelClient": "scheduler.engine.channel",
    "Decision": "scheduler.policies",
    "FluidParams": "scheduler.fluid_params",
    "HeadraceScheduler": "scheduler.vllm_scheduler",
    "IterationTimeModel": "scheduler.model.iteration_time",
    "Policy": "scheduler.policies",
    "RejectionMiddleware": "scheduler.alone.middleware",
    "Slo": "scheduler.tuning.slo",
    "Snapshot": "scheduler.policies",
    "Thresholds": "scheduler.thresholds",
    "build": "cluster.app",
    "load_profile": "scheduler.model.profiles",
    "parse_thresholds": "scheduler.thresholds",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("headrace")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
