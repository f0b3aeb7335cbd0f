//! Weights on the GPU, in the formats of `weights.cuh`.

use std::cell::RefCell;

use half::{bf16, f16};

use super::device::{Arguments, Launch};
use super::memory::{Arena, Region, Scratch};
use crate::{Error, Result, RowBlock, SourceType};

/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// Rows of bf16 are padded to so many elements.
const BF16_PADDING: usize = 64;
const PACK_THREADS: usize = 256;

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
    /// Stacks blocks of the same k, and packs them on the device.
    pub(crate) fn upload(
        arena: &Arena,
        staging: &RefCell<Scratch>,
        blocks: &[RowBlock<'_>],
        n: usize,
        k: usize,
    ) -> Result<Self> {
        if !k.is_multiple_of(8) {
            return Err(Error::Unsupported(format!(
                "a weight of [{n}, {k}] does not suit the GPU's kernels: k must be a multiple of 8"
            )));
        }
        let mut rows = Vec::with_capacity(n * k * 2);
        for block in blocks {
            append_bf16(block.bytes, block.dtype, &mut rows);
        }
        let bytes = n.div_ceil(TILE_ROWS) * k.div_ceil(BF16_PADDING) * TILE_ROWS * BF16_PADDING * 2;
        let weights = arena.region("weights", bytes)?;
        let staged = staging.borrow_mut().reserve(rows.len())?;
        arena.copy(staged, &rows)?;
        let launch = Launch {
            grid: (bytes.div_ceil(16 * PACK_THREADS) as u32, 1),
            threads: PACK_THREADS as u32,
            shared_bytes: 0,
        };
        let arguments =
            Arguments::default().with(staged).with(n as i32).with(k as i32).with(weights.pointer());
        // SAFETY: the region is as large as the packed matrix, the staged rows are n · k; see pack.cu.
        unsafe { arena.device().launch("pack_bf16", launch, arguments) }?;
        Ok(Self { format: Format::Bf16, weights, n, k, bytes })
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
