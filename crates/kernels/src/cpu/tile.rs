//! The one microkernel under matrices and attention: a tile of a few rows times a panel of 32 columns.
//!
//! A panel holds 32 columns with k outside: f32 as `[k][32]`, bf16 as `[k/2][32][2]`, so that a vector of 16 pairs
//! feeds 16 columns with two k each. A row tile is row-major, its rows [`SPAN`] elements apart.
//!
//! Every output has one accumulator and sums over k strictly in order, two k at a time where bf16 pairs are
//! dotted. Accumulators go through f32 memory between calls, which changes no bit. So neither the number of rows
//! nor the cut of k into calls can be seen in a result.

use half::bf16;

use super::isa::{Isa, Kernel};
use super::vector::Number;

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

/// Distance of a row tile's rows, and the most k that one call takes: a bf16 panel's share of it fills 32 KiB of
/// L1, and 512 keys are a span of attention.
pub(crate) const SPAN: usize = 512;

/// How rows of one type meet panels of another.
pub(crate) trait Product: 'static {
    /// Elements of the row tile.
    type Row: Number;
    /// Elements of the panel.
    type Panel: Number;
    /// Adds the products of two k.
    ///
    /// # Safety
    /// `rows` has `ROWS` rows of two readable elements, `panel` two columns' vectors of two k; runs under
    /// `I::vectorize`.
    unsafe fn step<I: Isa, const ROWS: usize>(
        sums: &mut [[I::Vector; 2]; ROWS],
        rows: *const Self::Row,
        panel: *const Self::Panel,
    );
}

/// bf16 times bf16 by dot products of pairs.
pub(crate) struct Dot;
/// f32 times bf16, widened.
pub(crate) struct Widened;
/// f32 times f32.
pub(crate) struct Single;

impl Product for Dot {
    type Row = bf16;
    type Panel = bf16;

    #[inline(always)]
    unsafe fn step<I: Isa, const ROWS: usize>(
        sums: &mut [[I::Vector; 2]; ROWS],
        rows: *const bf16,
        panel: *const bf16,
    ) {
        // SAFETY: by this function's contract.
        unsafe {
            let columns = [I::load_pairs(panel), I::load_pairs(panel.add(2 * I::LANES))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let row = I::splat_pair(rows.add(r * SPAN));
                sums[0] = I::dot(sums[0], row, columns[0]);
                sums[1] = I::dot(sums[1], row, columns[1]);
            }
        }
    }
}

impl Product for Widened {
    type Row = f32;
    type Panel = bf16;

    #[inline(always)]
    unsafe fn step<I: Isa, const ROWS: usize>(
        sums: &mut [[I::Vector; 2]; ROWS],
        rows: *const f32,
        panel: *const bf16,
    ) {
        // SAFETY: by this function's contract.
        unsafe {
            let second = panel.add(2 * I::LANES);
            multiply_add::<I, ROWS>(sums, rows, [I::load_firsts(panel), I::load_firsts(second)]);
            multiply_add::<I, ROWS>(sums, rows.add(1), [I::load_seconds(panel), I::load_seconds(second)]);
        }
    }
}

impl Product for Single {
    type Row = f32;
    type Panel = f32;

    #[inline(always)]
    unsafe fn step<I: Isa, const ROWS: usize>(
        sums: &mut [[I::Vector; 2]; ROWS],
        rows: *const f32,
        panel: *const f32,
    ) {
        // SAFETY: by this function's contract.
        unsafe {
            multiply_add::<I, ROWS>(sums, rows, [I::load(panel), I::load(panel.add(I::LANES))]);
            let panel = panel.add(PANEL);
            multiply_add::<I, ROWS>(sums, rows.add(1), [I::load(panel), I::load(panel.add(I::LANES))]);
        }
    }
}

/// Adds the products of one k.
///
/// # Safety
/// `rows` has `ROWS` readable rows.
#[inline(always)]
unsafe fn multiply_add<I: Isa, const ROWS: usize>(
    sums: &mut [[I::Vector; 2]; ROWS],
    rows: *const f32,
    columns: [I::Vector; 2],
) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: by this function's contract.
        let row = I::splat(unsafe { *rows.add(r * SPAN) });
        sums[0] = I::fma(row, columns[0], sums[0]);
        sums[1] = I::fma(row, columns[1], sums[1]);
    }
}

/// A row tile times (part of) a panel.
pub(crate) struct Tile<'a, P: Product> {
    /// The first row's first element.
    pub rows: *const P::Row,
    /// Where the panel's k begin: the values of a span of keys lie in several blocks.
    pub panels: &'a [*const P::Panel],
    /// An offset that all of them have.
    pub offset: usize,
    /// Pairs of k in each panel but the last, which may have fewer.
    pub panel_pairs: usize,
    /// Pairs of k in all.
    pub pairs: usize,
    /// The first row's 32 sums.
    pub sums: *mut f32,
    /// Distance of the sums' rows.
    pub stride: usize,
    /// Whether sums start from zero; otherwise from what is in memory.
    pub fresh: bool,
    /// Bytes from a pair of k to what to prefetch with it: two cache lines of 64 bytes are as long as a pair in
    /// bf16. Zero prefetches nothing new.
    pub ahead: [usize; 2],
}

impl<P: Product> Tile<'_, P> {
    /// Multiplies `count` ≤ `I::TILE_ROWS` rows.
    ///
    /// # Safety
    /// `rows` has `count` rows of `2 · pairs` elements, `panels` that many k, and `sums` `count` rows of 32; runs
    /// under `I::vectorize`.
    #[inline(always)]
    pub(crate) unsafe fn multiply<I: Isa>(self, count: usize) {
        macro_rules! by_count {
            ($($rows:literal)*) => {
                match count {
                    // SAFETY: `I` is running already, and the rest is this function's contract.
                    $($rows if $rows <= I::TILE_ROWS => unsafe { I::vectorize(Rows::<P, $rows>(self)) },)*
                    _ => debug_assert!(count == 0, "a tile of {count} rows"),
                }
            };
        }
        by_count!(1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// A tile of a fixed number of rows: a function of its own for each.
struct Rows<'a, P: Product, const ROWS: usize>(Tile<'a, P>);

impl<P: Product, const ROWS: usize> Kernel for Rows<'_, P, ROWS> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let tile = self.0;
        // Two vectors of columns at a time, all of k each: k pairs are `2 · PANEL` panel elements apart.
        let mut column = 0;
        while column < PANEL {
            // SAFETY: by the contract of `Tile::multiply`; `column + 2 · LANES <= PANEL`.
            unsafe {
                let mut sums = [[I::splat(0.0); 2]; ROWS];
                let out = tile.sums.add(column);
                if !tile.fresh {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let row = out.add(r * tile.stride);
                        *sums = [I::load(row), I::load(row.add(I::LANES))];
                    }
                }
                let pair_width = if size_of::<P::Panel>() == 2 { 2 } else { 1 };
                let mut rows = tile.rows;
                let mut pairs = tile.pairs;
                for panel in tile.panels {
                    let mut panel = panel.add(tile.offset + column * pair_width);
                    for _ in 0..pairs.min(tile.panel_pairs) {
                        I::prefetch(panel.cast::<u8>().wrapping_add(tile.ahead[0]));
                        I::prefetch(panel.cast::<u8>().wrapping_add(tile.ahead[1]));
                        P::step::<I, ROWS>(&mut sums, rows, panel);
                        rows = rows.add(2);
                        panel = panel.add(2 * PANEL);
                    }
                    pairs = pairs.saturating_sub(tile.panel_pairs);
                }
                for (r, sums) in sums.iter().enumerate() {
                    let row = out.add(r * tile.stride);
                    I::store(row, sums[0]);
                    I::store(row.add(I::LANES), sums[1]);
                }
            }
            column += 2 * I::LANES;
        }
    }
}

/// [`Tile::ahead`] that brings in all of the panel at `next` while the one at `panel` is read.
#[inline(always)]
pub(crate) fn ahead<T>(panel: *const T, next: *const T) -> [usize; 2] {
    let distance = next.addr().wrapping_sub(panel.addr());
    [distance, distance.wrapping_add(64)]
}

/// Cuts `rows` into as few tiles of at most `most` rows as possible, of equal height but for one row, and gives the
/// bounds of tile `index`.
#[inline(always)]
pub(crate) fn even_part(rows: usize, most: usize, index: usize) -> std::ops::Range<usize> {
    let parts = rows.div_ceil(most);
    rows * index / parts..rows * (index + 1) / parts
}
