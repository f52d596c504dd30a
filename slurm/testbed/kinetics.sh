#!/usr/bin/env bash
# Pretraining and fine-tuning end to end on a Slurm cluster of five hosts made of this machine (root): made-up videos in the
# layouts of Kinetics-600 and UCF101, with the faults that real copies have, become shards; a recipe pretrains, another goes
# on from its best checkpoint, and that is scored. The commands are those of the datasets' guides, read from there, with
# `--set` for a network small enough to try: 32 pixels, 16 frames, the CPU, some tens of batches.
#
#   slurm/testbed/kinetics.sh [FOLDER]     everything made goes there (default runs/kinetics-walk); what is in it is replaced
#
# RECIPE=vgg8 (or resnet50) says which; BATCHES=N how long.
set -euo pipefail
cd "$(dirname "$0")/../.."
checkout=$PWD
program=$(realpath "${SIDEWAYS:-target/release/sideways}")
recipe=${RECIPE:-vgg8}
batches=${BATCHES:-40}
folder=${1:-runs/kinetics-walk}
testbed=$checkout/slurm/testbed/testbed.sh

# A folder to submit from, as a checkout is one.
rm -rf "$folder" && mkdir -p "$folder/target/release"
cd "$folder"
ln -s "$checkout/slurm" "$checkout/datasets" . && ln -s "$program" target/release/sideways
unset SIDEWAYS

# film PATH HUE [SECONDS]: a moving picture, coloured by its class.
film() {
  mkdir -p "$(dirname "$1")"
  ffmpeg -nostdin -v error -y -f lavfi -i "testsrc2=size=68x52:rate=25:duration=${3:-1.2},hue=h=$2" -pix_fmt yuv420p "$1"
}
# copies PATH…: the same film under more names.
copies() { local first=$1; shift; for path in "$@"; do mkdir -p "$(dirname "$path")"; cp "$first" "$path"; done; }
# clip SPLIT CLASS NUMBER: sets `id` to eleven characters, as YouTube's are (some begin with a dash).
clip() { printf -v id -- '-%d_%.1sid-%04d' "$2" "$1" "$3"; }

echo "== made-up videos: Kinetics-600's lists, four of the 600 classes there, one clip in some fifty"
labels=("passing American football (in game)" "passing american football (not in game)" "massaging person's head" "curling (sport)")
for n in $(seq 4 599); do labels+=("action $n (made up)"); done
mkdir -p kinetics/lists
for split in train val; do
  [ $split = train ] && { list=kinetics/lists/train.csv clips=12 shift=0; } || { list=kinetics/lists/validate.csv clips=4 shift=8; }
  {
    echo label,youtube_id,time_start,time_end,split
    for class in "${!labels[@]}"; do
      for n in 1 2 3; do clip $split 9 $((class * 3 + n)); echo "${labels[class]},$id,$n,$((n + 10)),$split"; done
    done
    for class in 0 1 2 3; do
      for n in $(seq $clips); do clip $split $class "$n"; echo "${labels[class]},$id,7,17,$split"; done
    done
  } >"$list"
  for class in 0 1 2 3; do
    paths=()
    for n in $(seq $clips); do clip $split $class "$n"; paths+=("kinetics/videos/$split/${id}_000007_000017.mp4"); done
    film "${paths[0]}" $((class * 90 + shift))
    copies "${paths[@]}"
  done
done
# What real copies have: files cut short, empty, no videos at all; clips too short; names without times, unfinished downloads,
# one video used at two times and listed twice, a folder of another spelling.
at=kinetics/videos/train times=000007_000017
clip train 0 1 && first=$at/${id}_$times.mp4
copies "$first" "$at/${id}_000107_000117.mp4"
for _ in 1 2; do echo "${labels[0]},$id,107,117,train" >>kinetics/lists/train.csv; done
clip train 0 2 && film "$at/${id}_$times.mp4" 0 0.2
clip train 0 3 && copies "$first" "$at/$id.mp4"
clip train 0 4 && copies "$first" "$at/${id}_$times.mp4.part"
clip train 0 5 && mkdir "$at/passing_American_football_(in_game)" && mv "$at/${id}_$times.mp4" "$at/passing_American_football_(in_game)/"
clip train 1 2 && head -c 3000 "$first" >"$at/${id}_$times.mp4"
clip train 2 2 && : >"$at/${id}_$times.mp4"
clip train 3 2 && echo "<html>Video unavailable</html>" >"$at/${id}_$times.mp4"

echo "== and UCF101's: three of the 101 classes there"
classes=(ApplyEyeMakeup HandstandPushups YoYo)
for n in $(seq 4 101); do classes+=("MadeUp$n"); done
mkdir -p ucf101/lists
for n in $(seq 101); do echo "$n ${classes[n - 1]}"; done >ucf101/lists/classInd.txt
for class in 0 1 2; do
  name=${classes[class]} paths=()
  for group in 01 02 03 04 05 06; do
    for clip in 01 02; do paths+=("ucf101/videos/$name/v_${name/stand/Stand}_g${group}_c$clip.avi"); done
  done
  film "${paths[0]}" $((class * 120))
  film "${paths[4]}" $((class * 120 + 8))
  copies "${paths[0]}" "${paths[@]:1:3}"
  copies "${paths[4]}" "${paths[@]:5}"
  for path in "${paths[@]}"; do
    line=$name/$(basename "$path")
    case $path in *_g0[12]_*) echo "$line" >>ucf101/lists/testlist01.txt ;; *) echo "$line $((class + 1))" >>ucf101/lists/trainlist01.txt ;; esac
  done
done
for n in $(seq 4 101); do
  echo "MadeUp$n/v_MadeUp${n}_g08_c01.avi $n" >>ucf101/lists/trainlist01.txt
  echo "MadeUp$n/v_MadeUp${n}_g01_c01.avi" >>ucf101/lists/testlist01.txt
done
head -c 2000 ucf101/videos/YoYo/v_YoYo_g03_c01.avi >ucf101/cut && mv ucf101/cut ucf101/videos/YoYo/v_YoYo_g03_c01.avi

# said GUIDE WORDS: the first command in a dataset's guide with these words.
said() { grep -m 1 -E "^    .*$2" "datasets/$1/README.md" | sed 's/^    //'; }
# submit OPTIONS… SCRIPT…: a batch job, to its end; its log is job-N.log.
job=0
submit() {
  local number state=PENDING
  job=$((job + 1))
  echo "\$ sbatch $*"
  number=$("$testbed" run sbatch --parsable --output="job-$job.log" --export=ALL,NODE_WAIT=20 "$@")
  until [ "$state" = COMPLETED ]; do
    sleep 0.5
    state=$("$testbed" run squeue -h -t all -j "$number" -o %T)
    case $state in PENDING | CONFIGURING | RUNNING | COMPLETING | COMPLETED) continue ;; esac
    tail -n 30 "job-$job.log" >&2
    echo "kinetics.sh: this job is $state; its log: $PWD/job-$job.log" >&2
    exit 1
  done
}
# prepare DATASET FOLDER: the guide's `sideways data prepare`, as a batch job of two hosts.
prepare() {
  local command
  command=$(said "$1" 'sideways data prepare ' | sed "s/^sideways data prepare //; s|VIDEOS|$2/videos|; s|ANNOTATIONS|$2/lists|")
  submit --nodes=2 --cpus-per-task=1 slurm/prepare.sbatch $command --short-side 36
  grep -vE '^(==|[0-9]+\/)' "job-$job.log"
}
small=(run.device=cpu run.precision=f32 data.crop=32 data.frames=16 data.batch=4 data.decode_threads=1 data.crop_scale=[0.8,1]
  "train.batches=$batches" "train.validate_every=$((batches / 2))" "train.lr_schedule={ kind = 'constant' }" train.clip_norm=1.0
  "train.optimizer={ kind = 'sgd', lr = 0.05, momentum = 0.9 }" train.scale_lr=4)
# train DATASET RECIPE: the guide's job, a module a rank, on hosts without GPUs.
train() {
  local command sets=()
  command=$(said "$1" "sbatch .*/$2" | sed -E 's/^sbatch //; s/--gpus-per-node=[0-9]+ //; s/--cpus-per-task=[0-9]+/--cpus-per-task=1/')
  for set in "${small[@]}"; do sets+=(--set "$set"); done
  submit $command "${sets[@]}"
  grep -E 'validation after|done' "job-$job.log" || true
}

# One that is up already stays up.
"$testbed" status >/dev/null 2>&1 || trap '"$testbed" down' EXIT
"$testbed" up 5
prepare kinetics600 kinetics
train kinetics600 "pretrain-$recipe.toml"
prepare ucf101 ucf101
train ucf101 "finetune-$recipe.toml"
evaluate=$(said ucf101 'slurm/eval.sbatch ' | sed -E "s/^sbatch //; s/--gpus-per-node=[0-9]+ //; s/ucf101-[a-z0-9]+/ucf101-$recipe/")
submit $evaluate
grep -v '^batch' "job-$job.log"
