//! oneDNN's convolutions and matrix products, where the program was built with it (see `build.rs`).
//!
//! Everything computes on the calling thread; `shim.cpp` beside this file holds the C++ side.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;

use super::im2col::Shape;
use super::overwritten;
use crate::{Error, Result};

/// Room for oneDNN's messages.
const MESSAGE: usize = 256;

unsafe extern "C" {
    fn sw_product_new(shape: *const i64, kind: c_int, message: *mut c_char, room: usize) -> *mut c_void;
    fn sw_product_free(product: *mut c_void);
    fn sw_product_name(product: *const c_void) -> *const c_char;
    fn sw_product_packed_bytes(product: *const c_void) -> usize;
    fn sw_product_scratch_bytes(product: *const c_void) -> usize;
    fn sw_product_reorder(
        product: *const c_void,
        from: *const f32,
        to: *mut f32,
        unpack: c_int,
        message: *mut c_char,
        room: usize,
    ) -> c_int;
    fn sw_product_run(
        product: *const c_void,
        x: *mut f32,
        w: *mut f32,
        bias: *const f32,
        y: *mut f32,
        scratch: *mut u8,
        message: *mut c_char,
        room: usize,
    ) -> c_int;
    fn sw_sgemm(
        ta: c_char,
        tb: c_char,
        m: i64,
        n: i64,
        k: i64,
        a: *const f32,
        lda: i64,
        b: *const f32,
        ldb: i64,
        beta: f32,
        c: *mut f32,
        ldc: i64,
    ) -> c_int;
    fn sw_version(out: *mut c_int);
}

/// Major, minor and patch version of the library in use.
pub fn version() -> [i32; 3] {
    let mut version = [0; 3];
    // SAFETY: three integers are written.
    unsafe { sw_version(version.as_mut_ptr()) };
    version
}

/// Which of a convolution's three products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// y from x and w.
    Forward = 0,
    /// x's cotangent from y's and w.
    InputGradient = 1,
    /// w's gradient from x and y's cotangent.
    WeightGradient = 2,
}

/// One product of a convolution, made ready for a shape: x `[b, h, w, c]` and y `[b, oh, ow, o]`, weights in a layout of
/// oneDNN's choice. It may run on several threads at once.
pub(crate) struct Product {
    raw: NonNull<c_void>,
    x: usize,
    y: usize,
    weights: usize,
    bias: usize,
    packed: usize,
    scratch: usize,
}

// SAFETY: a product is not changed after it was made, and oneDNN's primitives may be executed by several threads.
unsafe impl Send for Product {}
unsafe impl Sync for Product {}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: `raw` came from sw_product_new and is freed once.
        unsafe { sw_product_free(self.raw.as_ptr()) }
    }
}

impl Product {
    /// Makes the product ready; `bias` matters to the forward product only.
    ///
    /// # Errors
    /// [`Error::Run`] with oneDNN's message.
    pub(crate) fn new(s: &Shape, kind: Kind, bias: bool) -> Result<Self> {
        let window = s.window;
        let shape = [
            s.b,
            s.c,
            s.h,
            s.w,
            s.o,
            window.kernel[0],
            window.kernel[1],
            window.stride[0],
            window.stride[1],
            window.padding[0],
            window.padding[1],
            s.g,
            usize::from(bias && kind == Kind::Forward),
        ]
        .map(|n| n as i64);
        let mut message = [0; MESSAGE];
        // SAFETY: the shape has 13 numbers, the message the room given.
        let raw = unsafe { sw_product_new(shape.as_ptr(), kind as c_int, message.as_mut_ptr(), MESSAGE) };
        let raw = NonNull::new(raw).ok_or_else(|| failure(&message))?;
        // SAFETY: `raw` is a product.
        let (packed, scratch) =
            unsafe { (sw_product_packed_bytes(raw.as_ptr()), sw_product_scratch_bytes(raw.as_ptr())) };
        Ok(Product {
            raw,
            x: s.b * s.h * s.w * s.c,
            y: s.b * s.oh * s.ow * s.o,
            weights: s.o * s.patch(),
            bias: if shape[12] != 0 { s.o } else { 0 },
            packed: packed.div_ceil(size_of::<f32>()),
            scratch,
        })
    }

    /// The implementation that oneDNN chose, by its own name.
    pub(crate) fn name(&self) -> String {
        // SAFETY: the name is a C string that lives as long as the product.
        unsafe { CStr::from_ptr(sw_product_name(self.raw.as_ptr())) }.to_string_lossy().into_owned()
    }

    /// Elements of packed weights.
    pub(crate) fn packed_len(&self) -> usize {
        self.packed
    }

    /// Memory for [`Product::run`], for one thread.
    pub(crate) fn scratch(&self) -> Vec<f32> {
        overwritten((self.scratch + 64).div_ceil(size_of::<f32>()))
    }

    /// Weights `[O, C/g, kH, kW]` in oneDNN's layout.
    pub(crate) fn pack(&self, weight: &[f32]) -> Result<Vec<f32>> {
        assert_eq!(weight.len(), self.weights, "weights of a convolution");
        let mut packed = vec![0.0; self.packed];
        self.reorder(weight, &mut packed, false)?;
        Ok(packed)
    }

    /// The inverse of [`Product::pack`].
    pub(crate) fn unpack(&self, packed: &[f32]) -> Result<Vec<f32>> {
        assert_eq!(packed.len(), self.packed, "packed weights of a convolution");
        let mut weight = overwritten(self.weights);
        self.reorder(packed, &mut weight, true)?;
        Ok(weight)
    }

    fn reorder(&self, from: &[f32], to: &mut [f32], unpack: bool) -> Result<()> {
        let mut message = [0; MESSAGE];
        let unpack = c_int::from(unpack);
        // SAFETY: the callers checked both lengths.
        let failed = unsafe {
            sw_product_reorder(self.raw.as_ptr(), from.as_ptr(), to.as_mut_ptr(), unpack, message.as_mut_ptr(), MESSAGE)
        };
        if failed == 0 { Ok(()) } else { Err(failure(&message)) }
    }

    /// `y = x * w (+ bias)`.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        w: &[f32],
        bias: Option<&[f32]>,
        y: &mut [f32],
        s: &mut [f32],
    ) -> Result<()> {
        assert!(
            x.len() == self.x && w.len() == self.packed && y.len() == self.y && self.bias == bias.map_or(0, <[_]>::len)
        );
        let bias = bias.map_or(std::ptr::null(), <[f32]>::as_ptr);
        self.run(x.as_ptr().cast_mut(), w.as_ptr().cast_mut(), bias, y.as_mut_ptr(), s)
    }

    /// x's cotangent.
    pub(crate) fn input_gradient(&self, gx: &mut [f32], w: &[f32], gy: &[f32], s: &mut [f32]) -> Result<()> {
        assert!(gx.len() == self.x && w.len() == self.packed && gy.len() == self.y);
        self.run(gx.as_mut_ptr(), w.as_ptr().cast_mut(), std::ptr::null(), gy.as_ptr().cast_mut(), s)
    }

    /// w's gradient, packed.
    pub(crate) fn weight_gradient(&self, x: &[f32], gw: &mut [f32], gy: &[f32], s: &mut [f32]) -> Result<()> {
        assert!(x.len() == self.x && gw.len() == self.packed && gy.len() == self.y);
        self.run(x.as_ptr().cast_mut(), gw.as_mut_ptr(), std::ptr::null(), gy.as_ptr().cast_mut(), s)
    }

    fn run(&self, x: *mut f32, w: *mut f32, bias: *const f32, y: *mut f32, scratch: &mut [f32]) -> Result<()> {
        assert!(size_of_val(scratch) >= self.scratch + 60, "scratch memory of a convolution");
        let mut message = [0; MESSAGE];
        // oneDNN wants its scratch memory aligned to 64 bytes.
        let start = scratch.as_mut_ptr().cast::<u8>();
        let aligned = start.wrapping_add(start.align_offset(64));
        // SAFETY: lengths were checked above and in the callers; oneDNN writes only what the product computes, which
        // its caller borrowed mutably, and the scratch memory.
        let failed =
            unsafe { sw_product_run(self.raw.as_ptr(), x, w, bias, y, aligned, message.as_mut_ptr(), MESSAGE) };
        if failed == 0 { Ok(()) } else { Err(failure(&message)) }
    }
}

/// `c = op(a) op(b) + beta c`, row-major with `ld` elements from one row to the next; op transposes where the flag is set.
///
/// # Safety
/// Every element that m, n, k and the strides reach lies inside what the pointers may access.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn sgemm(
    [m, n, k]: [usize; 3],
    (a, lda, ta): (*const f32, usize, bool),
    (b, ldb, tb): (*const f32, usize, bool),
    accumulate: bool,
    c: *mut f32,
    ldc: usize,
) -> bool {
    let letter = |transposed| if transposed { b'T' } else { b'N' } as c_char;
    let beta = if accumulate { 1.0 } else { 0.0 };
    // SAFETY: as the caller promises.
    let failed = unsafe {
        let [m, n, k, lda, ldb, ldc] = [m, n, k, lda, ldb, ldc].map(|v| v as i64);
        sw_sgemm(letter(ta), letter(tb), m, n, k, a, lda, b, ldb, beta, c, ldc)
    };
    failed == 0
}

fn failure(message: &[c_char; MESSAGE]) -> Error {
    // SAFETY: the shim ends its messages with a zero, and the array began as zeros.
    let text = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy();
    Error::Run(format!("oneDNN: {text}"))
}
