#!/usr/bin/env bash
# transformer-engine-cu13 2.20.2 (each release from 2.13 on) calls cublasLtGroupedMatrixLayoutInit_internal, which cuBLAS
# has from 13.2 on. No package asks for that, and torch 2.11 pins nvidia-cublas 13.1.0.3 (2.12 to 2.14: 13.1.1.3). Symbols
# are bound when they are first called, so Transformer Engine imports and trains, and a grouped GEMM (experts) would end
# the process with "undefined symbol". Seen on Linux x86_64, 2026-11-28:
#
#   nvidia-cublas 13.1.0.3 lacks: cublasLtGroupedMatrixLayoutInit_internal
#   nvidia-cublas 13.2.0.9 lacks: nothing
#
# Exits with 0 while that is so. Installs into a temporary folder (1.2 GB); needs nm. PYTHON names an interpreter 3.10+.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$1" "$2"; }
install te transformer-engine-cu13==2.20.2
nm -D --undefined-only "$folder/te/transformer_engine/wheel_lib/libtransformer_engine.so" |
  grep -o 'cublasLt[A-Za-z0-9_]*' | sort -u >"$folder/needed"

lacking() { # in this release of cuBLAS
  install "cublas-$1" "nvidia-cublas==$1"
  nm -D --defined-only "$folder/cublas-$1/nvidia/cu13/lib/libcublasLt.so.13" | grep -o 'cublasLt[A-Za-z0-9_]*' |
    sort -u | comm -23 "$folder/needed" -
}
old=$(lacking 13.1.0.3)
new=$(lacking 13.2.0.9)
printf 'nvidia-cublas %s lacks: %s\n' 13.1.0.3 "${old:-nothing}" 13.2.0.9 "${new:-nothing}"
[[ $old == cublasLtGroupedMatrixLayoutInit_internal && -z $new ]]
