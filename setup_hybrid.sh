#!/usr/bin/env bash
# Makes .venv with vllm-hybrid, vLLM and the development tools in it. `make` runs it first; it can also be
# run by hand. Repeated, it ends at once unless something it installs has changed; interrupted, the next run
# starts over. Two at once wait for each other.
#
#   HYBRID_DEVICE     cpu or cuda; default: cuda where `nvidia-smi -L` works, else cpu
#   HYBRID_PYTHON     the Python to use; default: the first of 3.11, 3.12, 3.13 that runs
#   TORCH_INDEX_URL   a further package index for pip, for machines whose own offers no CPU build of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly VENV=.venv
# The first file in an environment of ours (device and Python it is for), and the last: without the last
# one it is half made.
readonly OURS=$VENV/.made-by-setup-hybrid
readonly STAMP=$VENV/.setup-hybrid-complete

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

device() {
  case "${HYBRID_DEVICE:-}" in
    cpu | cuda) echo "$HYBRID_DEVICE" ;;
    "") if nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi ;;
    *) die "HYBRID_DEVICE is '$HYBRID_DEVICE', but must be cpu or cuda" ;;
  esac
}

# Prints the path of the interpreter behind version managers and active virtual environments: the latter may
# be the very one that is about to be made again.
usable_python() {
  "$1" - 2>/dev/null <<'PYTHON'
import os, sys
assert (3, 11) <= sys.version_info[:2] <= (3, 13)
print(os.path.realpath(sys._base_executable))
PYTHON
}

python() {
  if [[ -n ${HYBRID_PYTHON:-} ]]; then
    usable_python "$HYBRID_PYTHON" || die "HYBRID_PYTHON is '$HYBRID_PYTHON', which is not a working Python 3.11 to 3.13"
    return
  fi
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    usable_python "$candidate" && return
  done
  die "no Python 3.11 to 3.13 was found: install one (Debian: python3 python3-venv python3-dev) or set HYBRID_PYTHON"
}

check_system() {
  local python=$1 device=$2
  [[ $(uname -s) == Linux ]] || die "this is $(uname -s), but vLLM's wheels are for Linux"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments: install its venv package (Debian: python3-venv)"
  if [[ $device == cpu ]]; then
    # The CPU attention is C++, compiled at first use against Python's headers.
    command -v "${CXX:-g++}" >/dev/null || die "no C++ compiler was found: install g++ (Debian: g++) or set CXX"
    [[ -f $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
      die "Python.h of $python is missing: install its headers (Debian: python3-dev)"
  fi
}

# Changes whenever something changes that would make another environment.
fingerprint() {
  { printf '%s\n' "$@" "${TORCH_INDEX_URL:-}" "$PWD" && cat setup_hybrid.sh pyproject.toml &&
    find vllm_hybrid/doctor/stand_ins -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 cat; } | sha256sum | cut -d' ' -f1
}

# An environment is kept only when a set-up completed it for the same device and Python: an interrupted pip
# can leave a package that looks installed, and the two devices' vLLM go by the same name.
make_venv() {
  local purpose="$2 $1"
  if [[ -e $VENV && ! -e $OURS ]]; then
    die "$VENV exists and was not made by this script: move it away"
  fi
  if [[ -e $VENV && ! -e $STAMP ]]; then
    say "$VENV is half made (a set-up was interrupted): starting over"
    rm -rf "$VENV"
  elif [[ -e $VENV && $(cat "$OURS") != "$purpose" ]]; then
    say "$VENV was made for another device or Python ($(cat "$OURS")): starting over"
    rm -rf "$VENV"
  fi
  rm -f "$STAMP"
  if [[ ! -e $VENV ]]; then
    # Moved into place with the mark in it, so that there is never an unmarked one of ours.
    rm -rf "$VENV.new"
    mkdir "$VENV.new"
    echo "$purpose" >"$VENV.new/$(basename "$OURS")"
    mv "$VENV.new" "$VENV"
    "$1" -m venv "$VENV"
  fi
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

install_packages() {
  local device=$1 log=$VENV/pip.log
  local index=()
  if [[ $device == cpu && -n ${TORCH_INDEX_URL:-} ]]; then
    index=(--extra-index-url "$TORCH_INDEX_URL")
  fi
  # One resolution for everything, so that no later package moves an earlier one.
  if ! pip install --progress-bar off "${index[@]}" hatchling editables -e ".[$device,dev]" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    if [[ $device == cpu ]] && grep -q 'torch==2.13.0+cpu' "$log"; then
      die "pip found no CPU build of torch 2.13.0 (above): set TORCH_INDEX_URL to PyTorch's index of CPU builds"
    fi
    die "pip could not install vllm-hybrid[$device,dev] (above; all of it in $log)"
  fi
}

# What a CPU installation lacks or has broken: the doctor says what that is, and installs small packages of ours.
# Never done on CUDA.
close_cpu_gaps() {
  "$VENV/bin/python" -m vllm_hybrid.cli doctor --fix || die "this environment lacks something to serve (above)"
}

check_device() {
  local built_for
  built_for=$("$VENV/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu")')
  [[ $built_for == "$1" ]] ||
    die "pip installed a $built_for build of torch for device $1: set TORCH_INDEX_URL to PyTorch's index of $1 builds"
}

main() {
  local device python key started=$SECONDS
  device=$(device)
  python=$(python)
  command -v flock >/dev/null || die "flock was not found: install it (Debian: util-linux)"
  exec 9>.setup.lock
  flock -n 9 || { say "another set-up is running: waiting for it" && flock 9; }

  key=$(fingerprint "$device" "$python")
  if [[ -e $STAMP && $(cat "$STAMP") == "$key" ]]; then
    return
  fi
  check_system "$python" "$device"
  say "installing for $device with $("$python" --version) into $VENV; this takes some minutes"
  make_venv "$python" "$device"
  install_packages "$device"
  if [[ $device == cpu ]]; then
    close_cpu_gaps
  fi
  check_device "$device"
  echo "$key" >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  say "done in $((SECONDS - started)) s"
}

main
