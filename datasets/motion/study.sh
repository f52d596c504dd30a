#!/usr/bin/env bash
# What learns, and by which rule (README.md here has the tables). A part by its name, each resumable:
#
#   datasets/motion/study.sh defaults   demo.toml with default settings, 8 seeds, and with twice the batches
#   datasets/motion/study.sh modules    study.toml: coloured shapes, twelve units in 6 modules, all rules
#   datasets/motion/study.sh depth      12 modules of one unit, and 16, on longer clips
#   datasets/motion/study.sh rates      6 modules at half of the motion from frame to frame, 12 at a quarter of it
#   datasets/motion/study.sh time       batches, and ticks of a pipeline, until 95 % of the test clips are told, by rule
#   datasets/motion/study.sh frames     frames.toml: future frames; the copy's MSE is `copy_mse` in runs/study/frames/*/eval.json
#
# COLOUR="--shapes 6 ..." makes other data (in an empty data/motion-colour). SEEDS="1 2 3", JOBS=N at a time, ONLY=PATTERN (datasets/study.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
here=datasets/motion
part=${1:?one of defaults, modules, depth, rates, time, frames}

synth() { # FOLDER FRAMES SPEED
  [ -e "$1/train-00000.h5" ] ||
    target/release/sideways data synth --out "$1" --videos 4096 --test-videos 800 --frames "$2" --speed "$3" $COLOUR >&2
}
EASY="--shapes 8 --radius 12 --noise 0 --grey"
COLOUR=${COLOUR:-"--shapes 8 --radius 12 --noise 0"}

# NAME SEED CONFIG SETS..., for every rule on the same network; FROZEN: the modules that keep their initial weights.
rules() { # PREFIX CONFIG FROZEN SETS...
  local prefix=$1 config=$2 frozen=$3
  shift 3
  for seed in ${SEEDS:-1 2 3}; do
    echo "$prefix-stash $seed $config train.stash=activations $*"
    echo "$prefix-bp $seed $config train.rule=bp $*"
    echo "$prefix-frozen $seed $config train.stash=activations train.freeze=$frozen $*"
    echo "$prefix-fresh $seed $config $*"
    echo "$prefix-stash-aligned $seed $config train.stash=activations model.skip.delay=aligned $*"
    echo "$prefix-sideways $seed $config $* train.rule=sideways model.skip={}"
  done
}

# NAME CONFIG SETS...: until validation comes to 95 %. The exact pipelines compute what 1f1b does, to rounding.
until_learnt() {
  local prefix=$1 config=$2
  shift 2
  for seed in ${SEEDS:-1 2 3}; do
    for rule in fresh stash 1f1b gpipe; do
      case $rule in
        fresh) sets="" ;;
        stash) sets="train.stash=activations" ;;
        *) sets="train.rule=$rule" ;;
      esac
      echo "$prefix-$rule $seed $config train.validate_every=16 train.until={top1=0.95} $*${sets:+ $sets}"
    done
  done
}

# A line a run of `time`: batches until the first validation of 95 %, and ticks: T a batch, by the exact pipelines T + D - 1.
learnt() {
  printf '%-24s %8s %8s\n' run batches ticks
  for run in runs/study/time/*/metrics.jsonl; do
    awk -v run="$(basename "$(dirname "$run")")" "$(cat datasets/field.awk)"'
      /"kind":"validation"/ && field("top1") >= 0.95 { found = field("batches"); exit }
      END {
        split(run, part, "-")  # DATA-T-D-RULE-SEED
        frames = part[2] + (part[4] == "1f1b" || part[4] == "gpipe" ? part[3] - 1 : 0)
        if (found) printf "%-24s %8d %8d\n", run, found, found * frames
        else printf "%-24s %8s %8s\n", run, "-", "-"
      }' "$run"
  done
}

on() { echo "data.train=$1/train-*.h5 data.test=$1/test-*.h5"; }

case $part in
defaults)
  COLOUR=$EASY synth data/motion 12 1
  for seed in ${SEEDS:-1 2 3 4 5 6 7 8}; do
    echo "demo $seed $here/demo.toml $(on data/motion)"
    echo "demo-twice $seed $here/demo.toml $(on data/motion) train.batches=1024"
  done
  ;;
modules)
  synth data/motion-colour 16 1
  rules 6 $here/study.toml '[1,2,3,4]' "$(on data/motion-colour)"
  ;;
depth)
  synth data/motion-colour-long 32 1
  synth data/motion-colour-longer 40 1
  rules 12 $here/study-12.toml '[1,2,3,4,5,6,7,8]' "$(on data/motion-colour-long)"
  rules 16 $here/study-16.toml '[1,2,3,4,5,6,7,8,9,10,11,12,13]' "$(on data/motion-colour-longer)"
  ;;
rates)
  # Skips that reach about as many pixels ahead as spans 2 and 3 do at a pixel a frame.
  synth data/motion-colour-0.5 16 0.5
  rules 6-speed-0.5 $here/study.toml '[1,2,3,4]' "$(on data/motion-colour-0.5)" model.skip.spans=[3,5]
  synth data/motion-colour-long-0.25 32 0.25
  rules 12-speed-0.25 $here/study-12.toml '[1,2,3,4,5,6,7,8]' "$(on data/motion-colour-long-0.25)" model.skip.spans=[5,9]
  ;;
time)
  COLOUR=$EASY
  synth data/motion 12 1
  synth data/motion-long 32 1
  eight=model.cuts=[3,6,9,12,15,18,21]
  until_learnt easy-12-6 $here/demo.toml "$(on data/motion)"
  until_learnt easy-12-8 $here/demo.toml "$(on data/motion)" $eight
  until_learnt easy-32-6 $here/demo.toml "$(on data/motion-long)" data.frames=32
  until_learnt easy-32-8 $here/demo.toml "$(on data/motion-long)" data.frames=32 $eight
  ;;
frames)
  COLOUR=$EASY synth data/motion 12 1
  for seed in ${SEEDS:-1 2 3}; do
    for rule in sideways fresh stash bp; do
      case $rule in
        sideways) sets="train.rule=sideways model.skip={}" ;;
        fresh) sets="" ;;
        stash) sets="train.stash=activations" ;;
        bp) sets="train.rule=bp" ;;
      esac
      echo "$rule $seed $here/frames.toml $(on data/motion)${sets:+ $sets}"
    done
  done
  ;;
*)
  echo "unknown part $part: defaults, modules, depth, rates, time or frames" >&2
  exit 2
  ;;
esac | datasets/study.sh "runs/study/$part"
[ "$part" != time ] || learnt
