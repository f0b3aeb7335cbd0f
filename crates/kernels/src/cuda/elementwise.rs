//! Norms, and what works element by element: embedding, gate, copies of rows. One block for each row, or several.

use bytemuck::{Pod, Zeroable};

use super::buffer::{Buffer, Table};
use super::device::{Arguments, Device, Launch};
use super::fold::MAX_UNITS;
use super::memory::Memory;
use crate::{DType, Error, Result};

const THREADS: usize = 256;
/// Threads of a norm's block.
const NORM_THREADS: u32 = 512;
/// Elements that a thread does.
const PER_THREAD: usize = 4;

/// Where each unit's columns begin (see elementwise.cu).
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Widths {
    count: i32,
    first: [i32; MAX_UNITS + 1],
}

fn rows_of(rows: usize, cols: usize) -> Launch {
    let blocks = cols.div_ceil(THREADS * PER_THREAD).max(1);
    Launch { grid: (rows as u32, blocks as u32), threads: THREADS as u32, shared_bytes: 0 }
}

fn whole_rows(rows: usize) -> Launch {
    Launch { grid: (rows as u32, 1), threads: NORM_THREADS, shared_bytes: 0 }
}

/// `tokens`: a word for each row (see `step`); `last_sampled`: an id for each slot.
pub(crate) fn embed(
    device: &Device,
    rows: usize,
    tokens: u64,
    last_sampled: &Memory,
    table: &Table,
    out: &Buffer,
) -> Result<()> {
    let arguments = Arguments::default()
        .with(tokens)
        .with(last_sampled.pointer())
        .with(table.rows.pointer())
        .with(table.first_id as u32)
        .with(table.count as u32)
        .with(table.cols as i32)
        .with(out.pointer());
    // SAFETY: sizes were checked by `shape`.
    unsafe { device.launch_early("embed", rows_of(rows, table.cols), arguments) }
}

pub(crate) fn rms_norm(
    device: &Device,
    rows: usize,
    x: &Buffer,
    weight: &Buffer,
    eps: f32,
    out: &Buffer,
) -> Result<()> {
    let arguments = Arguments::default()
        .with(x.pointer())
        .with(weight.pointer())
        .with(x.dims().cols as i32)
        .with(eps)
        .with(out.pointer());
    // SAFETY: sizes were checked by `shape`.
    unsafe { device.launch_early("rms_norm", whole_rows(rows), arguments) }
}

pub(crate) fn add_rms_norm(
    device: &Device,
    rows: usize,
    x: &Buffer,
    residual: &Buffer,
    weight: &Buffer,
    eps: f32,
    out: &Buffer,
) -> Result<()> {
    let arguments = Arguments::default()
        .with(x.pointer())
        .with(residual.pointer())
        .with(weight.pointer())
        .with(x.dims().cols as i32)
        .with(eps)
        .with(out.pointer());
    // SAFETY: sizes were checked by `shape`.
    unsafe { device.launch_early("add_rms_norm", whole_rows(rows), arguments) }
}

pub(crate) fn silu_mul(
    device: &Device,
    rows: usize,
    gate_up: &Buffer,
    widths: &[usize],
    out: &Buffer,
) -> Result<()> {
    if widths.len() > MAX_UNITS {
        let count = widths.len();
        return Err(Error::Unsupported(format!("{count} units on one GPU: its kernels take {MAX_UNITS}")));
    }
    let mut table = Widths { count: widths.len() as i32, first: [0; MAX_UNITS + 1] };
    let mut total = 0;
    for (first, width) in table.first[1..].iter_mut().zip(widths) {
        total += width;
        *first = total as i32;
    }
    let arguments = Arguments::default().with(gate_up.pointer()).with(table).with(out.pointer());
    // SAFETY: sizes were checked by `shape`.
    unsafe { device.launch_early("silu_mul", rows_of(rows, total), arguments) }
}

pub(crate) fn gather_rows(device: &Device, rows: usize, ids: u64, x: &Buffer, out: &Buffer) -> Result<()> {
    let cols = x.dims().cols;
    let kernel = match x.dims().dtype {
        DType::F32 => "gather_rows_4",
        DType::Bf16 => "gather_rows_2",
    };
    let arguments = Arguments::default().with(ids).with(x.pointer()).with(cols as i32).with(out.pointer());
    // SAFETY: sizes were checked by `shape`.
    unsafe { device.launch_early(kernel, rows_of(rows, cols), arguments) }
}
