//! Weights on a GPU that are not bf16, and wide products: against the oracle, and bit for bit where that is promised.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::ops::Range;

use common::gpu;
use common::{Device, Random, assert_close, bits, block, bytes};
use kernels::{
    Backend, Cuda, CudaOptions, DType, Oracle, Partial, QuantizedBlock, SourceType, Tree, WeightFormat,
};

/// Rows from which cuBLASLt takes over unless bits are to be kept.
const WIDE: usize = 512;

/// A weight as a checkpoint has it.
enum Weight {
    Plain {
        n: usize,
        k: usize,
        values: Vec<f32>,
    },
    Quantized {
        bits: usize,
        group: usize,
        n: usize,
        k: usize,
        values: Vec<u8>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    },
}

/// What a weight is made as.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Plain,
    /// Bits, and columns of a group.
    Quantized(usize, usize),
}

impl Kind {
    fn weight(self, n: usize, k: usize, random: &mut Random) -> Weight {
        let Kind::Quantized(bits, group) = self else {
            return Weight::Plain { n, k, values: random.row(n * k) };
        };
        let groups = n * k.div_ceil(group);
        let mut below = |count: usize| (0..count).map(|_| (random.next() >> (64 - bits)) as u8).collect();
        let (values, zeros) = (below(n * k), below(groups));
        let scale = |x: f32| half::f16::from_f32(x / (1 << (bits - 1)) as f32).to_f32();
        Weight::Quantized {
            bits,
            group,
            n,
            k,
            values,
            scales: random.row(groups).into_iter().map(scale).collect(),
            zeros,
        }
    }
}

impl Weight {
    fn on<B: Backend>(&self, backend: &B, dtype: DType) -> B::Matrix {
        match self {
            Weight::Plain { n, k, values } => {
                let bytes = bytes(values, SourceType::Bf16);
                backend.matrix(&[block(&bytes, SourceType::Bf16, *n, *k)], dtype).unwrap()
            }
            Weight::Quantized { bits, group, n, k, values, scales, zeros } => {
                // In two blocks, as projections are stacked; the border is not one of tiles.
                let groups = k.div_ceil(*group);
                let part = |rows: Range<usize>| QuantizedBlock {
                    bits: *bits,
                    group_size: *group,
                    rows: rows.len(),
                    cols: *k,
                    values: &values[rows.start * k..rows.end * k],
                    scales: &scales[rows.start * groups..rows.end * groups],
                    zeros: &zeros[rows.start * groups..rows.end * groups],
                };
                backend.quantized_matrix(&[part(0..n / 3), part(n / 3..*n)], dtype).unwrap()
            }
        }
    }

    /// The elements that the GPU's kernels multiply with, in f32.
    fn elements(&self, fp8: bool) -> Vec<f32> {
        match self {
            Weight::Plain { k, values, .. } => {
                let values: Vec<f32> = values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
                if fp8 { values.chunks(*k).flat_map(as_fp8).collect() } else { values }
            }
            Weight::Quantized { group, k, values, scales, zeros, .. } => {
                let at = |i: usize| (i / k) * k.div_ceil(*group) + i % k / group;
                let element =
                    |(i, &q): (usize, &u8)| (f32::from(q) - f32::from(zeros[at(i)])) * scales[at(i)];
                values.iter().enumerate().map(element).collect()
            }
        }
    }
}

/// A row in E4M3 times its scale. The nearest of all magnitudes is looked for, the one with an even code of two.
fn as_fp8(row: &[f32]) -> Vec<f32> {
    let magnitude = |code: u32| match (code >> 3, code & 7) {
        (0, mantissa) => mantissa as f32 / 512.0,
        (exponent, mantissa) => (1.0 + mantissa as f32 / 8.0) * 2f32.powi(exponent as i32 - 7),
    };
    let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
    let scale = if most == 0.0 { 1.0 } else { most / 448.0 };
    let round = |x: f32| {
        let distance = |code: u32| (f64::from(magnitude(code)) - f64::from(x.abs())).abs();
        let code =
            (0..=0x7e).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2))));
        magnitude(code.unwrap()).copysign(x)
    };
    row.iter().map(|&x| round(x / scale) * scale).collect()
}

/// `x · Wᵀ` of all weights, side by side.
fn product<B: Device>(backend: &mut B, x: &[Vec<f32>], weights: &[B::Matrix], cols: usize) -> Vec<Vec<f32>> {
    let x_buffer = backend.filled(DType::Bf16, x);
    let mut out = backend.buffer(DType::F32, x.len(), cols).unwrap();
    backend.linear(x.len(), &x_buffer, weights, &mut out).unwrap();
    B::rows(&out, x.len())
}

/// The rows of the unit matrix: their products are the weight's columns.
fn unit_rows(k: usize) -> Vec<Vec<f32>> {
    (0..k).map(|i| (0..k).map(|j| f32::from(i == j)).collect()).collect()
}

fn open(deterministic: bool, weights: WeightFormat) -> Cuda {
    gpu::open_with(CudaOptions { deterministic, weights, ..CudaOptions::default() })
}

const KEPT: [Kind; 6] = [
    Kind::Quantized(4, 128),
    Kind::Quantized(8, 128),
    Kind::Quantized(4, 256),
    Kind::Quantized(8, 640),
    Kind::Quantized(4, 32),
    Kind::Quantized(8, 64),
];

#[test]
fn quantized_products_are_the_oracles() {
    if !gpu::present() {
        return;
    }
    for (case, kind) in KEPT.into_iter().enumerate() {
        let mut gpu = gpu::open(case % 2 == 0);
        // What there are no kernels for becomes bf16.
        let kept = !matches!(kind, Kind::Quantized(_, 32 | 64));
        let dtype = if kept { DType::F32 } else { DType::Bf16 };
        for k in [8, 136, 640, 1032] {
            let mut random = Random::new(k as u64);
            let n = [1, 17, 40, 70];
            let weights = n.map(|n| kind.weight(n, k, &mut random));
            let here: Vec<_> = weights.iter().map(|w| w.on(&gpu, DType::Bf16)).collect();
            let there: Vec<_> = weights.iter().map(|w| w.on(&Oracle::default(), dtype)).collect();
            for rows in [1, 7, 8, 9, 17, 40, 65, 300] {
                let x = random.rows(rows, k);
                let want = product(&mut Oracle::default(), &x, &there, 128);
                assert_close(
                    &product(&mut gpu, &x, &here, 128),
                    &want,
                    2e-4,
                    &format!("{kind:?} {rows} × {k}"),
                );
            }
        }
    }
}

/// Row-parallel products of uneven units.
fn partials<B: Device>(
    backend: &mut B,
    weights: &[Weight],
    dtype: DType,
    rows: usize,
    held: Range<usize>,
    units: usize,
) -> Vec<Vec<f32>> {
    let widths = weights.iter().map(|w| w.elements(false).len() / N);
    let x = Random::new(rows as u64).rows(rows, widths.sum());
    let x = backend.filled(DType::Bf16, &x);
    let tree = Tree { units };
    let weights: Vec<_> = weights.iter().map(|w| w.on(backend, dtype)).collect();
    let mut partials: Vec<_> = tree
        .subtrees(&held)
        .into_iter()
        .map(|units| Partial { units, sum: backend.buffer(DType::F32, rows, N).unwrap() })
        .collect();
    backend.linear_partials(rows, &x, &weights, held.start, tree, &mut partials).unwrap();
    partials.iter().flat_map(|partial| B::rows(&partial.sum, rows)).collect()
}

/// Of weights in `partials`.
const N: usize = 45;

#[test]
fn quantized_partials_of_uneven_units() {
    if !gpu::present() {
        return;
    }
    for (kind, (units, held)) in
        [Kind::Quantized(4, 128), Kind::Quantized(8, 128)].into_iter().zip([(7, 2..7), (4, 0..4)])
    {
        for deterministic in [true, false] {
            let mut gpu = gpu::open(deterministic);
            let mut random = Random::new(units as u64);
            let weights: Vec<_> = held
                .clone()
                .map(|unit| kind.weight(N, 128 * (1 + unit * 3 % 5) + 8 * (unit % 2), &mut random))
                .collect();
            for rows in [1, 8, 9, 40, WIDE + 3] {
                let wide = !deterministic && rows >= WIDE;
                let dtype = if wide { DType::Bf16 } else { DType::F32 };
                let want = partials(&mut Oracle::default(), &weights, dtype, rows, held.clone(), units);
                let got = partials(&mut gpu, &weights, DType::Bf16, rows, held.clone(), units);
                assert_close(&got, &want, 4e-4, &format!("{kind:?} {} {rows} rows", gpu.path()));
            }
        }
    }
}

#[test]
fn columns_come_out_exactly() {
    if !gpu::present() {
        return;
    }
    for (deterministic, k) in [(true, 136), (true, WIDE + 8), (false, WIDE + 8)] {
        for kind in [Kind::Plain, Kind::Quantized(4, 128), Kind::Quantized(8, 256)] {
            let formats: &[WeightFormat] = match kind {
                Kind::Plain => &[WeightFormat::AsStored, WeightFormat::Fp8],
                Kind::Quantized(..) => &[WeightFormat::AsStored],
            };
            for &format in formats {
                let mut gpu = open(deterministic, format);
                let mut random = Random::new(k as u64);
                let weights = [33, 16, 3].map(|n| kind.weight(n, k, &mut random));
                let here: Vec<_> = weights.iter().map(|w| w.on(&gpu, DType::Bf16)).collect();
                let got = product(&mut gpu, &unit_rows(k), &here, 52);
                let elements: Vec<_> =
                    weights.iter().flat_map(|w| w.elements(format == WeightFormat::Fp8)).collect();
                for (col, got) in got.iter().enumerate() {
                    for (row, &got) in got.iter().enumerate() {
                        let exact = elements[row * k + col];
                        let want = if deterministic { exact } else { half::bf16::from_f32(exact).to_f32() };
                        assert_eq!(got, want, "{kind:?} {} [{row}, {col}] of k = {k}", gpu.path());
                    }
                }
            }
        }
    }
}

#[test]
fn fp8_rounds_as_the_format_says() {
    if !gpu::present() {
        return;
    }
    let k = 448;
    let tiny = f32::from_bits(0x0001_0000); // the least of bf16
    let mut rows = [
        vec![0.0; k],
        // Every bf16 of several binades around the least normal number, and the largest that sets the scale to 1.
        (0..k as u32).map(|i| f32::from_bits((0x3a80 + i) << 16)).collect(),
        (0..k as u32).map(|i| -f32::from_bits((0x3c00 + 2 * i) << 16)).collect(),
        (0..k).map(|i| tiny * (i % 9) as f32).collect(),
        (0..k).map(|i| if i % 2 == 0 { -3e38 } else { 1e30 }).collect(),
        Random::new(8).row(k),
    ];
    rows[1][0] = 448.0;
    rows[2][7] = 448.0;
    rows[0][3] = -0.0;
    let n = rows.len();
    let weight = Weight::Plain { n, k, values: rows.concat() };
    let mut gpu = open(true, WeightFormat::Fp8);
    let here = [weight.on(&gpu, DType::Bf16)];
    let want = weight.elements(true);
    for (col, got) in product(&mut gpu, &unit_rows(k), &here, n).iter().enumerate() {
        for (row, &got) in got.iter().enumerate() {
            assert_eq!(got, want[row * k + col], "[{row}, {col}] of {}", rows[row][col]);
        }
    }
}

#[test]
fn numbers_that_are_not_finite_stay_visible_in_fp8() {
    if !gpu::present() {
        return;
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = Random::new(2).row(2 * 64);
        values[9] = bad;
        let mut gpu = open(true, WeightFormat::Fp8);
        let here = [Weight::Plain { n: 2, k: 64, values }.on(&gpu, DType::Bf16)];
        let got = product(&mut gpu, &[vec![1.0; 64]], &here, 2);
        assert!(!got[0][0].is_finite() && got[0][1].is_finite(), "{got:?}");
    }
}

#[test]
fn fp8_of_all_checkpoint_types() {
    if !gpu::present() {
        return;
    }
    let mut gpu = open(true, WeightFormat::Fp8);
    let values: Vec<f32> =
        Random::new(4).row(20 * 72).iter().map(|&x| half::bf16::from_f32(x / 8.0).to_f32()).collect();
    let x = Random::new(5).rows(3, 72);
    let [a, b, c] = [SourceType::F32, SourceType::F16, SourceType::Bf16].map(|source| {
        let bytes = bytes(&values, source);
        let weight = gpu.matrix(&[block(&bytes, source, 20, 72)], DType::Bf16).unwrap();
        product(&mut gpu, &x, &[weight], 20)
    });
    assert_eq!(bits(&a), bits(&c));
    // Its least bits are beyond f16's.
    assert_close(&b, &c, 1e-2, "f16");
}

#[test]
fn wide_products_are_the_oracles() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(false);
    for kind in [Kind::Plain, Kind::Quantized(4, 128), Kind::Quantized(8, 128)] {
        for (k, n) in [(264, [64, 128, 64]), (8, [1, 2, 4]), (1032, [17, 33, 130])] {
            let mut random = Random::new(k as u64);
            let weights = n.map(|n| kind.weight(n, k, &mut random));
            let here: Vec<_> = weights.iter().map(|w| w.on(&gpu, DType::Bf16)).collect();
            let there: Vec<_> = weights.iter().map(|w| w.on(&Oracle::default(), DType::Bf16)).collect();
            let x = random.rows(WIDE + 1, k);
            let want = product(&mut Oracle::default(), &x, &there, n.iter().sum());
            assert_close(
                &product(&mut gpu, &x, &here, n.iter().sum()),
                &want,
                1e-4,
                &format!("{kind:?} {k}"),
            );
        }
    }
}

#[test]
fn a_row_does_not_see_the_others_in_any_format() {
    if !gpu::present() {
        return;
    }
    for kind in [Kind::Plain, Kind::Quantized(4, 128), Kind::Quantized(8, 128)] {
        let mut gpu = open(true, WeightFormat::Fp8);
        let k = 1160;
        let mut random = Random::new(6);
        let weights = [33, 20].map(|n| kind.weight(n, k, &mut random));
        let here: Vec<_> = weights.iter().map(|w| w.on(&gpu, DType::Bf16)).collect();
        let x = random.rows(WIDE + 8, k);
        let whole = bits(&product(&mut gpu, &x, &here, 53));
        for count in [1, 2, 8, 9, 16, 32, 64, 65, 200] {
            let part = bits(&product(&mut gpu, &x[x.len() - count..], &here, 53));
            assert_eq!(part, whole[x.len() - count..], "{kind:?} {count} rows");
        }
    }
}

#[test]
fn weights_take_what_their_formats_say() {
    if !gpu::present() {
        return;
    }
    let (n, k) = (32, 256);
    let mut random = Random::new(1);
    let mut size = |gpu: &Cuda, kind: Kind| {
        let weight = kind.weight(n, k, &mut random).on(gpu, DType::Bf16);
        gpu.matrix_bytes(&weight)
    };
    let mut gpu = open(false, WeightFormat::Fp8);
    assert!(gpu.path().ends_with("-fp8"), "{}", gpu.path());
    assert_eq!(size(&gpu, Kind::Plain), n * k + n * 4);
    assert_eq!(size(&gpu, Kind::Quantized(4, 128)), n * k / 2 + n * 2 * 5);
    assert_eq!(size(&gpu, Kind::Quantized(8, 256)), n * k + n * 2 * 5);
    let plain = gpu::open(true);
    assert!(plain.path().ends_with("-deterministic") && !plain.path().contains("fp8"), "{}", plain.path());
    assert_eq!(size(&plain, Kind::Plain), n * k * 2);

    let weight = Kind::Quantized(4, 128).weight(n, k, &mut random).on(&gpu, DType::Bf16);
    let budget = gpu.kv_budget(0).unwrap();
    let shape = kernels::KvShape { layers: 2, units: 1, group: 2, head_dim: 64, dtype: DType::Bf16 };
    let kv = gpu.kv_cache(shape, 10).unwrap();
    let report = gpu.memory_report().unwrap();
    assert_eq!((report.kv_tokens, report.kv_cache), (640, 10 * gpu.kv_block_bytes(shape) as u64));
    assert!(report.weights >= gpu.matrix_bytes(&weight) as u64, "{report}");
    // What products need is taken with the cache, as the budget foresaw.
    assert!(report.work_space >= 192 << 20, "{report}");
    let left = budget.saturating_sub(gpu.kv_budget(0).unwrap());
    assert!(left.abs_diff(report.kv_cache) < 8 << 20, "{left} where the cache takes {}", report.kv_cache);
    drop((kv, weight));
    assert_eq!(gpu.memory_report().unwrap().kv_cache, 0);
}
