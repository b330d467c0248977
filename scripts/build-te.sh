#!/usr/bin/env bash
# Builds Transformer Engine for a machine without GPU, driver or CUDA toolkit, into .venv-te/RELEASE: a folder that stands
# on PYTHONPATH in front of .venv, whose torch and NVIDIA libraries it uses. Its layers can then be built, counted and
# saved on a CPU; what they compute needs a GPU. Takes about four minutes of CPU and 0.9 GB (0.4 GB stay). Where the build
# is there it returns at once. Prints the folder.
#
# The Python part and the core library are wheels. The PyTorch extension has none and its setup.py wants a toolkit, so
# it is compiled here: 33 files as two, not optimized, with the headers of torch and of NVIDIA's packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RELEASE=2.20.2
# Headers that the packages which torch asks for lack.
HEADERS=(nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cudnn-frontend==1.32.0)
# What TE imports and .venv has not.
IMPORTED=(onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0 ml-dtypes==0.6.0)

PY=.venv/bin/python
place=$PWD/.venv-te/$RELEASE
work=$PWD/.venv-te/work

say() { printf 'build-te: %s\n' "$*" >&2; }
fail() {
  say "error: $*"
  exit 1
}

# Sets site, torch, include and suffix: where .venv's packages, its torch and Python's headers are, and what an
# extension's file name ends in. `built_for` is what a build depends on.
look_at_python() {
  [ -x "$PY" ] || fail ".venv is missing; run 'make setup' first."
  read -r site torch include suffix built_for < <("$PY" -c '
import sysconfig, torch
paths = sysconfig.get_paths()
print(paths["purelib"], *torch.__path__, paths["include"], sysconfig.get_config_var("EXT_SUFFIX"), torch.__version__)')
  built_for+=" $(sha256sum <"${BASH_SOURCE[0]}")"
}

refuse_what_cannot_work() {
  [ -f "$site/nvidia/cu13/include/cuda.h" ] ||
    fail "torch in .venv brings no CUDA 13 libraries, on which Transformer Engine is built; take PyPI's torch for Linux."
  [ -f "$include/Python.h" ] || fail "$include/Python.h is missing; install Python's headers (Debian: python3-dev)."
  type -P g++ >/dev/null || fail "g++ is missing; install it (Debian: g++)."
}

packages() { bash scripts/uv.sh pip install -q --python "$PY" --no-deps "$@" >&2; }

# setup.py's list of sources is a search for *.cpp. Names that two files define at the same scope keep them from being
# one; comm_gemm_overlap.cpp has using-directives at file scope and comes last.
write_units() {
  local source=$work/src/csrc file name first=" activation attention ep misc normalization padding permutation pybind router softmax "
  find "$source" -name '*.cpp' | sort | while read -r file; do
    name=$(basename "$file" .cpp)
    if [[ $first == *" $name "* ]]; then
      echo "#include \"$file\"" >&3
    elif [ "$name" != comm_gemm_overlap ]; then
      echo "#include \"$file\""
    fi
  done 3>"$work/first.cpp" >"$work/second.cpp"
  echo "#include \"$source/extensions/comm_gemm_overlap.cpp\"" >>"$work/second.cpp"
}

compile() { # with a unit's name
  local flags=(-std=c++17 -O0 -g0 -w -fPIC -fvisibility=hidden -DNDEBUG -DNVTE_WITH_NCCL_EP -DUSE_NCCL
    -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=transformer_engine_torch) folder
  for folder in "$work"/src/common_headers{,/common,/common/include} "$work"/src/csrc{,/extensions} \
    "$torch"/include{,/torch/csrc/api/include} "$site"/nvidia/{cu13,cudnn,nccl}/include \
    "$work"/headers/nvidia/cu13/include{,/cccl} "$work/headers/include" "$include"; do
    flags+=("-I$folder")
  done
  nice g++ "${flags[@]}" -c "$work/$1.cpp" -o "$work/$1.o"
}

# As setup.py links: no library of CUDA's is named, TE's Python loads them before.
link() {
  g++ -shared "$work"/{first,second}.o -L"$torch/lib" -lc10 -ltorch -ltorch_cpu -ltorch_python \
    -o "$work/place/transformer_engine/wheel_lib/transformer_engine_torch$suffix"
}

build() {
  say "Transformer Engine $RELEASE: packages"
  rm -rf "$work"
  mkdir -p "$work/src"
  packages --target "$work/place" "transformer-engine==$RELEASE" "transformer-engine-cu13==$RELEASE" "${IMPORTED[@]}"
  packages --target "$work/headers" "${HEADERS[@]}"
  "$PY" -m pip --disable-pip-version-check download -q --no-deps --no-build-isolation --no-binary :all: -d "$work" \
    "transformer-engine-torch==$RELEASE" >&2
  tar xzf "$work/transformer_engine_torch-$RELEASE.tar.gz" -C "$work/src" --strip-components 1
  say "compiling its PyTorch extension, some minutes (2.5 GB of memory each for two compilers)"
  write_units
  compile first 9>&- &
  first=$! # Not local: the trap runs outside the function.
  trap 'kill "$first" 2>/dev/null || true' EXIT
  compile second
  wait "$first"
  trap - EXIT
  link
  # torch first: it loads libnccl.so.2, which TE does not look for.
  PYTHONPATH=$work/place "$PY" -c 'import torch, transformer_engine.pytorch' ||
    fail "it is built and does not import (see above)."
  rm -rf "$place"
  mv "$work/place" "$place"
  rm -rf "$work"
  printf '%s\n' "$built_for" >"$place/.built"
  say "done in $SECONDS s"
}

look_at_python
exec 9>.venv-te.lock
flock 9
if [ "$(cat "$place/.built" 2>/dev/null)" != "$built_for" ]; then
  refuse_what_cannot_work
  build
fi
printf '%s\n' "$place"
