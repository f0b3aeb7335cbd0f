//! Eight lanes: AVX2 with FMA.

use std::arch::x86_64::*;

use half::bf16;

use super::{Isa, Kernel};

/// AVX2 and FMA; bf16 is widened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2;

impl Avx2 {
    pub(crate) fn is_available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
}

#[target_feature(enable = "avx2,fma")]
fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Calls an intrinsic of this path.
macro_rules! op {
    ($call:expr) => {
        // SAFETY: runs under `vectorize`, so the CPU has the instruction; pointers are valid by the callers' contracts.
        unsafe { $call }
    };
}

impl Isa for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    const TILE_ROWS: usize = 6;
    const BF16_DOT: bool = false;

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output {
        op!(enter(kernel))
    }

    #[inline(always)]
    fn splat(x: f32) -> __m256 {
        op!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn add(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        op!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(a: __m256, b: __m256) -> __m256 {
        op!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn scale(x: __m256, n: __m256) -> __m256 {
        // In two steps, since 2^n itself may be out of range where the result is not.
        op!({
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let pow2 =
                |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
            _mm256_mul_ps(_mm256_mul_ps(x, pow2(half)), pow2(_mm256_sub_epi32(n, half)))
        })
    }

    #[inline(always)]
    fn round_bf16(x: __m256) -> __m256 {
        op!({
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let rounded = _mm256_blendv_epi8(up, nan, is_nan);
            _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(!0xffff)))
        })
    }

    #[inline(always)]
    fn keep_first(x: __m256, count: usize, fill: f32) -> __m256 {
        op!({
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lane);
            _mm256_blendv_ps(_mm256_set1_ps(fill), x, _mm256_castsi256_ps(keep))
        })
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(from.cast()))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        op!(_mm256_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m256) {
        op!(_mm256_storeu_ps(to, x))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m256 {
        op!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))))
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut bf16, x: __m256) {
        op!({
            let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(Self::round_bf16(x)));
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high));
            _mm_storeu_si128(to.cast(), packed)
        })
    }

    #[inline(always)]
    unsafe fn load_firsts(from: *const bf16) -> __m256 {
        op!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast()))))
    }

    #[inline(always)]
    unsafe fn load_seconds(from: *const bf16) -> __m256 {
        op!(_mm256_castsi256_ps(_mm256_and_si256(
            _mm256_loadu_si256(from.cast()),
            _mm256_set1_epi32(!0xffff)
        )))
    }

    unsafe fn load_pairs(_: *const bf16) -> __m256 {
        unreachable!("no dot products of bf16 on this path")
    }

    unsafe fn splat_pair(_: *const bf16) -> __m256 {
        unreachable!("no dot products of bf16 on this path")
    }

    fn dot(_: __m256, _: __m256, _: __m256) -> __m256 {
        unreachable!("no dot products of bf16 on this path")
    }
}
