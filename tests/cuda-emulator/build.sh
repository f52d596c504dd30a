#!/bin/sh
# build.sh OUTDIR: builds the emulated CUDA libraries into OUTDIR, unless they are up to date.
set -eu
[ $# -eq 1 ] || { echo "usage: build.sh OUTDIR" >&2; exit 2; }
source=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
cxx=${CXX:-c++}
flags="-std=c++17 -O2 -g -fPIC -shared -fvisibility=hidden -Wall -Wextra -pthread"

exec 9>"$out/.lock"
flock 9
stamp=$( (cat "$source"/*.cpp "$source"/*.h "$source"/build.sh; "$cxx" --version) | cksum)
if [ -f "$out/.stamp" ] && [ "$(cat "$out/.stamp")" = "$stamp" ]; then exit 0; fi

# Built aside and moved into place: programs that run now keep what they have loaded.
new="$out/.new"
rm -rf "$new"
mkdir "$new"
objects=""
failed=0
jobs=""
for name in knobs device memory host_memory streams events capture copies fibers kernels cudnn descriptors convolution; do
    "$cxx" $flags -c "$source/$name.cpp" -o "$new/$name.o" &
    jobs="$jobs $!"
done
"$cxx" $flags -Wl,-soname,libnvrtc.so.13 "$source/nvrtc.cpp" -o "$new/libnvrtc.so.13" -ldl &
jobs="$jobs $!"
for job in $jobs; do wait "$job" || failed=1; done
[ $failed = 0 ] || exit 1
for name in knobs device memory host_memory streams events capture copies fibers kernels; do objects="$objects $new/$name.o"; done
"$cxx" $flags -Wl,-soname,libcuda.so.1 $objects -o "$new/libcuda.so.1" -ldl
"$cxx" $flags -Wl,-soname,libcudnn.so.9 -Wl,-rpath,'$ORIGIN' "$new/cudnn.o" "$new/descriptors.o" "$new/convolution.o" "$new/libcuda.so.1" \
    -o "$new/libcudnn.so.9"
rm -f "$new"/*.o
cp "$source/kernel_prelude.h" "$source/kernel_abi.h" "$new/"
ln -s libcuda.so.1 "$new/libcuda.so"
ln -s libnvrtc.so.13 "$new/libnvrtc.so"
ln -s libcudnn.so.9 "$new/libcudnn.so"
mv -f "$new"/* "$out/"
rmdir "$new"
echo "$stamp" > "$out/.stamp"
