//! Weights on the GPU, in the formats of `weights.cuh`.

use half::{bf16, f16};

use super::arena::Region;
use crate::SourceType;

/// Rows of a tile, to a multiple of which rows are padded.
const TILE_ROWS: usize = 16;

/// How a weight's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    /// As they are.
    Bf16,
    /// 8 bits, with a zero point and a scale for each row and group of columns.
    Int8,
    /// Likewise, 4 bits.
    Int4,
    /// E4M3, with a scale for each row.
    Fp8,
}

impl Format {
    /// Bytes of the values of `[n, k]`, padding included.
    pub(crate) fn value_bytes(self, n: usize, k: usize) -> usize {
        let (bits, padded_k) = match self {
            Self::Bf16 => (16, k.next_multiple_of(64)),
            Self::Int8 | Self::Fp8 => (8, k.next_multiple_of(128)),
            Self::Int4 => (4, k.next_multiple_of(128)),
        };
        padded_rows(n) * padded_k * bits / 8
    }
}

/// Rows of the tiles that hold `n` rows.
pub(crate) fn padded_rows(n: usize) -> usize {
    n.next_multiple_of(TILE_ROWS)
}

/// A weight `[n, k]`.
#[derive(Debug)]
pub struct Matrix {
    pub(crate) format: Format,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) weights: Region,
    /// Of rows, or of groups of rows, where the format has them.
    pub(crate) scales: Option<Region>,
    pub(crate) zeros: Option<Region>,
    /// Bytes that a product reads.
    pub(crate) bytes: usize,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_take_what_the_tiles_take() {
        // Tiles of 16 rows, lines of 1 KiB.
        assert_eq!(Format::Bf16.value_bytes(17, 65), 2 * 4 * 1024);
        assert_eq!(Format::Int8.value_bytes(16, 129), 4 * 1024);
        assert_eq!(Format::Fp8.value_bytes(1, 8), 2 * 1024);
        assert_eq!(Format::Int4.value_bytes(33, 256), 3 * 2 * 1024);
    }
}
