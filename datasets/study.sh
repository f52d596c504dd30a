#!/usr/bin/env bash
# Trains a list of runs, those that are not done yet, scores each on its test clips, and prints a table: mean, standard deviation
# and the worst over seeds. Interrupted, the same command goes on: a training from its last checkpoint.
#
#   datasets/study.sh FOLDER <LIST        a line of LIST: NAME SEED CONFIG [SECTION.KEY=VALUE ...]
#
# JOBS=N trainings at a time (default: one a core), each in one process and on one core, from core CORE (default 0) on; ONLY=PATTERN
# takes the lines that match; VIEWS=CLIPSxCROPS scores by so many views, and writes every clip's scores to RUN/scores.csv.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"

one() {
  local name=$1 seed=$2 config=$3 run sets=() pin=(taskset -c "$((${CORE:-0} + SLOT))") scores=()
  shift 3
  "${pin[@]}" true 2>/dev/null || pin=()
  run="$out/$name-$seed"
  [ -e "$run/eval.json" ] && return
  for set in "$@"; do sets+=(--set "$set"); done
  "${pin[@]}" target/release/sideways train "$config" --set "run.dir=$run" --set "train.seed=$seed" "${sets[@]}" 2>"$run.log" ||
    { tail -n 3 "$run.log" >&2; return 1; }
  [ -n "${VIEWS:-}" ] && scores=(--views "$VIEWS" --scores "$run/scores.csv")
  "${pin[@]}" target/release/sideways eval "$run" --json "${scores[@]}" 2>>"$run.log" >"$run/eval.part" && mv "$run/eval.part" "$run/eval.json"
}
export -f one
export out

{ grep -E "${ONLY:-.}" || true; } | sed "s/[[:blank:]]*$//" | xargs -r --process-slot-var=SLOT -P "${JOBS:-$(nproc)}" -L 1 bash -c 'one "$@"' _ && failed=0 || failed=1

printf '%-28s %5s %10s %8s %10s\n' run seeds mean +- worst
for name in $(ls "$out"/*/eval.json 2>/dev/null | sed -E 's|.*/([^/]*)-[0-9]+/eval.json|\1|' | sort -u); do
  cat "$out/$name"-[0-9]*/eval.json | awk -v name="$name" "$(cat datasets/field.awk)"'
    { x = field("mse"); mse = x != ""; if (!mse) x = 100 * field("top1"); n++; s += x; q += x * x
      if (n == 1 || (mse ? x > worst : x < worst)) worst = x }
    END { d = n > 1 ? (q - s * s / n) / (n - 1) : 0; d = d > 0 ? sqrt(d) : 0
      format = mse ? "%-28s %5d %10.5f %8.5f %10.5f   MSE\n" : "%-28s %5d %10.1f %8.1f %10.1f   %% top-1\n"
      printf format, name, n, s / n, d, worst }'
done
if [ "$failed" = 1 ]; then
  echo "some runs failed, and are not in the table: see $out/*.log" >&2
  exit 1
fi
