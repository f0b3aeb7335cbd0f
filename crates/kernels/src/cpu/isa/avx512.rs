//! Sixteen lanes: AVX-512, with or without dot products of bf16 pairs.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::bf16;

use super::{Isa, Kernel};

/// AVX-512; with `DOT` also AVX512_BF16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const DOT: bool>;

impl<const DOT: bool> Avx512<DOT> {
    pub(crate) fn is_available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && (!DOT || is_x86_feature_detected!("avx512bf16"))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<false>>()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn enter_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true>>()
}

/// Calls an intrinsic of this path.
macro_rules! op {
    ($call:expr) => {
        // SAFETY: runs under `vectorize`, so the CPU has the instruction; pointers are valid by the callers' contracts.
        unsafe { $call }
    };
}

impl<const DOT: bool> Isa for Avx512<DOT> {
    type Vector = __m512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 12;
    const BF16_DOT: bool = DOT;

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output {
        if DOT { op!(enter_dot(kernel)) } else { op!(enter(kernel)) }
    }

    #[inline(always)]
    fn splat(x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn scale(x: __m512, n: __m512) -> __m512 {
        op!(_mm512_scalef_ps(x, n))
    }

    #[inline(always)]
    fn round_bf16(x: __m512) -> __m512 {
        if DOT {
            // The instruction reads and writes denormals as zeros, as `dot` does.
            return op!(_mm512_cvtpbh_ps(_mm512_cvtneps_pbh(x)));
        }
        op!({
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let rounded = _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x40_0000));
            _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(!0xffff)))
        })
    }

    #[inline(always)]
    fn keep_first(x: __m512, count: usize, fill: f32) -> __m512 {
        let keep = ((1u32 << count.min(16)) - 1) as u16;
        op!(_mm512_mask_blend_ps(keep, _mm512_set1_ps(fill), x))
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(from.cast()))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        op!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m512) {
        op!(_mm512_storeu_ps(to, x))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
            from.cast()
        )))))
    }

    #[inline(always)]
    unsafe fn store_bf16(to: *mut bf16, x: __m512) {
        if DOT {
            return op!(_mm256_storeu_si256(
                to.cast(),
                transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))
            ));
        }
        op!({
            let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(Self::round_bf16(x)));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(high))
        })
    }

    #[inline(always)]
    unsafe fn load_firsts(from: *const bf16) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(from.cast()))))
    }

    #[inline(always)]
    unsafe fn load_seconds(from: *const bf16) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_and_si512(
            _mm512_loadu_si512(from.cast()),
            _mm512_set1_epi32(!0xffff)
        )))
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const bf16) -> __m512 {
        op!(_mm512_loadu_ps(from.cast()))
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const bf16) -> __m512 {
        op!(_mm512_castsi512_ps(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())))
    }

    #[inline(always)]
    fn dot(acc: __m512, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_dpbf16_ps(acc, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b)))
    }
}
