#!/usr/bin/env bash
# uv 0.13.9 on Python 3.12 installs the wheel of multiprocess 0.70.19 that is built for Python 3.10, where pip takes that
# for 3.12: both tags (py310-none-any, py312-none-any) are compatible. The package imports, and starting a process that
# needs its resource tracker fails. datasets and datatrove use it for several processes (seen on 2026-11-28):
#
#   uv: py310-none-any, TypeError: fork_exec expected 23 arguments, got 21
#   pip: py312-none-any, ok
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON names an interpreter 3.12.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/pip"
"$folder/pip/bin/pip" install --quiet uv==0.13.9 multiprocess==0.70.19 dill==0.4.1
"${PYTHON:-python3.12}" -m venv "$folder/uv"
"$folder/pip/bin/uv" pip install --quiet --python "$folder/uv/bin/python" multiprocess==0.70.19 dill==0.4.1
cat > "$folder/try.py" <<'END'
import importlib.metadata

import multiprocess

wheel = importlib.metadata.distribution("multiprocess").read_text("WHEEL").split("Tag: ")[1].split()[0]
try:
    multiprocess.get_context("forkserver").Lock()
    print(f"{wheel}, ok")
except TypeError as error:
    print(f"{wheel}, TypeError: {error}")
END
by_uv=$("$folder/uv/bin/python" "$folder/try.py")
by_pip=$("$folder/pip/bin/python" "$folder/try.py")
printf 'uv: %s\npip: %s\n' "$by_uv" "$by_pip"
[[ $by_uv == "py310-none-any, TypeError: fork_exec expected 23 arguments, got 21" && $by_pip == "py312-none-any, ok" ]]
