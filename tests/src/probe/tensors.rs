//! The files that the probe reads and writes.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kernels::{RowBlock, SourceType};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};

/// A file's tensors, by name.
pub(crate) struct Inputs<'a>(SafeTensors<'a>);

/// A matrix of numbers, row-major.
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) values: Vec<f32>,
}

impl<'a> Inputs<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self> {
        Ok(Self(SafeTensors::deserialize(bytes)?))
    }

    /// The bytes of a tensor of this type; of one without rows, the last dimension are its columns.
    fn tensor(&self, name: &str, dtypes: &[Dtype]) -> Result<(Dtype, [usize; 2], &'a [u8])> {
        let tensor = self.0.tensor(name).with_context(|| format!("input {name}"))?;
        let dtype = tensor.dtype();
        ensure!(dtypes.contains(&dtype), "input {name} is {dtype:?}, wanted {dtypes:?}");
        match *tensor.shape() {
            [cols] => Ok((dtype, [1, cols], tensor.data())),
            [rows, cols] => Ok((dtype, [rows, cols], tensor.data())),
            ref other => bail!("input {name} has the shape {other:?}, wanted one or two dimensions"),
        }
    }

    /// A matrix of F32 or BF16.
    pub(crate) fn matrix(&self, name: &str) -> Result<Matrix> {
        let (dtype, [rows, cols], bytes) = self.tensor(name, &[Dtype::F32, Dtype::BF16])?;
        let values = match dtype {
            Dtype::F32 => words(bytes).map(f32::from_le_bytes).collect(),
            _ => words(bytes).map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)).collect(),
        };
        Ok(Matrix { rows, cols, values })
    }

    /// A matrix as a checkpoint would have it: F32, F16 or BF16.
    pub(crate) fn block(&self, name: &str) -> Result<RowBlock<'a>> {
        let (dtype, [rows, cols], bytes) = self.tensor(name, &[Dtype::F32, Dtype::F16, Dtype::BF16])?;
        let dtype = match dtype {
            Dtype::F32 => SourceType::F32,
            Dtype::F16 => SourceType::F16,
            _ => SourceType::Bf16,
        };
        Ok(RowBlock { bytes, dtype, rows, cols })
    }

    /// A matrix of U8: its shape and elements.
    pub(crate) fn bytes(&self, name: &str) -> Result<([usize; 2], &'a [u8])> {
        let (_, shape, bytes) = self.tensor(name, &[Dtype::U8])?;
        Ok((shape, bytes))
    }

    /// Token ids, as I32.
    pub(crate) fn ids(&self, name: &str) -> Result<Vec<u32>> {
        let (_, _, bytes) = self.tensor(name, &[Dtype::I32])?;
        Ok(words(bytes).map(u32::from_le_bytes).collect())
    }

    /// Numbers of F64.
    pub(crate) fn doubles(&self, name: &str) -> Result<Vec<f64>> {
        let (_, _, bytes) = self.tensor(name, &[Dtype::F64])?;
        Ok(words(bytes).map(f64::from_le_bytes).collect())
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.as_chunks::<N>().0.iter().copied()
}

/// A file's tensors, to be written.
#[derive(Default)]
pub(crate) struct Outputs(Vec<Output>);

struct Output {
    name: String,
    dtype: Dtype,
    shape: [usize; 2],
    bytes: Vec<u8>,
}

impl Outputs {
    /// Rows of `cols` numbers, as F32.
    pub(crate) fn floats(&mut self, name: impl Into<String>, cols: usize, values: &[f32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.push(name.into(), Dtype::F32, [values.len() / cols.max(1), cols], bytes);
    }

    /// One row of token ids, as I32.
    pub(crate) fn ids(&mut self, name: impl Into<String>, values: &[u32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.push(name.into(), Dtype::I32, [1, values.len()], bytes);
    }

    fn push(&mut self, name: String, dtype: Dtype, shape: [usize; 2], bytes: Vec<u8>) {
        self.0.push(Output { name, dtype, shape, bytes });
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut views = Vec::new();
        for Output { name, dtype, shape, bytes } in &self.0 {
            let view =
                TensorView::new(*dtype, shape.to_vec(), bytes).with_context(|| format!("output {name}"))?;
            views.push((name, view));
        }
        serialize_to_file(views, None, path).with_context(|| path.display().to_string())
    }
}
