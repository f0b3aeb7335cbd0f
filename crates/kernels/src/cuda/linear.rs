//! Matrix products: which kernel takes which sizes, and what it is told. Wide ones are those of `wide`, where they may be.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::arena::Region;
use super::buffer::Buffer;
use super::device::{Arguments, Device, Launch};
use super::fold::{FoldProgram, MAX_UNITS, Outputs, Parts, fold};
use super::matrix::{Format, Matrix};
use super::memory::Scratch;
use super::wide::{Operands, WIDE_ROWS, Wide};
use crate::{Error, Result};

/// A dot product is summed in segments of so many.
const SEGMENT: usize = 512;
/// Up to so many rows `gemv` serves.
const GEMV_ROWS: usize = 8;
/// Weight rows of a tile of `gemv`.
const GEMV_TILE: usize = 16;
/// The most warps that share a tile's segments.
const GEMV_WARPS: usize = 8;
/// Bytes of units' sums at a time: more rows are done in several turns.
pub(crate) const SUMS_BYTES: usize = 64 << 20;

/// One unit's matrix, as kernels take it (see `weights.cuh`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Panel {
    weights: u64,
    scales: u64,
    zeros: u64,
    out_offset: i64,
    n: i32,
    k: i32,
    x_offset: i32,
    padding: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Panels([Panel; MAX_UNITS]);

/// What products share.
pub(crate) struct Products<'a> {
    pub(crate) device: &'a Device,
    /// For units' sums.
    pub(crate) scratch: &'a mut Scratch,
    /// Unless bits are not to depend on the number of rows.
    pub(crate) wide: Option<&'a mut Wide>,
}

impl Products<'_> {
    /// `out[rows, Σn] = x · Wᵀ`, the weights' results side by side.
    pub(crate) fn column_parallel(
        &mut self,
        rows: usize,
        x: &Buffer,
        weights: &[Matrix],
        out: &Buffer,
    ) -> Result<()> {
        let out_cols = out.dims().cols;
        let (x_cols, x) = (x.dims().cols, x.pointer());
        let Some(format) = format(weights)? else { return Ok(()) };
        if rows >= WIDE_ROWS
            && let Some(wide) = &mut self.wide
        {
            let operands = Operands { rows, x, x_cols, out: out.pointer(), out_cols };
            // SAFETY: sizes were checked by `shape`; x and out begin where allocations do.
            return unsafe { wide.side_by_side(self.device, operands, weights) };
        }
        let mut first = 0;
        let panels = collect(weights.iter().map(|w| {
            let panel = panel(w, 0, first);
            first += w.n;
            panel
        }))?;
        let n = weights.iter().map(|w| w.n).max().unwrap_or(0);
        if rows <= GEMV_ROWS {
            let segments = weights.iter().map(|w| w.k.div_ceil(SEGMENT)).max().unwrap_or(1);
            let kernel = format.kernels().gemv;
            let gemv =
                Gemv { kernel, ring: format.kernels().gemv_ring, tiles: n.div_ceil(GEMV_TILE), segments };
            let launch = gemv.launch(self.device, weights.len(), rows)?;
            let arguments = Arguments::default()
                .with(panels)
                .with(weights.len() as i32)
                .with(gemv.tiles as i32)
                .with(segments as i32)
                .with(x)
                .with(rows as i32)
                .with(x_cols as i32)
                .with(out.pointer())
                .with(out_cols as i32);
            // SAFETY: sizes were checked by `shape`; see gemv.cu.
            return unsafe { self.device.launch_early(kernel, launch, arguments) };
        }
        // SAFETY: sizes were checked by `shape`.
        unsafe {
            self.gemm(format, panels, (rows, n, weights.len() as u32), (x, x_cols), (out.pointer(), out_cols))
        }
    }

    /// Every unit's product, added along the tree into `outputs` by `program`.
    pub(crate) fn row_parallel(
        &mut self,
        rows: usize,
        x: &Buffer,
        weights: &[Matrix],
        subtrees: &[(Range<usize>, u64)],
        first_unit: usize,
    ) -> Result<()> {
        let Some(format) = format(weights)? else { return Ok(()) };
        let (x_cols, x) = (x.dims().cols, x.pointer());
        let n = weights[0].n;
        if rows >= WIDE_ROWS
            && let Some(wide) = &mut self.wide
        {
            let mut x = x;
            for (units, out) in subtrees {
                let weights = &weights[units.start - first_unit..units.end - first_unit];
                let operands = Operands { rows, x, x_cols, out: *out, out_cols: n };
                // SAFETY: sizes were checked by `shape`, sub-trees tile the weights; k is a multiple of 8 columns of x.
                unsafe { wide.summed(self.device, operands, weights) }?;
                x += weights.iter().map(|w| w.k * 2).sum::<usize>() as u64;
            }
            return Ok(());
        }
        let leaves: Vec<_> = (first_unit..first_unit + weights.len()).map(|unit| unit..unit + 1).collect();
        let roots: Vec<_> = subtrees.iter().map(|(units, _)| units.clone()).collect();
        let program = FoldProgram::new(&leaves, &roots)?;
        if rows <= GEMV_ROWS {
            let mut first = 0;
            let panels = collect(weights.iter().map(|w| {
                let panel = panel(w, first, 0);
                first += w.k;
                panel
            }))?;
            let segments = weights.iter().map(|w| w.k.div_ceil(SEGMENT)).sum();
            let kernel = format.kernels().gemv_partials;
            let gemv =
                Gemv { kernel, ring: format.kernels().gemv_ring, tiles: n.div_ceil(GEMV_TILE), segments };
            let launch = gemv.launch(self.device, 1, rows)?;
            let arguments = Arguments::default()
                .with(panels)
                .with(program)
                .with(Outputs::new(subtrees.iter().map(|(_, out)| *out)))
                .with(gemv.tiles as i32)
                .with(segments as i32)
                .with(x)
                .with(rows as i32)
                .with(x_cols as i32);
            // SAFETY: sizes were checked by `shape`; see gemv.cu.
            return unsafe { self.device.launch_early(kernel, launch, arguments) };
        }
        let row_bytes = weights.len() * (n + 4) * 4;
        let turn = (SUMS_BYTES / row_bytes / 128 * 128).max(128).min(rows);
        let scratch = self.scratch.reserve(turn * row_bytes)?;
        for done in (0..rows).step_by(turn) {
            let rows = turn.min(rows - done);
            // `fold` reads 16 bytes at a time.
            let unit_elements = (rows * n).next_multiple_of(4);
            let mut first = 0;
            let panels = collect(weights.iter().enumerate().map(|(unit, w)| {
                let panel = panel(w, first, unit * unit_elements);
                first += w.k;
                panel
            }))?;
            let x = x + (done * x_cols * 2) as u64;
            // SAFETY: sizes were checked by `shape`; the scratch memory holds every unit's `[rows, n]`.
            unsafe { self.gemm(format, panels, (rows, n, weights.len() as u32), (x, x_cols), (scratch, n)) }?;
            let parts =
                Parts::new((0..weights.len()).map(|unit| scratch + (unit * unit_elements * 4) as u64));
            let outputs = Outputs::new(subtrees.iter().map(|(_, out)| out + (done * n * 4) as u64));
            // SAFETY: as above; `done` is a multiple of 128, so outputs stay aligned.
            unsafe { fold(self.device, parts, program, outputs, rows * n) }?;
        }
        Ok(())
    }

    /// # Safety
    /// `x` is `[rows, x_cols]` bf16, `out` has what the panels write.
    unsafe fn gemm(
        &self,
        format: Format,
        panels: Panels,
        (rows, n, count): (usize, usize, u32),
        (x, x_cols): (u64, usize),
        (out, out_cols): (u64, usize),
    ) -> Result<()> {
        let tile = format.kernels().tile(rows, self.device.shared_limit());
        let blocks = rows.div_ceil(tile.rows) * n.div_ceil(tile.weight_rows);
        let launch =
            Launch { grid: (blocks as u32, count), threads: tile.threads, shared_bytes: tile.shared_bytes };
        let arguments = Arguments::default()
            .with(panels)
            .with(x)
            .with(rows as i32)
            .with(x_cols as i32)
            .with(out)
            .with(out_cols as i32);
        // SAFETY: the caller's promise; see gemm.cu.
        unsafe { self.device.launch(tile.kernel, launch, arguments) }
    }
}

/// `x_offset`: the first of its columns of x; `out_offset`: elements to its first result.
pub(crate) fn panel(weight: &Matrix, x_offset: usize, out_offset: usize) -> Panel {
    Panel {
        weights: weight.weights.pointer(),
        scales: weight.scales.as_ref().map_or(0, Region::pointer),
        zeros: weight.zeros.as_ref().map_or(0, Region::pointer),
        out_offset: out_offset as i64,
        n: weight.n as i32,
        k: weight.k as i32,
        x_offset: x_offset as i32,
        padding: 0,
    }
}

fn collect(panels: impl ExactSizeIterator<Item = Panel>) -> Result<Panels> {
    let count = panels.len();
    if count > MAX_UNITS {
        return Err(Error::Unsupported(format!(
            "{count} units on one GPU: its kernels take {MAX_UNITS}; use more workers"
        )));
    }
    let mut all = Panels([Panel::zeroed(); MAX_UNITS]);
    all.0.iter_mut().zip(panels).for_each(|(to, panel)| *to = panel);
    Ok(all)
}

/// The one format of a run of weights; none where there are no weights.
fn format(weights: &[Matrix]) -> Result<Option<Format>> {
    let Some(first) = weights.first() else { return Ok(None) };
    if weights.iter().any(|w| w.format != first.format) {
        return Err(Error::Shape { op: "linear", detail: "weights of several formats".into() });
    }
    Ok(Some(first.format))
}

/// A product for a few rows.
struct Gemv {
    kernel: &'static str,
    /// Bytes of a warp's ring.
    ring: usize,
    /// Of the largest panel.
    tiles: usize,
    /// Of the largest panel, or of all that are summed.
    segments: usize,
}

impl Gemv {
    /// Blocks that stay, of warps that do a tile's segments in as few turns as can be.
    fn launch(&self, device: &Device, panels: usize, rows: usize) -> Result<Launch> {
        let segments = self.segments.max(1);
        let wanted = segments.div_ceil(segments.div_ceil(GEMV_WARPS));
        let sums = segments * rows * GEMV_TILE * size_of::<f32>();
        let room = (device.shared_limit() as usize).saturating_sub(sums) / self.ring;
        let warps = wanted.min(room.max(1));
        let (threads, shared_bytes) = (32 * warps as u32, (sums + warps * self.ring) as u32);
        let blocks = device.resident_blocks(self.kernel, threads, shared_bytes)?;
        Ok(Launch { grid: (blocks.min((self.tiles * panels) as u32), 1), threads, shared_bytes })
    }
}

/// What the kernels' loads of 16 bytes want of x.
pub(crate) fn check(x: &Buffer) -> Result<()> {
    let dims = x.dims();
    if dims.dtype == crate::DType::Bf16 && dims.cols.is_multiple_of(8) {
        return Ok(());
    }
    let found = format!("{} columns of {:?}", dims.cols, dims.dtype);
    Err(Error::Unsupported(format!("the GPU's products take bf16 and multiples of 8 columns, not {found}")))
}
