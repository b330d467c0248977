#!/usr/bin/env bash
# torch 2.15.0: a distributed checkpoint (torch.distributed.checkpoint, so Megatron's torch_dist too) that it has saved cannot
# be read by any torch before: the properties of a tensor in `.metadata` are pickled as six values where there were five, and
# the version that stands beside them is not looked at. What earlier ones saved is read by 2.15. So a job that ran once
# with the newer torch cannot go on with the older, and the message reads like damage (seen on Python 3.11, 2026-11-28):
#
#   2.14.1 saves, 2.15.0 loads: [0.0, 1.0, 2.0, 3.0]
#   2.15.0 saves, 2.14.1 loads: AssertionError: metadata is None; global metadata read failed: too many values to unpack
#   (expected 5); rank local metadata read failed: [Errno 2] No such file or directory: '.../by-2.15.0/__0.metadata'
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for release in 2.14.1 2.15.0; do
    "${PYTHON:-python3}" -m venv "$folder/$release"
    "$folder/$release/bin/pip" install --quiet "torch==$release" numpy==2.3.5
done
cat > "$folder/try.py" <<'END'
import logging
import sys

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

logging.disable()
state = {"weight": torch.arange(4.0)}
if sys.argv[1] == "save":
    dcp.save(state, checkpoint_id=sys.argv[2])
    raise SystemExit
state["weight"].fill_(-1)
try:
    dcp.load(state, checkpoint_id=sys.argv[2])
    print(state["weight"].tolist())
except CheckpointException as error:
    cause = error.failures[0][0]
    print(f"{type(cause).__name__}: {cause}")
END
try_out() {
    "$folder/$1/bin/python" -W ignore "$folder/try.py" save "$folder/by-$1"
    found=$("$folder/$2/bin/python" -W ignore "$folder/try.py" load "$folder/by-$1")
    echo "$1 saves, $2 loads: $found"
}
try_out 2.14.1 2.15.0
[[ $found == "[0.0, 1.0, 2.0, 3.0]" ]]
try_out 2.15.0 2.14.1
[[ $found == *"too many values to unpack (expected 5"* ]]
