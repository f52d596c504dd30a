//! The one-dimensional transforms, and the points of the polynomial that they are made of: 0, ±5/8, ±3/2 and infinity, exact
//! in binary and kinder to rounding than the usual 0, ±1, ±2, infinity.

use super::{IN, LANES, Lanes, OUT};
use crate::backend::cpu::Real;

const P: f64 = 0.625;
const Q: f64 = 1.5;

/// The points p and q and what is made of them; the one-dimensional transforms.
pub(super) struct Points<T> {
    p: T,
    q: T,
    p2: T,
    q2: T,
    p3: T,
    q3: T,
    /// p² q², p² + q², p q², q p².
    pq: T,
    sum: T,
    pqq: T,
    qpp: T,
    /// 1 / p²q², and 1 over the products of differences at ±p and ±q.
    n0: T,
    np: T,
    nq: T,
}

impl<T: Real> Points<T> {
    pub(super) fn new() -> Self {
        let (p2, q2) = (P * P, Q * Q);
        Points {
            p: T::of(P),
            q: T::of(Q),
            p2: T::of(p2),
            q2: T::of(q2),
            p3: T::of(P * p2),
            q3: T::of(Q * q2),
            pq: T::of(p2 * q2),
            sum: T::of(p2 + q2),
            pqq: T::of(P * q2),
            qpp: T::of(Q * p2),
            n0: T::of(1.0 / (p2 * q2)),
            np: T::of(1.0 / (2.0 * p2 * (p2 - q2))),
            nq: T::of(1.0 / (2.0 * q2 * (q2 - p2))),
        }
    }

    /// Bᵀ d.
    #[inline(always)]
    pub(super) fn bt(&self, d: &[Lanes<T>; IN]) -> [Lanes<T>; IN] {
        let mut r = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (even_p, odd_p) = (d[4][l] - self.q2 * d[2][l], d[3][l] - self.q2 * d[1][l]);
            let (even_q, odd_q) = (d[4][l] - self.p2 * d[2][l], d[3][l] - self.p2 * d[1][l]);
            r[0][l] = self.pq * d[0][l] - self.sum * d[2][l] + d[4][l];
            r[1][l] = even_p + self.p * odd_p;
            r[2][l] = even_p - self.p * odd_p;
            r[3][l] = even_q + self.q * odd_q;
            r[4][l] = even_q - self.q * odd_q;
            r[5][l] = self.pq * d[1][l] - self.sum * d[3][l] + d[5][l];
        }
        r
    }

    /// B r.
    #[inline(always)]
    pub(super) fn b(&self, r: &[Lanes<T>; IN]) -> [Lanes<T>; IN] {
        let mut d = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (sum_p, difference_p) = (r[1][l] + r[2][l], r[1][l] - r[2][l]);
            let (sum_q, difference_q) = (r[3][l] + r[4][l], r[3][l] - r[4][l]);
            d[0][l] = self.pq * r[0][l];
            d[1][l] = self.pq * r[5][l] - self.pqq * difference_p - self.qpp * difference_q;
            d[2][l] = -(self.sum * r[0][l]) - self.q2 * sum_p - self.p2 * sum_q;
            d[3][l] = self.p * difference_p + self.q * difference_q - self.sum * r[5][l];
            d[4][l] = r[0][l] + sum_p + sum_q;
            d[5][l] = r[5][l];
        }
        d
    }

    /// Aᵀ m.
    #[inline(always)]
    pub(super) fn at(&self, m: &[Lanes<T>; IN]) -> [Lanes<T>; OUT] {
        let mut y = [[T::ZERO; LANES]; OUT];
        for l in 0..LANES {
            let (sum_p, difference_p) = (m[1][l] + m[2][l], m[1][l] - m[2][l]);
            let (sum_q, difference_q) = (m[3][l] + m[4][l], m[3][l] - m[4][l]);
            y[0][l] = m[0][l] + sum_p + sum_q;
            y[1][l] = self.p * difference_p + self.q * difference_q;
            y[2][l] = self.p2 * sum_p + self.q2 * sum_q;
            y[3][l] = self.p3 * difference_p + self.q3 * difference_q + m[5][l];
        }
        y
    }

    /// A g.
    #[inline(always)]
    pub(super) fn a(&self, g: &[Lanes<T>; OUT]) -> [Lanes<T>; IN] {
        let mut z = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (even_p, odd_p) = (g[0][l] + self.p2 * g[2][l], self.p * g[1][l] + self.p3 * g[3][l]);
            let (even_q, odd_q) = (g[0][l] + self.q2 * g[2][l], self.q * g[1][l] + self.q3 * g[3][l]);
            z[0][l] = g[0][l];
            z[1][l] = even_p + odd_p;
            z[2][l] = even_p - odd_p;
            z[3][l] = even_q + odd_q;
            z[4][l] = even_q - odd_q;
            z[5][l] = g[3][l];
        }
        z
    }

    /// G w.
    #[inline(always)]
    pub(super) fn g(&self, w: &[Lanes<T>; 3]) -> [Lanes<T>; IN] {
        let mut u = [[T::ZERO; LANES]; IN];
        for l in 0..LANES {
            let (even_p, odd_p) = (w[0][l] + self.p2 * w[2][l], self.p * w[1][l]);
            let (even_q, odd_q) = (w[0][l] + self.q2 * w[2][l], self.q * w[1][l]);
            u[0][l] = self.n0 * w[0][l];
            u[1][l] = self.np * (even_p + odd_p);
            u[2][l] = self.np * (even_p - odd_p);
            u[3][l] = self.nq * (even_q + odd_q);
            u[4][l] = self.nq * (even_q - odd_q);
            u[5][l] = w[2][l];
        }
        u
    }

    /// Gᵀ u.
    #[inline(always)]
    pub(super) fn gt(&self, u: &[Lanes<T>; IN]) -> [Lanes<T>; 3] {
        let mut w = [[T::ZERO; LANES]; 3];
        for l in 0..LANES {
            let (sum_p, difference_p) = (self.np * (u[1][l] + u[2][l]), self.np * (u[1][l] - u[2][l]));
            let (sum_q, difference_q) = (self.nq * (u[3][l] + u[4][l]), self.nq * (u[3][l] - u[4][l]));
            w[0][l] = self.n0 * u[0][l] + sum_p + sum_q;
            w[1][l] = self.p * difference_p + self.q * difference_q;
            w[2][l] = self.p2 * sum_p + self.q2 * sum_q + u[5][l];
        }
        w
    }
}
