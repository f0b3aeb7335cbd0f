//! Matrix products on a GPU at their edges: more segments than warps, more rows than a band, as many units as kernels take. On a GPU or
//! the emulator.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Device, Random, assert_close, bits, block, bytes, gpu, weight};
use kernels::{
    Backend, Cuda, CudaOptions, DType, Oracle, Partial, QuantizedBlock, Result, SourceType, Tree,
    WeightFormat,
};

/// Bits of a weight's elements in the checkpoint, and what is made of 16.
const FORMATS: [(usize, WeightFormat); 4] = [
    (16, WeightFormat::AsStored),
    (16, WeightFormat::Fp8),
    (8, WeightFormat::AsStored),
    (4, WeightFormat::AsStored),
];

/// A weight `[n, k]` of so many bits.
fn made(gpu: &Cuda, bits: usize, n: usize, k: usize, random: &mut Random) -> kernels::cuda::Matrix {
    if bits > 8 {
        return weight(gpu, n, k, SourceType::Bf16, DType::Bf16, random);
    }
    let groups = k.div_ceil(128);
    let mut below =
        |count: usize| -> Vec<u8> { (0..count).map(|_| (random.next() >> (64 - bits)) as u8).collect() };
    let (values, zeros) = (below(n * k), below(n * groups));
    let scales = random.row(n * groups);
    let block = QuantizedBlock {
        bits,
        group_size: 128,
        rows: n,
        cols: k,
        values: &values,
        scales: &scales,
        zeros: &zeros,
    };
    gpu.quantized_matrix(&[block], DType::Bf16).unwrap()
}

fn product<B: Device>(backend: &mut B, x: &[Vec<f32>], weights: &[B::Matrix], cols: usize) -> Vec<Vec<f32>> {
    let x_buffer = backend.filled(DType::Bf16, x);
    let mut out = backend.buffer(DType::F32, x.len(), cols).unwrap();
    backend.linear(x.len(), &x_buffer, weights, &mut out).unwrap();
    B::rows(&out, x.len())
}

fn sums<B: Device>(
    backend: &mut B,
    x: &[Vec<f32>],
    weights: &[B::Matrix],
    n: usize,
) -> Result<Vec<Vec<f32>>> {
    let units = weights.len();
    let x_buffer = backend.filled(DType::Bf16, x);
    let mut partials = [Partial { units: 0..units, sum: backend.buffer(DType::F32, x.len(), n)? }];
    backend.linear_partials(x.len(), &x_buffer, weights, 0, Tree { units }, &mut partials)?;
    Ok(B::rows(&partials[0].sum, x.len()))
}

/// `gemv`'s warps have several segments each; `gemm` sums them in the same order.
#[test]
fn long_rows_are_the_same_bits_for_few_and_many_rows() {
    if !gpu::present() {
        return;
    }
    for (bits_of, format) in FORMATS {
        let mut gpu =
            gpu::open_with(CudaOptions { deterministic: true, weights: format, ..CudaOptions::default() });
        let k = 17 * 512 + 136;
        let mut random = Random::new(3);
        let here: Vec<_> = [17, 3].map(|n| made(&gpu, bits_of, n, k, &mut random)).into();
        let x = random.rows(9, k);
        let many = bits(&product(&mut gpu, &x, &here, 20));
        assert!(bits(&product(&mut gpu, &x[..5], &here, 20)) == many[..5], "{bits_of} bits, {format:?}");
        // Units of six segments, which the warps go through one behind the other.
        let k = 5 * 512 + 8;
        let units: Vec<_> = (0..4).map(|_| made(&gpu, bits_of, 20, k, &mut random)).collect();
        let x = random.rows(9, 4 * k);
        let many = bits(&sums(&mut gpu, &x, &units, 20).unwrap());
        assert!(
            bits(&sums(&mut gpu, &x[..5], &units, 20).unwrap()) == many[..5],
            "{bits_of} bits, {format:?}"
        );
    }
}

#[test]
fn long_rows_are_the_oracles() {
    if !gpu::present() {
        return;
    }
    let (n, k) = (18, 20 * 512 + 72);
    let data = bytes(&Random::new(1).row(n * k), SourceType::Bf16);
    let data = block(&data, SourceType::Bf16, n, k);
    let x = Random::new(2).rows(3, k);
    let mut gpu = gpu::open(true);
    let here = gpu.matrix(&[data], DType::Bf16).unwrap();
    let there = Oracle::default().matrix(&[data], DType::Bf16).unwrap();
    let want = product(&mut Oracle::default(), &x, &[there], n);
    assert_close(&product(&mut gpu, &x, &[here], n), &want, 2e-4, "long rows");
}

/// More tiles of rows than stand together in a band, and several tiles of weight rows.
#[test]
fn rows_beyond_a_band() {
    if !gpu::present() {
        return;
    }
    let (rows, n, k) = (17 * 128 + 5, [130, 5], 8);
    let mut random = Random::new(7);
    let x = random.rows(rows, k);
    let mut gpu = gpu::open(true);
    let weights = n.map(|n| bytes(&random.row(n * k), SourceType::Bf16));
    let blocks = [0, 1].map(|i| block(&weights[i], SourceType::Bf16, n[i], k));
    let here = blocks.map(|block| gpu.matrix(&[block], DType::Bf16).unwrap());
    let there = blocks.map(|block| Oracle::default().matrix(&[block], DType::Bf16).unwrap());
    let want = product(&mut Oracle::default(), &x, &there, 135);
    assert_close(&product(&mut gpu, &x, &here, 135), &want, 1e-4, "many rows");
}

#[test]
fn as_many_units_as_kernels_take() {
    if !gpu::present() {
        return;
    }
    let (n, k) = (5, 8);
    let mut gpu = gpu::open(true);
    let mut random = Random::new(9);
    let data: Vec<_> = (0..65).map(|_| bytes(&random.row(n * k), SourceType::Bf16)).collect();
    let data: Vec<_> = data.iter().map(|data| block(data, SourceType::Bf16, n, k)).collect();
    let here: Vec<_> = data.iter().map(|&block| gpu.matrix(&[block], DType::Bf16).unwrap()).collect();
    let there: Vec<_> =
        data.iter().map(|&block| Oracle::default().matrix(&[block], DType::Bf16).unwrap()).collect();
    for rows in [2, 11] {
        let x = random.rows(rows, 64 * k);
        let want = sums(&mut Oracle::default(), &x, &there[..64], n).unwrap();
        assert_close(&sums(&mut gpu, &x, &here[..64], n).unwrap(), &want, 2e-4, "64 units summed");
        let x = random.rows(rows, k);
        let want = product(&mut Oracle::default(), &x, &there[..64], 64 * n);
        assert_close(&product(&mut gpu, &x, &here[..64], 64 * n), &want, 1e-4, "64 units side by side");
        let error = sums(&mut gpu, &random.rows(rows, 65 * k), &here, n).unwrap_err().to_string();
        assert!(error.contains("65"), "{error}");
    }
}

/// Sums of units that do not fit into the work space at once.
#[test]
fn rows_in_several_turns() {
    if !gpu::present() {
        return;
    }
    let (rows, units, n, k) = (2 * 128 + 9, 8, 11_003, 8);
    let mut gpu = gpu::open(true);
    let mut random = Random::new(9);
    let here: Vec<_> =
        (0..units).map(|_| weight(&gpu, n, k, SourceType::Bf16, DType::Bf16, &mut random)).collect();
    let x = random.rows(rows, units * k);
    let whole = sums(&mut gpu, &x, &here, n).unwrap();
    for first in [0, 120, 136, 250, 260] {
        let part = sums(&mut gpu, &x[first..first + 5], &here, n).unwrap();
        assert!(bits(&part) == bits(&whole[first..first + 5]), "rows from {first} on");
    }
}

/// Weights that are unpacked in several slices, whose borders are none of weights, tiles or units.
#[test]
fn slices_multiply_as_the_whole_does() {
    if !gpu::present() {
        return;
    }
    let rows = 512;
    for (bits_of, weights) in FORMATS {
        let results = [128 << 20, 0, 2 * 128 * 2 * 72, 2 * 128 * 2 * 208].map(|unpacked_bytes| {
            let mut gpu = gpu::open_with(CudaOptions { unpacked_bytes, weights, ..CudaOptions::default() });
            let mut random = Random::new(4);
            let columns = [100, 45, 7, 200].map(|n| made(&gpu, bits_of, n, 72, &mut random));
            let units = [64, 136, 8].map(|k| made(&gpu, bits_of, 300, k, &mut random));
            let side_by_side = product(&mut gpu, &random.rows(rows, 72), &columns, 352);
            let summed = sums(&mut gpu, &random.rows(rows, 208), &units, 300).unwrap();
            [bits(&side_by_side), bits(&summed)]
        });
        assert!(results.iter().all(|other| *other == results[0]), "{bits_of} bits, {weights:?}");
    }
}
