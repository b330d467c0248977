#!/usr/bin/env bash
# Everything that a GPU has to show, where one is at hand for minutes, on a machine without network.
#
# Before, where there is a network:   make gpu-wheels      what that machine lacks, into build/gpu-wheels
# There, in a copy of this checkout:  bash benchmarks/gpu_hour.sh --minutes 30 --tune
# Back here, with build/gpu-hour:     python benchmarks/run.py --from build/gpu-hour      into docs/benchmarks.md
#
# It takes Python 3.12, torch 2.11 and triton 3.6, and what `make gpu-wheels` takes for given. Stages run in order of
# worth, each for at most 8 minutes; started again, it goes on where it was. With --rehearse a CPU stands for the GPU.
# Options: bash benchmarks/gpu_hour.sh --help
#
# Environment: PY (interpreter, default python3), WHEELS (default build/gpu-wheels), OUT (default build/gpu-hour).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PY:-python3}" benchmarks/gpu_hour.py --wheels "${WHEELS:-build/gpu-wheels}" --output "${OUT:-build/gpu-hour}" "$@"
