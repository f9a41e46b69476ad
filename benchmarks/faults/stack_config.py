"""The configuration of the stacks that faults are put into: configs/local.yaml with two replicas and targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scheduler.tuning.slo import Slo

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "configs" / "local.yaml"
TARGETS = Slo(ttft_s=5.0, tpot_s=0.5)
FAULTY_SCHEDULER = "benchmarks.faults.faulty_engine.FaultyChannelScheduler"


@dataclass(frozen=True)
class Settings:
    """What differs from one start, or one redeploy, to another.

    address: of the Ray cluster to join; "local" starts one. max_num_seqs: the engine setting that a rolling redeploy
    changes. faulty_channel: engines whose channel misbehaves when told to. ingresses: as many; 0: the default, one on
    one node.
    """

    replicas: int = 2
    max_num_seqs: int = 64
    address: str = "local"
    faulty_channel: bool = False
    ingresses: int = 0


def configuration(settings: Settings, port: int) -> dict[str, Any]:
    """What `headrace up` reads; plain Ray Serve LLM takes its model, engine, replicas and environment from it too."""
    config: dict[str, Any] = yaml.safe_load(LOCAL.read_text())
    config["ray"]["address"] = settings.address
    config["http_options"]["port"] = port
    config["proxy_location"] = "HeadOnly"  # two nodes on one machine would want the same port
    args = config["applications"][0]["args"]
    (model,) = args["llm_configs"]
    source = model["model_loading_config"]["model_source"]
    model["model_loading_config"]["model_source"] = str((ROOT / source).resolve())
    model["deployment_config"] = {"num_replicas": settings.replicas}
    model["engine_kwargs"]["max_num_seqs"] = settings.max_num_seqs
    if settings.ingresses:
        args["ingress_deployment_config"] = {"num_replicas": settings.ingresses}
    ours = args["headrace"]
    ours.pop("engine_timeout_s", None)  # the default, as where engines have a device of their own
    ours["targets"] = {"ttft_s": TARGETS.ttft_s, "tpot_s": TARGETS.tpot_s}
    ours["controller"]["min_finished"] = 10
    if settings.faulty_channel:
        ours["scheduler"] = FAULTY_SCHEDULER
    return config


def write(settings: Settings, port: int, path: Path) -> Path:
    """The configuration as a file."""
    path.write_text(yaml.safe_dump(configuration(settings, port)))
    return path
