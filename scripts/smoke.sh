#!/usr/bin/env bash
# Installs what `make build` has left in dist/ into empty environments, without this checkout, and uses it there:
# what a user gets. It fails where the package lacks a file, or its metadata a dependency.
#
#   wheel alone        DynamicTanh on the C kernels, the command line, an extra that is missing is named
#   sdist, no compiler the same by plain torch, with one warning
#   [train,report]     two training steps on mock data, and a report of them
#
# uv takes the packages from its cache, where `make setup` has put them. TORCH_INDEX_URL as for make setup.
set -euo pipefail

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
wheel=$(printf '%s\n' "$root"/dist/*.whl)
sdist=$(printf '%s\n' "$root"/dist/*.tar.gz)
[[ -f $wheel && -f $sdist ]] || { echo "smoke: error: dist/ must hold one wheel and one sdist; run 'make build'." >&2; exit 1; }
# shellcheck source=scripts/uv.sh
. "$root/scripts/uv.sh"
find_uv
use_pip_settings

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset PYTHONPATH
export WANDB_MODE=disabled

say() { printf 'smoke: %s\n' "$*"; }
fail() { printf 'smoke: error: %s\n' "$*" >&2; exit 1; }

# environment NAME PACKAGE...: a new one that holds the packages, and nothing else.
environment() {
    local name=$1
    shift
    "$uv" venv -q --no-project --python "$python" "$name"
    [[ -z ${TORCH_INDEX_URL:-} ]] ||
        install "$name" --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' "$root/constraints.txt")"
    install "$name" "$@"
}

install() {
    local name=$1
    shift
    "$uv" pip install -q --python "$name/bin/python" -c "$root/constraints.txt" "$@"
}

# DynamicTanh forward and backward against its formula; prints which code ran, and how many warnings there were.
cat >dynamic_tanh.py <<'END'
import warnings

import torch

import megatron_dyt
from megatron_dyt.ops import cpu_dyt

assert "site-packages" in megatron_dyt.__file__, megatron_dyt.__file__
x = torch.randn(64, 96, requires_grad=True)
norm = megatron_dyt.DynamicTanh(96, alpha_init=0.7)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        y = norm(x)
y.sum().backward()
torch.testing.assert_close(y, torch.tanh(0.7 * x))
torch.testing.assert_close(x.grad, 0.7 * (1 - y.detach() ** 2))
print(f"kernels={cpu_dyt.IS_BUILT} warnings={len(seen)}")
END

say "the wheel alone"
environment plain "$wheel"
found=$(plain/bin/python dynamic_tanh.py)
[[ $found == "kernels=True warnings=0" ]] || fail "DynamicTanh from the wheel: $found"
plain/bin/megatron-dyt --help >/dev/null
plain/bin/megatron-dyt recipe 7b >/dev/null
for command in $(plain/bin/python -c 'from megatron_dyt.cli import COMMANDS; print(*COMMANDS)'); do
    plain/bin/megatron-dyt "$command" --help >/dev/null || fail "megatron-dyt $command --help needs more than the wheel"
done
message=$(plain/bin/megatron-dyt report --run a=. --output report 2>&1) && fail "a report was made without its extra"
[[ $message == *"pip install 'megatron-dyt[report]'"* ]] || fail "an extra that is missing is not named: $message"

say "the sdist, without a compiler"
CC=/bin/false install plain --reinstall-package megatron-dyt --no-cache --no-deps "$sdist"
found=$(plain/bin/python dynamic_tanh.py)
[[ $found == "kernels=False warnings=1" ]] || fail "DynamicTanh from an sdist that was built without a compiler: $found"

say "[train,report]: two steps on mock data"
environment train "megatron-dyt[train,report] @ file://$wheel"
train/bin/python -m megatron_dyt.pretrain --device cpu --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 \
    --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 \
    --train-iters 2 --lr 1e-2 --lr-decay-style constant --swiglu --position-embedding-type rope \
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --mock-data \
    --tokenizer-type NullTokenizer --vocab-size 63 --log-interval 1 --eval-interval 2 --eval-iters 1 --num-workers 0 \
    --normalization DyT --dyt-preset unit --save run/checkpoint --save-interval 2 --tensorboard-dir run/tensorboard \
    >run.log 2>&1 || { tail -n 30 run.log >&2; fail "training failed"; }
[[ -d run/checkpoint/iter_0000002 ]] || fail "training left no checkpoint"
train/bin/megatron-dyt report --run dyt=run --output report --allow-missing-eval --allow-missing-stats >/dev/null
[[ -s report/report.html && -s report/curves.svg ]] || fail "there is no report"

say "ok: $(basename "$wheel") and $(basename "$sdist")"
