#!/usr/bin/env bash
# Queues one training as several jobs, each waiting for the one before: for sites that do not let jobs requeue themselves,
# or where a long run should stand in the queue in advance.
#
#   slurm/chain.sh JOBS [SBATCH OPTIONS --] CONFIG [OPTIONS OF sideways train]
#   slurm/chain.sh 5 --nodes=4 --time=12:00:00 -- config.toml
#
# Each job goes on from the checkpoint of the one before. A job that finds nothing left to do ends at once with exit code 0,
# so too many jobs do no harm (a dependency `afterany`: a job that failed is tried again by the next).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^$/p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
jobs=$1; shift
options=()
if [[ " $* " == *" -- "* ]]; then
  while [ "$1" != "--" ]; do options+=("$1"); shift; done
  shift
fi
here=$(dirname "${BASH_SOURCE[0]}")
before=
for n in $(seq "$jobs"); do
  # MAX_REQUEUES=0: the next job of the chain goes on, not this one.
  job=$(MAX_REQUEUES=0 sbatch --parsable --no-requeue --export=ALL,CHAIN=$n \
    ${before:+--dependency=afterany:$before} "${options[@]}" "$here/train.sbatch" "$@")
  echo "job $n of $jobs: $job${before:+ (after $before)}"
  before=$job
done
