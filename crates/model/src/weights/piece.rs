//! Weights in the memory of the host, on their way from where they come from to a backend.

use std::borrow::Cow;

use kernels::{Backend, DType, RowBlock, SourceType};

use crate::checkpoint::QuantizedRows;
use crate::error::Result;

/// What was read for a request.
#[derive(Debug)]
pub(crate) enum Piece<'a> {
    /// Each matrix's blocks are stacked, and lie in `bytes`.
    Plain { bytes: Cow<'a, [u8]>, matrices: Vec<Vec<Block>> },
    /// Likewise, quantised.
    Quantized(Vec<Vec<QuantizedRows<'a>>>),
}

/// Where rows of a tensor lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Block {
    /// Of the first byte.
    pub(crate) start: usize,
    pub(crate) dtype: SourceType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Block {
    /// Of the byte behind the last.
    pub(crate) fn end(&self) -> usize {
        self.start + self.rows * self.cols * self.dtype.size()
    }

    fn of<'b>(&self, bytes: &'b [u8]) -> RowBlock<'b> {
        let Self { start, dtype, rows, cols } = *self;
        RowBlock { bytes: &bytes[start..self.end()], dtype, rows, cols }
    }
}

impl Piece<'_> {
    /// Packs its matrices.
    pub(crate) fn matrices<B: Backend>(&self, backend: &B, dtype: DType) -> Result<Vec<B::Matrix>> {
        match self {
            Self::Plain { bytes, matrices } => matrices
                .iter()
                .map(|blocks| {
                    let blocks: Vec<_> = blocks.iter().map(|block| block.of(bytes)).collect();
                    Ok(backend.matrix(&blocks, dtype)?)
                })
                .collect(),
            Self::Quantized(matrices) => matrices
                .iter()
                .map(|rows| {
                    let blocks: Vec<_> = rows.iter().map(QuantizedRows::block).collect();
                    Ok(backend.quantized_matrix(&blocks, dtype)?)
                })
                .collect(),
        }
    }

    /// The rows of the only block of its only matrix: none where it is quantised.
    pub(crate) fn rows(&self) -> RowBlock<'_> {
        match self {
            Self::Plain { bytes, matrices } => match matrices.iter().flatten().next() {
                Some(block) => block.of(bytes),
                None => NO_ROWS,
            },
            Self::Quantized(_) => NO_ROWS,
        }
    }

    /// The memory that its bytes lie in, to be used again.
    pub(crate) fn into_buffer(self) -> Vec<u8> {
        match self {
            Self::Plain { bytes: Cow::Owned(buffer), .. } => buffer,
            _ => Vec::new(),
        }
    }
}

const NO_ROWS: RowBlock<'static> = RowBlock { bytes: &[], dtype: SourceType::Bf16, rows: 0, cols: 0 };
