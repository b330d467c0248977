#!/usr/bin/env bash
# Tests the newest release that pyproject.toml allows of every dependency, in .venv-newest, and the newest Megatron
# Bridge with the releases that it pins, in .venv-newest-bridge. Which tests a dependency concerns stands in
# scripts/compatibility.py (TOUCHED), and what was run goes to build/newest, for `make compatibility`.
#
# Environment: PYTEST_ARGS is passed through to pytest; WORKERS is the number of pytest processes (2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PY=.venv/bin/python
[ -x "$PY" ] || { echo "test-newest: error: .venv is missing; run 'make setup' first." >&2; exit 1; }
# shellcheck source=scripts/uv.sh
. scripts/uv.sh
find_uv
use_pip_settings
unset UV_CONSTRAINT # pip's, for the machine; it would hide newer releases

# install ENVIRONMENT REQUIREMENTS...: the newest of these and of all they need
install() {
  local place=$1
  [ -x "$place/bin/python" ] || "$uv" venv -q --no-project --python "$PY" "$place"
  "$uv" pip install -q --upgrade --python "$place/bin/python" "${@:2}" ||
    { echo "test-newest: error: uv could not install ${*:2} into $place (its message is above)." >&2; return 1; }
}

# run ENVIRONMENT [DEPENDENCY]
run() {
  local tests
  tests=$("$PY" scripts/compatibility.py tests "${@:2}")
  echo "test-newest: $tests with $("$1/bin/python" -c 'import sys, torch; print(sys.prefix, "torch", torch.__version__)')"
  # shellcheck disable=SC2086 # tests and PYTEST_ARGS are lists of words.
  MEGATRON_DYT_CORE_CASES=1 "$1/bin/python" -m pytest -n "${WORKERS:-2}" --no-cov -q -W ignore -m "not slow" \
    -p no:cacheprovider --record-results="build/newest/${2:-all}" ${PYTEST_ARGS:-} $tests
}

code=0
install .venv-newest pip setuptools wheel
install .venv-newest "${checkout[@]}"
run .venv-newest || code=$?

# Bridge asks for much that needs a GPU's libraries to be built or is made for newer systems alone, and without bounds
# on Megatron-Core a resolver goes back to one of years ago. So it is installed alone, and what it asks for bounds the rest.
install .venv-newest-bridge --no-deps megatron-bridge pip setuptools wheel
.venv-newest-bridge/bin/python - >.venv-newest-bridge/pins.txt <<'PINS'
import importlib.metadata
import re

for line in importlib.metadata.requires("megatron-bridge") or []:
    if "extra ==" not in line:
        print(re.sub(r"\[.*?\]", "", line))
PINS
install .venv-newest-bridge -c .venv-newest-bridge/pins.txt "${checkout[@]}"
run .venv-newest-bridge megatron-bridge || code=$?

# A resolver that meets all of Bridge's wishes may go back to a Megatron-Core that no release of Bridge was written for
# (findings/megatron_bridge_old_core.sh), which is worth a line, as Bridge as a whole is not run here.
read -r bridge core < <(.venv-newest-bridge/bin/python -c 'from importlib.metadata import version
print(version("megatron-bridge"), version("megatron-core"))')
whole=$("$uv" pip compile -q --no-annotate --python .venv-newest-bridge/bin/python - <<<"megatron-bridge==$bridge" |
  sed -nE 's/^megatron-core(\[.*\])?==//p') || whole="none"
echo "test-newest: Bridge's providers and YAML: megatron-bridge $bridge with megatron-core $core"
[ "$whole" = "$core" ] ||
  echo "test-newest: megatron-bridge $bridge as a whole cannot be had here: with all that it asks for uv takes megatron-core $whole (glibc: $(ldd --version | sed -n '1s/.* //p'))"
exit "$code"
