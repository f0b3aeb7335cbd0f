//! What loading reads of a checkpoint: whole requests, of which a backend makes matrices.

use std::borrow::Cow;

use kernels::SourceType;

use super::error::CheckpointError;
use super::unpack::PackedSlice;
use super::{Checkpoint, Target};
use crate::names::Tensor;
use crate::weights::{Block, Piece, Request};

impl Checkpoint {
    /// Reads what a request says; `buffer` is memory to use.
    pub(crate) fn piece(
        &self,
        request: &Request,
        buffer: Vec<u8>,
    ) -> Result<Piece<'static>, CheckpointError> {
        match request {
            Request::Rows { parts, padding } => {
                let sizes = parts.iter().map(|(tensor, rows)| {
                    let [_, cols] = self.shape(*tensor);
                    Ok((self.dtype(*tensor)?, rows.len() + padding, cols))
                });
                let (blocks, mut bytes) = room(sizes, buffer)?;
                for ((tensor, rows), block) in parts.iter().zip(&blocks) {
                    let row_bytes = block.cols * block.dtype.size();
                    let (data, zeros) = bytes[block.start..block.end()].split_at_mut(rows.len() * row_bytes);
                    zeros.fill(0);
                    let target = Target { cols: 0..block.cols, bytes: data, row_bytes };
                    self.read_plain(*tensor, rows.clone(), &mut [target])?;
                }
                Ok(Piece::Plain { bytes: Cow::Owned(bytes), matrices: vec![blocks] })
            }
            Request::Columns { tensor, runs } => {
                let (dtype, [rows, _]) = (self.dtype(*tensor)?, self.shape(*tensor));
                let sizes = runs.iter().map(|(run, padding)| Ok((dtype, rows, run.len() + padding)));
                let (blocks, mut bytes) = room(sizes, buffer)?;
                if runs.iter().any(|(_, padding)| *padding > 0) {
                    bytes[..blocks.last().map_or(0, Block::end)].fill(0);
                }
                let mut rest = &mut bytes[..];
                let mut targets = Vec::new();
                for ((run, _), block) in runs.iter().zip(&blocks) {
                    let (bytes, behind) = rest.split_at_mut(block.end() - block.start);
                    rest = behind;
                    targets.push(Target { cols: run.clone(), bytes, row_bytes: block.cols * dtype.size() });
                }
                self.read_plain(*tensor, 0..rows, &mut targets)?;
                let matrices = blocks.into_iter().map(|block| vec![block]).collect();
                Ok(Piece::Plain { bytes: Cow::Owned(bytes), matrices })
            }
            Request::QuantizedRows { parts } => {
                let slices = parts
                    .iter()
                    .map(|(tensor, runs)| {
                        let [_, cols] = self.shape(*tensor);
                        self.read_quantized(*tensor, runs, 0..cols)
                    })
                    .collect::<Result<Vec<_>, _>>()?;
                let units = slices.iter().map(Vec::len).min().unwrap_or(0);
                let whole = |slice: &PackedSlice| slice.unpack(slice.group_size());
                let of_unit = |unit: usize| slices.iter().map(|slices| whole(&slices[unit])).collect();
                Ok(Piece::Quantized((0..units).map(of_unit).collect()))
            }
            Request::QuantizedColumns { tensor, run, group_size } => {
                let [rows, _] = self.shape(*tensor);
                let slices = self.read_quantized(*tensor, std::slice::from_ref(&(0..rows)), run.clone())?;
                Ok(Piece::Quantized(vec![slices.iter().map(|slice| slice.unpack(*group_size)).collect()]))
            }
        }
    }

    fn read_plain(
        &self,
        tensor: Tensor,
        rows: std::ops::Range<usize>,
        targets: &mut [Target<'_>],
    ) -> Result<(), CheckpointError> {
        self.read_into(self.place(tensor)?.0, || tensor.name(self.naming), rows, targets)
    }
}

/// Places blocks, of types, rows and columns, one behind the other in `buffer`, which gets as long as they are.
fn room(
    sizes: impl Iterator<Item = Result<(SourceType, usize, usize), CheckpointError>>,
    mut buffer: Vec<u8>,
) -> Result<(Vec<Block>, Vec<u8>), CheckpointError> {
    let mut end = 0;
    let blocks = sizes
        .map(|size| {
            let (dtype, rows, cols) = size?;
            let block = Block { start: end, dtype, rows, cols };
            end = block.end();
            Ok(block)
        })
        .collect::<Result<_, CheckpointError>>()?;
    // Never cut: what is cut is filled with zeros when it is needed again.
    if buffer.len() < end {
        buffer.resize(end, 0);
    }
    Ok((blocks, buffer))
}
