#!/usr/bin/env bash
# Runs uv with the network settings that pip has: scripts/uv.sh pip install ...
#
# uv is the one on PATH; where there is none, pip installs it into .venv-uv. uv does not read pip's
# configuration, and behind a mirror that is where the index and the certificates stand, so they are translated
# into uv's variables. What uv has of its own (its variables, a uv.toml) is left alone.
#
# scripts/setup.sh and scripts/test-newest.sh source this file for find_uv, use_pip_settings and checkout.

# The checkout; setup.sh has set it already.
root=${root:-$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
uv= # set by find_uv

# What an environment of this checkout gets. multiprocess (of datasets and datatrove) has a wheel for each Python, all of
# them marked as fit for later ones too. uv takes that of 3.10, which cannot start a process on 3.12; the source package
# fits the Python it is built by.
# shellcheck disable=SC2034 # for those who source this file
checkout=(--no-build-isolation --no-binary multiprocess -e "${root}[train,eval,hf,report,slurm,docs,dev]")

# 0.5 is the first that knows all that is used here.
is_usable_uv() { [[ $("$1" --version 2>/dev/null) =~ ^uv\ (0\.([5-9]|[1-9][0-9])|[1-9])\. ]]; }

# Sets uv, installing it where it is missing. Returns 1 after saying why it could not.
find_uv() {
    local candidate python tried=()
    for candidate in "$(type -P uv || true)" "$root/.venv-uv/bin/uv"; do
        if is_usable_uv "$candidate"; then
            uv=$candidate
            return
        fi
    done
    uv=$root/.venv-uv/bin/uv
    while IFS= read -r python; do
        if "$python" -m venv --clear "$root/.venv-uv" >/dev/null 2>&1 &&
            "$root/.venv-uv/bin/python" -m pip --disable-pip-version-check install -q \
                "$(grep '^uv==' "$root/constraints.txt")" >&2 && is_usable_uv "$uv"; then
            return
        fi
        tried+=("$python")
    done < <(any_python)
    printf 'setup: error: uv is not here and could not be installed by pip. Tried: %s\n' \
        "${tried[*]:-no Python is on PATH}" \
        "  Install uv (https://docs.astral.sh/uv), or a Python with venv and pip (Debian: python3-venv)," \
        "  then run this again." >&2
    return 1
}

# Interpreters that can install uv: any Python 3 with venv and pip.
any_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python; do
        "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || continue
        printf '%s\n' "$candidate"
    done
}

# Exports as uv's variables what pip is configured with.
use_pip_settings() {
    local python config home=${XDG_CONFIG_HOME:-${HOME:-}/.config}
    export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}
    for python in "$root/.venv-uv/bin/python" "$root/.venv/bin/python" "${PYTHON:-}" python3 python; do
        config=$("$python" -m pip config list 2>/dev/null) && break
    done
    [[ -n ${config:-} ]] || return 0
    adopt SSL_CERT_FILE cert
    adopt SSL_CLIENT_CERT client-cert
    adopt ALL_PROXY proxy
    adopt UV_INSECURE_HOST trusted-host
    adopt UV_HTTP_TIMEOUT timeout
    adopt UV_HTTP_TIMEOUT default-timeout
    adopt UV_CONSTRAINT constraint
    [[ -z ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-}${UV_CONFIG_FILE:-} ]] || return 0
    [[ ! -e $home/uv/uv.toml && ! -e /etc/uv/uv.toml ]] || return 0
    adopt UV_DEFAULT_INDEX index-url
    adopt UV_INDEX extra-index-url
    adopt UV_FIND_LINKS find-links
    [[ -z ${UV_FIND_LINKS:-} ]] || UV_FIND_LINKS=${UV_FIND_LINKS// /,}
    # pip takes the best version of all indexes; uv by default takes the first index that has the package.
    [[ -z ${UV_INDEX:-} ]] || export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
}

# adopt VARIABLE SETTING: export it with pip's value, unless it is set. `config` is what `pip config list` says:
# lines as global.index-url='https://...', with the environment before a command's own section before global.
adopt() {
    local section value
    [[ -z ${!1:-} ]] || return 0
    for section in :env: install global; do
        if [[ $'\n'$config$'\n' =~ $'\n'"$section.$2='"([^$'\n']*)"'"$'\n' ]]; then
            value=${BASH_REMATCH[1]//\\n/ } # a list over several lines
            export "$1=${value# }"
            return
        fi
    done
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    find_uv
    use_pip_settings
    exec "$uv" "$@"
fi
