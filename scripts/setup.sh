#!/usr/bin/env bash
# Makes .venv with a Python >= 3.12, < 3.14 and the pinned development set (constraints.txt), and installs
# this checkout into it as editable. When nothing changed it returns at once; when it was interrupted,
# running it again continues.
#
#   scripts/setup.sh                 set up (what `make setup` runs)
#   scripts/setup.sh --find-python   print the interpreter that would be used, and stop
#
# Environment:
#   PYTHON            the interpreter to use; nothing else is then tried
#   TORCH_INDEX_URL   package index to take torch from at the first install, for example that of
#                     PyTorch's CPU wheels for a build without the CUDA libraries
#
# Without PYTHON the interpreter is, in this order: python3.12, python3.13, python3, python on PATH; a
# version installed by pyenv; one that uv has or can install.
set -euo pipefail

here=${BASH_SOURCE[0]%/*}
[[ $here == "${BASH_SOURCE[0]}" ]] && here=.
root=$(cd -P "$here/.." && pwd)
venv=$root/.venv
stamp=$venv/.setup-stamp
kernels=$root/megatron_dyt/ops/cpu_kernels
inputs=("$root/pyproject.toml" "$root/setup.py" "$root/constraints.txt" "$kernels.c")
extras=train,eval,hf,dev

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    [[ $# -eq 0 ]] || printf '  %s\n' "$@" >&2
    exit 1
}

# ---- finding an interpreter (shell built-ins only, so that an odd PATH cannot break it) ----

found=  # the interpreter, once try_python has accepted one
reason= # why the last candidate was refused
tried=()

# Sets found, or reason. A candidate must really run: a pyenv shim exists for versions that are not active.
# A virtual environment stands for the interpreter it was made with.
try_python() {
    local answer version path
    if ! answer=$("$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3] + " " + getattr(sys, "_base_executable", sys.executable))' \
        2>/dev/null) || [[ $answer != *' '* ]]; then
        reason="does not run"
        return 1
    fi
    version=${answer%% *}
    path=${answer#* }
    if [[ ! $version =~ ^3\.1[23]\. ]]; then
        reason="is Python $version"
        return 1
    fi
    if ! "$path" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        reason="is Python $version without the venv and ensurepip modules (Debian: install python${version%.*}-venv)"
        return 1
    fi
    found=$path
}

consider() {
    try_python "$1" && return 0
    tried+=("$1 $reason")
    return 1
}

search_path() {
    local name candidate any=
    for name in python3.12 python3.13 python3 python; do
        while IFS= read -r candidate; do
            any=yes
            consider "$candidate" && return 0
        done < <(type -aP "$name")
    done
    [[ -n $any ]] || tried+=("PATH: no python3.12, python3.13, python3 or python")
    return 1
}

search_pyenv() {
    local versions candidate any=
    versions=${PYENV_ROOT:-$(pyenv root 2>/dev/null || printf '%s' "${HOME:-}/.pyenv")}/versions
    for candidate in "$versions"/3.12*/bin/python "$versions"/3.13*/bin/python; do
        [[ -x $candidate ]] || continue
        any=yes
        consider "$candidate" && return 0
    done
    [[ -n $any ]] || tried+=("pyenv: no 3.12 or 3.13 in $versions")
    return 1
}

search_uv() {
    local candidate
    if ! type -P uv >/dev/null; then
        tried+=("uv is not installed")
        return 1
    fi
    if ! candidate=$(uv python find '>=3.12,<3.14' 2>/dev/null); then
        say "no Python >= 3.12 here; asking uv to install one" >&2
        if ! uv python install 3.12 >&2 || ! candidate=$(uv python find '>=3.12,<3.14'); then
            tried+=("uv could not install Python 3.12 (its message is above)")
            return 1
        fi
    fi
    consider "$candidate"
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        try_python "$PYTHON" || fail "PYTHON=$PYTHON $reason; Python >= 3.12, < 3.14 is needed." \
            "Give another interpreter, or unset PYTHON to let this script look for one."
        return
    fi
    search_path || search_pyenv || search_uv && return
    fail "no usable Python >= 3.12, < 3.14 found. Tried:" "${tried[@]/#/- }" \
        "Install one (for example: apt install python3.12 python3.12-venv; pyenv install 3.12; uv python install 3.12)" \
        "and run this again, or name one: PYTHON=/path/to/python3.12 make setup"
}

# ---- the environment ----

sha256() {
    if type -P sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi
}

# What the environment depends on. The place is part of it: scripts in a .venv hold absolute paths.
fingerprint() {
    { cat "${inputs[@]}" && printf '%s\n' "$venv" "$extras" "$(readlink -f "$venv/bin/python")"; } | sha256
}

up_to_date() {
    [[ -x $venv/bin/python && -f $stamp && $(fingerprint) == "$(<"$stamp")" ]] || return 1
    [[ -z ${PYTHON:-} ]] || is_made_with_requested_python
}

is_made_with_requested_python() {
    find_python
    [[ $(readlink -f "$found") == "$(readlink -f "$venv/bin/python")" ]]
}

# Whether an existing .venv can be built upon: made here, complete, of a supported and the requested version.
is_usable() {
    grep -qF "$venv" "$venv/bin/activate" 2>/dev/null || return 1
    "$venv/bin/python" -c 'import pip, sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' \
        2>/dev/null || return 1
    [[ -z ${PYTHON:-} ]] || is_made_with_requested_python
}

make_venv() {
    is_usable && return
    find_python
    say "making .venv with $found"
    "$found" -m venv --clear "$venv" || fail "could not make $venv; see the message above."
}

# pip writes a package's RECORD last: a package without one was cut off while it was being installed, and pip
# would take it for installed.
drop_half_installed() {
    local info
    for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [[ ! -d $info || -f $info/RECORD ]] || rm -rf "$info"
    done
}

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install -q -c "$root/constraints.txt" "$@" ||
        fail "pip failed (its message is above). Free disk space or mend the network or the package" \
            "index, then run 'make setup' again: it continues where it stopped."
}

# The long step is quiet; this shows that it lives. It must not hold the lock when the script is killed.
report_progress() {
    local started=$SECONDS
    while sleep 20 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        say "  … $((SECONDS - started)) s, .venv holds $(du -sm "$venv" | cut -f1) MB"
    done 9>&-
}

install() {
    local torch
    torch=$(grep '^torch==' "$root/constraints.txt")
    drop_half_installed
    pip_install setuptools wheel
    say "installing $torch, megatron-core and the rest of constraints.txt; the first time this takes some" \
        "minutes and up to 6 GB with the CUDA libraries (the TORCH_INDEX_URL variable can choose a smaller torch)"
    report_progress &
    # shellcheck disable=SC2064
    trap "kill $! 2>/dev/null || true" EXIT
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        pip_install --no-deps --index-url "$TORCH_INDEX_URL" "$torch"
    fi
    rm -f "$kernels.so"
    pip_install --no-build-isolation -e "${root}[$extras]"
}

# The installation has compiled the kernels, unless that failed; what was missing may be there now.
compile_kernels() {
    [[ -f $kernels.so ]] && return
    (cd "$root" && "$venv/bin/python" setup.py -q build_ext --inplace) >"$venv/kernels.log" 2>&1 || true
    [[ -f $kernels.so ]] || say "warning: the kernels for CPUs could not be compiled ($venv/kernels.log says why), so" \
        "DyT is slow here; install a C compiler with OpenMP (gcc), and 'make setup' tries again"
}

main() {
    up_to_date && [[ -f $kernels.so ]] && return
    exec 9>"$root/.venv.lock"
    if type -P flock >/dev/null && ! flock -n 9; then
        say "another set-up of this checkout is running; waiting for it"
        flock 9
    fi
    if ! up_to_date; then
        rm -f "$stamp"
        make_venv
        install
        fingerprint >"$stamp.new"
        mv "$stamp.new" "$stamp"
        say "done in $SECONDS s: $("$venv/bin/python" -V), $venv"
    fi
    compile_kernels
}

case ${1:-} in
    '') main ;;
    --find-python)
        find_python
        printf '%s\n' "$found"
        ;;
    *) fail "unknown argument '$1'; allowed: --find-python, or none." ;;
esac
