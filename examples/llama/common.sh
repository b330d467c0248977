#!/usr/bin/env bash
# Pretrains LLaMA on many nodes. Sourced by 7b.sh, 13b.sh, ... which only name the size.
#
#   Slurm:      sbatch --nodes 64 --time 2-0 examples/llama/7b.sh [MEGATRON FLAGS]
#   by hand:    on every node, with NODES, NODE_RANK and MASTER_ADDR set:  bash examples/llama/7b.sh [FLAGS]
#   look first: PLAN_ONLY=1 bash examples/llama/7b.sh     prints plan and flags, tries them without a GPU, ends;
#                                                         of the settings below, checks those that are there
#
# It plans the parallel layout for this cluster, tries the flags under a simulated world, and refuses what
# cannot work before a GPU is taken. Checkpoints are written every SAVE_INTERVAL steps, and on SIGTERM, which Slurm
# sends ten minutes before the time is up. Started again, by hand or by the requeue under Slurm, a run resumes
# from the last complete checkpoint; three starts in a row without a new checkpoint end it. To stop a job for good,
# with a checkpoint:  touch OUT/stop; scancel --signal=TERM JOB
# Flags given on the command line come last and win.
#
# Exit codes: 0  all steps are there, or the run was stopped as OUT/stop asked
#             1  it ended before the last step, and is not requeued
#             2  the input is wrong: the last lines say what to change
#
# Settings (environment):
#   TRAIN_DATA, VALID_DATA  what megatron-dyt prepare-data wrote: a directory with a manifest, prefixes, or a
#                           blend (weight prefix weight prefix ...)
#   TOKENIZER_MODEL         the SentencePiece file that the data was made with
#   OUT                     where checkpoints and logs go           (default runs/llama-SIZE-NORM)
#   NORM                    DyT or RMSNorm                          (default DyT)
#   NODES, GPUS_PER_NODE    size of the cluster                     (1 and 8; under Slurm what the job has)
#   GPU_MEMORY, GPU_FLOPS   GB and bf16 TFLOP/s per GPU              (default 80 and 989: H100)
#   SAVE_INTERVAL           steps between checkpoints               (default 500)
#   PRECISION               bf16, or fp32 where there is no GPU     (default bf16)
#   PLAN_FLAGS              sizes of your own, such as "--tp 8"     (see megatron-dyt plan --help)
#   WANDB_PROJECT           logs to Weights & Biases too, by Megatron's own flags
#   NODE_RANK, MASTER_ADDR, MASTER_PORT                             without Slurm
#   SIGNAL_LEAD             seconds from Slurm's SIGTERM to the job's end (default 600); give it together with
#                           another sbatch --signal=TERM@SECONDS
#   SRUN_FLAGS              more flags for srun, such as "--container-image=... --container-mounts=..."
#   PY                      interpreter                             (default this checkout's .venv, else python3)
set -euo pipefail

: "${MODEL:?source this from one of the size scripts, such as 7b.sh}"
say() { printf 'llama-%s: %s\n' "$MODEL" "$*"; }
give_up() { # with an exit code and why
  printf 'llama-%s: error: %s\n' "$MODEL" "${*:2}" >&2
  exit "$1"
}
fail() { give_up 2 "$@"; }

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ -n "${PY:-}" ] || { [ -x "$checkout/.venv/bin/python" ] && PY=$checkout/.venv/bin/python; } || PY=python3
NORM=${NORM:-DyT}
OUT=${OUT:-runs/llama-$MODEL-$NORM}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron overlaps TP communication by it.
export MASTER_PORT=${MASTER_PORT:-29500}
# shellcheck source=examples/llama/slurm.sh
. "$(dirname "${BASH_SOURCE[0]}")/slurm.sh"

# A command that only looks: on this node, or where the containers of SRUN_FLAGS are. It must not take itself
# for a rank of the job.
alone() {
  local where=()
  if [ -n "${SLURM_JOB_ID:-}" ] && [ -n "${SRUN_FLAGS:-}" ]; then
    # SIGTERM for the job must not end it: what the signal means is looked at before the ranks start.
    # shellcheck disable=SC2016 # The words are those of the task.
    where=("${SRUN[@]}" --nodes 1 --ntasks 1 bash -c 'trap "" TERM; exec "$@"' look)
  fi
  ${where[@]+"${where[@]}"} env -u RANK -u WORLD_SIZE -u SLURM_PROCID -u SLURM_NTASKS "$PY" "$@"
}

# --- what to run ---------------------------------------------------------------------------------------

check_python() {
  local why
  [ -z "${SLURM_JOB_ID:-}" ] || [ -z "${SRUN_FLAGS:-}" ] || return 0 # It may be in the containers alone.
  why=$(alone -c 'import megatron_dyt' 2>&1) ||
    fail "$PY cannot import megatron_dyt (${why##*$'\n'}). Run make setup in $checkout, or set PY=... to an interpreter that has it."
}

check_settings() {
  local name found
  ALL_SET=1
  for name in TRAIN_DATA VALID_DATA TOKENIZER_MODEL; do
    [ -n "${!name:-}" ] || ALL_SET=
    [ -n "${!name:-}${PLAN_ONLY:-}" ] || fail "$name is not set; see the head of examples/llama/common.sh."
  done
  [ -z "${TOKENIZER_MODEL:-}" ] || [ -f "$TOKENIZER_MODEL" ] || fail "TOKENIZER_MODEL=$TOKENIZER_MODEL is not a file."
  for name in TRAIN_DATA VALID_DATA; do
    [ -n "${!name:-}" ] || continue
    found=$(blend "${!name}") || exit
    printf -v "$name" %s "$found"
  done
}

# The blend that TRAIN_DATA or VALID_DATA stands for; refuses data sets that are not there.
blend() {
  local prefix
  if [ -d "$1" ]; then
    alone -m megatron_dyt prepare-data --print-blend "$1"
    return
  fi
  for prefix in $1; do
    [[ $prefix =~ ^[0-9.]+$ ]] && continue # a weight of a blend
    [ -f "$prefix.idx" ] || fail "$prefix.idx is missing: $prefix is no indexed data set (megatron-dyt prepare-data makes them)."
  done
  echo "$1"
}

make_flags() {
  local text
  text=$(alone -m megatron_dyt recipe "$MODEL" --norm "$NORM" --format flags) || exit
  read -r -a RECIPE <<<"$text"
  local cluster=(--model "$MODEL" --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE"
    --gpu-memory "${GPU_MEMORY:-80}" --gpu-flops "${GPU_FLOPS:-989}")
  # shellcheck disable=SC2206 # PLAN_FLAGS is a list of words.
  cluster+=(${PLAN_FLAGS:-})
  PLAN=$(alone -m megatron_dyt plan "${cluster[@]}") || exit
  text=$(alone -m megatron_dyt plan "${cluster[@]}" --format flags) || exit
  read -r -a LAYOUT <<<"$text"
}

# One precision and one kernel set for every size; TRANSFORMER_IMPL=local runs without Transformer Engine.
SPEED=(--transformer-impl "${TRANSFORMER_IMPL:-transformer_engine}" --attention-backend auto
  --no-create-attention-mask-in-dataloader)
[ "${PRECISION:-bf16}" = fp32 ] || SPEED+=(--bf16)
# Kernels that Transformer Engine and apex bring, and PyTorch's norm has not.
[ "${TRANSFORMER_IMPL:-}" != local ] || SPEED+=(--no-rope-fusion --no-masked-softmax-fusion --no-persist-layer-norm)

# Megatron's output layer adds its gradient up by an extension of apex, and refuses to be built without it.
# Looked for before torch is imported, which takes seconds.
set_fusion() {
  local extension=fused_weight_gradient_mlp_cuda
  alone -c "import importlib.util as util; assert util.find_spec('$extension'); import torch, $extension" 2>/dev/null ||
    SPEED+=(--no-gradient-accumulation-fusion)
}
# Of ten checkpoints one stays, beside the last two (--dyt-load-fallback). A damaged one is passed over.
# Megatron saves asynchronously with its own persistent writer only; mcore's needs no other package.
SAFETY=(--ckpt-format torch_dist --async-save --use-persistent-ckpt-worker --async-strategy mcore
  --save-interval "$SAVE_INTERVAL" --save-retain-interval "$((10 * SAVE_INTERVAL))"
  --dyt-load-fallback --exit-signal-handler --distributed-timeout-minutes 30)
LOGGING=(--log-interval 10 --eval-interval 500 --eval-iters 20 --log-throughput
  --tensorboard-dir "$OUT/tensorboard")
[ "$NORM" != DyT ] || LOGGING+=(--dyt-stats-interval 100)
if [ -n "${WANDB_PROJECT:-}" ]; then
  LOGGING+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "llama-$MODEL-$NORM" --wandb-save-dir "$OUT/wandb")
fi

set_data_flags() {
  # shellcheck disable=SC2206 # Blends are lists of words.
  DATA=(--train-data-path ${TRAIN_DATA:-none} --valid-data-path ${VALID_DATA:-none}
    --data-cache-path "$OUT/cache" --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "${TOKENIZER_MODEL:-none}")
  PLACES=(--save "$OUT/checkpoint" --load "$OUT/checkpoint")
}

try_flags() {
  local what
  if [ -n "$ALL_SET" ]; then
    what=(--files --tokenizer-model "$TOKENIZER_MODEL")
  else
    what=(--vocab-size "$(alone -c 'import sys; from megatron_dyt.recipes import load; print(load(sys.argv[1]).vocab_size)' "$MODEL")")
  fi
  alone -m megatron_dyt dry-run --nodes "$NODES" --gpus-per-node "$GPUS_PER_NODE" \
    "${what[@]}" -- "${TRAINING[@]}"
}

# Two runs in one OUT would clear away each other's saves. A requeued job finds its own number in the lock.
take_lock() {
  local lock=$OUT/lock own other turn=$OUT/lock.turn
  own="host $(hostname) $$"
  [ -z "${SLURM_JOB_ID:-}" ] || own="job $SLURM_JOB_ID"
  if ! (set -o noclobber && echo "$own" >"$lock") 2>/dev/null; then
    other=$(<"$lock")
    # shellcheck disable=SC2086 # A kind, and one or two words.
    [ "$other" = "$own" ] || ! may_run $other || refuse_lock "$other"
    # Of several that find it gone, one takes over at a time, and only from whom it asked about.
    mkdir "$turn" 2>/dev/null || refuse_lock "another start"
    [ "$(<"$lock")" != "$other" ] || echo "$own" >"$lock"
    rmdir "$turn"
    other=$(<"$lock")
    [ "$other" = "$own" ] || refuse_lock "$other"
  fi
  trap 'rm -f "$OUT/lock"' EXIT
}

refuse_lock() { # with who has it
  fail "$1 trains into $OUT (by $OUT/lock). Take another OUT, or end it first; if it is gone, remove that file and lock.turn beside it."
}

# Whether "job ID" or "host NAME PID" runs, or cannot be asked.
may_run() {
  if [ "$1" = job ]; then
    is_queued "$2"
  else
    [ "$2" != "$(hostname)" ] || kill -0 "$3" 2>/dev/null
  fi
}

# --- starting it ---------------------------------------------------------------------------------------

launch() {
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    launch_with_slurm
  elif [ "$NODES" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] ||
      fail "NODES=$NODES without Slurm needs NODE_RANK (0 to $((NODES - 1))) and MASTER_ADDR."
    launch_with_torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" \
      --master-port "$MASTER_PORT"
  else
    launch_with_torchrun --standalone
  fi
}

# torchrun, told to end, kills its processes after 30 s, which is too short for a checkpoint, and the torchruns of
# other nodes wait five minutes for one that ended so. So SIGTERM goes to its processes and not to torchrun: they
# save, end, and torchrun with them. In a session of its own it does not hear what a terminal, timeout or
# kill send to the whole group.
launch_with_torchrun() {
  setsid "$PY" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" "$@" \
    -m megatron_dyt.pretrain "${TRAINING[@]}" &
  local torchrun=$! code=0 told=''
  trap "say 'told to end: saving a checkpoint'; told=yes" TERM INT HUP
  # A signal ends the waiting, not torchrun, which may not have started its processes yet.
  while kill -0 "$torchrun" 2>/dev/null; do
    if [ -n "$told" ]; then
      if pkill -TERM -P "$torchrun"; then told=''; else sleep 1; fi
      continue
    fi
    wait "$torchrun" || true
  done
  wait "$torchrun" || code=$?
  trap - TERM INT HUP
  return "$code"
}

# --- and again -----------------------------------------------------------------------------------------

# The step of the last complete checkpoint.
saved_step() { cat "$OUT/checkpoint/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# Whether the checkpoint directory has the last step.
finished() {
  local word previous='' steps=0
  for word in "${TRAINING[@]}"; do
    [ "$previous" = --train-iters ] && steps=$word
    [[ $word = --train-iters=* ]] && steps=${word#*=}
    previous=$word
  done
  [ "$(saved_step)" -ge "$steps" ]
}

go_on() { # with the exit code
  local code=$1
  if finished; then
    rm -f "$OUT/vain-starts"
    say "finished: all steps are in $OUT/checkpoint"
    return
  fi
  [ "$code" -ne 2 ] || fail "the input is wrong (see above); not requeued."
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    requeue "exit code $code"
  else
    give_up 1 "stopped before the last step (exit code $code). Start it again to resume from the last complete checkpoint."
  fi
}

main() {
  note_leftovers
  set_cluster
  check_python
  check_settings
  make_flags
  set_fusion
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
  [ "${NODE_RANK:-0}" != 0 ] || take_lock
  touch "$OUT/started"
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    remove_leftovers
    check_stop
    check_time
  fi
  local code=0
  say "training into $OUT, from step $(saved_step)"
  launch || code=$?
  go_on "$code"
}
