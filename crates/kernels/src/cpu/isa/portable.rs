//! Four lanes of plain Rust, which compilers turn into SSE2 or NEON.

use half::bf16;

use super::{Isa, Kernel};

/// For any CPU. Products and sums round apart: a fused one would be a library call on baseline x86-64.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 4;

type Lanes = [f32; LANES];

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> Lanes {
    [f(0), f(1), f(2), f(3)]
}

impl Isa for Portable {
    type Vector = Lanes;
    const LANES: usize = LANES;
    const TILE_ROWS: usize = 4;
    const BF16_DOT: bool = false;

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Self>()
    }

    #[inline(always)]
    fn splat(x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn add(a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(a: Lanes, b: Lanes) -> Lanes {
        each(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        each(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(a: Lanes, b: Lanes) -> Lanes {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(a: Lanes, b: Lanes) -> Lanes {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn scale(x: Lanes, n: Lanes) -> Lanes {
        // In two steps, since 2^n itself may be out of range where the result is not.
        let pow2 = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        each(|i| {
            let n = n[i] as i32;
            x[i] * pow2(n >> 1) * pow2(n - (n >> 1))
        })
    }

    #[inline(always)]
    fn round_bf16(x: Lanes) -> Lanes {
        each(|i| bf16::from_f32(x[i]).to_f32())
    }

    #[inline(always)]
    fn keep_first(x: Lanes, count: usize, fill: f32) -> Lanes {
        each(|i| if i < count { x[i] } else { fill })
    }

    #[inline(always)]
    fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Lanes {
        // SAFETY: readable by contract.
        unsafe { from.cast::<Lanes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Lanes) {
        // SAFETY: writable by contract.
        unsafe { to.cast::<Lanes>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Lanes {
        // SAFETY: readable by contract.
        let x = unsafe { from.cast::<[bf16; LANES]>().read_unaligned() };
        each(|i| x[i].to_f32())
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut bf16, x: Lanes) {
        // SAFETY: writable by contract.
        unsafe { to.cast::<[bf16; LANES]>().write_unaligned(x.map(bf16::from_f32)) }
    }

    #[inline(always)]
    unsafe fn load_firsts(from: *const bf16) -> Lanes {
        // SAFETY: readable by contract.
        let pairs = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        each(|i| f32::from_bits(u32::from(pairs[i][0]) << 16))
    }

    #[inline(always)]
    unsafe fn load_seconds(from: *const bf16) -> Lanes {
        // SAFETY: readable by contract.
        let pairs = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        each(|i| f32::from_bits(u32::from(pairs[i][1]) << 16))
    }

    unsafe fn load_pairs(_: *const bf16) -> Lanes {
        unreachable!("no dot products of bf16 on this path")
    }

    unsafe fn splat_pair(_: *const bf16) -> Lanes {
        unreachable!("no dot products of bf16 on this path")
    }

    fn dot(_: Lanes, _: Lanes, _: Lanes) -> Lanes {
        unreachable!("no dot products of bf16 on this path")
    }
}
