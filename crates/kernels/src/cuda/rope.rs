//! Rotary embedding, and writing keys and values to the cache (see rope.cu).

use std::rc::Rc;

use super::buffer::{Buffer, KvCache};
use super::device::{Arguments, Device, Launch};
use super::memory::Memory;
use super::step::Plan;
use crate::Result;
use crate::shape::KvDims;

const TABLE_THREADS: usize = 256;
const WRITE_THREADS: u32 = 128;

/// The frequencies, on the device since their first use.
#[derive(Debug, Default)]
pub(crate) struct Frequencies {
    values: Vec<f64>,
    memory: Option<Memory>,
}

impl Frequencies {
    /// Their address: f64.
    pub(crate) fn on_device(&mut self, device: &Rc<Device>, values: &[f64]) -> Result<u64> {
        match &self.memory {
            Some(memory) if self.values == values => Ok(memory.pointer()),
            _ => {
                let memory = Memory::allocate(device, "frequencies", size_of_val(values))?;
                memory.write(0, bytemuck::cast_slice(values))?;
                self.values = values.to_vec();
                Ok(self.memory.insert(memory).pointer())
            }
        }
    }
}

/// Cosines and sines of every row's angles into `out`, f32 `[rows, 2 · frequencies]`.
pub(crate) fn rope_table(
    device: &Device,
    rows: usize,
    positions: u64,
    frequencies: u64,
    out: &Buffer,
) -> Result<()> {
    let half = out.dims().cols / 2;
    let blocks = (rows * half).div_ceil(TABLE_THREADS);
    let launch = Launch { grid: (blocks as u32, 1), threads: TABLE_THREADS as u32, shared_bytes: 0 };
    let arguments = Arguments::default()
        .with(positions)
        .with(frequencies)
        .with(rows as i32)
        .with(half as i32)
        .with(out.pointer());
    // SAFETY: sizes were checked by `shape`.
    unsafe { device.launch_early("rope_table", launch, arguments) }
}

/// One call of `rope_write_kv`.
pub(crate) struct Fresh<'a> {
    pub(crate) plan: &'a Plan,
    /// Address of the step's words.
    pub(crate) words: u64,
    pub(crate) qkv: &'a Buffer,
    pub(crate) rope: &'a Buffer,
    pub(crate) layer: usize,
    /// Query heads of a unit.
    pub(crate) group: usize,
}

impl Fresh<'_> {
    /// Writes keys and values to the cache and queries to `q`.
    pub(crate) fn write(&self, device: &Device, kv: &mut KvCache, q: &Buffer) -> Result<()> {
        let KvDims { units, head_dim, blocks, .. } = kv.dims;
        let parts = self.plan.parts;
        let word = |part: usize| self.words + 4 * part as u64;
        let launch = Launch {
            grid: (self.plan.sizes.rows as u32, units as u32),
            threads: WRITE_THREADS,
            shared_bytes: 0,
        };
        let arguments = Arguments::default()
            .with(self.qkv.pointer())
            .with(self.rope.pointer())
            .with(word(parts.positions))
            .with(word(parts.row_slice))
            .with(word(parts.table_offset))
            .with(word(parts.table))
            .with(kv.pointer())
            .with(self.layer as i32)
            .with(blocks as i32)
            .with(units as i32)
            .with(self.group as i32)
            .with(head_dim as i32)
            .with(q.pointer());
        // SAFETY: sizes were checked by `shape`, and so were the blocks of the step.
        unsafe { device.launch_early("rope_write_kv", launch, arguments) }
    }
}
