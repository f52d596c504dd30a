//! Plain loops compiled for the widest vectors the machine has.

use std::sync::LazyLock;

use pulp::Arch;

static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

/// Runs `f`, a closure marked `#[inline(always)]` (else it stays what it is for the baseline), compiled for the best instruction set found at start (AVX-512, AVX2 or the baseline). Loops in `f` and in
/// functions inlined into it are vectorised for it; the operations stay those written, so results are the same to the bit
/// on every machine.
#[inline(always)]
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    ARCH.dispatch(f)
}
