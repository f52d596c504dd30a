#!/usr/bin/env bash
# Makes the shards of three folds by person from Weizmann's videos: data/weizmann-1 to -3, each with splits train and test.
#
#   datasets/weizmann/prepare.sh VIDEOS      with VIDEOS/ACTION/PERSON_ACTION.avi
set -euo pipefail
videos=$(realpath "${1:?the folder of videos}")
cd "$(dirname "$0")/../.."
n=0
while read -r persons; do
  n=$((n + 1))
  links=$(mktemp -d)
  for video in "$videos"/*/*.avi; do
    action=$(basename "$(dirname "$video")")
    person=$(basename "$video" .avi)
    split=train
    [[ " $persons " == *" ${person%%_*} "* ]] && split=test
    mkdir -p "$links/$split/$action"
    ln -s "$video" "$links/$split/$action/"
  done
  target/release/sideways data prepare --dataset datasets/folders --name weizmann --videos "$links" --out "data/weizmann-$n" \
    --split train,test --short-side "${SIDE:-48}" --aspect 5:4
  rm -r "$links"
done <datasets/weizmann/folds.txt
