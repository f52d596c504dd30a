#!/usr/bin/env bash
# Every rule on the three folds (README.md has the table). Resumable; SEEDS="1 2 3", FOLDS="1 2 3", JOBS=N at a time
# (datasets/study.sh). Needs data/weizmann-1 to -3 (`prepare.sh`). A fold's runs are called RULE-SEEDFOLD.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=datasets/weizmann/study.toml
for seed in ${SEEDS:-1 2 3}; do
  for fold in ${FOLDS:-1 2 3}; do
    data="data.train=data/weizmann-$fold/train-*.h5 data.test=data/weizmann-$fold/test-*.h5"
    run="$seed$fold $config $data"
    echo "bp $run train.rule=bp"
    echo "stash $run train.stash=activations"
    echo "stash-aligned $run train.stash=activations model.skip.delay=aligned"
    echo "frozen $run train.stash=activations train.freeze=[1,2,3,4]"
    echo "fresh $run"
    echo "sideways $run train.rule=sideways model.skip={}"
  done
done | datasets/study.sh runs/study/weizmann
