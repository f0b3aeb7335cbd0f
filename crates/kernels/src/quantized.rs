//! Weights quantised in groups along k, in the neutral form that a loader hands to a backend.

use crate::{DType, Error, Result, RowBlock, SourceType};

/// Rows of a weight quantised in groups: element `[row][col]` stands for `(value − zero) · scale`, with the zero point and the
/// scale that its row has for group `col / group_size`.
///
/// Values and zeros are one a byte whatever their bits, row-major, so that a backend can pack them as its kernels like. With
/// scales that were IEEE half precision, as in published checkpoints, every element is exact in f32: the difference has at most
/// 9 bits and the scale 11.
#[derive(Debug, Clone, Copy)]
pub struct QuantizedBlock<'a> {
    /// Bits of a value and of a zero point: 4 or 8.
    pub bits: usize,
    /// Columns of a group, counted from column 0; the last group may be shorter.
    pub group_size: usize,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// `[rows][cols]`, each below 2^bits.
    pub values: &'a [u8],
    /// `[rows][groups]`, all finite.
    pub scales: &'a [f32],
    /// `[rows][groups]`, each below 2^bits.
    pub zeros: &'a [u8],
}

impl QuantizedBlock<'_> {
    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group_size.max(1))
    }

    /// The elements as numbers of `dtype`: little-endian, dense, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] where sizes do not fit together.
    pub fn dequantize(&self, dtype: DType) -> Result<Vec<u8>> {
        self.check()?;
        Ok(match dtype {
            DType::F32 => self.elements(f32::to_le_bytes),
            DType::Bf16 => self.elements(|x| bf16_bits(x).to_le_bytes()),
        })
    }

    /// Every element, each of N bytes.
    fn elements<const N: usize>(&self, bytes_of: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        let cols = self.cols.max(1);
        let mut bytes = vec![[0; N]; self.values.len()];
        let outputs = bytes.chunks_mut(cols).flat_map(|row| row.chunks_mut(self.group_size));
        let groups = self.values.chunks(cols).flat_map(|row| row.chunks(self.group_size));
        for (((out, values), &scale), &zero) in outputs.zip(groups).zip(self.scales).zip(self.zeros) {
            for (out, &value) in out.iter_mut().zip(values) {
                *out = bytes_of(f32::from(i16::from(value) - i16::from(zero)) * scale);
            }
        }
        bytes.into_flattened()
    }

    fn check(&self) -> Result<()> {
        let require = |holds, detail: &dyn Fn() -> String| {
            if holds { Ok(()) } else { Err(Error::Shape { op: "quantized_matrix", detail: detail() }) }
        };
        require(matches!(self.bits, 4 | 8), &|| format!("{} bits, wanted 4 or 8", self.bits))?;
        require(self.group_size > 0, &|| "groups of no columns".into())?;
        for (name, found, of_row) in [
            ("values", self.values.len(), self.cols),
            ("scales", self.scales.len(), self.groups()),
            ("zeros", self.zeros.len(), self.groups()),
        ] {
            require(self.rows.checked_mul(of_row) == Some(found), &|| {
                format!("{found} {name} for {} rows of {of_row}", self.rows)
            })?;
        }
        require(self.scales.iter().all(|scale| scale.is_finite()), &|| "a scale that is not finite".into())?;
        let limit = u8::MAX >> (8 - self.bits);
        let above = |bytes: &[u8]| bytes.iter().fold(0, |most, &byte| most.max(byte)) > limit;
        require(!above(self.values) && !above(self.zeros), &|| format!("a value above {limit}"))
    }
}

/// A number that is not NaN in bf16, rounded to nearest even: what `half` does, but without a branch, so that it becomes vector code.
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Checks blocks that are to be stacked: each by itself, and all of one width, group size and number of bits. Returns (n, k).
///
/// # Errors
/// [`Error::Shape`]
pub(crate) fn stacked(blocks: &[QuantizedBlock<'_>]) -> Result<(usize, usize)> {
    let kind = |block: &QuantizedBlock<'_>| (block.cols, block.group_size, block.bits);
    blocks.iter().try_for_each(QuantizedBlock::check)?;
    if blocks.windows(2).any(|pair| kind(&pair[0]) != kind(&pair[1])) {
        let detail = "blocks of several widths, group sizes or bits".into();
        return Err(Error::Shape { op: "quantized_matrix", detail });
    }
    Ok((blocks.iter().map(|block| block.rows).sum(), blocks.first().map_or(0, |block| block.cols)))
}

/// Dequantises blocks to `dtype` and packs them by `matrix`: for backends without kernels for quantised weights.
///
/// # Errors
/// [`Error::Shape`], and those of `matrix`.
pub(crate) fn dequantized<M>(
    blocks: &[QuantizedBlock<'_>],
    dtype: DType,
    matrix: impl FnOnce(&[RowBlock<'_>]) -> Result<M>,
) -> Result<M> {
    stacked(blocks)?;
    let bytes = blocks.iter().map(|block| block.dequantize(dtype)).collect::<Result<Vec<_>>>()?;
    let dtype = match dtype {
        DType::F32 => SourceType::F32,
        DType::Bf16 => SourceType::Bf16,
    };
    let rows: Vec<_> = blocks
        .iter()
        .zip(&bytes)
        .map(|(block, bytes)| RowBlock { bytes, dtype, rows: block.rows, cols: block.cols })
        .collect();
    matrix(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, Cpu, Oracle};
    use half::bf16;
    use proptest::prelude::*;

    const VALUES: [u8; 10] = [0, 15, 8, 7, 1, 2, 3, 4, 5, 6];
    const SCALES: [f32; 6] = [0.5, 2.0, 0.0, 1.0, -1.0, 0.25];
    const ZEROS: [u8; 6] = [8, 7, 3, 0, 15, 6];
    /// Two rows of five columns in groups of two: the last group has one.
    const BLOCK: QuantizedBlock<'_> = QuantizedBlock {
        bits: 4,
        group_size: 2,
        rows: 2,
        cols: 5,
        values: &VALUES,
        scales: &SCALES,
        zeros: &ZEROS,
    };

    #[test]
    fn elements_are_value_minus_zero_times_scale() {
        let expected = [-4.0, 3.5, 2.0, 0.0, -0.0, 2.0, 3.0, 11.0, 10.0, 0.0f32];
        let bytes = BLOCK.dequantize(DType::F32).unwrap();
        let found: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(found, expected);
        let bytes = BLOCK.dequantize(DType::Bf16).unwrap();
        let found: Vec<f32> = bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn the_whole_range_of_eight_bits_is_exact() {
        let values: Vec<u8> = (0..=255).collect();
        let scale = half::f16::from_f32(0.001_234).to_f32();
        let (scales, zeros) = ([scale], [255]);
        let block = QuantizedBlock {
            bits: 8,
            group_size: 256,
            rows: 1,
            cols: 256,
            values: &values,
            scales: &scales,
            zeros: &zeros,
        };
        let bytes = block.dequantize(DType::F32).unwrap();
        for (value, b) in bytes.chunks(4).enumerate() {
            let exact = (value as f64 - 255.0) * f64::from(scale);
            assert_eq!(f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])), exact, "{value}");
        }
    }

    #[test]
    fn backends_take_blocks_stacked() {
        let block = QuantizedBlock { cols: 4, scales: &[1.0; 4], zeros: &[8; 4], values: &[9; 8], ..BLOCK };
        for dtype in [DType::F32, DType::Bf16] {
            let cpu = Cpu::new(1).unwrap();
            let matrix = cpu.quantized_matrix(&[block, block], dtype).unwrap();
            assert_eq!((matrix.n(), matrix.k()), (4, 4));
            let oracle = Oracle::default();
            let matrix = oracle.quantized_matrix(&[block, block], dtype).unwrap();
            assert_eq!(oracle.matrix_bytes(&matrix), 16 * dtype.size());
        }
    }

    #[test]
    fn blocks_that_do_not_fit_are_refused() {
        let faults = [
            (QuantizedBlock { bits: 3, ..BLOCK }, "3 bits"),
            (QuantizedBlock { group_size: 0, ..BLOCK }, "no columns"),
            (QuantizedBlock { group_size: 3, ..BLOCK }, "6 scales for 2 rows of 2"),
            (QuantizedBlock { rows: 3, ..BLOCK }, "10 values for 3 rows of 5"),
            (QuantizedBlock { rows: usize::MAX, ..BLOCK }, "values"),
            (QuantizedBlock { zeros: &ZEROS[1..], ..BLOCK }, "5 zeros"),
            (QuantizedBlock { scales: &[f32::NAN; 6], ..BLOCK }, "not finite"),
            (QuantizedBlock { zeros: &[16; 6], ..BLOCK }, "above 15"),
            (QuantizedBlock { values: &[16; 10], ..BLOCK }, "above 15"),
        ];
        for (block, expected) in faults {
            let message =
                Cpu::new(1).unwrap().quantized_matrix(&[block], DType::F32).unwrap_err().to_string();
            assert!(message.contains("quantized_matrix") && message.contains(expected), "{message}");
        }
        let other = QuantizedBlock { bits: 8, ..BLOCK };
        let message =
            Oracle::default().quantized_matrix(&[BLOCK, other], DType::F32).unwrap_err().to_string();
        assert!(message.contains("several"), "{message}");
    }

    proptest! {
        #[test]
        fn rounding_is_to_nearest_even(bits: u32) {
            let x = f32::from_bits(bits);
            prop_assume!(!x.is_nan());
            prop_assert_eq!(bf16_bits(x), bf16::from_f32(x).to_bits());
        }
    }
}
