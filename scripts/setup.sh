#!/usr/bin/env bash
# Makes .venv with a Python >= 3.12, < 3.14 and the pinned development set (constraints.txt), and installs
# this checkout into it as editable. When nothing changed it returns at once; when it was interrupted,
# running it again continues. uv does the work (scripts/uv.sh finds or installs it); pip, where uv cannot.
#
# Environment:
#   PYTHON            the interpreter to use; nothing else is then tried
#   TORCH_INDEX_URL   package index to take torch from at the first install, for example that of
#                     PyTorch's CPU wheels for a build without the CUDA libraries
#
# Without PYTHON the interpreter is a 3.12, else a 3.13, of uv's, on PATH or of pyenv, that runs; else one
# that uv downloads.
set -euo pipefail

here=${BASH_SOURCE[0]%/*}
[[ $here == "${BASH_SOURCE[0]}" ]] && here=.
root=$(cd -P "$here/.." && pwd)
venv=$root/.venv
stamp=$venv/.setup-stamp
kernels=("$root/megatron_dyt/ops/cpu_kernels" "$root/megatron_dyt/cpu/layer_kernels")
inputs=("$root/pyproject.toml" "$root/setup.py" "$root/constraints.txt" "${kernels[@]/%/.c}")

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    [[ $# -eq 0 ]] || printf '  %s\n' "$@" >&2
    exit 1
}

# shellcheck source=scripts/uv.sh
. "$root/scripts/uv.sh"

# ---- the interpreter ----

# The interpreter behind a command, as "VERSION PATH"; a virtual environment stands for the one it was made with.
describe_python() {
    "$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3] + " " + getattr(sys, "_base_executable", sys.executable))' 2>/dev/null
}

# Sets found: what PYTHON names.
take_requested_python() {
    local answer reason="does not run"
    if answer=$(describe_python "$PYTHON"); then
        found=${answer#* }
        [[ ! $answer =~ ^3\.1[23]\. ]] || return 0
        reason="is Python ${answer%% *}"
    fi
    fail "PYTHON=$PYTHON $reason; Python >= 3.12, < 3.14 is needed." \
        "Give another interpreter, or unset PYTHON to let this script look for one."
}

# Sets found: the best that is here. uv tries what is on PATH, so that a shim that does not run is passed over;
# pyenv's versions are not on PATH, but for such shims.
search_python() {
    local version folder path=$PATH
    for folder in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23]*/bin; do
        path+=:$folder
    done
    for version in 3.12 3.13; do
        found=$(PATH=$path "$uv" python find --system --no-project --no-python-downloads "$version" 2>/dev/null) &&
            return
    done
    say "no Python 3.12 or 3.13 here; uv downloads one"
    "$uv" python install -q 3.12 >&2 &&
        found=$("$uv" python find --system --no-project --no-python-downloads 3.12) && return
    fail "no usable Python >= 3.12, < 3.14 found. Tried: uv's own, python3.12 and python3.13 on PATH," \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions, and a download by uv (its message is above)." \
        "Install one (for example: apt install python3.12; pyenv install 3.12; uv python install 3.12)" \
        "and run this again, or name one: PYTHON=/path/to/python3.12 make setup"
}

# ---- the environment ----

sha256() {
    if type -P sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi
}

# What the environment depends on. The place is part of it: scripts in a .venv hold absolute paths.
fingerprint() {
    { cat "${inputs[@]}" && printf '%s\n' "$venv" "${checkout[*]}" "$(readlink -f "$venv/bin/python")"; } | sha256
}

up_to_date() {
    [[ -x $venv/bin/python && -f $stamp && $(fingerprint) == "$(<"$stamp")" ]] && is_of_requested_python
}

is_of_requested_python() {
    [[ -n ${PYTHON:-} ]] || return 0
    take_requested_python
    [[ $(readlink -f "$found") == "$(readlink -f "$venv/bin/python")" ]]
}

# Whether an existing .venv can be built upon: made here, and of a supported and the requested version.
is_usable() {
    grep -qF "$venv" "$venv/bin/activate" 2>/dev/null &&
        [[ $(describe_python "$venv/bin/python") =~ ^3\.1[23]\. ]] && is_of_requested_python
}

make_venv() {
    is_usable && return
    if [[ -n ${PYTHON:-} ]]; then take_requested_python; else search_python; fi
    say "making .venv with $found"
    "$uv" venv -q --clear --no-project --python "$found" "$venv" || fail "could not make $venv; see the message above."
}

# uv and pip write INSTALLER and RECORD last: a package without them was cut off while it was being installed, and
# would be taken for installed.
drop_half_installed() {
    local info
    for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [[ ! -d $info || (-f $info/INSTALLER && -f $info/RECORD) ]] || rm -rf "$info"
    done
}

# pip knows settings that uv does not (a keyring, options for a single host), and is slower.
install() {
    local options=(-c "$root/constraints.txt" "$@") quiet=(-q) code=0
    [[ ! -t 2 ]] || quiet=() # uv shows how far it is
    "$uv" pip install "${quiet[@]}" --python "$venv/bin/python" "${options[@]}" || code=$?
    [[ $code -ne 0 ]] || return 0
    [[ $code -lt 128 ]] || exit "$code" # Ctrl-C
    say "uv could not install this (its message is above); trying pip, which has network settings of its own"
    "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true
    "$venv/bin/python" -m pip --disable-pip-version-check install -q "${options[@]}" ||
        fail "neither uv nor pip could install it (their messages are above). Free disk space or mend the network or" \
            "the package index, then run 'make setup' again: it continues where it stopped."
}

install_everything() {
    local torch
    torch=$(grep '^torch==' "$root/constraints.txt")
    drop_half_installed
    say "installing $torch, megatron-core and the rest of constraints.txt; the first time this takes some" \
        "minutes and up to 6 GB with the CUDA libraries (the TORCH_INDEX_URL variable can choose a smaller torch)"
    install pip setuptools wheel
    [[ -z ${TORCH_INDEX_URL:-} ]] || install --no-deps --index-url "$TORCH_INDEX_URL" "$torch"
    rm -f "${kernels[@]/%/.so}"
    install "${checkout[@]}"
}

are_compiled() {
    local each
    for each in "${kernels[@]}"; do
        [[ -f $each.so ]] || return 1
    done
}

# The installation has compiled the kernels, unless that failed; what was missing may be there now.
compile_kernels() {
    are_compiled && return
    (cd "$root" && "$venv/bin/python" setup.py -q build_ext --inplace) >"$venv/kernels.log" 2>&1 || true
    are_compiled || say "warning: the kernels for CPUs could not be compiled ($venv/kernels.log says why), so" \
        "training is slow here; install a C compiler with OpenMP (gcc), and 'make setup' tries again"
}

main() {
    [[ $# -eq 0 ]] || fail "unknown argument '$1'; this script takes none (PYTHON=... make setup names an interpreter)."
    up_to_date && are_compiled && return
    exec 9>"$root/.venv.lock"
    if type -P flock >/dev/null && ! flock -n 9; then
        say "another set-up of this checkout is running; waiting for it"
        flock 9
    fi
    if ! up_to_date; then
        rm -f "$stamp"
        [[ -z ${PYTHON:-} ]] || take_requested_python
        find_uv || exit 1
        use_pip_settings
        make_venv
        install_everything
        fingerprint >"$stamp.new"
        mv "$stamp.new" "$stamp"
        say "done in $SECONDS s: $("$venv/bin/python" -V), $venv"
    fi
    compile_kernels
}

main "$@"
