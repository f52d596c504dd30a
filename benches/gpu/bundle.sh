#!/usr/bin/env bash
# Puts all that tests and benchmarks on a GPU need into target/gpu/bundle.tar.xz, to be carried to a machine with a GPU that
# has neither a Rust toolchain nor a network: the stripped executables, and Open MPI, HDF5 and oneDNN with what they need.
# CUDA's libraries are not in it.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo=${CARGO:-cargo}
tree=target/gpu/tree

"$cargo" build --release --locked --features cuda
tests=$("$cargo" test --release --locked --features cuda --no-run --message-format=json \
    --test cuda | grep -o '"executable":"[^"]*"' | cut -d'"' -f4)
rm -rf "$tree"
mkdir -p "$tree"/{bin,lib,openmpi/bin,openmpi/plugins,pmix}
strip -o "$tree/bin/sideways" target/release/sideways
for file in $tests; do
    name=$(basename "$file")
    case $name in sideways-*) continue ;; esac
    # Without the hash that cargo puts behind the name.
    strip -o "$tree/bin/test-${name%-*}" "$file"
done

# Open MPI finds its parts by OPAL_* (run.sh); transports of networks that one machine does not have are left behind.
cp -L "$(command -v mpirun)" "$tree/openmpi/bin/mpirun"
cp -L "$(command -v orted)" "$tree/openmpi/bin/orted"
plugins=$(ompi_info --path pkglibdir --parsable | cut -d: -f3)
for file in "$plugins"/*.so; do
    case $(basename "$file") in
        *ucx* | *ofi* | *verbs* | *openib* | *psm* | *portals* | *usnic* | *hcoll* | *cuda* | *monitoring*) continue ;;
    esac
    cp -L "$file" "$tree/openmpi/plugins/"
done
cp -rL "$(ompi_info --path pkgdatadir --parsable | cut -d: -f3)" "$tree/openmpi/share"
pmix=$(find /usr/lib -path '*pmix*' -name 'libpmix.so.2' | head -1)
if [ -n "$pmix" ]; then
    cp -rL "$(dirname "$pmix")/pmix" "$tree/pmix/plugins" 2>/dev/null || true
    cp -L "$pmix" "$tree/lib/"
fi

# The C and C++ libraries are the other machine's own.
needed=$(find "$tree" -type f \( -perm -u+x -o -name '*.so*' \) -exec ldd {} \; 2>/dev/null | awk '$3 ~ /^\// { print $3 }' | sort -u)
for file in $needed; do
    case $(basename "$file") in
        ld-linux* | libc.so* | libm.so* | libdl.so* | libpthread.so* | librt.so* | libresolv.so* | libstdc++* | libgcc_s*) ;;
        *) cp -Ln "$file" "$tree/lib/" ;;
    esac
done
strip --strip-unneeded "$tree"/lib/*.so* "$tree"/openmpi/plugins/*.so 2>/dev/null || true
tar -C "$tree" -cf - . | xz -T0 -6 > target/gpu/bundle.tar.xz.new
mv target/gpu/bundle.tar.xz.new target/gpu/bundle.tar.xz
rm -rf "$tree"
bytes=$(stat -c %s target/gpu/bundle.tar.xz)
echo "target/gpu/bundle.tar.xz: $((bytes >> 20)) MiB"
if [ "$bytes" -gt $((60 << 20)) ]; then
    echo "bundle.sh: that is more than the 60 MiB that can be carried" >&2
    exit 1
fi
