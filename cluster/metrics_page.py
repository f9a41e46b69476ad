"""The reference page of the metrics: python -m cluster.metrics_page > docs/reference/metrics.md"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.config import METRICS_PORT
from scheduler.metrics import ALL, Kind, Metric, Source

_HEAD = f"""# Metrics

Made from `scheduler/metrics.py` by `python -m cluster.metrics_page`; do not edit.

## Where they are

Headrace records its metrics through Ray, as vLLM and Serve do: one scrape of a node's metrics agent gives all three.

| started by | scrape |
|---|---|
| `headrace up` with a Ray of its own | `http://127.0.0.1:{METRICS_PORT}/metrics`, or `ray: {{metrics_port: …}}` |
| a Ray cluster that is joined | each node; the port is `ray start`'s `--metrics-export-port`, `headrace up` prints it |
| KubeRay | port 8080 of each pod |
| `vllm serve` alone | vLLM's own `/metrics` ([with vLLM alone](../with-vllm-alone.md)) |

```yaml
scrape_configs:
  - job_name: ray
    scrape_interval: 10s
    static_configs:
      - targets: ["127.0.0.1:{METRICS_PORT}"]
```

- In a scrape of Ray every name begins with `ray_`: `headrace_good_total` is `ray_headrace_good_total`, vLLM's
  `vllm:num_requests_running` is `ray_vllm_num_requests_running`. Under plain `vllm serve` there is no prefix, and a
  label `engine` (the data-parallel rank) stands in place of `model` and `replica`.
- Processes hand their values to the agent every ten seconds. A gauge that is not recorded again vanishes within half a
  minute: those of a controller or a replica that hangs or is gone do not stay. Counters and histograms of an ended
  process stay with its node's agent until Ray stops there, as all of Ray's do.
- Ray adds `WorkerId`, `NodeAddress`, `SessionName` and others; sum them away (`sum by (model) (…)`). It keeps a
  histogram's buckets and takes the middle of a bucket for its `_sum`.
- Values of labels are bounded: there is never a request in them. `tenant` and `model` are `none` for a request that has
  none, or that is refused before it is known.
- Alert and recording rules are in `helm/headrace/files/rules.yaml`, a Grafana dashboard in
  `helm/headrace/files/grafana-dashboard.json`, both under `share/headrace` in an installed package; the
  [runbook](../runbook.md) has a section for each alert.
- vLLM's engine metrics are on; `log_engine_metrics: false` in an entry of `llm_configs` switches them off.

## What adds up

For each engine, `arrivals = completed + aborted + rejected + recalled + in flight`, and `rejected` is the sum over its
reasons; a request counts once for each choice. For HTTP requests, `started = requests over all outcomes + in flight`.
"""
_SECTIONS = (
    (Source.REPLICA, "From each replica", "What its engine knows, and the times of its requests."),
    (Source.CONTROLLER, "From the controller", "Estimates and plans, and its own pace."),
    (Source.INGRESS, "From each ingress", "Requests as clients see them."),
)


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    for source, title, text in _SECTIONS:
        yield f"## {title}\n\n{text}\n"
        yield "\n".join(_table(metric for metric in ALL if metric.source is source)) + "\n"


def _table(metrics: Iterable[Metric]) -> Iterator[str]:
    yield "| name | kind | unit | labels | what | `vllm serve` |"
    yield "|---|---|---|---|---|---|"
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        what = metric.help
        if metric.kind is Kind.HISTOGRAM:
            what += f" Buckets to {metric.buckets[-1]:g} s."
        alone = "yes" if metric.alone else ""
        yield f"| `{metric.exposed}` | {metric.kind} | {metric.unit} | {labels} | {what} | {alone} |"


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
