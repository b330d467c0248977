#!/usr/bin/env bash
# timm 1.0.31: the spatial attention of CSATv2 normalizes one channel (nn.LayerNorm(1) in SpatialTransformerBlock), whose result
# is the norm's bias whatever comes in. So attention and MLP of these blocks see no image: what they add to their input is the
# same map for every image (a position's map, by the convolution at the border), at any weights. Seen on Python 3.12, torch
# 2.11.0, 2026-11-28, for two random images and random weights:
#
#   what the block adds for two images differs by less than 1e-4: True
#
# Exits with 0 while that is so. Installs into a temporary folder, and torch too unless the interpreter has it; PYTHON chooses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.11.0")' 2> "$folder/none"; then
    "$python" -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet torch==2.11.0
fi
install=("$python" -m pip install --quiet --disable-pip-version-check --target "$folder/packages")
"${install[@]}" --no-deps timm==1.0.31 torchvision==0.26.0 # without torch, once more
"${install[@]}" huggingface_hub==2.4.0 safetensors==0.8.0 pillow==13.0.0 pyyaml==6.0.3 numpy==2.3.5
PYTHONPATH=$folder/packages "$python" - <<'END_OF_PYTHON'
import torch
from timm.models.csatv2 import SpatialTransformerBlock

torch.manual_seed(0)
block = SpatialTransformerBlock().eval()
for parameter in block.parameters():
    torch.nn.init.normal_(parameter)
images = torch.randn(2, 1, 7, 7) * torch.tensor([0.1, 10.0]).view(2, 1, 1, 1)
with torch.no_grad():
    first, second = block(images) - images
is_constant = float((first - second).abs().max()) < 1e-4
print("what the block adds for two images differs by less than 1e-4:", is_constant)
raise SystemExit(not is_constant)
END_OF_PYTHON
