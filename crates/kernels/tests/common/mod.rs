//! What the suites share: backends to test, reproducible data, and attention over growing sequences.
#![allow(dead_code, reason = "each suite uses a part")]

#[cfg(feature = "cuda")]
pub(crate) mod gpu;
pub(crate) mod ops;

use kernels::cpu::Path;
use kernels::oracle::OracleBuffer;
use kernels::{
    Backend, Batch, Cpu, DType, Draw, Error, KvShape, Oracle, RowBlock, SampledRow, Slice, SourceType, Step,
    Token, cpu,
};

/// A backend whose buffers tests can fill and read, whatever their type.
pub(crate) trait Device: Backend {
    fn set_row(buffer: &mut Self::Buffer, row: usize, values: &[f32]);
    fn row(buffer: &Self::Buffer, row: usize) -> Vec<f32>;

    fn filled(&self, dtype: DType, rows: &[Vec<f32>]) -> Self::Buffer {
        let cols = rows.first().map_or(0, Vec::len);
        let mut buffer = self.buffer(dtype, rows.len(), cols).unwrap();
        rows.iter().enumerate().for_each(|(i, row)| Self::set_row(&mut buffer, i, row));
        buffer
    }

    fn rows(buffer: &Self::Buffer, rows: usize) -> Vec<Vec<f32>> {
        (0..rows).map(|row| Self::row(buffer, row)).collect()
    }
}

impl Device for Cpu {
    fn set_row(buffer: &mut cpu::Buffer, row: usize, values: &[f32]) {
        buffer.set_row(row, values);
    }

    fn row(buffer: &cpu::Buffer, row: usize) -> Vec<f32> {
        buffer.row(row)
    }
}

impl Device for Oracle {
    fn set_row(buffer: &mut OracleBuffer, row: usize, values: &[f32]) {
        buffer.set_row(row, values);
    }

    fn row(buffer: &OracleBuffer, row: usize) -> Vec<f32> {
        buffer.row(row)
    }
}

/// One CPU backend for each path that this machine has.
pub(crate) fn cpus() -> Vec<Cpu> {
    Path::available().into_iter().map(|path| Cpu::with_path(2, path).unwrap()).collect()
}

/// xorshift64*: the same numbers everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In -1..1.
    pub(crate) fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn row(&mut self, cols: usize) -> Vec<f32> {
        (0..cols).map(|_| self.value()).collect()
    }

    pub(crate) fn rows(&mut self, rows: usize, cols: usize) -> Vec<Vec<f32>> {
        (0..rows).map(|_| self.row(cols)).collect()
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.next() as usize % (i + 1));
        }
    }
}

/// A checkpoint's bytes of `values`.
pub(crate) fn bytes(values: &[f32], dtype: SourceType) -> Vec<u8> {
    let element = |&value: &f32| match dtype {
        SourceType::F32 => value.to_le_bytes().to_vec(),
        SourceType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        SourceType::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(element).collect()
}

pub(crate) fn block(bytes: &[u8], dtype: SourceType, rows: usize, cols: usize) -> RowBlock<'_> {
    RowBlock { bytes, dtype, rows, cols }
}

pub(crate) fn weight<B: Backend>(
    backend: &B,
    n: usize,
    k: usize,
    source: SourceType,
    dtype: DType,
    random: &mut Random,
) -> B::Matrix {
    let data = bytes(&random.row(n * k), source);
    backend.matrix(&[block(&data, source, n, k)], dtype).unwrap()
}

/// A step over `batch` with ids that nobody looks at.
pub(crate) fn step<B: Backend>(backend: &B, batch: Batch) -> Step {
    backend.step(vec![Token::Id(0); batch.rows()], batch, Vec::new())
}

/// A step of one sequence with these ids.
pub(crate) fn ids_step<B: Backend>(backend: &B, ids: &[u32]) -> Step {
    let blocks = (0..ids.len().div_ceil(64) as u32).collect();
    let slices = vec![Slice { start: 0, len: ids.len(), blocks }];
    backend.step(ids.iter().copied().map(Token::Id).collect(), Batch { slices }, Vec::new())
}

/// A step of one sequence of `rows` rows, of which some are sampled.
pub(crate) fn sampled_step<B: Backend>(backend: &B, rows: usize, sampled: &[(usize, Draw)]) -> Step {
    let slices = vec![Slice { start: 0, len: rows, blocks: (0..rows.div_ceil(64) as u32).collect() }];
    let sampled = sampled.iter().map(|&(row, draw)| SampledRow { row, slot: None, draw }).collect();
    backend.step(vec![Token::Id(0); rows], Batch { slices }, sampled)
}

/// Runs ops within a step.
pub(crate) fn run<B: Backend>(
    backend: &mut B,
    step: &Step,
    mut ops: impl FnMut(&mut B) -> kernels::Result<()>,
) {
    backend.run(step, true, |backend| ops(backend)).unwrap_or_else(|error: Error| panic!("{error}"));
}

/// Fails where `got` is further than `tolerance · (1 + |want|)` from `want`.
pub(crate) fn assert_close(got: &[Vec<f32>], want: &[Vec<f32>], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (row, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len(), "{what}");
        for (col, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= tolerance * (1.0 + w.abs()), "{what}: [{row}, {col}] is {g}, not {w}");
        }
    }
}

pub(crate) fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// Attention of one layer over sequences that grow step by step.
#[derive(Debug, Clone)]
pub(crate) struct Sequences {
    pub(crate) units: usize,
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) compute: DType,
    pub(crate) kv: DType,
    pub(crate) seed: u64,
    /// Lengths to which the sequences grow.
    pub(crate) lengths: Vec<usize>,
    /// Whether every block held NaN before.
    pub(crate) recycled: bool,
}

impl Sequences {
    /// Runs `steps` of `(sequence, rows)` and returns every sequence's outputs by position.
    pub(crate) fn run<B: Device>(
        &self,
        backend: &mut B,
        steps: &[Vec<(usize, usize)>],
    ) -> Vec<Vec<Vec<f32>>> {
        self.run_with(backend, steps, 0, 1.0)
    }

    /// Likewise, with scores multiplied by `sharpness`, and outputs of the steps from number `attended` on alone: those before only
    /// write keys and values.
    pub(crate) fn run_with<B: Device>(
        &self,
        backend: &mut B,
        steps: &[Vec<(usize, usize)>],
        attended: usize,
        sharpness: f32,
    ) -> Vec<Vec<Vec<f32>>> {
        let unit = self.units * self.head_dim;
        let counts: Vec<usize> = self.lengths.iter().map(|length| length.div_ceil(64)).collect();
        let blocks: usize = counts.iter().sum();
        let (layers, layer) = (2, 1);
        let Sequences { units, group, head_dim, kv: dtype, .. } = *self;
        let mut kv = backend.kv_cache(KvShape { layers, units, group, head_dim, dtype }, blocks).unwrap();
        if self.recycled {
            self.fill_with_nan(backend, &mut kv, layer, blocks);
        }
        let mut ids: Vec<u32> = (0..blocks as u32).collect();
        Random::new(self.seed).shuffle(&mut ids);
        let mut tables = Vec::new();
        for count in counts {
            tables.push(ids.split_off(ids.len() - count));
        }
        let mut done = vec![0; self.lengths.len()];
        let mut outputs = vec![Vec::new(); self.lengths.len()];
        for (index, step) in steps.iter().enumerate() {
            let mut batch = Batch::default();
            let mut rows = Vec::new();
            for &(sequence, len) in step {
                let start: usize = done[sequence];
                let table = &tables[sequence][..(start + len).div_ceil(64)];
                batch.slices.push(Slice { start, len, blocks: table.to_vec() });
                rows.extend((start..start + len).map(|position| self.qkv(sequence, position)));
                done[sequence] += len;
            }
            let step_of = self::step(backend, batch);
            rows.resize(step_of.rows, vec![0.0; unit * (self.group + 2)]);
            let qkv = backend.filled(DType::F32, &rows);
            let mut rope = backend.buffer(DType::F32, rows.len(), self.head_dim).unwrap();
            let mut q = backend.buffer(self.compute, rows.len(), unit * self.group).unwrap();
            let mut out = backend.buffer(self.compute, rows.len(), unit * self.group).unwrap();
            let scale = sharpness / (self.head_dim as f32).sqrt();
            run(backend, &step_of, |backend| {
                backend.rope_table(&step_of, &self.frequencies(), &mut rope)?;
                backend.rope_write_kv(&step_of, &qkv, &rope, layer, &mut kv, &mut q)?;
                if index < attended {
                    return Ok(());
                }
                backend.attend(&step_of, &q, layer, &kv, scale, &mut out)
            });
            if index < attended {
                continue;
            }
            let mut row = 0;
            for &(sequence, len) in step {
                outputs[sequence].extend((row..row + len).map(|row| B::row(&out, row)));
                row += len;
            }
        }
        outputs
    }

    /// All sequences in one step each.
    pub(crate) fn whole(&self) -> Vec<Vec<(usize, usize)>> {
        self.lengths.iter().copied().enumerate().map(|step| vec![step]).collect()
    }

    fn qkv(&self, sequence: usize, position: usize) -> Vec<f32> {
        let seed = self.seed.wrapping_add((sequence as u64) << 40).wrapping_add(position as u64 + 1);
        let mut row = Random::new(seed).row(self.units * (self.group + 2) * self.head_dim);
        row.iter_mut().for_each(|x| *x *= 3.0);
        row
    }

    fn frequencies(&self) -> Vec<f64> {
        (0..self.head_dim / 2).map(|i| 5e6f64.powf(-2.0 * i as f64 / self.head_dim as f64)).collect()
    }

    fn fill_with_nan<B: Device>(&self, backend: &mut B, kv: &mut B::KvCache, layer: usize, blocks: usize) {
        let (len, unit) = (blocks * 64, self.units * self.head_dim);
        let batch = Batch { slices: vec![Slice { start: 0, len, blocks: (0..blocks as u32).collect() }] };
        let step = self::step(backend, batch);
        let qkv = backend.filled(DType::F32, &vec![vec![f32::NAN; unit * (self.group + 2)]; step.rows]);
        let rope = backend.filled(DType::F32, &vec![vec![f32::NAN; self.head_dim]; step.rows]);
        let mut q = backend.buffer(self.compute, step.rows, unit * self.group).unwrap();
        run(backend, &step, |backend| backend.rope_write_kv(&step, &qkv, &rope, layer, kv, &mut q));
    }
}
