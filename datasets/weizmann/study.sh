#!/usr/bin/env bash
# Every rule on the three folds (README.md has the tables), then the accuracy of each class over all folds and seeds. Resumable;
# SEEDS="1 2 3", FOLDS="1 2 3", JOBS=N at a time (datasets/study.sh). Needs data/weizmann-1 to -3 (`prepare.sh`). A fold's runs
# are called RULE-SEEDFOLD.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=datasets/weizmann/study.toml
out=runs/study/weizmann
for seed in ${SEEDS:-1 2 3}; do
  for fold in ${FOLDS:-1 2 3}; do
    data="data.train=data/weizmann-$fold/train-*.h5 data.test=data/weizmann-$fold/test-*.h5"
    run="$seed$fold $config $data"
    echo "bp $run train.rule=bp"
    echo "stash $run train.stash=activations"
    echo "stash-aligned $run train.stash=activations model.skip.delay=aligned"
    echo "single $run train.rule=bp data.frames=1 model.skip.delay=aligned train.epochs=320"
    echo "frozen $run train.stash=activations train.freeze=[1,2,3,4]"
    echo "fresh $run"
    echo "sideways $run train.rule=sideways model.skip={}"
  done
done | VIEWS=${VIEWS:-5x3} datasets/study.sh "$out" && failed=0 || failed=1

echo
for name in $(ls "$out"/*/scores.csv | sed -E 's|.*/([^/]*)-[0-9]+/scores.csv|\1|' | sort -u); do
  cat "$out/$name"-[0-9]*/scores.csv | awk -F, -v name="$name" '
    $1 == "video" { for (i = 4; i <= NF; i++) { gsub(/"/, "", $i); class[i - 4] = $i }; classes = NF - 3; next }
    { videos[$2]++; correct[$2] += $2 == $3; n++; all += $2 == $3 }
    END { printf "%-14s %6.1f %%, by class:", name, 100 * all / n
      for (c = 0; c < classes; c++) printf " %s %.0f", class[c], videos[c] ? 100 * correct[c] / videos[c] : 0
      print "" }'
done
exit "$failed"
