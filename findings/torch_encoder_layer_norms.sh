#!/usr/bin/env bash
# torch 2.11.0: nn.TransformerEncoderLayer in eval mode takes a fused kernel that is given eps, weight and bias of norm1 and
# norm2, whatever class these have. A norm with a forward of its own (here a LayerNorm whose gain is 1 + weight, as Nemotron's;
# an RMSNorm with a bias does it too) is used in training and silently becomes a plain LayerNorm in evaluation. Without
# dropout both modes should agree (seen on Python 3.12, 2026-11-28):
#
#   LayerNorm:                 training and evaluation differ by 0.0
#   LayerNorm with 1 + weight: training and evaluation differ by 2.6
#
# With torch.backends.mha.set_fastpath_enabled(False) they agree. Exits with 0 while that is so. Installs into a temporary
# folder, unless the interpreter has that torch; PYTHON chooses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.11.0")' 2> "$folder/none"; then
    "$python" -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet torch==2.11.0 numpy==2.3.5
fi
"$python" - <<'END_OF_PYTHON'
import torch
from torch import nn
from torch.nn import functional as F


class OnePlusWeight(nn.LayerNorm):
    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


@torch.no_grad()
def difference(norm):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    layer.norm1, layer.norm2 = norm(32), norm(32)
    x = torch.randn(2, 5, 32)
    return float((layer.train()(x) - layer.eval()(x)).abs().max())


plain, other = difference(nn.LayerNorm), difference(OnePlusWeight)
print(f"LayerNorm:                 training and evaluation differ by {plain:.1f}")
print(f"LayerNorm with 1 + weight: training and evaluation differ by {other:.1f}")
torch.backends.mha.set_fastpath_enabled(False)
raise SystemExit(not (plain < 1e-4 and other > 1 and difference(OnePlusWeight) == 0))
END_OF_PYTHON
