#!/usr/bin/env bash
# vLLM's own server under Headrace's scheduler, without Ray: examples/standalone_vllm.sh MODEL [options of vllm serve]
# Targets in seconds. PROFILE (optional) names iteration times of this model on this device, to start from; without it
# the engine is measured first.
set -euo pipefail

model=${1:?usage: $0 MODEL [options of vllm serve]}
shift
profile=${PROFILE:-}
ttft_s=${TTFT_S:-3.0}
tpot_s=${TPOT_S:-0.08}

exec vllm serve "$model" \
  --scheduler-cls headrace.HeadraceScheduler \
  --middleware headrace.RejectionMiddleware \
  --additional-config "{\"headrace\": {\"targets\": {\"ttft_s\": $ttft_s, \"tpot_s\": $tpot_s}, \
    \"controller\": {\"profile\": \"$profile\"}}}" \
  "$@"
