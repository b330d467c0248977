#!/usr/bin/env bash
# megatron-bridge 0.6.2 on Linux with a glibc before 2.39 (Debian 12, Ubuntu 22.04, RHEL 9): uv installs it with megatron-core
# 0.13.1, of a year before, without a word; Bridge imports modules that this does not have. Bridge asks for
# megatron-core[dev] of any release, and dev of 0.19.2 for nvidia-resiliency-ext 0.6.0, which has wheels for glibc 2.39 alone.
# Bounds of the user's own (megatron-core>=0.19) make an error of it that names the wheels (uv 0.13.9, 2026-11-28):
#
#   glibc 2.36: megatron-core==0.13.1
#   glibc 2.39: megatron-core==0.19.2
#   glibc 2.36, megatron-core>=0.19: Wheels are available for `nvidia-resiliency-ext` (v0.6.0) on ... manylinux_2_39_x86_64
#   megatron.core.activations: imported by 17 files of Bridge, not in megatron-core 0.13.1
#
# Exits with 0 while that is so. Compiles 0.13.1's small extension, so needs g++; PYTHON names an interpreter 3.12.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9

resolve() { # for a glibc, with requirements
  printf '%s\n' megatron-bridge==0.6.2 "${@:2}" |
    "$folder/venv/bin/uv" pip compile --quiet --no-annotate --python-version 3.12 \
      --python-platform "x86_64-manylinux_$1" - 2>&1
}
old=$(resolve 2_36 | grep '^megatron-core==')
new=$(resolve 2_39 | grep '^megatron-core==')
refused=$(resolve 2_36 'megatron-core>=0.19' | grep 'Wheels are available') || true
printf 'glibc 2.36: %s\nglibc 2.39: %s\nglibc 2.36, megatron-core>=0.19: %s\n' "$old" "$new" "$refused"

"$folder/venv/bin/uv" pip install --quiet --no-deps --python "$folder/venv/bin/python" --target "$folder/both" \
  megatron-bridge==0.6.2 "$old"
importing=$(grep -rl '^from megatron.core.activations import' "$folder/both/megatron/bridge" | wc -l)
there=in
[ -e "$folder/both/megatron/core/activations.py" ] || there="not in"
echo "megatron.core.activations: imported by $importing files of Bridge, $there megatron-core 0.13.1"
[[ $importing -gt 0 && $there == "not in" ]]
[[ $old == megatron-core==0.13.1 && $new == megatron-core==0.19.2 && $refused == *manylinux_2_39* ]]
