//! Where weights come from.

use kernels::SourceType;

use super::piece::Piece;
use super::random::RandomWeights;
use super::request::{Reading, Request};
use crate::checkpoint::Checkpoint;
use crate::config::Quantization;
use crate::error::Result;
use crate::names::Tensor;

/// A checkpoint, or nowhere: random numbers, for measuring models that one has not got.
#[derive(Debug)]
pub(crate) enum Origin {
    Checkpoint(Checkpoint),
    Random(RandomWeights),
}

impl Origin {
    /// How a tensor is quantised, if it is.
    pub(crate) fn quantization(&self, tensor: Tensor) -> Option<Quantization> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.quantization(tensor),
            Self::Random(random) => random.quantization(tensor),
        }
    }

    /// Bytes of an element of a tensor that is not quantised.
    pub(crate) fn element_bytes(&self, tensor: Tensor) -> usize {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.dtype(tensor).map_or(0, SourceType::size),
            Self::Random(_) => SourceType::Bf16.size(),
        }
    }

    /// Reads what a request says; `buffer` is memory to use.
    pub(crate) fn read(&self, request: &Request, buffer: Vec<u8>) -> Result<Piece<'_>> {
        match self {
            Self::Checkpoint(checkpoint) => Ok(checkpoint.piece(request, buffer)?),
            Self::Random(random) => Ok(random.piece(request)),
        }
    }

    /// Bytes that are read for a request, but for the scales and zero points of quantised tensors.
    pub(crate) fn bytes(&self, request: &Request) -> u64 {
        let bits = |tensor| match self.quantization(tensor) {
            Some(quantization) => quantization.bits,
            None => 8 * self.element_bytes(tensor),
        };
        let shape = |tensor| match self {
            Self::Checkpoint(checkpoint) => checkpoint.shape(tensor),
            Self::Random(random) => random.shape(tensor),
        };
        let slices = request.slices(shape).into_iter();
        slices.map(|(tensor, rows, cols)| (rows * cols * bits(tensor) / 8) as u64).sum()
    }

    /// Likewise, for several.
    pub(crate) fn bytes_of(&self, readings: &[Reading]) -> u64 {
        readings.iter().map(|reading| self.bytes(&reading.request)).sum()
    }
}
