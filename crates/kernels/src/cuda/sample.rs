//! Choosing tokens on the device (see sample.cu).

use super::buffer::Buffer;
use super::device::{Arguments, Device, Launch};
use crate::Result;

/// Threads of a row.
const THREADS: u32 = 1024;

/// `draws`: six words for each row (see `step`); `out`: two words for each row.
pub(crate) fn sample(device: &Device, rows: usize, logits: &Buffer, draws: u64, out: u64) -> Result<()> {
    let launch = Launch { grid: (rows as u32, 1), threads: THREADS, shared_bytes: 0 };
    let arguments =
        Arguments::default().with(logits.pointer()).with(logits.dims().cols as i32).with(draws).with(out);
    // SAFETY: sizes were checked by `shape`; the step has that many rows of words, and results have room.
    unsafe { device.launch("sample", launch, arguments) }
}
