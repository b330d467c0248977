#!/usr/bin/env bash
# Tests the plugin on other releases of megatron-core: unit tests of what touches Megatron, and the core of the
# equivalence tests (tests/distributed/cases.py). Each release is installed alone into .venv-versions/RELEASE
# and put in front of .venv, so that all share one torch. The release in .venv is what `make test` covers.
#
#   scripts/test-versions.sh                    every supported release (megatron_dyt/compat.py: TESTED)
#   scripts/test-versions.sh 0.18.2 [0.19.2]    these
#
# Environment: PYTEST_ARGS is passed through to pytest; WORKERS is the number of pytest processes (2). WITH_TE is a
# folder of scripts/build-te.sh: then tests/te run, and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PY=.venv/bin/python
[ -x "$PY" ] || { echo "test-versions: error: .venv is missing; run 'make setup' first." >&2; exit 1; }

TESTED=$("$PY" -c 'from megatron_dyt.compat import TESTED; print(*TESTED)')
UNIT=(tests/mcore tests/test_pretrain.py tests/test_run.py)
UNIT+=(tests/evaluation/test_checkpoint_model.py tests/evaluation/test_scoring.py)
PARALLEL=(tests/distributed/test_equivalence.py tests/distributed/test_families.py)
# 0.16 has no training loop: its parallel tests are those of megatron.core alone.
PARALLEL_WITHOUT_LOOP=(tests/distributed/test_families.py)

# Arguments may be lists ("0.17.1 0.18.2"), as make passes them.
read -r -a releases <<<"${*:-$TESTED}"

# A directory of the release; it gets its name when it is complete.
install() {
  local release=$1 place=.venv-versions/$1
  [ -f "$place/megatron/__init__.py" ] && return
  echo "test-versions: installing megatron-core $release into $place"
  rm -rf "$place" "$place.new"
  bash scripts/uv.sh pip install -q --python "$PY" --no-deps --target "$place.new" "megatron-core==$release" ||
    "$PY" -m pip --disable-pip-version-check install -q --no-deps --target "$place.new" "megatron-core==$release" ||
    { echo "test-versions: error: neither uv nor pip could install megatron-core $release (their messages are above)." >&2
      exit 1; }
  # Megatron's wheels have no megatron/__init__.py. Without one Python would look for what a release lacks
  # (0.16: megatron.training) in the release of .venv, and mix the two.
  touch "$place.new/megatron/__init__.py"
  mv "$place.new" "$place"
}

run() {
  local release=$1 tests=("${UNIT[@]}") parallel=("${PARALLEL[@]}") path=$PWD/.venv-versions/$1 results=build/results
  [ -d ".venv-versions/$release/megatron/training" ] || parallel=("${PARALLEL_WITHOUT_LOOP[@]}")
  [ -z "${WITH_TE:-}" ] || { tests=(tests/te) parallel=() path=$WITH_TE:$path results=build/results/te; }
  echo "test-versions: megatron-core $release"
  # shellcheck disable=SC2086 # PYTEST_ARGS is a list of words.
  PYTHONPATH=$path MEGATRON_DYT_CORE_CASES=1 \
    "$PY" -m pytest -n "${WORKERS:-2}" --no-cov -q -W ignore -m "not slow" -p no:cacheprovider \
    --record-results="$results" ${PYTEST_ARGS:-} "${tests[@]}" "${parallel[@]}"
}

# One after the other: two at a time, whose ranks share two cores, took longer.
for each in "${releases[@]}"; do
  [[ " $TESTED " == *" $each "* ]] ||
    { echo "test-versions: error: $each is not among the supported releases: $TESTED." >&2; exit 2; }
  install "$each"
  run "$each"
done
