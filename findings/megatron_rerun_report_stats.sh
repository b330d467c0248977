#!/usr/bin/env bash
# megatron-core 0.19.2: `--rerun-mode` allows disabled, validate_results and report_stats, but the enum that the value
# is turned into while Megatron initializes has the third one as report_determinism_stats. So report_stats passes the
# parser and ends the run at start-up, and what would work is refused by the parser: the mode cannot be chosen.
# Seen with PyTorch 2.11.0, 2026-11-29:
#
#   the flag allows: ['disabled', 'validate_results', 'report_stats']
#   disabled: RerunMode.DISABLED
#   validate_results: RerunMode.VALIDATE_RESULTS
#   report_stats: 'report_stats' is not a valid RerunMode
#
# Exits with 0 while that is so. Installs into a temporary folder (3 GB); PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" torch==2.11.0 megatron-core==0.19.2
cat > "$folder/modes.py" <<'END'
from typing import get_args, get_type_hints

from megatron.core.rerun_state_machine import RerunMode
from megatron.training.config.resilience_config import RerunStateMachineConfig

allowed = get_args(get_type_hints(RerunStateMachineConfig)["rerun_mode"])
print("the flag allows:", list(allowed))
for value in allowed:
    try:
        print(f"{value}: {RerunMode(value)}")  # As megatron/training/initialize.py does.
    except ValueError as error:
        print(f"{value}: {error}")
END
"$folder/venv/bin/python" -W ignore "$folder/modes.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'END'
the flag allows: ['disabled', 'validate_results', 'report_stats']
disabled: RerunMode.DISABLED
validate_results: RerunMode.VALIDATE_RESULTS
report_stats: 'report_stats' is not a valid RerunMode
END
