//! The op set on candle tensors, plain and slow: what every backend is tested against.
//!
//! Maths is in f32; where a buffer, a weight or the cache is bf16, its values are rounded to bf16 when stored.

use candle_core::{D, Device, Tensor};
use half::{bf16, f16};

use crate::host_sampler::HostSampler;
use crate::shape::{self, BLOCK, Dims, KvDims};
use crate::{
    Backend, Choice, DType, Error, HostBuffer, KvShape, Partial, Result, RowBlock, Slice, SourceType, Step,
    Tree,
};

/// The reference backend.
#[derive(Debug, Default)]
pub struct Oracle {
    sampler: HostSampler,
}

/// An activation matrix; bf16 as rounded f32.
#[derive(Debug, Clone)]
pub struct OracleBuffer {
    data: Vec<f32>,
    dims: Dims,
}

/// A weight `[n, k]`.
#[derive(Debug)]
pub struct OracleMatrix {
    weight: Tensor,
    n: usize,
    k: usize,
    dtype: DType,
}

/// A run of embedding rows.
#[derive(Debug)]
pub struct OracleTable {
    rows: OracleBuffer,
    first_id: usize,
}

/// Paged KV: `[layer][block][unit][token][d]`, keys and values apart.
#[derive(Debug)]
pub struct OracleKvCache {
    dims: KvDims,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl OracleBuffer {
    /// The elements of a row, widened.
    pub fn row(&self, row: usize) -> Vec<f32> {
        self.data[row * self.dims.cols..][..self.dims.cols].to_vec()
    }

    /// Sets a row, rounded to the buffer's type.
    pub fn set_row(&mut self, row: usize, values: &[f32]) {
        for (to, &value) in self.data[row * self.dims.cols..][..self.dims.cols].iter_mut().zip(values) {
            *to = round(value, self.dims.dtype);
        }
    }

    /// The first rows.
    fn tensor(&self, rows: usize) -> Result<Tensor> {
        tensor(&self.data[..rows * self.dims.cols], &[rows, self.dims.cols])
    }

    /// Overwrites the first rows.
    fn set(&mut self, tensor: &Tensor) -> Result<()> {
        let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
        for (to, value) in self.data.iter_mut().zip(values) {
            *to = round(value, self.dims.dtype);
        }
        Ok(())
    }
}

impl HostBuffer for OracleBuffer {
    fn as_f32(&self) -> Option<&[f32]> {
        (self.dims.dtype == DType::F32).then_some(&self.data)
    }

    fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        (self.dims.dtype == DType::F32).then_some(&mut self.data)
    }
}

impl OracleKvCache {
    /// The first element of a unit's row at a position of a slice.
    fn place(&self, layer: usize, slice: &Slice, position: usize, unit: usize) -> usize {
        let block = slice.blocks[position / BLOCK] as usize;
        let head = (layer * self.dims.blocks + block) * self.dims.units + unit;
        (head * BLOCK + position % BLOCK) * self.dims.head_dim
    }

    /// Rows `0..end` of a unit, out of keys or values.
    fn gather(&self, from: &[f32], layer: usize, slice: &Slice, end: usize, unit: usize) -> Result<Tensor> {
        let d = self.dims.head_dim;
        let rows = (0..end).flat_map(|position| {
            let at = self.place(layer, slice, position, unit);
            &from[at..at + d]
        });
        tensor(&rows.copied().collect::<Vec<f32>>(), &[end, d])
    }
}

impl Backend for Oracle {
    type Buffer = OracleBuffer;
    type Matrix = OracleMatrix;
    type Table = OracleTable;
    type KvCache = OracleKvCache;

    fn path(&self) -> &str {
        "oracle"
    }

    fn buffer(&self, dtype: DType, rows: usize, cols: usize) -> Result<OracleBuffer> {
        Ok(OracleBuffer { data: vec![0.0; rows * cols], dims: Dims { dtype, rows, cols } })
    }

    fn matrix(&self, blocks: &[RowBlock<'_>], dtype: DType) -> Result<OracleMatrix> {
        let (n, k) = shape::weight(blocks)?;
        let values: Vec<f32> = blocks.iter().flat_map(|block| source(block, dtype)).collect();
        Ok(OracleMatrix { weight: tensor(&values, &[n, k])?, n, k, dtype })
    }

    fn table(&self, block: RowBlock<'_>, first_id: usize, dtype: DType) -> Result<OracleTable> {
        shape::source("table", &block)?;
        let dims = Dims { dtype, rows: block.rows, cols: block.cols };
        Ok(OracleTable { rows: OracleBuffer { data: source(&block, dtype), dims }, first_id })
    }

    fn vector(&self, block: RowBlock<'_>) -> Result<OracleBuffer> {
        shape::source("vector", &block)?;
        let data = source(&block, DType::F32);
        let dims = Dims { dtype: DType::F32, rows: 1, cols: data.len() };
        Ok(OracleBuffer { data, dims })
    }

    fn matrix_bytes(&self, matrix: &OracleMatrix) -> usize {
        matrix.n * matrix.k * matrix.dtype.size()
    }

    fn kv_cache(&mut self, shape: KvShape, blocks: usize) -> Result<OracleKvCache> {
        shape::kv_cache(shape.head_dim)?;
        let KvShape { layers, units, head_dim, .. } = shape;
        let empty = vec![0.0; layers * blocks * units * BLOCK * head_dim];
        Ok(OracleKvCache { dims: KvDims::new(shape, blocks), keys: empty.clone(), values: empty })
    }

    fn kv_block_bytes(&self, shape: KvShape) -> usize {
        2 * shape.layers * shape.units * BLOCK * shape.head_dim * shape.dtype.size()
    }

    fn read_row(&self, buffer: &OracleBuffer, row: usize) -> Result<Vec<f32>> {
        shape::read_row(buffer.dims, row)?;
        Ok(buffer.row(row))
    }

    fn kv_budget(&self, enough: u64) -> Result<u64> {
        Ok(enough.min(1 << 30))
    }

    fn settle(&mut self) -> Result<()> {
        self.sampler.forget();
        Ok(())
    }

    fn embed(&mut self, step: &Step, table: &OracleTable, out: &mut OracleBuffer) -> Result<()> {
        let dims = table.rows.dims;
        shape::embed(step, dims.cols, out.dims)?;
        for (row, id) in self.sampler.ids(step).into_iter().enumerate() {
            match (id as usize).checked_sub(table.first_id).filter(|&at| at < dims.rows) {
                Some(at) => out.set_row(row, &table.rows.row(at)),
                None => out.set_row(row, &vec![0.0; dims.cols]),
            }
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        rows: usize,
        x: &OracleBuffer,
        weight: &OracleBuffer,
        eps: f32,
        out: &mut OracleBuffer,
    ) -> Result<()> {
        shape::rms_norm(rows, x.dims, None, weight.dims, out.dims)?;
        let x = x.tensor(rows)?;
        let rms = (x.sqr()?.mean_keepdim(1)? + f64::from(eps))?.sqrt()?;
        out.set(&x.broadcast_div(&rms)?.broadcast_mul(&weight.tensor(1)?)?)
    }

    fn add_rms_norm(
        &mut self,
        rows: usize,
        x: &OracleBuffer,
        residual: &mut OracleBuffer,
        weight: &OracleBuffer,
        eps: f32,
        out: &mut OracleBuffer,
    ) -> Result<()> {
        shape::rms_norm(rows, x.dims, Some(residual.dims), weight.dims, out.dims)?;
        let sum = (residual.tensor(rows)? + x.tensor(rows)?)?;
        residual.set(&sum)?;
        self.rms_norm(rows, residual, weight, eps, out)
    }

    fn linear(
        &mut self,
        rows: usize,
        x: &OracleBuffer,
        weights: &[OracleMatrix],
        out: &mut OracleBuffer,
    ) -> Result<()> {
        shape::linear(rows, x.dims, weights.iter().map(|w| (w.n, w.k)), out.dims)?;
        if rows == 0 || weights.is_empty() {
            return Ok(());
        }
        let x = x.tensor(rows)?;
        let products = weights.iter().map(|w| Ok(x.matmul(&w.weight.t()?)?)).collect::<Result<Vec<_>>>()?;
        out.set(&Tensor::cat(&products, 1)?)
    }

    fn linear_partials(
        &mut self,
        rows: usize,
        x: &OracleBuffer,
        weights: &[OracleMatrix],
        first_unit: usize,
        tree: Tree,
        partials: &mut [Partial<OracleBuffer>],
    ) -> Result<()> {
        let sizes: Vec<_> = weights.iter().map(|w| (w.n, w.k)).collect();
        let places: Vec<_> = partials.iter().map(|p| (p.units.clone(), p.sum.dims)).collect();
        shape::linear_partials(rows, x.dims, &sizes, first_unit, tree, &places)?;
        if rows == 0 {
            return Ok(());
        }
        let x = x.tensor(rows)?;
        for partial in partials {
            let mut first_col = 0;
            let mut sum: Option<Tensor> = None;
            for (unit, weight) in (first_unit..).zip(weights) {
                if partial.units.contains(&unit) {
                    let product =
                        x.narrow(1, first_col, weight.k)?.contiguous()?.matmul(&weight.weight.t()?)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + product)?,
                        None => product,
                    });
                }
                first_col += weight.k;
            }
            sum.map_or(Ok(()), |sum| partial.sum.set(&sum))?;
        }
        Ok(())
    }

    fn rope_table(&mut self, step: &Step, frequencies: &[f64], out: &mut OracleBuffer) -> Result<()> {
        shape::rope_table(step, frequencies.len(), out.dims)?;
        for (row, position) in step.batch.positions().enumerate() {
            let angles: Vec<f64> = frequencies.iter().map(|frequency| position as f64 * frequency).collect();
            let angles = Tensor::from_slice(&angles, angles.len(), &Device::Cpu)?;
            let functions = Tensor::cat(&[angles.cos()?, angles.sin()?], 0)?;
            out.set_row(row, &functions.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    fn rope_write_kv(
        &mut self,
        step: &Step,
        qkv: &OracleBuffer,
        rope: &OracleBuffer,
        layer: usize,
        kv: &mut OracleKvCache,
        q: &mut OracleBuffer,
    ) -> Result<()> {
        let group = shape::rope_write_kv(step, qkv.dims, rope.dims, layer, kv.dims, q.dims)?;
        let KvDims { units, head_dim, dtype, .. } = kv.dims;
        let half = head_dim / 2;
        let positions =
            step.batch.slices.iter().flat_map(|s| (s.start..s.start + s.len).map(move |p| (s, p)));
        for (row, (slice, position)) in positions.enumerate() {
            let heads = tensor(&qkv.row(row), &[units, group + 2, head_dim])?;
            let turn = tensor(&rope.row(row), &[1, 1, head_dim])?;
            let (cos, sin) = (turn.narrow(2, 0, half)?, turn.narrow(2, half, half)?);
            let (x1, x2) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
            let turned = Tensor::cat(
                &[
                    (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?,
                    (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?,
                ],
                2,
            )?;
            q.set_row(row, &turned.narrow(1, 0, group)?.flatten_all()?.to_vec1::<f32>()?);
            for unit in 0..units {
                let at = kv.place(layer, slice, position, unit);
                let key: Vec<f32> = turned.get(unit)?.get(group)?.to_vec1()?;
                let value: Vec<f32> = heads.get(unit)?.get(group + 1)?.to_vec1()?;
                for i in 0..head_dim {
                    kv.keys[at + i] = round(key[i], dtype);
                    kv.values[at + i] = round(value[i], dtype);
                }
            }
        }
        Ok(())
    }

    fn attend(
        &mut self,
        step: &Step,
        q: &OracleBuffer,
        layer: usize,
        kv: &OracleKvCache,
        scale: f32,
        out: &mut OracleBuffer,
    ) -> Result<()> {
        let group = shape::attend(step, q.dims, layer, kv.dims, out.dims)?;
        let KvDims { units, head_dim, .. } = kv.dims;
        let mut first_row = 0;
        for slice in &step.batch.slices {
            let end = slice.start + slice.len;
            let rows = q.tensor(first_row + slice.len)?.narrow(0, first_row, slice.len)?;
            let queries = rows.reshape((slice.len, units, group, head_dim))?;
            let hidden = (slice.start..end)
                .flat_map(|p| (0..end).map(move |key| if key <= p { 0.0 } else { f32::NEG_INFINITY }));
            let mask = tensor(&hidden.collect::<Vec<f32>>(), &[slice.len, 1, end])?;
            let mut heads = Vec::with_capacity(units);
            for unit in 0..units {
                let keys = kv.gather(&kv.keys, layer, slice, end, unit)?;
                let values = kv.gather(&kv.values, layer, slice, end, unit)?;
                let q = queries.narrow(1, unit, 1)?.reshape((slice.len * group, head_dim))?;
                let scores = (q.matmul(&keys.t()?)? * f64::from(scale))?.reshape((slice.len, group, end))?;
                let scores = scores.broadcast_add(&mask)?;
                let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
                let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
                let o = weights.reshape((slice.len * group, end))?.matmul(&values)?;
                heads.push(o.reshape((slice.len, group * head_dim))?);
            }
            let result = Tensor::cat(&heads, 1)?.to_vec2::<f32>()?;
            for (row, values) in result.iter().enumerate() {
                out.set_row(first_row + row, values);
            }
            first_row += slice.len;
        }
        Ok(())
    }

    fn silu_mul(
        &mut self,
        rows: usize,
        gate_up: &OracleBuffer,
        widths: &[usize],
        out: &mut OracleBuffer,
    ) -> Result<()> {
        shape::silu_mul(rows, gate_up.dims, widths, out.dims)?;
        if rows == 0 || widths.is_empty() {
            return Ok(());
        }
        let gate_up = gate_up.tensor(rows)?;
        let mut units = Vec::with_capacity(widths.len());
        let mut first = 0;
        for &width in widths {
            let gate = gate_up.narrow(1, 2 * first, width)?;
            let up = gate_up.narrow(1, 2 * first + width, width)?;
            units.push((gate.silu()? * up)?);
            first += width;
        }
        out.set(&Tensor::cat(&units, 1)?)
    }

    fn gather_sampled(&mut self, step: &Step, x: &OracleBuffer, out: &mut OracleBuffer) -> Result<()> {
        shape::gather_sampled(step, x.dims, out.dims)?;
        for (to, from) in step.sampled.iter().enumerate() {
            out.set_row(to, &x.row(from.row));
        }
        Ok(())
    }

    fn sample(&mut self, step: &Step, logits: &OracleBuffer, chosen: &mut OracleBuffer) -> Result<()> {
        shape::sample(step, logits.dims, chosen.dims)?;
        self.sampler.sample(step, &logits.data, logits.dims.cols, &mut chosen.data);
        Ok(())
    }

    fn keep(&mut self, step: &Step, chosen: &OracleBuffer) -> Result<()> {
        shape::keep(step, chosen.dims)?;
        self.sampler.keep(step, &chosen.data);
        Ok(())
    }

    fn choices(&mut self) -> Result<Vec<Choice>> {
        self.sampler.choices()
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Unsupported(format!("candle: {error}"))
    }
}

fn tensor(values: &[f32], shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, shape, &Device::Cpu)?)
}

fn round(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

/// A checkpoint's elements as values of `dtype`.
fn source(block: &RowBlock<'_>, dtype: DType) -> Vec<f32> {
    let element = |bytes: &[u8]| match *bytes {
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        [a, b] if block.dtype == SourceType::F16 => f16::from_le_bytes([a, b]).to_f32(),
        [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
        _ => f32::NAN,
    };
    block.bytes.chunks_exact(block.dtype.size()).map(|bytes| round(element(bytes), dtype)).collect()
}
