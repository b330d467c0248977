#!/usr/bin/env bash
#SBATCH --job-name=llama-350m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
# LLaMA 350m: see common.sh beside this file for how to start it and what can be set.
MODEL=350m # read by common.sh
here=$(dirname "${BASH_SOURCE[0]}")
# Slurm runs a copy of this file from a directory of its own, and knows where it was submitted from.
if [ ! -f "$here/common.sh" ]; then
  here=$(scontrol show job "${SLURM_JOB_ID:-}" | sed -n 's/^ *Command=//p') # with its arguments
  here=${here%%"/$MODEL.sh"*}
  # sbatch <350m.sh has no command; it works from the root of the checkout.
  [ -f "$here/common.sh" ] || here=$SLURM_SUBMIT_DIR/examples/llama
fi
# shellcheck source=examples/llama/common.sh
. "$here/common.sh" || exit 2
main "$@"
