#!/usr/bin/env bash
# What `make cluster-demo` runs: a Slurm cluster of five hosts on this machine, a training job submitted to it that is told
# to stop, loses a host and goes on each time, and its evaluation, as a second job. BATCHES=N (formerly CLIPS) sets the length.
set -euo pipefail
cd "$(dirname "$0")/../.."
testbed=slurm/testbed/testbed.sh
run=runs/cluster-demo

[ -e data/motion/train-00000.h5 ] ||
  target/release/sideways data synth --out data/motion --videos 4096 --test-videos 800 --frames 12 --shapes 8 --radius 12 --speed 1 --noise 0 --grey

trap '$testbed down' EXIT
$testbed up 5
$testbed status
rm -rf "$run" && mkdir -p "$run"

submit() { $testbed run sbatch --parsable --output="$run/%x.log" --export=ALL,NODE_WAIT=40 "$@"; }
state() { $testbed run squeue -h -t all -j "$1" -o %T; }
batches() { { wc -l <"$run/metrics.jsonl"; } 2>/dev/null || echo 0; }
# wait_until COMMAND…: waits while the job lives.
wait_until() {
  until "$@"; do
    case $(state "$job") in FAILED | CANCELLED | TIMEOUT) tail -n 30 "$run"/*.log; exit 1 ;; esac
    sleep 1
  done
}
past() { [ "$(batches)" -ge "$1" ]; }
restarted() { grep -q "restart $1\$" "$run/sideways.log"; }
ended() { [ "$(state "$1")" = COMPLETED ]; }

job=$(submit --nodes=3 --ntasks-per-node=2 slurm/train.sbatch datasets/motion/demo.toml --set "run.dir=$run" \
  --set "train.batches=${BATCHES:-${CLIPS:-200}}" --set run.checkpoint_every=25 --set run.timeout=15)
echo "== job $job: six modules on six ranks of three hosts"
wait_until past 30
echo "== SIGUSR1, as before a time limit: a checkpoint, and the job requeues itself"
$testbed run scancel --signal=USR1 "$job"
wait_until restarted 1
wait_until past 80
node=$($testbed run squeue -h -j "$job" -o %N | sed 's/[^0-9].*[,-]//; s/[^0-9]//g')
echo "== host n$node dies"
$testbed kill-node "$node"
wait_until restarted 2
echo "== the job runs on other hosts"
wait_until ended "$job"
job=$(submit --ntasks=6 --nodes=3 slurm/eval.sbatch "$run")
wait_until ended "$job"
grep -E '^(==|done)' "$run/sideways.log"
cat "$run/sideways-eval.log"
