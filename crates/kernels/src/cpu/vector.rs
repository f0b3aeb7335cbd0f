//! Vector helpers over any instruction set: typed loads and stores, ragged ends, fixed-order sums, e^x.

use half::bf16;

use super::isa::Isa;
use super::memory::Element;

/// The most lanes that a vector has on any path.
const MAX_LANES: usize = 16;

/// An element type of buffers, weights and KV, as vectors of f32.
pub(crate) trait Number: Element {
    /// Zero.
    const ZERO: Self;
    /// Loads `LANES` values.
    ///
    /// # Safety
    /// They are readable, and this runs under `I::vectorize`.
    unsafe fn load<I: Isa>(from: *const Self) -> I::Vector;
    /// Stores `LANES` values, rounded to this type.
    ///
    /// # Safety
    /// They are writable, and this runs under `I::vectorize`.
    unsafe fn store<I: Isa>(to: *mut Self, x: I::Vector);
}

impl Number for f32 {
    const ZERO: f32 = 0.0;

    #[inline(always)]
    unsafe fn load<I: Isa>(from: *const f32) -> I::Vector {
        // SAFETY: by this function's contract.
        unsafe { I::load(from) }
    }

    #[inline(always)]
    unsafe fn store<I: Isa>(to: *mut f32, x: I::Vector) {
        // SAFETY: by this function's contract.
        unsafe { I::store(to, x) }
    }
}

impl Number for bf16 {
    const ZERO: bf16 = bf16::ZERO;

    #[inline(always)]
    unsafe fn load<I: Isa>(from: *const bf16) -> I::Vector {
        // SAFETY: by this function's contract.
        unsafe { I::load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn store<I: Isa>(to: *mut bf16, x: I::Vector) {
        // SAFETY: by this function's contract.
        unsafe { I::store_bf16(to, x) }
    }
}

/// Loads `count` ≤ `LANES` values; the other lanes are zero.
///
/// # Safety
/// They are readable, and this runs under `I::vectorize`.
#[inline(always)]
pub(crate) unsafe fn load_first<I: Isa, N: Number>(from: *const N, count: usize) -> I::Vector {
    // SAFETY: `count` values are readable, and the copy holds a whole vector.
    unsafe {
        if count == I::LANES {
            return N::load::<I>(from);
        }
        let mut whole = [N::ZERO; MAX_LANES];
        std::ptr::copy_nonoverlapping(from, whole.as_mut_ptr(), count);
        N::load::<I>(whole.as_ptr())
    }
}

/// Stores the first `count` ≤ `LANES` lanes.
///
/// # Safety
/// They are writable, and this runs under `I::vectorize`.
#[inline(always)]
pub(crate) unsafe fn store_first<I: Isa, N: Number>(to: *mut N, x: I::Vector, count: usize) {
    // SAFETY: `count` values are writable, and the copy holds a whole vector.
    unsafe {
        if count == I::LANES {
            return N::store::<I>(to, x);
        }
        let mut whole = [N::ZERO; MAX_LANES];
        N::store::<I>(whole.as_mut_ptr(), x);
        std::ptr::copy_nonoverlapping(whole.as_ptr(), to, count);
    }
}

/// Copies `count` values, converted.
///
/// # Safety
/// They are readable and writable, do not overlap, and this runs under `I::vectorize`.
#[inline(always)]
pub(crate) unsafe fn convert<I: Isa, A: Number, B: Number>(from: *const A, to: *mut B, count: usize) {
    let mut i = 0;
    while i < count {
        let lanes = I::LANES.min(count - i);
        // SAFETY: `i + lanes <= count`.
        unsafe { store_first::<I, B>(to.add(i), load_first::<I, A>(from.add(i), lanes), lanes) };
        i += lanes;
    }
}

/// The lanes of `x`, followed by copies of `fill`.
#[inline(always)]
fn lanes<I: Isa>(x: I::Vector, fill: f32) -> [f32; MAX_LANES] {
    let mut lanes = [fill; MAX_LANES];
    // SAFETY: the array holds a whole vector.
    unsafe { I::store(lanes.as_mut_ptr(), x) };
    lanes
}

/// The sum of the lanes, halves onto halves.
#[inline(always)]
pub(crate) fn sum<I: Isa>(x: I::Vector) -> f32 {
    fold(lanes::<I>(x, 0.0), |a, b| a + b)
}

/// The greatest lane.
#[inline(always)]
pub(crate) fn max<I: Isa>(x: I::Vector) -> f32 {
    fold(lanes::<I>(x, f32::NEG_INFINITY), |a, b| if a > b { a } else { b })
}

#[inline(always)]
fn fold(mut lanes: [f32; MAX_LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
    }
    lanes[0]
}

/// e^x to about 1 ulp; 0 below every f32, infinite above, NaN of NaN.
#[inline(always)]
pub(crate) fn exp<I: Isa>(x: I::Vector) -> I::Vector {
    // Adding and taking away 1.5 · 2^23 rounds to an integer.
    let magic = I::splat(12_582_912.0);
    // In this order of operands a NaN stays.
    let x = I::min(I::splat(100.0), I::max(I::splat(-110.0), x));
    let n = I::sub(I::fma(x, I::splat(std::f32::consts::LOG2_E), magic), magic);
    // x - n · ln 2; the first part of ln 2 has few bits, so that its product is exact.
    let r = I::fma(n, I::splat(-0.693_359_4), x);
    let r = I::fma(n, I::splat(2.121_944_4e-4), r);
    let mut p = I::splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = I::fma(p, r, I::splat(c));
    }
    I::scale(I::add(I::fma(I::mul(r, r), p, r), I::splat(1.0)), n)
}

#[cfg(test)]
mod tests {
    use super::super::isa::Kernel;
    use super::super::path::{Path, Vectors};
    use super::*;

    struct Exp([f32; MAX_LANES]);

    impl Kernel for Exp {
        type Output = [f32; MAX_LANES];
        #[inline(always)]
        fn run<I: Isa>(self) -> Self::Output {
            // SAFETY: the array holds a whole vector.
            lanes::<I>(exp::<I>(unsafe { I::load(self.0.as_ptr()) }), 0.0)
        }
    }

    #[test]
    fn exp_is_within_two_ulps_everywhere() {
        for path in Path::available() {
            let vectors = Vectors::new(path).unwrap();
            let of = |x: f32| vectors.run(Exp([x; MAX_LANES]))[0];
            for i in -10_300..8_872 {
                let x = i as f32 * 0.01;
                let expected = libm::exp(f64::from(x));
                let ulp =
                    f64::from(f32::from_bits((expected as f32).to_bits() + 1)) - f64::from(expected as f32);
                let error = (f64::from(of(x)) - expected).abs() / ulp;
                assert!(error < 2.0, "{path:?}: e^{x} is off by {error} ulp");
            }
            assert_eq!(of(0.0), 1.0);
            assert_eq!(of(f32::NEG_INFINITY), 0.0);
            assert_eq!(of(-1e30), 0.0);
            assert_eq!(of(f32::INFINITY), f32::INFINITY);
            assert_eq!(of(89.0), f32::INFINITY);
            assert!(of(f32::NAN).is_nan());
        }
    }
}
