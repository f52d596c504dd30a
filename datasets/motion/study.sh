#!/usr/bin/env bash
# Test top-1 of sideways, skip-sideways and exact back-propagation on the demo's data and network, seeds 1 to 3, each
# run in one process: about 12 minutes on 2 cores. Needs data/motion (`make demo` makes it). SEEDS="1 2" takes others.
set -euo pipefail
cd "$(dirname "$0")/../.."
sideways=target/release/sideways
mkdir -p runs/study
printf '%-16s %6s %12s\n' rule seed 'test top-1'
for rule in sideways skip-sideways bp; do
  skips=()
  [ "$rule" = sideways ] && skips=(--set 'model.skip={}')
  for seed in ${SEEDS:-1 2 3}; do
    run="runs/study/$rule-$seed"
    rm -rf "$run"
    "$sideways" train datasets/motion/demo.toml --set "train.rule=$rule" --set "train.seed=$seed" \
      --set "run.dir=$run" "${skips[@]}" 2>"$run.err" || { cat "$run.err" >&2; exit 1; }
    "$sideways" eval "$run" --json 2>/dev/null |
      sed -E 's/.*"top1":([0-9.eE+-]+).*/\1/' | awk -v r="$rule" -v s="$seed" '{ printf "%-16s %6d %10.1f %%\n", r, s, 100 * $1 }'
  done
done
