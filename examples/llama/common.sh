#!/usr/bin/env bash
# Pretrains LLaMA on many nodes. Sourced by 7b.sh, 13b.sh, ... which only name the size.
#
#   Slurm:      sbatch --nodes 64 examples/llama/7b.sh [MEGATRON FLAGS]
#   by hand:    on every node, with NODES, NODE_RANK and MASTER_ADDR set:  bash examples/llama/7b.sh [FLAGS]
#   look first: PLAN_ONLY=1 bash examples/llama/7b.sh     prints plan and flags, tries them without a GPU, ends
#
# It plans the parallel layout for this cluster, tries the flags under a simulated world, and refuses what
# cannot work before a GPU is taken. Started again, by hand or by Slurm's requeue, it resumes from the last
# complete checkpoint. Flags given on the command line come last and win.
#
# Settings (environment):
#   TRAIN_DATA, VALID_DATA  Megatron's indexed data sets: prefixes, or a blend (weight prefix weight prefix ...)
#   TOKENIZER_MODEL         the SentencePiece file that the data was made with
#   OUT                     where checkpoints and logs go           (default runs/llama-SIZE-NORM)
#   NORM                    DyT or RMSNorm                          (default DyT)
#   NODES, GPUS_PER_NODE    size of the cluster                     (default Slurm's; 1 and 8)
#   GPU_MEMORY, GPU_FLOPS   GB and bf16 TFLOP/s a GPU               (default 80 and 989: H100)
#   SAVE_INTERVAL           steps between checkpoints               (default 500)
#   PLAN_FLAGS              sizes of your own, such as "--tp 8"     (see megatron-dyt plan --help)
#   NODE_RANK, MASTER_ADDR, MASTER_PORT                             without Slurm
#   PY                      interpreter                             (default .venv/bin/python, else python3)
set -euo pipefail

: "${MODEL:?source this from one of the size scripts, such as 7b.sh}"
say() { printf 'llama-%s: %s\n' "$MODEL" "$*"; }
fail() {
  printf 'llama-%s: error: %s\n' "$MODEL" "$*" >&2
  exit 2
}

[ -n "${PY:-}" ] || { [ -x .venv/bin/python ] && PY=.venv/bin/python; } || PY=python3
NORM=${NORM:-DyT}
OUT=${OUT:-runs/llama-$MODEL-$NORM}
NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron overlaps TP communication by it.
# Commands that only look at flags must not print as rank so-and-so of the job.
alone() { env -u RANK -u WORLD_SIZE -u SLURM_PROCID -u SLURM_NTASKS "$PY" "$@"; }

# --- what to run ---------------------------------------------------------------------------------------

check_settings() {
  if [ -n "${PLAN_ONLY:-}" ]; then return; fi
  local name
  for name in TRAIN_DATA VALID_DATA TOKENIZER_MODEL; do
    [ -n "${!name:-}" ] || fail "$name is not set; see the head of examples/llama/common.sh."
  done
  [ -f "$TOKENIZER_MODEL" ] || fail "TOKENIZER_MODEL=$TOKENIZER_MODEL is not a file."
  local prefix
  for prefix in $TRAIN_DATA $VALID_DATA; do
    [[ $prefix =~ ^[0-9.]+$ ]] && continue # a weight of a blend
    [ -f "$prefix.idx" ] || fail "$prefix.idx is missing: $prefix is no indexed data set (megatron-dyt prepare-data makes them)."
  done
}

make_flags() {
  local text
  text=$(alone -m megatron_dyt.recipes "$MODEL" --norm "$NORM" --format flags) || exit
  read -r -a RECIPE <<<"$text"
  local cluster=(--model "$MODEL" --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE"
    --gpu-memory "${GPU_MEMORY:-80}" --gpu-flops "${GPU_FLOPS:-989}")
  # shellcheck disable=SC2206 # PLAN_FLAGS is a list of words.
  cluster+=(${PLAN_FLAGS:-})
  PLAN=$(alone -m megatron_dyt.planning "${cluster[@]}") || exit
  text=$(alone -m megatron_dyt.planning "${cluster[@]}" --format flags) || exit
  read -r -a LAYOUT <<<"$text"
}

# One precision and one kernel set for every size; --transformer-impl local runs without Transformer Engine.
SPEED=(--bf16 --transformer-impl "${TRANSFORMER_IMPL:-transformer_engine}" --attention-backend auto
  --no-create-attention-mask-in-dataloader)
SAFETY=(--ckpt-format torch_dist --async-save --save-interval "$SAVE_INTERVAL"
  --exit-signal-handler --distributed-timeout-minutes 30)
LOGGING=(--log-interval 10 --eval-interval 500 --eval-iters 20 --log-throughput
  --dyt-stats-interval 100)

set_data_flags() {
  # shellcheck disable=SC2206 # Blends are lists of words.
  DATA=(--train-data-path ${TRAIN_DATA:-none} --valid-data-path ${VALID_DATA:-none}
    --data-cache-path "$OUT/cache" --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "${TOKENIZER_MODEL:-none}")
  PLACES=(--save "$OUT/checkpoint" --load "$OUT/checkpoint" --tensorboard-dir "$OUT/tensorboard")
}

try_flags() {
  local vocabulary
  vocabulary=$(alone -c 'import sys; from megatron_dyt.recipes import load; print(load(sys.argv[1]).vocab_size)' "$MODEL")
  alone -m megatron_dyt.planning.dry_run --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE" \
    --vocab-size "$vocabulary" -- "${TRAINING[@]}"
}

# --- starting it ---------------------------------------------------------------------------------------

launch() {
  local torchrun=("$PY" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE")
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Slurm sends TERM ten minutes before the time is up; Megatron then saves and ends.
    srun --ntasks "$NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 \
      "${torchrun[@]}" --rdzv-backend c10d --rdzv-endpoint "$head:${MASTER_PORT:-29500}" \
      --rdzv-id "$SLURM_JOB_ID" -m megatron_dyt.pretrain "${TRAINING[@]}"
  elif [ "$NODES" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
      fail "NODES=$NODES without Slurm needs NODE_RANK (0 to $((NODES - 1))) and MASTER_ADDR."
    "${torchrun[@]}" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" \
      --master-port "${MASTER_PORT:-29500}" -m megatron_dyt.pretrain "${TRAINING[@]}"
  else
    "${torchrun[@]}" --standalone -m megatron_dyt.pretrain "${TRAINING[@]}"
  fi
}

# Whether the checkpoint directory has the last step.
finished() {
  local last=0 word
  [ -f "$OUT/checkpoint/latest_checkpointed_iteration.txt" ] &&
    last=$(<"$OUT/checkpoint/latest_checkpointed_iteration.txt")
  local previous=
  local steps=0
  for word in "${TRAINING[@]}"; do
    [ "$previous" = --train-iters ] && steps=$word
    previous=$word
  done
  [ "$last" -ge "$steps" ]
}

main() {
  check_settings
  make_flags
  set_data_flags
  TRAINING=("${RECIPE[@]}" "${LAYOUT[@]}" "${SPEED[@]}" "${SAFETY[@]}" "${LOGGING[@]}" "${DATA[@]}" "${PLACES[@]}" "$@")
  if [ "${NODE_RANK:-0}" = 0 ]; then
    printf '%s\n' "$PLAN"
    try_flags
  fi
  if [ -n "${PLAN_ONLY:-}" ]; then
    printf '%q ' "${TRAINING[@]}"
    echo
    return
  fi
  mkdir -p "$OUT"
  say "training into $OUT"
  local code=0
  launch || code=$?
  if finished; then
    say "finished: all steps are in $OUT/checkpoint"
  elif [ -n "${SLURM_JOB_ID:-}" ] && [ "$code" -ne 2 ]; then
    # 2 is our code for wrong input, which trying again does not mend.
    say "not finished (exit code $code); requeued, it resumes from the last complete checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
  else
    fail "stopped before the last step (exit code $code). Start it again to resume from the last complete checkpoint."
  fi
}
