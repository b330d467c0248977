#!/usr/bin/env bash
# megatron-core 0.19.2 with torch 2.15.0, which its `torch>=2.6` takes: `dist_checkpointing.load_tensors_metadata` fails on a
# sound checkpoint. It hands all properties that the metadata have of a tensor to torch.empty, and 2.15 has added `strides`.
# With it fails `load` by every strictness but the default one (--dist-ckpt-strictness log_all, raise_all, ...), and all that
# looks into a checkpoint before it loads. With torch 2.14.1 it works (seen on Python 3.12, 2026-11-28):
#
#   torch 2.14.1+cu130: keys ['weight']
#   torch 2.15.0+cu132: TypeError: empty() got an unexpected keyword argument 'strides'
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON names an interpreter 3.12.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'END'
import json

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing

# As Megatron writes it, which needs a GPU for that.
dcp.save({"weight": torch.arange(4.0)}, checkpoint_id="checkpoint", no_dist=True)
form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
with open("checkpoint/metadata.json", "w") as file:
    json.dump(form, file)
try:
    print(f"torch {torch.__version__}: keys {list(dist_checkpointing.load_tensors_metadata('checkpoint'))}")
except TypeError as error:
    print(f"torch {torch.__version__}: TypeError: {error}")
END
for release in 2.14.1 2.15.0; do
    "${PYTHON:-python3.12}" -m venv "$folder/$release"
    "$folder/$release/bin/pip" install --quiet "torch==$release" megatron-core==0.19.2 numpy==2.3.5
    mkdir "$folder/run-$release"
    cd "$folder/run-$release"
    found=$("$folder/$release/bin/python" -W ignore "$folder/try.py" 2>errors) || cat errors
    echo "$found"
    case $release in
    2.14.1) [[ $found == *"keys ['weight']" ]] ;;
    2.15.0) [[ $found == *"TypeError: empty() got an unexpected keyword argument 'strides'" ]] ;;
    esac
done
