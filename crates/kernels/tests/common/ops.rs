//! Each op on data of its own: what a backend's results are compared on.

use std::ops::Range;

use kernels::{Batch, DType, Partial, Slice, SourceType, Tree};

use super::{Device, Random, block, bytes, ids_step, run, step, weight};

/// Of activations, of weights, and of the checkpoint.
pub(crate) type Types = (DType, DType, SourceType);

pub(crate) fn linear<B: Device>(
    backend: &mut B,
    types: Types,
    rows: usize,
    k: usize,
    n: &[usize],
) -> Vec<Vec<f32>> {
    let (compute, dtype, source) = types;
    let mut random = Random::new((rows * 7919 + k) as u64);
    let x = backend.filled(compute, &random.rows(rows, k));
    let weights: Vec<_> = n.iter().map(|&n| weight(backend, n, k, source, dtype, &mut random)).collect();
    let mut out = backend.buffer(DType::F32, rows, n.iter().sum()).unwrap();
    backend.linear(rows, &x, &weights, &mut out).unwrap();
    B::rows(&out, rows)
}

/// Units of uneven widths, all multiples of `grain`.
pub(crate) fn partials<B: Device>(
    backend: &mut B,
    types: Types,
    grain: usize,
    rows: usize,
    units: usize,
    held: Range<usize>,
) -> Vec<Vec<f32>> {
    let (compute, dtype, source) = types;
    let (tree, n) = (Tree { units }, 45);
    let mut random = Random::new(units as u64);
    let widths: Vec<usize> = (0..units).map(|unit| grain * (1 + unit * 127 % 350)).collect();
    let all = random.rows(rows, widths.iter().sum());
    let weights: Vec<_> = widths.iter().map(|&k| weight(backend, n, k, source, dtype, &mut random)).collect();
    let weights: Vec<_> = weights.into_iter().skip(held.start).take(held.len()).collect();
    let first: usize = widths[..held.start].iter().sum();
    let last: usize = widths[..held.end].iter().sum();
    let x: Vec<Vec<f32>> = all.iter().map(|row| row[first..last].to_vec()).collect();
    let x = backend.filled(compute, &x);
    let mut partials: Vec<_> = tree
        .subtrees(&held)
        .into_iter()
        .map(|units| Partial { units, sum: backend.buffer(DType::F32, rows, n).unwrap() })
        .collect();
    backend.linear_partials(rows, &x, &weights, held.start, tree, &mut partials).unwrap();
    partials.iter().flat_map(|partial| B::rows(&partial.sum, rows)).collect()
}

pub(crate) fn embedded<B: Device>(backend: &mut B, dtype: DType, source: SourceType) -> Vec<Vec<f32>> {
    let data = bytes(&Random::new(5).row(10 * 37), source);
    let table = backend.table(block(&data, source, 10, 37), 20, dtype).unwrap();
    let mut out = backend.filled(DType::F32, &vec![vec![9.0; 37]; 6]);
    let step = ids_step(backend, &[20, 29, 30, 19, 0, 25]);
    run(backend, &step, |backend| backend.embed(&step, &table, &mut out));
    B::rows(&out, 6)
}

pub(crate) fn norms<B: Device>(backend: &mut B, compute: DType, rows: usize, cols: usize) -> Vec<Vec<f32>> {
    let mut random = Random::new(cols as u64);
    let x = backend.filled(DType::F32, &random.rows(rows, cols));
    let mut residual = backend.filled(DType::F32, &random.rows(rows, cols));
    let data = bytes(&random.row(cols), SourceType::Bf16);
    let weight = backend.vector(block(&data, SourceType::Bf16, 1, cols)).unwrap();
    let mut out = backend.buffer(compute, rows, cols).unwrap();
    backend.rms_norm(rows, &x, &weight, 1e-5, &mut out).unwrap();
    let mut all = B::rows(&out, rows);
    backend.add_rms_norm(rows, &x, &mut residual, &weight, 1e-5, &mut out).unwrap();
    all.extend(B::rows(&out, rows));
    all.extend(B::rows(&residual, rows));
    all
}

pub(crate) fn gated<B: Device>(
    backend: &mut B,
    compute: DType,
    rows: usize,
    widths: &[usize],
) -> Vec<Vec<f32>> {
    let total: usize = widths.iter().sum();
    let mut values = Random::new(total as u64).rows(rows, 2 * total);
    values.iter_mut().flatten().for_each(|x| *x *= 20.0);
    let gate_up = backend.filled(DType::F32, &values);
    let mut out = backend.buffer(compute, rows, total).unwrap();
    backend.silu_mul(rows, &gate_up, widths, &mut out).unwrap();
    B::rows(&out, rows)
}

pub(crate) fn turned<B: Device>(backend: &mut B) -> Vec<Vec<f32>> {
    let frequencies: Vec<f64> = (0..64).map(|i| 5e6f64.powf(-f64::from(i) / 64.0)).collect();
    let slice = |start: usize, len: usize| Slice { start, len, blocks: vec![0; (start + len).div_ceil(64)] };
    let batch = Batch { slices: vec![slice(0, 3), slice(199_990, 40), slice(511, 2)] };
    let rows = batch.rows();
    let step = step(backend, batch);
    let mut out = backend.buffer(DType::F32, step.rows, 128).unwrap();
    run(backend, &step, |backend| backend.rope_table(&step, &frequencies, &mut out));
    B::rows(&out, rows)
}
