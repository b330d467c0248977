# shellcheck shell=bash
# What the launch scripts do under Slurm; sourced by common.sh, whose settings and functions it uses.

read -r -a SRUN <<<"srun --kill-on-bad-exit=0 ${SRUN_FLAGS:-}"
SIGNAL_LEAD=${SIGNAL_LEAD:-600} # the scripts' --signal=TERM@600
SIGNAL_EARLY=60 # Slurm's may come a minute before it is due (man sbatch, --signal).

# Sets NODES and GPUS_PER_NODE, which must be the job's; a look (PLAN_ONLY) is free to ask for others.
set_cluster() {
  # What was asked for, as "8", "h100:4" or "a100:2,h100:2": with --exclusive SLURM_GPUS_ON_NODE counts all GPUs of
  # the node, of which a step still gets what was asked for.
  local words=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}} word gpus=0
  for word in ${words//,/ }; do
    word=${word##*:}
    [[ $word = [0-9]* ]] || word=1 # "h100" alone
    gpus=$((gpus + word))
  done
  if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${PLAN_ONLY:-}" ]; then
    [ "${NODES:-$SLURM_JOB_NUM_NODES}" = "$SLURM_JOB_NUM_NODES" ] ||
      fail "NODES=$NODES, and the job has $SLURM_JOB_NUM_NODES: give sbatch --nodes $NODES, or leave NODES out."
    [ "$gpus" = 0 ] || [ "${GPUS_PER_NODE:-$gpus}" = "$gpus" ] ||
      fail "GPUS_PER_NODE=$GPUS_PER_NODE, and the job asked for $gpus: give sbatch --gpus-per-node $GPUS_PER_NODE, or leave GPUS_PER_NODE out."
  fi
  [ "$gpus" != 0 ] || gpus=8
  NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}}
  GPUS_PER_NODE=${GPUS_PER_NODE:-$gpus}
}

# --- before the ranks start ----------------------------------------------------------------------------

# Slurm signals the steps of a job, and until the ranks start there is none: what came meanwhile is lost. So it is
# asked for once more, by the stop file and by the clock.

# When OUT/stop was made; nothing if it is not there.
stop_made() { stat -c %Y "$OUT/stop" 2>/dev/null || true; }

# The first start of a job owes nothing to those before it. What they left is known by its time, as a
# file of a job that runs is not ours to remove before the lock is.
note_leftovers() {
  OLD_STOP=
  [ -n "${SLURM_RESTART_COUNT:-}" ] || OLD_STOP=$(stop_made)
}

remove_leftovers() {
  [ -z "${SLURM_RESTART_COUNT:-}" ] || return 0
  rm -f "$OUT/vain-starts"
  [ -n "$OLD_STOP" ] && [ "$(stop_made)" = "$OLD_STOP" ] || return 0
  rm "$OUT/stop"
  say "removed $OUT/stop: it was there before this job started"
}

check_stop() {
  [ -e "$OUT/stop" ] || return 0
  rm "$OUT/stop"
  say "not started, as $OUT/stop asked; submitted again, it goes on from step $(saved_step)"
  exit 0
}

check_time() {
  local start end needed=$((SIGNAL_LEAD + SIGNAL_EARLY))
  read -r start end <<<"$(squeue -h -j "$SLURM_JOB_ID" -o '%S %e')"
  [[ $end = [0-9]* ]] || return 0 # There is no limit.
  start=$(date -d "$start" +%s) end=$(date -d "$end" +%s)
  [ $((end - start)) -gt "$needed" ] ||
    fail "--time of $(((end - start) / 60)) minutes leaves no time to train: Slurm's signal to save comes $SIGNAL_LEAD to $needed s before its end. Give sbatch a longer --time, or --signal=TERM@SECONDS for a shorter notice, with SIGNAL_LEAD=SECONDS."
  [ $((end - $(date +%s))) -gt "$needed" ] || requeue "no time is left to train"
}

# --- the ranks -----------------------------------------------------------------------------------------

# One task per GPU, without torchrun: Slurm's SIGTERM reaches the training processes themselves. When a task has
# ended, the others have two minutes to end as well. srun returns the highest exit code, which hides a 2 (wrong
# input) behind the 137 of those that waited in vain; so a file says that there was one.
launch_with_slurm() {
  local gpus=() code=0
  [ -z "${SLURM_GPUS_ON_NODE:-}" ] || gpus=(--gpus-per-node "$GPUS_PER_NODE")
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR
  rm -f "$OUT/wrong-input"
  # scancel tells this shell too, which must hold the lock until the ranks have saved.
  trap 'say "told to end: waiting for the ranks to save"' TERM
  # shellcheck disable=SC2016 # The variables are those of a task.
  "${SRUN[@]}" --ntasks "$((NODES * GPUS_PER_NODE))" --ntasks-per-node "$GPUS_PER_NODE" \
    ${gpus[@]+"${gpus[@]}"} --cpu-bind=none --wait 120 bash -c '
      wrong=$1 code=0
      shift
      export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
      trap : TERM # It is for the rank alone.
      "$@" || code=$?
      [ "$code" != 2 ] || touch "$wrong"
      exit "$code"' task "$OUT/wrong-input" \
    "$PY" -m megatron_dyt.pretrain "${TRAINING[@]}" || code=$?
  trap - TERM
  [ ! -e "$OUT/wrong-input" ] || code=2
  return "$code"
}

# --- and again -----------------------------------------------------------------------------------------

# Counts, in a file, the starts in a row that brought no new checkpoint. After a damaged one was passed over, its
# step is saved anew, so the files say it.
count_vain_start() {
  local file=$OUT/vain-starts count=0 last
  last=$OUT/checkpoint/$(printf 'iter_%07d' "$(saved_step)")/metadata.json
  if [ "$last" -nt "$OUT/started" ]; then
    rm -f "$file"
  else
    [ -f "$file" ] && count=$(<"$file")
    echo "$((count + 1))" >"$file"
  fi
}

# Ends this start of the job, for the reason given; another follows, if it may.
requeue() {
  local job
  if [ -e "$OUT/stop" ]; then
    rm "$OUT/stop"
    say "not requeued, as $OUT/stop asked; submitted again, it resumes from step $(saved_step)"
    exit 0
  fi
  job=$(scontrol show job "$SLURM_JOB_ID")
  [[ $job = *JobState=RUNNING* ]] ||
    give_up 1 "not finished ($1): Slurm is ending the job. Started again, it resumes from step $(saved_step)."
  [[ $job = *Requeue=1*BatchFlag=1* ]] ||
    give_up 1 "not finished ($1), and Slurm does not requeue this job. Submitted again, it resumes from step $(saved_step)."
  count_vain_start
  if [ -f "$OUT/vain-starts" ] && [ "$(<"$OUT/vain-starts")" -ge 3 ]; then
    rm -f "$OUT/vain-starts"
    give_up 1 "three starts in a row brought no new checkpoint ($1); not requeued."
  fi
  say "not finished ($1); requeued, it resumes from step $(saved_step)"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

# Whether a job is in the queue, or cannot be asked about.
is_queued() {
  local answer
  answer=$(squeue -h -j "$1" 2>&1) || true
  [[ -n $answer && $answer != *"Invalid job id"* ]]
}
