//! What the ops work on, in the GPU's memory.

use std::rc::Rc;

use half::bf16;

use super::arena::Region;
use super::device::Device;
use super::memory::{ACTIVATIONS, KV_CACHE, Memory};
use crate::shape::{BLOCK, Dims, KvDims};
use crate::{DType, Error, Result};

/// An activation matrix `[rows, cols]`, row-major and dense.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    dims: Dims,
}

impl Buffer {
    pub(crate) fn zeroed(device: &Rc<Device>, dims: Dims) -> Result<Self> {
        let bytes = dims.rows * dims.cols * dims.dtype.size();
        Ok(Self { memory: Memory::zeroed(device, ACTIVATIONS, bytes)?, dims })
    }

    pub(crate) fn dims(&self) -> Dims {
        self.dims
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.memory.pointer()
    }

    pub(crate) fn device(&self) -> &Rc<Device> {
        self.memory.device()
    }

    /// The address of at least `len` elements of f32 on `device`.
    pub(crate) fn floats(&self, op: &'static str, device: &Rc<Device>, len: usize) -> Result<u64> {
        let Dims { dtype, rows, cols } = self.dims;
        if dtype == DType::F32 && rows * cols >= len && Rc::ptr_eq(self.device(), device) {
            return Ok(self.pointer());
        }
        let detail =
            format!("{len} elements of f32 on this GPU where a buffer is {dtype:?} [{rows}, {cols}]");
        Err(Error::Shape { op, detail })
    }

    /// The first `len` elements of an f32 buffer, when all that was begun before has ended.
    pub fn read(&self, len: usize) -> Result<Vec<f32>> {
        self.read_from(0, len)
    }

    /// Overwrites the first elements of an f32 buffer.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        self.memory.write(0, bytemuck::cast_slice(values))
    }

    /// The elements of a row, widened.
    pub fn row(&self, row: usize) -> Result<Vec<f32>> {
        self.read_from(row * self.dims.cols, self.dims.cols)
    }

    /// Sets a row, rounded to the buffer's type.
    pub fn set_row(&mut self, row: usize, values: &[f32]) -> Result<()> {
        let first = row * self.dims.cols * self.dims.dtype.size();
        match self.dims.dtype {
            DType::F32 => self.memory.write(first, bytemuck::cast_slice(values)),
            DType::Bf16 => {
                let rounded: Vec<u16> = values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
                self.memory.write(first, bytemuck::cast_slice(&rounded))
            }
        }
    }

    fn read_from(&self, first: usize, len: usize) -> Result<Vec<f32>> {
        let size = self.dims.dtype.size();
        let mut bytes = vec![0; len * size];
        self.memory.read(first * size, &mut bytes)?;
        let element = |bytes: &[u8]| match *bytes {
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
            _ => f32::NAN,
        };
        Ok(bytes.chunks_exact(size).map(element).collect())
    }
}

/// A run of embedding rows in bf16.
#[derive(Debug)]
pub struct Table {
    pub(crate) rows: Region,
    pub(crate) count: usize,
    pub(crate) cols: usize,
    pub(crate) first_id: usize,
}

/// Paged KV in bf16: `[layer][block][unit]`, of each the keys `[token][d]`, then the values `[d][token]`.
#[derive(Debug)]
pub struct KvCache {
    memory: Memory,
    pub(crate) dims: KvDims,
}

impl KvCache {
    pub(crate) fn zeroed(device: &Rc<Device>, dims: KvDims) -> Result<Self> {
        let bytes = dims.blocks * kv_block_bytes(dims);
        Ok(Self { memory: Memory::zeroed(device, KV_CACHE, bytes)?, dims })
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.memory.pointer()
    }
}

/// Bytes of one block, all layers together.
pub(crate) fn kv_block_bytes(dims: KvDims) -> usize {
    2 * dims.layers * dims.units * BLOCK * dims.head_dim * DType::Bf16.size()
}
