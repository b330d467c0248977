"""Stand-ins for what the launch scripts call: a Slurm of one machine, and a Python that answers at once."""

from __future__ import annotations

import sys
from pathlib import Path

# srun: starts the tasks with the variables that Slurm gives them, and returns the highest exit code.
# Their process ids go to $FAKE_HOME/tasks, for a test to signal them as Slurm signals a step.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
words = sys.argv[1:]
flags = []
while words[0].startswith("--"):
    flags.append(words.pop(0))
    if "=" not in flags[-1]:
        flags.append(words.pop(0))
home = os.environ["FAKE_HOME"]
open(f"{{home}}/srun", "a").write(" ".join(flags) + "\\n")
count, per_node = int(flags[flags.index("--ntasks") + 1]), 10**6
if "--ntasks-per-node" in flags:
    per_node = int(flags[flags.index("--ntasks-per-node") + 1])
tasks = []
for rank in range(count):
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node), "SLURM_NTASKS": str(count)}}
    tasks.append(subprocess.Popen(words, env=os.environ | own))
open(f"{{home}}/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$FAKE_HOME/scontrol"
if [ "$1 $2" = "show hostnames" ]; then echo localhost; fi
"""

# squeue: the job whose number is in $FAKE_HOME/queue is there.
SQUEUE = """#!/usr/bin/env bash
if grep -qsx "$3" "$FAKE_HOME/queue"; then echo "$3 RUNNING"; exit; fi
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""

# python: recipe and plan of ten steps; training and torchrun are what the test says in $FAKE_TRAIN.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m megatron_dyt recipe "*) echo --train-iters 10 ;;
  "-m megatron_dyt dry-run "*) echo dry run ;;
  "-m megatron_dyt plan "*) echo --micro-batch-size 1 ;;
  "-m megatron_dyt prepare-data "*) echo "0.25 some/prefix 0.75 other/prefix" ;;
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


def slurm(home: Path) -> dict[str, str]:
    """The environment of a batch job whose srun and scontrol are ours; what they are told goes to `home`."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
        _executable(home / "bin" / name, text)
    return {
        "FAKE_HOME": str(home),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "2",
    }


def python(home: Path) -> dict[str, str]:
    """The environment of a script whose Python is ours."""
    _executable(home / "bin" / "python", PYTHON)
    return {"FAKE_HOME": str(home), "PY": str(home / "bin" / "python")}


def dry_run(home: Path) -> dict[str, str]:
    """The environment of a script whose dry run is ours, and costs no start of Megatron."""
    _executable(home / "bin" / "python", NO_DRY_RUN)
    return {"FAKE_HOME": str(home), "PY": str(home / "bin" / "python")}


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
