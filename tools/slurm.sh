#!/bin/bash
# `lit-eemllm fit` on one or many machines, under Slurm or by torchrun. Its Python is
# $PYTHON, else that of .venv in the current folder, else python3.
#
#   sbatch --nodes=2 --gpus-per-node=8 tools/slurm.sh CONFIG... [KEY=VALUE...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 tools/slurm.sh CONFIG... [KEY=VALUE...]      # on each machine, NODE_RANK=0, 1
#   tools/slurm.sh CONFIG... [KEY=VALUE...]                                             # all devices of this machine
#
# Processes per machine: its GPUs, or PER_NODE. `out` must be a folder that all machines see.
#SBATCH --job-name=lit-eemllm
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: $0 CONFIG... [KEY=VALUE...]" >&2
  exit 2
fi
export PYTHONSAFEPATH=1 # what lies in the current folder is not taken for a library (Python 3.11 and newer)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

if [ -n "${SLURM_JOB_ID:-}" ]; then # one task per device; Lightning reads rank and address from Slurm
  per_node=${PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
  nodes=$SLURM_NNODES
  launch=(srun --nodes="$nodes" --ntasks-per-node="$per_node" --kill-on-bad-exit=1 "$python" -m)
else
  per_node=${PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
  nodes=${NNODES:-1}
  launch=("$python" -m torch.distributed.run --nproc-per-node="$per_node")
  if [ "$nodes" -gt 1 ]; then
    launch+=(--nnodes="$nodes" --node-rank="${NODE_RANK:?which of the machines is this: 0, 1, ...}")
    launch+=(--master-addr="${MASTER_ADDR:?name of machine 0}" --master-port="${MASTER_PORT:-29500}")
  else
    launch+=(--standalone)
  fi
  launch+=(-m)
fi
exec "${launch[@]}" lit_eemllm fit "$@" trainer.devices="$per_node" trainer.num_nodes="$nodes"
