#!/usr/bin/env bash
# vLLM's own server under Headrace's scheduler, without Ray: examples/standalone_vllm.sh MODEL [options of vllm serve]
# Targets in seconds. The profile must be that of the model on this device; python benchmarks/measure_law.py makes one.
set -euo pipefail

model=${1:?usage: $0 MODEL [options of vllm serve]}
shift
profile=${PROFILE:-a100-llama2-7b}
ttft_s=${TTFT_S:-3.0}
tpot_s=${TPOT_S:-0.08}

exec vllm serve "$model" \
  --scheduler-cls headrace.HeadraceScheduler \
  --additional-config "{\"headrace\": {\"profile\": \"$profile\", \"targets\": {\"ttft_s\": $ttft_s, \"tpot_s\": $tpot_s}}}" \
  "$@"
