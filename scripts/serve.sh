#!/usr/bin/env bash
# Serves a checkpoint with `vllm serve`, after making it where it is missing. `make serve` calls it.
#
#   MODEL          a LLaVA-1.5 checkpoint to prepare and serve; default: the small demo model
#   PREPARE_ARGS   further arguments of `vllm-hybrid prepare`
#   PORT           where to listen; default 8000
#   ARGS           further arguments of `vllm serve`
#
# On a CPU, VLLM_CPU_KVCACHE_SPACE is the size of the KV cache in GiB; default 4.
# ARGS and PREPARE_ARGS are read as the shell reads a command line: quoted arguments stay whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BIN=.venv/bin

# Makes checkpoint $1 with the command that follows, which gets a folder as its last argument. The folder
# moves into place when it is complete, so an interrupted run leaves nothing that looks like a checkpoint.
make_once() {
  local out=$1 partial
  shift
  partial=$(dirname "$out")/.$(basename "$out").partial
  mkdir -p "$(dirname "$out")"
  exec 9>.setup.lock
  flock 9
  if [[ ! -e $out ]]; then
    rm -rf "$partial"
    "$@" "$partial"
    mv "$partial" "$out"
  fi
  exec 9>&-
}

# Two checkpoints may have the same folder name: the path's checksum keeps them apart.
prepared_name() {
  local source
  source=$(realpath "$1")
  echo "prepared/$(basename "$source")-$(cksum <<<"$source" | cut -d' ' -f1)"
}

if [[ -n ${MODEL:-} ]]; then
  if [[ ! -d $MODEL ]]; then
    echo "serve: error: MODEL is '$MODEL', which is no folder: give the folder of a LLaVA-1.5 checkpoint" >&2
    exit 1
  fi
  checkpoint=$(prepared_name "$MODEL")
  eval "prepare_args=(${PREPARE_ARGS:-})"
  prepare() { "$BIN/vllm-hybrid" prepare "${prepare_args[@]}" "$MODEL" "$1"; }
  make_once "$checkpoint" prepare
else
  checkpoint=llava-hybrid
  make_once "$checkpoint" "$BIN/vllm-hybrid" demo-model
fi

# The checkpoint is a folder: nothing is to be looked up on a model hub.
export HF_HUB_OFFLINE=1
eval "args=(${ARGS:-})"

if [[ $(cut -d' ' -f1 .venv/.made-by-setup-hybrid) == cpu ]]; then
  # vLLM keeps one core for its scheduler: of two cores that is half the machine.
  if (($(nproc) <= 2)); then
    export VLLM_CPU_NUM_OF_RESERVED_CPU=${VLLM_CPU_NUM_OF_RESERVED_CPU:-0}
  fi
  # Without a size vLLM takes 92 % of the machine's memory, and refuses to start where other programs need more
  # than the rest.
  if [[ " ${args[*]}" != *" --gpu-memory-utilization"* && " ${args[*]}" != *" --kv-cache-memory-bytes"* ]]; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}
  fi
  echo "serve: VLLM_CPU_NUM_OF_RESERVED_CPU=${VLLM_CPU_NUM_OF_RESERVED_CPU:-}" \
    "VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-} (GiB)"
fi
echo "serve: vllm serve --model $checkpoint --port ${PORT:-8000} ${args[*]}"
exec "$BIN/vllm" serve --model "$checkpoint" --port "${PORT:-8000}" "${args[@]}"
