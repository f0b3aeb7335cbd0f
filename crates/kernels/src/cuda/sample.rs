//! Choosing tokens on the device, and keeping them by slot (see sample.cu).

use super::buffer::Buffer;
use super::device::{Arguments, Device, Launch};
use super::memory::Memory;
use crate::Result;

/// Threads of a row.
const THREADS: u32 = 1024;
/// Threads of a block that keeps what was chosen.
const KEEP_THREADS: u32 = 256;

/// What is chosen, and where it is kept.
#[derive(Debug)]
pub(crate) struct Kept<'a> {
    /// Sampled rows, padding included.
    pub(crate) rows: usize,
    /// A word for each row (see `step`).
    pub(crate) slots: u64,
    /// Two words for each row: the id, and the bits of its log-probability.
    pub(crate) chosen: &'a Buffer,
    /// An id for each slot.
    pub(crate) last: &'a Memory,
}

/// `draws`: six words for each row (see `step`).
pub(crate) fn sample(device: &Device, logits: &Buffer, draws: u64, kept: &Kept<'_>) -> Result<()> {
    let launch = Launch { grid: (kept.rows as u32, 1), threads: THREADS, shared_bytes: 0 };
    let arguments = Arguments::default()
        .with(logits.pointer())
        .with(logits.dims().cols as i32)
        .with(draws)
        .with(kept.slots)
        .with(kept.chosen.pointer())
        .with(kept.last.pointer());
    // SAFETY: sizes were checked by `shape`, and slots too; the step has that many rows of words.
    unsafe { device.launch_early("sample", launch, arguments) }
}

/// Keeps what another rank chose.
pub(crate) fn keep(device: &Device, kept: &Kept<'_>) -> Result<()> {
    let blocks = (kept.rows as u32).div_ceil(KEEP_THREADS);
    let launch = Launch { grid: (blocks, 1), threads: KEEP_THREADS, shared_bytes: 0 };
    let arguments = Arguments::default()
        .with(kept.chosen.pointer())
        .with(kept.rows as i32)
        .with(kept.slots)
        .with(kept.last.pointer());
    // SAFETY: as above.
    unsafe { device.launch_early("keep_sampled", launch, arguments) }
}
