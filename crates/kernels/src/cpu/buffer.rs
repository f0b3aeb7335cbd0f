//! Activations and embedding rows: dense row-major matrices.

use half::bf16;

use super::memory::{Memory, Shared};
use crate::{DType, HostBuffer, Result, RowBlock, SourceType};

/// An activation matrix `[rows, cols]`.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Buffer {
    /// Zeros.
    pub(crate) fn zeroed(dtype: DType, rows: usize, cols: usize) -> Result<Self> {
        let bytes = rows.saturating_mul(cols).saturating_mul(dtype.size());
        Ok(Buffer { memory: Memory::zeroed(bytes, "an activation buffer")?, dtype, rows, cols })
    }

    /// The elements' type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// How many rows it can hold.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements of a row, widened.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let range = row * self.cols..(row + 1) * self.cols;
        match self.elements() {
            Elements::F32(x) => x[range].to_vec(),
            Elements::Bf16(x) => x[range].iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// Sets a row, rounded to the buffer's type.
    pub fn set_row(&mut self, row: usize, values: &[f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match self.dtype {
            DType::F32 => self.memory.as_mut_slice()[range].copy_from_slice(values),
            DType::Bf16 => {
                let to = &mut self.memory.as_mut_slice::<bf16>()[range];
                to.iter_mut().zip(values).for_each(|(to, &value)| *to = bf16::from_f32(value));
            }
        }
    }

    /// The elements by type.
    pub(crate) fn elements(&self) -> Elements<'_> {
        let count = self.rows * self.cols;
        match self.dtype {
            DType::F32 => Elements::F32(&self.memory.as_slice()[..count]),
            DType::Bf16 => Elements::Bf16(&self.memory.as_slice()[..count]),
        }
    }

    /// The elements, for the threads of a job to write disjoint parts of.
    pub(crate) fn shared(&mut self) -> SharedElements {
        match self.dtype {
            DType::F32 => SharedElements::F32(self.memory.shared()),
            DType::Bf16 => SharedElements::Bf16(self.memory.shared()),
        }
    }
}

impl HostBuffer for Buffer {
    fn as_f32(&self) -> Option<&[f32]> {
        match self.elements() {
            Elements::F32(elements) => Some(elements),
            Elements::Bf16(_) => None,
        }
    }

    fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        let count = self.rows * self.cols;
        (self.dtype == DType::F32).then(|| &mut self.memory.as_mut_slice()[..count])
    }
}

/// A buffer's elements by type.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// A buffer's elements by type, to write.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SharedElements {
    F32(Shared<f32>),
    Bf16(Shared<bf16>),
}

/// A run of embedding rows.
#[derive(Debug)]
pub struct Table {
    pub(crate) rows: Buffer,
    pub(crate) first_id: usize,
}

/// Element `index` of a checkpoint's bytes.
#[inline(always)]
pub(crate) fn source_f32(block: &RowBlock<'_>, index: usize) -> f32 {
    let at = index * block.dtype.size();
    match block.dtype {
        SourceType::F32 => {
            let b = &block.bytes[at..at + 4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        SourceType::F16 => half::f16::from_le_bytes([block.bytes[at], block.bytes[at + 1]]).to_f32(),
        SourceType::Bf16 => bf16::from_le_bytes([block.bytes[at], block.bytes[at + 1]]).to_f32(),
    }
}
