#!/usr/bin/env bash
# Quickstart: is DyT as good as RMSNorm? A small answer on this machine, in five to ten minutes.
#
# Trains two small LLaMAs with Megatron-Core's own training loop, one with RMSNorm and one with DyT, on the
# source code of Python's standard library; evaluates both zero-shot with lm-eval; compares them in
# quickstart/report.html and quickstart/results.json. Needs no GPU and uses one when there is one.
#
#   make quickstart            (or: bash examples/quickstart.sh)
#
# Interrupted, it continues where it was: each step knows what is done. Start over: rm -r quickstart.
# Every step is a command that works at any size; a cluster runs the same ones with other numbers.
#
# Environment: PY (interpreter, default .venv/bin/python), OUT (default quickstart), STEPS (default 200).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PY=${PY:-.venv/bin/python}
OUT=${OUT:-quickstart}
STEPS=${STEPS:-200}
# OpenMP's threads must not burn the time of a busy machine while they wait.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
command -v "$PY" >/dev/null || { echo "quickstart: $PY is missing; run 'make setup' first" >&2; exit 1; }
mkdir -p "$OUT"
# Seconds of the interrupted attempts before this one.
before=$(cat "$OUT/elapsed_seconds" 2>/dev/null || echo 0)
elapsed() { echo $((before + SECONDS)); }
follower=
stop_following() {
  [ -z "$follower" ] || { kill "$follower" && wait "$follower"; } 2>/dev/null || true
  follower=
}
trap 'elapsed >"$OUT/elapsed_seconds"; stop_following' EXIT
say() { printf '\n== %s (%d s so far)\n' "$*" "$(elapsed)"; }

# The model: 2.4M parameters in the matrices, LLaMA's parts. The two runs differ in NORM alone.
HIDDEN=192
MODEL=(
  --num-layers 4 --hidden-size "$HIDDEN" --ffn-hidden-size 512 --num-attention-heads 6
  --group-query-attention --num-query-groups 2 --swiglu --disable-bias-linear
  --position-embedding-type rope --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0 --max-position-embeddings 256
)
# The recipe, the same for both: seed, data order, schedule, weights at the start.
RECIPE=(
  --seed 1234 --seq-length 256 --micro-batch-size 16 --global-batch-size 16 --train-iters "$STEPS"
  --lr-decay-style cosine --min-lr 0 --lr-warmup-iters $((STEPS / 10))
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
  --init-method-std 0.0721688 --embedding-init-method-std 0.02 # 1/sqrt(192) for linear layers
)
DATA=(
  --train-data-path "$OUT/data/train" --valid-data-path "$OUT/data/valid" --data-cache-path "$OUT/data/cache"
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUT/tokenizer.model"
  --no-create-attention-mask-in-dataloader --num-workers 0
)
# What makes the same command work with and without Transformer Engine and apex.
PORTABLE=(--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion)
LOGGING=(--log-interval 5 --eval-interval 50 --eval-iters 16 --save-interval 50)

say "corpus, tokenizer, data sets, evaluation tasks"
"$PY" examples/quickstart/corpus.py --output "$OUT/corpus"
"$PY" -m megatron_dyt train-tokenizer --input "$OUT/corpus/train.jsonl" --vocab-size 4096 \
  --output "$OUT/tokenizer.model"
for split in train valid; do
  "$PY" -m megatron_dyt prepare-data --input "$OUT/corpus/$split.jsonl" \
    --tokenizer-model "$OUT/tokenizer.model" --output-prefix "$OUT/data/$split"
done
# Megatron's cache of sample indices goes by path, not by content.
[ "$OUT/data/train.manifest.json" -ot "$OUT/data/cache" ] || rm -rf "$OUT/data/cache"
"$PY" examples/quickstart/tasks.py --corpus "$OUT/corpus" --output "$OUT/tasks" --questions 800

# run NAME LEARNING_RATE NORM_FLAGS...: train (or continue), then evaluate.
worked=no
run() {
  local name=$1 lr=$2 dir=$OUT/$1 began=$SECONDS
  shift 2
  local command=(
    "$PY" -m torch.distributed.run --standalone --nproc-per-node 1 -m megatron_dyt.pretrain
    "${MODEL[@]}" "${RECIPE[@]}" "${DATA[@]}" "${PORTABLE[@]}" "${LOGGING[@]}"
    --lr "$lr" "$@" --save "$dir/checkpoint" --load "$dir/checkpoint"
  )
  # What was begun with another command or other data is no part of this run.
  "$PY" examples/quickstart/record.py --begin "$dir" --data "$OUT/data/train.manifest.json" -- "${command[@]}"
  if [ ! -e "$dir/run.json" ]; then
    worked=yes
    say "$name: training $STEPS steps at learning rate $lr"
    "$PY" -m megatron_dyt follow "$dir" --name "$name" &
    follower=$!
    # All of the output is in the log, to the last line after Ctrl-C too; here is what a person must see.
    "${command[@]}" 2>&1 | tee -aip "$dir/train.log" |
      { grep --line-buffered -E '^(megatron_dyt|DyT |WARNING: DyT)|Error\b' || true; } ||
      { code=$?; [ $code -eq 130 ] || echo "quickstart: $name: training failed; its output is in $dir/train.log" >&2; exit $code; }
    stop_following
    "$PY" examples/quickstart/record.py --finish "$dir" --learning-rate "$lr" --seconds $((SECONDS - began))
  fi
  if [ ! -e "$dir/eval.json" ]; then
    worked=yes
    say "$name: zero-shot evaluation"
    "$PY" -m megatron_dyt eval --load "$dir/checkpoint" --tasks dyt_bits_per_byte,dyt_next_line \
      --include-path "$OUT/tasks" --output "$dir/eval.json"
  fi
}

# Both at RMSNorm's best learning rate (docs/results.md); DyT with its default preset. RMSNorm gets the embedding
# scale too, because that is better for it.
run rmsnorm 8e-3 --normalization RMSNorm --embedding-scale unit
run dyt 8e-3 --normalization DyT --dyt-stats-interval 10

if [ $worked = no ] && [ -e "$OUT/results.json" ]; then
  trap - EXIT # A look at finished work is no work.
  say "everything is done already: $OUT/report.html"
  exit 0
fi
say "report"
"$PY" -m megatron_dyt report --run "rmsnorm=$OUT/rmsnorm" --run "dyt=$OUT/dyt" --output "$OUT" \
  --title "DyT against RMSNorm: quickstart" --elapsed-seconds "$(elapsed)"
say "done: open $OUT/report.html"
