#!/usr/bin/env bash
# What `make demo` runs: a motion dataset, the same network with and without skips under mpirun, and a table.
# BATCHES=N (formerly CLIPS) shortens or lengthens both runs; RANKS=N uses fewer processes (each then runs several modules).
set -euo pipefail
cd "$(dirname "$0")/../.."
sideways=target/release/sideways
config=datasets/motion/demo.toml
extra=()
BATCHES=${BATCHES:-${CLIPS:-}}
[ -n "$BATCHES" ] && extra=(--set "train.batches=$BATCHES")

[ -e data/motion/train-00000.h5 ] ||
  "$sideways" data synth --out data/motion --videos 4096 --test-videos 800 --frames 12 --shapes 8 --radius 12 --speed 1 --noise 0 --grey

rm -rf runs/demo
for rule in sideways skip-sideways; do
  skips=()
  [ "$rule" = sideways ] && skips=(--set 'model.skip={}')
  echo "== training with $rule, one module a rank"
  mpirun --bind-to none -n "${RANKS:-6}" "$sideways" train "$config" \
    --set "train.rule=$rule" --set "run.dir=runs/demo/$rule" "${skips[@]}" "${extra[@]}"
  "$sideways" eval "runs/demo/$rule" --json >"runs/demo/$rule/eval.json"
done

printf '\n%-16s %12s %12s %12s\n' rule 'test top-1' 'test loss' clips
for rule in sideways skip-sideways; do
  field() { sed -E "s/.*\"$1\":([0-9.eE+-]+).*/\1/" "runs/demo/$rule/eval.json"; }
  awk -v rule="$rule" -v top1="$(field top1)" -v loss="$(field loss)" -v clips="$(field clips)" \
    'BEGIN { printf "%-16s %10.1f %% %12.4f %12d\n", rule, 100 * top1, loss, clips }'
done
echo 'chance is 12.5 %: a network that sees one frame at a time cannot beat it'
