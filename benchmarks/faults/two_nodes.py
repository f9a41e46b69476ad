"""A Ray cluster of two nodes on this machine, in the foreground until its input ends.

    python -m benchmarks.faults.two_nodes

Prints `address HOST:PORT` when the head runs. Each line `add` on its input starts a worker node and prints `added`.
A replica takes two logical cores, one for its actor and one for its engine, an ingress one: each node has room for one
of both.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

HEAD_CPUS = NODE_CPUS = 3
_STORE_BYTES = 100 << 20


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    head = cluster.add_node(num_cpus=HEAD_CPUS, object_store_memory=_STORE_BYTES, include_dashboard=False)
    print(f"address {head.address}", flush=True)
    try:
        for line in sys.stdin:
            if line.strip() == "add":
                cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=_STORE_BYTES)
                print("added", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
