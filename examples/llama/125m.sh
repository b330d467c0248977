#!/usr/bin/env bash
#SBATCH --job-name=llama-125m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
# LLaMA 125m: see common.sh beside this file for how to start it and what can be set.
MODEL=125m # read by common.sh
here=$(dirname "${BASH_SOURCE[0]}")
# Slurm runs a copy of this file from a directory of its own; it is submitted from the top of the checkout.
[ -f "$here/common.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/examples/llama
# shellcheck source=examples/llama/common.sh
. "$here/common.sh"
main "$@"
