"""Deploy plain Ray Serve LLM over a running one, from a process of its own.

    python -m benchmarks.faults.redeploy CLUSTER.yaml GCS_ADDRESS
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    config_file, address = sys.argv[1:]
    import ray
    from ray import serve

    from benchmarks.evidence.plain_ray_llm import build
    from cluster.config import load_config

    application = load_config(Path(config_file)).application
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    serve.run(build(application.args), name=application.name, route_prefix=application.route_prefix)
    ray.shutdown()


if __name__ == "__main__":
    main()
