#!/usr/bin/env bash
# sbatch --nodes N configs/slurm.sh CONFIG [key=value ...]: one torchrun a node, 8 ranks each. See docs/running.md.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
set -euo pipefail
grace=840  # seconds that torchrun leaves the ranks for a checkpoint; give the run checkpoint.grace_seconds as long
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE / 8))}"  # else torchrun sets it to 1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarted ranks meet in a new store, not in that of the ended ones
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "$grace" \
  --log-dir "${LOG_DIR:-logs}/$SLURM_JOB_ID" --tee 3 \
  r1engine/train.py "$@" &
run=$! warned='' status=0
# Slurm warns this script before the time limit: the ranks save, and the job goes to the queue again.
trap 'warned=1; scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do  # the signal has ended the wait
  status=0
  wait "$run" || status=$?
done
if [[ $warned && $status -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
