//! Matrix products on strided slices, on the calling thread.

use gemm::Parallelism;

use super::Real;

/// A read-only matrix inside a slice: element (r, c) is `data[r * row + c * column]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    row: usize,
    column: usize,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// Row-major, `row` elements from one row to the next.
    pub(crate) fn new(data: &'a [T], row: usize) -> Self {
        Matrix { data, row, column: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Matrix { row: self.column, column: self.row, ..self }
    }

    /// (start, elements from one row to the next as it lies, whether it is the transpose of what lies there).
    #[cfg(onednn)]
    fn plain(&self) -> Option<(*const f32, usize, bool)> {
        let start = self.data.as_ptr().cast();
        match (self.row, self.column) {
            (row, 1) => Some((start, row, false)),
            (1, column) => Some((start, column, true)),
            _ => None,
        }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.data.len()
    }
}

/// `c = a b`, or `c += a b` where `accumulate`: a is m by k, b is k by n, c is m by n with `c_row` elements from one
/// row to the next.
pub(crate) fn multiply<T: Real>(
    [m, n, k]: [usize; 3],
    c: &mut [T],
    c_row: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    accumulate: bool,
) {
    let c_fits = m == 0 || n == 0 || (m - 1) * c_row + n <= c.len();
    assert!(c_fits && a.holds(m, k) && b.holds(k, n), "matrix product {m}x{k} by {k}x{n} out of bounds");
    #[cfg(onednn)]
    if T::DTYPE == candle_core::DType::F32
        && let (Some(a), Some(b)) = (a.plain(), b.plain())
    {
        // SAFETY: the assertion above keeps every element inside its slice, and T is f32.
        let done = unsafe { super::onednn::sgemm([m, n, k], a, b, accumulate, c.as_mut_ptr().cast(), c_row) };
        if done {
            return;
        }
    }
    // SAFETY: the assertion above keeps every element read or written inside its slice; T is f32 or f64, which gemm
    // knows; c is borrowed mutably, so it overlaps neither a nor b. Strides fit isize as the slices do.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_row as isize,
            accumulate,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
