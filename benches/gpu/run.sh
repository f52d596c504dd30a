#!/usr/bin/env bash
# run.sh test|bench [NAME...]: runs what bundle.sh has packed, on a machine with a GPU, and ends with one table. Exit status 0
# if all of it worked, 1 if something failed, 2 if something is missing here.
#   SIDEWAYS_GPU=emulator  on the emulator of CUDA's libraries instead, small: a rehearsal
#   SIDEWAYS_PYTHON        a Python, for PyTorch and for CUDA's libraries among its packages [python3]
#   SIDEWAYS_CUDA          folders of CUDA's libraries (nvrtc, cuDNN 9), separated by colons, in front of all others
#   SIDEWAYS_SECONDS       time for the comparison with PyTorch [240]
set -uo pipefail
cd "$(dirname "$0")/../.."
what=${1:-}
case $what in test | bench) shift ;; *) sed -n '2,8s/^# //p' "$0" >&2; exit 2 ;; esac
only=" $* "
emulated=$([ "${SIDEWAYS_GPU:-}" = emulator ] && echo 1)
bundle=target/gpu/bundle.tar.xz
logs=target/gpu/logs
python=${SIDEWAYS_PYTHON:-python3}
[ -f "$bundle" ] || { echo "run.sh: $bundle is not there: run benches/gpu/bundle.sh where the program is built" >&2; exit 2; }

# What was packed, once.
tree=${TMPDIR:-/tmp}/sideways-gpu-$(cksum < "$bundle" | tr ' ' -)
if [ ! -d "$tree" ]; then
    rm -rf "$tree.new" && mkdir -p "$tree.new"
    tar -C "$tree.new" -xJf "$bundle" 2>/dev/null || "$python" -m tarfile -e "$bundle" "$tree.new" || exit 2
    mv "$tree.new" "$tree"
fi
rm -rf "$logs" && mkdir -p "$logs"

# CUDA's libraries: given ones, those that PyTorch or nvidia-* packages brought along, so that both sides have the same, the system's.
folders() {
    printf '%s\n' "${SIDEWAYS_CUDA:-}" "${LD_LIBRARY_PATH:-}" | tr ':' '\n'
    "$python" -c 'import glob, site, sys
for path in dict.fromkeys(sys.path + site.getsitepackages()):
    if path: print(*glob.glob(path + "/nvidia/*/lib"), sep="\n")' 2>/dev/null
    printf '%s\n' /usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/local/cuda/lib64 /usr/lib/x86_64-linux-gnu /usr/lib64
}
cuda=
if [ -n "$emulated" ]; then
    tests/cuda-emulator/build.sh target/cuda-emulator || exit 2
    cuda=$PWD/target/cuda-emulator
else
    missing=
    for library in libcuda.so.1 libnvrtc.so.13 libcudnn.so.9; do
        found=$(folders | while read -r folder; do [ -e "$folder/$library" ] && echo "$folder" && break; done)
        [ -n "$found" ] || found=$(ldconfig -p 2>/dev/null | awk -v l="$library" '$1 == l { print $NF; exit }' | xargs -r dirname)
        if [ -n "$found" ]; then cuda=$cuda${cuda:+:}$found; else missing="$missing $library"; fi
    done
    if [ -n "$missing" ]; then
        echo "run.sh: not found:$missing. libcuda is the driver's; the others come with the CUDA toolkit 13 and cuDNN 9, with" >&2
        echo "PyTorch for CUDA 13, or with PyPI's nvidia-cuda-nvrtc and nvidia-cudnn-cu13 (say which Python has them with" >&2
        echo "SIDEWAYS_PYTHON, or their folders with SIDEWAYS_CUDA). SIDEWAYS_GPU=emulator rehearses without a GPU." >&2
        exit 2
    fi
    export SIDEWAYS_TEST_GPU=1
fi
own=$cuda:$tree/lib
before=${LD_LIBRARY_PATH:-}
sideways=$tree/bin/sideways
export SIDEWAYS_TEST_PROGRAM=$sideways SIDEWAYS_CACHE=off
export PATH=$tree/openmpi/bin:$PATH OPAL_PREFIX=$tree/openmpi OPAL_BINDIR=$tree/openmpi/bin OPAL_LIBDIR=$tree/lib
export OPAL_PKGLIBDIR=$tree/openmpi/plugins OPAL_PKGDATADIR=$tree/openmpi/share PMIX_LIBDIR=$tree/lib
export PMIX_PKGLIBDIR=$tree/pmix/plugins OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PMIX_MCA_pcompress_base_silence_warning=1 PMIX_MCA_mca_base_component_show_load_errors=0 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1

rows=()
failed=0
# step NAME SECONDS PATTERN COMMAND...: a row of the table: how it went, and the last line of its output with the pattern.
step() {
    local name=$1 limit=$2 pattern=$3 begun status said
    shift 3
    case $only in "  ") ;; *" ${name%% *} "*) ;; *) return ;; esac
    echo "== $name: $*"
    begun=$(date +%s.%N)
    LD_LIBRARY_PATH=$own${before:+:$before} timeout "$limit" "$@" > "$logs/${name// /-}.log" 2>&1
    status=$?
    if [ "$what" = bench ] || [ $status -ne 0 ]; then tail -n 60 "$logs/${name// /-}.log"; fi
    said=$(grep -E "$pattern" "$logs/${name// /-}.log" | tail -1 | cut -c1-110)
    [ $status -eq 0 ] || failed=1
    rows+=("$(printf '%-24s %-9s %6.1f  %s' "$name" "$([ $status -eq 0 ] && echo ok || echo "FAILED $status")" \
        "$(echo "$(date +%s.%N) $begun" | awk '{ print $1 - $2 }')" "$said")")
}

# suite NAME: the tests of one module; a name that no test has is a failure (the test program alone takes it for success).
suite() {
    step "$1" 200 '^test result' sh -c '"$0" --list "$1::" | grep ": test$" >/dev/null && exec "$0" --test-threads=2 "$1::"' \
        "$tree/bin/test-cuda" "$1"
}

benches() {
    local vgg=benches/pytorch/vgg8.toml on="--set run.device=cuda" small="--set data.batch=16" ms=5 ticks=100 to=64MiB batches=3 sizes="256KiB 4MiB 16MiB"
    if [ -n "$emulated" ]; then
        small="--set data.crop=16 --set data.batch=1 --classes 5"
        ms=10 ticks=20 to=256KiB batches=1 sizes="64KiB 256KiB"
    fi
    local mods="--set model.modules=8 --set model.skip.spans=[2]" precision
    for precision in f32 tf32 bf16; do
        [ -n "$emulated" ] && [ $precision = tf32 ] && continue
        # shellcheck disable=SC2086
        step "layers $precision" 200 '^(peaks|all layers)' "$sideways" bench layers $vgg $on $small --set model.modules=8 \
            --set run.precision=$precision
        step "train $precision" 200 'frames/s' "$sideways" bench train $vgg $on $small $mods --batches $batches \
            --set run.precision=$precision
    done
    step "train graphs off" 200 'frames/s' "$sideways" bench train $vgg $on $small $mods --batches $batches \
        --set run.precision=f32 --set run.graphs=false
    for ranks in 2 4; do
        step "train $ranks ranks" 200 'frames/s' mpirun -n $ranks "$sideways" bench train $vgg $on $small $mods --batches $batches
    done
    for precision in f32 bf16; do
        # What averaging the gradients of two replicas that share the GPU adds to a tick.
        # shellcheck disable=SC2086
        step "train $precision 2 replicas" 200 'not hidden' "$sideways" bench train $vgg $on $small $mods --batches $batches \
            --set train.replicas=2 --set run.precision=$precision --no-prediction
    done
    for frames in 8 64; do
        [ -n "$emulated" ] && [ $frames = 64 ] && frames=16
        step "memory T=$frames" 200 'of its memory' "$sideways" bench train $vgg $on $small --set model.modules=1 \
            --set train.rule=sideways --set data.frames=$frames --batches 1
    done
    step "link threads" 200 '[KM]iB \|' "$sideways" bench link --device cuda --to $to --repeat 3
    step "link 2 ranks" 200 '[KM]iB \|' mpirun -n 2 "$sideways" bench link --device cuda --to $to --repeat 3
    for size in $sizes; do
        for ranks in 2 4; do
            step "overlap $ranks $size" 100 '^exposed' mpirun -n $ranks "$sideways" bench overlap --device cuda \
                --compute-ms $ms --ticks $ticks --bytes $size
        done
    done
    for how in "--stash activations" "--rule skip-sideways --spans 2" "--rule 1f1b"; do
        # shellcheck disable=SC2086
        step "overlap 4 $how" 100 '^(exposed|slowest)' mpirun -n 4 "$sideways" bench overlap --device cuda \
            --compute-ms $ms --ticks $ticks $how
    done
    if "$python" -c 'import torch' 2>/dev/null; then
        local how="--seconds ${SIDEWAYS_SECONDS:-240}"
        [ -n "$emulated" ] && how="--device cpu --small"
        # PyTorch has its own libraries; only sideways gets ours.
        step "pytorch" 500 '^(vgg8|resnet)' env LD_LIBRARY_PATH="$before" "$python" benches/pytorch/gpu.py $how \
            --sideways "$sideways" --library-path "$own" --json "$logs/pytorch.json"
    else
        rows+=("$(printf '%-24s %-9s %6s  %s' pytorch skipped '' "$python has no torch (SIDEWAYS_PYTHON)")")
    fi
}

if [ "$what" = test ]; then
    for name in ops training everywhere replicas exchange bench; do suite $name; done
else
    benches
fi

echo
if [ -n "$emulated" ]; then
    echo "make $what-gpu on the emulator: a rehearsal, whose times say nothing about a GPU"
else
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || true
fi
printf '%-24s %-9s %6s  %s\n' "what" "" "s" "said last"
printf '%s\n' "${rows[@]}"
if [ "$what" = bench ] && [ -f "$logs/pytorch.log" ]; then sed -n '/^A tick of all modules/,$p' "$logs/pytorch.log"; fi
echo "logs: $logs"
exit $failed
