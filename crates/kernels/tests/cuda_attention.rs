//! Attention on a GPU at its edges: every length, many spans, weights that hide nothing, rows of padding. On a GPU or the emulator.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Device, Random, Sequences, assert_close, bits, gpu};
use kernels::{Backend, Batch, Cuda, DType, Draw, Error, KvShape, Oracle, SampledRow, Slice, Token};

fn sequences(units: usize, group: usize, head_dim: usize, lengths: Vec<usize>) -> Sequences {
    let (seed, recycled) = ((head_dim + group) as u64, true);
    Sequences { units, group, head_dim, compute: DType::Bf16, kv: DType::Bf16, seed, lengths, recycled }
}

fn assert_oracle(sequences: &Sequences, gpu: &mut Cuda, steps: &[Vec<(usize, usize)>]) {
    let want = sequences.run(&mut Oracle::default(), steps);
    for (sequence, (got, want)) in sequences.run(gpu, steps).iter().zip(&want).enumerate() {
        assert_close(got, want, 1.5e-2, &format!("{sequences:?} sequence {sequence}"));
    }
}

fn assert_same_bits(got: &[Vec<Vec<f32>>], want: &[Vec<Vec<f32>>], what: &str) {
    for (sequence, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len(), "{what}: rows of sequence {sequence}");
        let other = bits(got).iter().zip(bits(want)).position(|(got, want)| *got != want);
        assert_eq!(other, None, "{what}: the first row of sequence {sequence} with other bits");
    }
}

/// What lies behind a slice's last key, at whatever place in a piece, a group, a block, a sub-span or a span, is NaN.
#[test]
fn slices_of_every_length() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    for head_dim in [16, 64] {
        // Too many rows for the kernel of short slices, whole.
        let lengths: Vec<usize> = (17..=33).chain(60..=68).chain(124..=132).chain([511, 512, 513]).collect();
        let long = sequences(1, 1, head_dim, lengths);
        assert_oracle(&long, &mut gpu, &long.whole());
        // One token after the other, each of few rows.
        let lengths = [20, 70, 140, 520];
        let firsts = lengths.map(|length| length - 18);
        let mut steps: Vec<_> = (0..4).zip(firsts).map(|first| vec![first]).collect();
        steps.extend((0..18).map(|_| (0..4).map(|sequence| (sequence, 1)).collect()));
        assert_oracle(&sequences(1, 2, head_dim, lengths.to_vec()), &mut gpu, &steps);
    }
}

/// All keys count about the same and cancel each other, so that the order of additions shows in the result.
#[test]
fn even_weights_are_the_same_bits_in_every_cut() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let even = sequences(1, 4, 32, vec![1300, 30]);
    let whole = even.run_with(&mut gpu, &even.whole(), 0, 0.05);
    let mut steps = vec![vec![(0, 100)], vec![(0, 550), (1, 27)]];
    // 3 · 4 rows are a short slice, 5 · 4 a long one.
    for len in [1, 3, 5, 2, 70, 1, 4] {
        steps.extend(vec![vec![(0, len)]; 6]);
    }
    steps.extend([vec![(1, 2), (0, 132)], vec![(0, 1), (1, 1)], vec![(0, 1)]]);
    let cut = even.run_with(&mut gpu, &steps, 0, 0.05);
    assert_same_bits(&cut, &whole, "in cuts");
}

/// More spans than the merging kernel has under way, and than there are blocks for.
#[test]
fn a_context_of_many_spans() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    for (units, length, sharpness) in [(1, 65 * 512 + 70, 0.05), (2, 32 * 512 + 1, 1.0)] {
        let all = sequences(units, 2, 16, vec![length]);
        let last = 12;
        let mut steps: Vec<_> = (0..length - last)
            .step_by(4096)
            .map(|first| vec![(0, 4096.min(length - last - first))])
            .collect();
        let filled = steps.len();
        // The last rows: in one slice too large for the kernel of short slices, or one by one.
        let alone = [&steps[..], &vec![vec![(0, 1)]; last]].concat();
        steps.push(vec![(0, last)]);
        let what = format!("{units} units, {length} keys");
        let long = all.run_with(&mut gpu, &steps, filled, sharpness);
        let short = all.run_with(&mut gpu, &alone, filled, sharpness);
        assert_same_bits(&short, &long, &what);
        let want = all.run_with(&mut Oracle::default(), &steps, filled, sharpness);
        assert_close(&long[0], &want[0], 1.5e-2, &what);
    }
}

/// Nine decoding rows are run as twelve.
#[test]
fn rows_of_padding_are_zeros_and_change_nothing() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let (units, group, head_dim, count) = (2, 2, 16, 9);
    let shape = KvShape { layers: 1, units, group, head_dim, dtype: DType::Bf16 };
    let blocks = |i: u32| (0..9).map(|block| 9 * block + i).collect();
    let slices: Vec<_> =
        (0..count).map(|i| Slice { start: 70 * i, len: 1, blocks: blocks(i as u32) }).collect();
    let sampled: Vec<_> = (0..count).map(|row| SampledRow { row, slot: None, draw: Draw::GREEDY }).collect();
    let frequencies: Vec<f64> = (0..head_dim / 2).map(|i| 0.5f64.powi(i as i32)).collect();
    let mut run = |sampled: &[SampledRow]| {
        let mut kv = gpu.kv_cache(shape, 90).unwrap();
        let batch = Batch { slices: slices.clone() };
        let step = gpu.step(vec![Token::Id(0); count], batch, sampled.to_vec());
        let rows = step.rows;
        let qkv = gpu.filled(DType::F32, &Random::new(5).rows(12, units * (group + 2) * head_dim));
        let mut rope = gpu.filled(DType::F32, &vec![vec![f32::NAN; head_dim]; rows]);
        let columns = units * group * head_dim;
        let [mut q, mut out] =
            [(); 2].map(|()| gpu.filled(DType::Bf16, &vec![vec![f32::NAN; columns]; rows]));
        gpu.run::<Error>(&step, false, |gpu| {
            gpu.rope_table(&step, &frequencies, &mut rope)?;
            gpu.rope_write_kv(&step, &qkv, &rope, 0, &mut kv, &mut q)?;
            gpu.attend(&step, &q, 0, &kv, 0.25, &mut out)
        })
        .unwrap();
        [rope, q, out].map(|buffer| Cuda::rows(&buffer, rows))
    };
    let exact = run(&[]);
    for (exact, padded) in exact.iter().zip(run(&sampled)) {
        assert_eq!((exact.len(), padded.len()), (count, 12));
        assert_eq!(bits(exact), bits(&padded[..count]));
        assert!(padded[count..].iter().flatten().all(|x| x.to_bits() == 0), "{:?}", &padded[count..]);
    }
}
