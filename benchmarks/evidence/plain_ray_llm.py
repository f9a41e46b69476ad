"""Plain Ray Serve LLM with the engine settings of a Headrace configuration, in the foreground until Ctrl-C.

    python benchmarks/evidence/plain_ray_llm.py CLUSTER.yaml METRICS_PORT

The other stack of real_engine.py: Ray's own `build_openai_app`, server, ingress and request router, vLLM's own
scheduler. Ray is started as `headrace up` starts it, and also shows vLLM's metrics, at METRICS_PORT.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Read when ray is imported; `headrace up` sets the same.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # keeps Ray's own services on 127.0.0.1
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
os.environ.setdefault("RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK", "0")

import httpx

from cluster.config import AppConfig, ApplicationEntry, load_config
from cluster.launch import Launcher, LaunchError
from replicas.ray_patches import NoDownload

READY_TIMEOUT_S = 300.0


class PlainLauncher(Launcher):
    """Starts and stops as `headrace up` does; what it deploys is Ray's."""

    metrics_port: int

    def _connect(self, ray: Any) -> None:
        if not self.owns_ray:
            self.join(ray)
            return
        ray.init(
            address="local", num_cpus=self._config.ray.num_cpus, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", _metrics_export_port=self.metrics_port,
            _system_config={"metrics_report_interval_ms": 1000},
        )

    def _application(self, entry: ApplicationEntry) -> Any:
        return build(entry.args)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self._config.base_url}/v1/models", trust_env=False).json().get("data"):
                    return
            time.sleep(0.5)
        raise LaunchError("Ray Serve LLM did not get ready")


def build(args: AppConfig) -> Any:
    """`ray.serve.llm`'s own application with the same models and engines."""
    from ray.serve.llm import build_openai_app

    from cluster.app import llm_config

    configs = []
    for entry in args.llm_configs:
        # The same options of the deployment, but Ray's own server, request router and schedulers. A router that the
        # configuration names is kept.
        options = dict(llm_config(entry, args.settings_of(entry.model_id)).deployment_config)
        if "request_router_config" not in entry.own.get("deployment_config", {}):
            options.pop("request_router_config", None)
        configs.append(
            entry.own | {
                "engine_kwargs": {**entry.engine_kwargs, "async_scheduling": True},
                "deployment_config": options,
                "callback_config": {"callback_class": NoDownload},  # the model is a folder
                "log_engine_metrics": True,
            }
        )
    one_process = {"autoscaling_config": None, "num_replicas": 1, "max_ongoing_requests": 4096}
    ingress = one_process | args.ingress_deployment_config
    return build_openai_app({"llm_configs": configs, "ingress_deployment_config": ingress})


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    launcher = PlainLauncher(config, progress=print)
    launcher.metrics_port = int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        launcher.start()
        if httpx.get(f"{config.base_url}/admin/state", trust_env=False).status_code != 404:
            raise LaunchError("this is Headrace, not plain Ray Serve LLM")
        print(f"ready at {config.base_url}", flush=True)
        launcher.wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        launcher.stop()


if __name__ == "__main__":
    main()
