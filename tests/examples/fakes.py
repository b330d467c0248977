"""Stand-ins for the Python that the launch scripts call, which answer at once."""

import sys
from pathlib import Path

# python: recipe and plan of ten steps; the import, the dry run, training and torchrun are what the
# test says in $FAKE_IMPORT, $FAKE_DRY_RUN and $FAKE_TRAIN.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m megatron_dyt recipe "*) echo --train-iters 10 ;;
  "-m megatron_dyt dry-run "*) echo "${*%% -- *}"; eval "${FAKE_DRY_RUN:-}" ;;
  "-m megatron_dyt plan "*) echo --micro-batch-size 1 ;;
  "-m megatron_dyt prepare-data "*) echo "0.25 some/prefix 0.75 other/prefix" ;;
  "-c import megatron_dyt") eval "${FAKE_IMPORT:-}" ;;
  "-c import importlib.util as util; "*) exit 1 ;;
  *)
    echo "${RANK:-}/${WORLD_SIZE:-} ${LOCAL_RANK:-} ${MASTER_ADDR:-} $*" >> "$FAKE_HOME/python"
    mkdir -p "$OUT/checkpoint"
    TRACKER=$OUT/checkpoint/latest_checkpointed_iteration.txt
    eval "$FAKE_TRAIN"
    ;;
esac
"""

# python: this one, but for dry runs, whose arguments go to $FAKE_HOME/dry-run; they end with $FAKE_DRY_RUN.
NO_DRY_RUN = f"""#!/usr/bin/env bash
if [ "$3" = dry-run ]; then shift 3; printf '%q ' "$@" > "$FAKE_HOME/dry-run"; exit "${{FAKE_DRY_RUN:-0}}"; fi
exec {sys.executable} "$@"
"""


def python(home: Path) -> dict[str, str]:
    """The environment of a script whose Python is ours."""
    _executable(home / "bin" / "python", PYTHON)
    return {"FAKE_HOME": str(home), "PY": str(home / "bin" / "python")}


def dry_run(home: Path) -> dict[str, str]:
    """The environment of a script whose dry run is ours, and costs no start of Megatron."""
    _executable(home / "bin" / "python", NO_DRY_RUN)
    return {"FAKE_HOME": str(home), "PY": str(home / "bin" / "python")}


def command(home: Path, name: str, script: str) -> None:
    """A command of this name, first on the PATH of a script."""
    _executable(home / "bin" / name, f"#!/usr/bin/env bash\n{script}\n")


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
