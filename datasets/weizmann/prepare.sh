#!/usr/bin/env bash
# Makes the shards of three folds by person from Weizmann's videos: data/weizmann-1 to -3, each with splits train and test.
# Frames are what differs from the video's background, on mid-grey; the background is each pixel's median over the video (README.md
# says why). BACKGROUND=keep leaves videos as they are; SIDE=48 is the frames' height; DATA=data/weizmann what the folders' names
# begin with.
#
#   datasets/weizmann/prepare.sh VIDEOS      with VIDEOS/ACTION/PERSON_ACTION.avi
set -euo pipefail
videos=$(realpath "${1:?the folder of videos}")
cd "$(dirname "$0")/../.."
side=${SIDE:-48} data=${DATA:-data/weizmann}
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

without_background() {
  local frames half scale="scale=$((side * 5 / 4)):$side,format=gbrp"
  frames=$(ffprobe -v error -select_streams v -count_packets -show_entries stream=nb_read_packets -of csv=p=0 "$1")
  # Of an even number of frames, all but the last.
  half=$(((${frames%%,*} - 1) / 2))
  ffmpeg -nostdin -y -v error -i "$1" -vf "$scale,tmedian=radius=$half" -frames:v 1 "$work/background.png"
  ffmpeg -nostdin -y -v error -i "$1" -i "$work/background.png" -c:v ffv1 -filter_complex \
    "[0]${scale}[a];[1]format=gbrp[b];[a][b]blend=all_expr='clip(128+A-B,0,255)'" "$2"
}

for video in "$videos"/*/*.avi; do
  made=$work/videos/${video#"$videos"/}
  mkdir -p "$(dirname "$made")"
  if [ "${BACKGROUND:-}" = keep ]; then ln -s "$video" "$made"; else without_background "$video" "$made"; fi
done
n=0
while read -r persons; do
  n=$((n + 1))
  for video in "$work"/videos/*/*.avi; do
    action=$(basename "$(dirname "$video")")
    person=$(basename "$video" .avi)
    split=train
    [[ " $persons " == *" ${person%%_*} "* ]] && split=test
    mkdir -p "$work/$n/$split/$action"
    ln -s "$video" "$work/$n/$split/$action/"
  done
  target/release/sideways data prepare --dataset datasets/folders --name weizmann --videos "$work/$n" --out "$data-$n" \
    --split train,test --short-side "$side" --aspect 5:4
done <datasets/weizmann/folds.txt
