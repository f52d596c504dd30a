#!/usr/bin/env bash
# What `make demo` runs: a motion dataset, the same network with and without skips, and with cotangents that meet their own
# activations, under mpirun, and a table. BATCHES=N (formerly CLIPS) shortens or lengthens the runs; RANKS=N uses fewer
# processes (each then runs several modules).
set -euo pipefail
cd "$(dirname "$0")/../.."
sideways=target/release/sideways
config=datasets/motion/study.toml
extra=(--set "train.batches=${BATCHES:-${CLIPS:-512}}")

[ -e data/motion-colour/train-00000.h5 ] ||
  "$sideways" data synth --out data/motion-colour --videos 4096 --test-videos 800 --frames 16 --speed 1 \
    --shapes 8 --radius 12 --noise 0

rm -rf runs/demo
rules=(sideways skip-sideways skip-sideways+stash)
for rule in "${rules[@]}"; do
  case $rule in
    sideways) sets=(--set 'model.skip={}') ;;
    *+stash) sets=(--set train.stash=activations) ;;
    *) sets=() ;;
  esac
  echo "== training with $rule, one module a rank"
  mpirun --bind-to none -n "${RANKS:-6}" "$sideways" train "$config" \
    --set "train.rule=${rule%+*}" --set "run.dir=runs/demo/$rule" "${sets[@]}" "${extra[@]}"
  "$sideways" eval "runs/demo/$rule" --json >"runs/demo/$rule/eval.json"
done

printf '\n%-20s %12s %12s %12s\n' rule 'test top-1' 'test loss' clips
for rule in "${rules[@]}"; do
  field() { sed -E "s/.*\"$1\":([0-9.eE+-]+).*/\1/" "runs/demo/$rule/eval.json"; }
  awk -v rule="$rule" -v top1="$(field top1)" -v loss="$(field loss)" -v clips="$(field clips)" \
    'BEGIN { printf "%-20s %10.1f %% %12.4f %12d\n", rule, 100 * top1, loss, clips }'
done
echo 'Chance is 12.5 %. Without skips no module sees motion. Fresh pseudo-gradients do not teach the lower modules. With stash each'
echo 'cotangent meets the activations it belongs to, and they learn.'
