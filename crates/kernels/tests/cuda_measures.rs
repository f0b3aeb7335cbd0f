//! What measures a GPU: that it runs, and reads all that it says it reads. No speed is asserted.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::gpu;
use common::ops::{Types, linear};
use kernels::cuda::Ceilings;
use kernels::{Backend, DType, SourceType};

#[test]
fn ceilings_of_odd_sizes() {
    if !gpu::present() {
        return;
    }
    let cuda = gpu::open(true);
    // Less than the pattern that memory is filled with, and twice it with a rest that no run of loads divides.
    for bytes in [16, 4096 + 16, 1 << 20, (8 << 20) + 48] {
        let mut ceilings = Ceilings::new(&cuda, bytes, 32).unwrap();
        for rate in [ceilings.read(), ceilings.copy(), ceilings.multiply()] {
            let rate = rate.unwrap();
            assert!(rate.is_finite() && rate > 0.0, "{rate}");
        }
    }
    assert!(Ceilings::new(&cuda, 8, 32).is_err());
    assert!(Ceilings::new(&cuda, 64, 0).is_err());
    assert!(Ceilings::new(&cuda, 64, 24).is_err());
}

#[test]
fn moments_are_in_order() {
    if !gpu::present() {
        return;
    }
    let cuda = gpu::open(true);
    let start = cuda.moment().unwrap();
    let _buffer = cuda.buffer(DType::F32, 100, 100).unwrap();
    let end = cuda.moment().unwrap();
    assert!(end.seconds_since(&start).unwrap() > 0.0);
}

/// 520 rows are a wide product, unless bits must not depend on that.
#[test]
fn deterministic_can_be_switched() {
    const TYPES: Types = (DType::Bf16, DType::Bf16, SourceType::Bf16);
    if !gpu::present() {
        return;
    }
    let of = |deterministic| {
        let mut cuda = gpu::open(deterministic);
        (cuda.path().to_owned(), linear(&mut cuda, TYPES, 520, 1032, &[32]))
    };
    let (deterministic, free) = (of(true), of(false));
    assert!(deterministic.0 != free.0 && deterministic.1 != free.1);
    let mut cuda = gpu::open(false);
    for (switched, wanted) in [(true, &deterministic), (false, &free), (false, &free), (true, &deterministic)]
    {
        cuda.set_deterministic(switched).unwrap();
        assert_eq!(&(cuda.path().to_owned(), linear(&mut cuda, TYPES, 520, 1032, &[32])), wanted);
    }
}
