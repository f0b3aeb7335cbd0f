//! What the kernels need of an instruction set: they are written once over [`Isa`].
//!
//! Rust inlines `#[inline(always)]` code into a `#[target_feature]` function and compiles it there with that
//! function's instructions. So every kernel is `#[inline(always)]` all through, and enters by [`Isa::vectorize`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
use half::bf16;
pub(crate) use portable::Portable;

/// Work that is compiled once for every instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// Does the work; implementations are `#[inline(always)]`.
    fn run<I: Isa>(self) -> Self::Output;
}

/// Vectors of f32 lanes. Only code that runs under [`Isa::vectorize`] calls the other functions.
pub(crate) trait Isa: Copy + 'static {
    /// `LANES` f32 values.
    type Vector: Copy;
    /// Lanes of a vector; divides [`super::tile::PANEL`] / 2.
    const LANES: usize;
    /// The most rows that a matrix tile of two vectors' width may have and stay in registers.
    const TILE_ROWS: usize;
    /// Whether [`Isa::dot`] exists.
    const BF16_DOT: bool;

    /// Runs a kernel with this instruction set enabled.
    ///
    /// # Safety
    /// The CPU has the instruction set.
    unsafe fn vectorize<K: Kernel>(kernel: K) -> K::Output;

    /// All lanes alike.
    fn splat(x: f32) -> Self::Vector;
    /// `a + b`.
    fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a - b`.
    fn sub(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b`.
    fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a / b`.
    fn div(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b + c`, rounded once where the instruction set can.
    fn fma(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The greater; `b` if either is NaN.
    fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The smaller; `b` if either is NaN.
    fn min(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `x · 2^n`, for integral n in -200..=200.
    fn scale(x: Self::Vector, n: Self::Vector) -> Self::Vector;
    /// Every lane rounded to the nearest bf16.
    fn round_bf16(x: Self::Vector) -> Self::Vector;
    /// `x` in the first `count` lanes, `fill` in the others.
    fn keep_first(x: Self::Vector, count: usize, fill: f32) -> Self::Vector;

    /// Asks for a cache line that will be needed; any address will do.
    fn prefetch(from: *const u8);

    /// Loads `LANES` values.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// Stores `LANES` values.
    ///
    /// # Safety
    /// They are writable.
    unsafe fn store(to: *mut f32, x: Self::Vector);
    /// Loads and widens `LANES` values.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector;
    /// Rounds and stores `LANES` values.
    ///
    /// # Safety
    /// They are writable.
    unsafe fn store_bf16(to: *mut bf16, x: Self::Vector);
    /// Loads `LANES` pairs and widens the first of each.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_firsts(from: *const bf16) -> Self::Vector;
    /// Loads `LANES` pairs and widens the second of each.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_seconds(from: *const bf16) -> Self::Vector;
    /// `LANES` pairs of bf16, in the bits of a vector.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_pairs(from: *const bf16) -> Self::Vector;
    /// One pair of bf16 in every lane.
    ///
    /// # Safety
    /// It is readable.
    unsafe fn splat_pair(from: *const bf16) -> Self::Vector;
    /// `acc + a.first · b.first + a.second · b.second` of pairs of bf16; only if `BF16_DOT`.
    fn dot(acc: Self::Vector, a: Self::Vector, b: Self::Vector) -> Self::Vector;
}
