//! Weights on the GPU, in the formats of `weights.cuh`.

use half::{bf16, f16};

use super::memory::{Arena, Region};
use crate::{Error, Result, RowBlock, SourceType};

/// Rows of bf16 are padded to so many elements.
const BF16_PADDING: usize = 32;

/// How a weight's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    /// As they are.
    Bf16,
}

/// A weight `[n, k]`.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) format: Format,
    pub(crate) weights: Region,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Bytes that a product reads.
    pub(crate) bytes: usize,
}

impl Matrix {
    /// Stacks blocks of the same k.
    pub(crate) fn upload(arena: &Arena, blocks: &[RowBlock<'_>], n: usize, k: usize) -> Result<Self> {
        if !k.is_multiple_of(8) {
            return Err(Error::Unsupported(format!(
                "a weight of [{n}, {k}] does not suit the GPU's kernels: k must be a multiple of 8"
            )));
        }
        let stride = k.next_multiple_of(BF16_PADDING);
        let mut bytes = Vec::with_capacity(n * stride * 2);
        for block in blocks {
            for row in block.bytes.chunks_exact(k * block.dtype.size()) {
                append_bf16(row, block.dtype, &mut bytes);
                bytes.resize(bytes.len() + (stride - k) * 2, 0);
            }
        }
        let weights = arena.upload("weights", &bytes)?;
        Ok(Self { format: Format::Bf16, weights, n, k, bytes: bytes.len() })
    }

    /// Elements from one row to the next (bf16).
    pub(crate) fn stride(&self) -> usize {
        self.k.next_multiple_of(BF16_PADDING)
    }
}

/// Appends a row of a checkpoint as bf16.
pub(crate) fn append_bf16(row: &[u8], dtype: SourceType, out: &mut Vec<u8>) {
    let mut push = |value: f32| out.extend(bf16::from_f32(value).to_le_bytes());
    match dtype {
        SourceType::Bf16 => out.extend_from_slice(row),
        SourceType::F16 => {
            row.as_chunks().0.iter().for_each(|&pair| push(f16::from_le_bytes(pair).to_f32()));
        }
        SourceType::F32 => row.as_chunks().0.iter().for_each(|&four| push(f32::from_le_bytes(four))),
    }
}

/// Elements of a checkpoint as f32.
pub(crate) fn widen(bytes: &[u8], dtype: SourceType) -> Vec<f32> {
    match dtype {
        SourceType::Bf16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        SourceType::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        SourceType::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}
