//! Quantised projections of a checkpoint: where their tensors lie, checks of them, and reading slices in their packed form.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::slice;

use half::{bf16, f16};
use kernels::SourceType;
use safetensors::Dtype;

use super::error::CheckpointError;
use super::header::Entry;
use super::unpack::{PackedSlice, covering, words, words_of_values};
use super::{Checkpoint, Place, check_shape, source_type};
use crate::config::{Config, Layout, Quantization};
use crate::names::{QuantizedPart, Tensor};

/// Bytes of a packed word, and of an element of `g_idx`.
const WORD_BYTES: usize = 4;

/// Where the tensors of the quantised projections lie.
#[derive(Debug, Default)]
pub(super) struct Packed {
    parts: HashMap<(Tensor, QuantizedPart), (Place, Element)>,
}

/// What a part's elements are.
#[derive(Debug, Clone, Copy)]
enum Element {
    /// int32
    Word,
    Number(SourceType),
}

impl Packed {
    /// Takes a part of a quantised projection that begins at byte `offset` of file number `file`; checks it against the config.
    pub(super) fn add(
        &mut self,
        (tensor, part): (Tensor, QuantizedPart),
        entry: &Entry,
        path: &Path,
        (file, offset): (usize, u64),
        (config, quantization): (&Config, Quantization),
    ) -> Result<(), CheckpointError> {
        let expected = stored_shape(tensor, part, config, quantization);
        check_shape(entry, expected.clone(), path)?;
        let element = match part {
            QuantizedPart::Scales | QuantizedPart::Bias => Element::Number(source_type(entry, path)?),
            _ if entry.dtype == Dtype::I32 => Element::Word,
            _ => return Err(CheckpointError::dtype(entry, path, "I32")),
        };
        let shape = match expected[..] {
            [rows, cols] => [rows, cols],
            _ => [1, expected.iter().product()],
        };
        self.parts
            .insert((tensor, part), (Place { file, offset, element_bytes: element.size(), shape }, element));
        Ok(())
    }

    /// The name of a part that a projection lacks.
    pub(super) fn missing(&self, tensor: Tensor, quantization: Quantization) -> Option<String> {
        let needed = QuantizedPart::ALL.into_iter().filter(|part| match part {
            QuantizedPart::Values | QuantizedPart::Zeros | QuantizedPart::Scales => true,
            QuantizedPart::GroupIndex => quantization.reordered,
            QuantizedPart::Bias => false,
        });
        let mut lacking = needed.filter(|part| !self.parts.contains_key(&(tensor, *part)));
        lacking.next().map(|part| tensor.part_name(part))
    }

    fn part(&self, tensor: Tensor, part: QuantizedPart) -> Option<(Place, Element)> {
        self.parts.get(&(tensor, part)).copied()
    }
}

impl Element {
    fn size(self) -> usize {
        match self {
            Element::Word => WORD_BYTES,
            Element::Number(dtype) => dtype.size(),
        }
    }
}

impl Checkpoint {
    /// Reads some runs of rows of a quantised projection `[n, k]`, each with the columns `cols`, in one pass over the file. What
    /// comes back is packed, about as large as in the file.
    pub(crate) fn read_quantized(
        &self,
        tensor: Tensor,
        runs: &[Range<usize>],
        cols: Range<usize>,
    ) -> Result<Vec<PackedSlice>, CheckpointError> {
        let [_, total_cols] = self.shape(tensor);
        let quantization = self.quantization(tensor).ok_or_else(|| self.missing(tensor.name(self.naming)))?;
        let group_size = quantization.group_of(total_cols);
        let of_groups = covering(&cols, group_size);
        let of_runs =
            |words: &dyn Fn(&Range<usize>) -> Range<usize>| runs.iter().map(words).collect::<Vec<_>>();
        let (word_rows, _) = words_of_values(quantization, &(0..0), &cols);
        let values = self.read_words(
            (tensor, QuantizedPart::Values),
            word_rows,
            &of_runs(&|run| words_of_values(quantization, run, &cols).1),
        )?;
        let zeros = self.read_words(
            (tensor, QuantizedPart::Zeros),
            of_groups.clone(),
            &of_runs(&|run| words(quantization, run)),
        )?;
        let scales = self.read_numbers((tensor, QuantizedPart::Scales), of_groups, runs)?;
        if scales.iter().flatten().any(|scale| !scale.is_finite()) {
            return Err(self.refuse(
                tensor,
                QuantizedPart::Scales,
                "has a scale that is not a finite number",
            ));
        }
        let slices = values.into_iter().zip(zeros).zip(scales).zip(runs);
        Ok(slices
            .map(|(((values, zeros), scales), rows)| PackedSlice {
                quantization,
                rows: rows.clone(),
                cols: cols.clone(),
                group_size,
                values,
                zeros,
                scales,
            })
            .collect())
    }

    /// Refuses projections whose columns are not in the order of their groups, and those with a bias.
    pub(super) fn check_quantized(
        &self,
        tensor: Tensor,
        quantization: Quantization,
    ) -> Result<(), CheckpointError> {
        let [rows, cols] = self.shape(tensor);
        if self.packed.part(tensor, QuantizedPart::GroupIndex).is_some() {
            let groups =
                self.read_words((tensor, QuantizedPart::GroupIndex), 0..1, slice::from_ref(&(0..cols)))?;
            let size = quantization.group_of(cols);
            if groups.iter().flatten().enumerate().any(|(column, &group)| group as usize != column / size) {
                return Err(self.refuse(
                    tensor,
                    QuantizedPart::GroupIndex,
                    "gives columns to groups out of order: checkpoints quantised with desc_act (act-order) are not supported",
                ));
            }
        }
        if self.packed.part(tensor, QuantizedPart::Bias).is_some() {
            let bias = self.read_numbers((tensor, QuantizedPart::Bias), 0..1, slice::from_ref(&(0..rows)))?;
            if bias.iter().flatten().any(|&number| number != 0.0) {
                return Err(self.refuse(
                    tensor,
                    QuantizedPart::Bias,
                    "is not all zeros: biases are not supported",
                ));
            }
        }
        Ok(())
    }

    /// That a part has contents that cannot be served.
    fn refuse(&self, tensor: Tensor, part: QuantizedPart, detail: &str) -> CheckpointError {
        let path = self.packed.part(tensor, part).map(|(place, _)| &self.weights.files[place.file].path);
        CheckpointError::Entry {
            path: path.unwrap_or(&self.weights.dir).clone(),
            tensor: tensor.part_name(part),
            detail: detail.to_owned(),
        }
    }

    fn read_words(
        &self,
        part: (Tensor, QuantizedPart),
        rows: Range<usize>,
        runs: &[Range<usize>],
    ) -> Result<Vec<Vec<u32>>, CheckpointError> {
        let (slices, _) = self.read_part(part, rows, runs)?;
        let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(slices.iter().map(|bytes| bytes.chunks_exact(WORD_BYTES).map(word).collect()).collect())
    }

    fn read_numbers(
        &self,
        part: (Tensor, QuantizedPart),
        rows: Range<usize>,
        runs: &[Range<usize>],
    ) -> Result<Vec<Vec<f32>>, CheckpointError> {
        let (slices, element) = self.read_part(part, rows, runs)?;
        let number = |b: &[u8]| match element {
            Element::Number(SourceType::F16) => f16::from_le_bytes([b[0], b[1]]).to_f32(),
            Element::Number(SourceType::Bf16) => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Element::Number(SourceType::F32) | Element::Word => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        };
        Ok(slices.iter().map(|bytes| bytes.chunks_exact(element.size()).map(number).collect()).collect())
    }

    fn read_part(
        &self,
        (tensor, part): (Tensor, QuantizedPart),
        rows: Range<usize>,
        runs: &[Range<usize>],
    ) -> Result<(Vec<Vec<u8>>, Element), CheckpointError> {
        let name = || tensor.part_name(part);
        let (place, element) = self.packed.part(tensor, part).ok_or_else(|| self.missing(name()))?;
        Ok((self.read_place(place, name, rows, runs)?, element))
    }
}

/// The dimensions that a part is stored with: see `unpack`.
pub(super) fn stored_shape(
    tensor: Tensor,
    part: QuantizedPart,
    config: &Config,
    quantization: Quantization,
) -> Vec<usize> {
    let [rows, cols] = tensor.shape(&config.shape);
    let per_word = quantization.per_word();
    match (part, quantization.layout) {
        (QuantizedPart::Values, Layout::Awq) => vec![cols, rows / per_word],
        (QuantizedPart::Values, Layout::Gptq | Layout::GptqV2) => vec![cols / per_word, rows],
        (QuantizedPart::Zeros, _) => vec![quantization.groups(cols), rows / per_word],
        (QuantizedPart::Scales, _) => vec![quantization.groups(cols), rows],
        (QuantizedPart::GroupIndex, _) => vec![cols],
        (QuantizedPart::Bias, _) => vec![rows],
    }
}

#[cfg(test)]
mod tests;
