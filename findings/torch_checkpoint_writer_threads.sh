#!/usr/bin/env bash
# torch 2.11.0: torch.distributed.checkpoint's FileSystemWriter with thread_count=2 or more loses what is raised in
# a thread that writes, a full disk for one. `save` returns, the `.metadata` by which a checkpoint counts as complete
# is written, the tensors of that thread's file are in neither, and the job goes on and deletes older checkpoints. The
# default, one thread, raises. Seen with a limit on a file's size in the place of a full disk (2026-11-29):
#
#   thread_count=1: save raises CheckpointException; files: __0_0.distcp
#   thread_count=2: save returns; files: .metadata __0_0.distcp __0_1.distcp; load raises CheckpointException
#
# (and the thread's "OSError: [Errno 27] File too large" on stderr). Exits with 0 while that is so. Installs into a
# temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.3.5
cat > "$folder/try.py" <<'END'
import os
import resource
import signal
import sys

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

place, threads = sys.argv[1], int(sys.argv[2])
state = {"large": torch.ones(1000, 1000), "small": torch.ones(100)}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # An error of the write, as a full disk's is.
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))


def outcome(call):
    try:
        call()
    except CheckpointException:
        return "raises CheckpointException"
    return "returns"


saved = outcome(lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(place, thread_count=threads)))
report = f"thread_count={threads}: save {saved}; files: {' '.join(sorted(os.listdir(place)))}"
if saved == "returns":
    report += f"; load {outcome(lambda: dcp.load(state, checkpoint_id=place))}"
print(report)
END
try_out() {
    found=$("$folder/venv/bin/python" -W ignore "$folder/try.py" "$folder/by-$1" "$1" 2>"$folder/errors")
    echo "$found"
}
try_out 1
[[ $found == "thread_count=1: save raises CheckpointException; files: __0_0.distcp" ]]
try_out 2
[[ $found == *"save returns; files: .metadata"*"load raises CheckpointException" ]]
grep -q "File too large" "$folder/errors"
