//! Every op of the CUDA backend against the oracle, and its promises on bits, on a GPU or the emulator.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::gpu;
use common::ops::{Types, embedded, gated, linear, norms, partials, turned};
use common::{Device, Random, Sequences, assert_close, bits, run, sampled_step, step};
use kernels::{
    Backend, Batch, Cuda, CudaOptions, DType, Draw, KvShape, Oracle, Partial, SampledRow, Slice, SourceType,
    Token, Tree, sample,
};

const BF16: Types = (DType::Bf16, DType::Bf16, SourceType::Bf16);

/// Both ways of doing wide products.
fn gpus() -> Vec<Cuda> {
    if !gpu::present() {
        return Vec::new();
    }
    [true, false].map(gpu::open).into()
}

#[test]
fn linear_of_ragged_shapes() {
    for gpu in &mut gpus() {
        for k in [8, 16, 40, 64, 512, 520, 1032] {
            for rows in [1, 2, 7, 8, 9, 16, 17, 40, 65, 130] {
                let n = [1, 15, 16, 17, 33, 64];
                let what = format!("{} {rows} × {k}", gpu.path());
                let want = linear(&mut Oracle::default(), BF16, rows, k, &n);
                assert_close(&linear(gpu, BF16, rows, k, &n), &want, 1e-4, &what);
            }
        }
    }
}

#[test]
fn wide_products_of_aligned_shapes() {
    for gpu in &mut gpus() {
        let want = linear(&mut Oracle::default(), BF16, 150, 264, &[64, 128, 64]);
        assert_close(&linear(gpu, BF16, 150, 264, &[64, 128, 64]), &want, 1e-4, gpu.path());
    }
}

#[test]
fn other_checkpoint_types_become_bf16() {
    for gpu in &mut gpus() {
        for source in [SourceType::F32, SourceType::F16] {
            let types = (DType::Bf16, DType::Bf16, source);
            let want = linear(&mut Oracle::default(), types, 3, 72, &[20]);
            assert_close(&linear(gpu, types, 3, 72, &[20]), &want, 1e-4, gpu.path());
        }
    }
}

#[test]
fn linear_partials_of_uneven_units() {
    for gpu in &mut gpus() {
        for (units, held) in [(1, 0..1), (4, 0..4), (8, 1..7), (7, 2..7), (5, 4..5)] {
            for rows in [1, 7, 8, 9, 40, 70] {
                let what = format!("{} units {held:?} of {units}, {rows} rows", gpu.path());
                let want = partials(&mut Oracle::default(), BF16, 8, rows, units, held.clone());
                assert_close(&partials(gpu, BF16, 8, rows, units, held.clone()), &want, 2e-4, &what);
            }
        }
    }
}

#[test]
fn embed_gives_rows_or_zeros() {
    for gpu in &mut gpus() {
        for source in [SourceType::F32, SourceType::F16, SourceType::Bf16] {
            assert_eq!(
                embedded(gpu, DType::Bf16, source),
                embedded(&mut Oracle::default(), DType::Bf16, source)
            );
        }
    }
}

#[test]
fn norms_of_any_width() {
    for gpu in &mut gpus() {
        for cols in [1, 7, 64, 100, 2048, 8192, 20_000] {
            for rows in [1, 3, 40] {
                let want = norms(&mut Oracle::default(), DType::Bf16, rows, cols);
                assert_close(&norms(gpu, DType::Bf16, rows, cols), &want, 8e-3, gpu.path());
            }
        }
    }
}

#[test]
fn silu_mul_of_odd_widths() {
    for gpu in &mut gpus() {
        for widths in [&[1][..], &[5, 3, 17], &[129, 128], &[640, 640, 0, 641]] {
            let want = gated(&mut Oracle::default(), DType::Bf16, 9, widths);
            assert_close(&gated(gpu, DType::Bf16, 9, widths), &want, 8e-3, gpu.path());
        }
    }
}

#[test]
fn silu_mul_at_the_ends_of_the_range() {
    for gpu in &mut gpus() {
        let gates = [-1e30, -200.0, -90.0, -0.0, 90.0, 200.0, 1e30];
        let row: Vec<f32> = gates.into_iter().chain([1.0; 7]).collect();
        let gate_up = gpu.filled(DType::F32, &[row]);
        let mut out = gpu.buffer(DType::Bf16, 1, 7).unwrap();
        gpu.silu_mul(1, &gate_up, &[7], &mut out).unwrap();
        let want = [0.0, 0.0, 0.0, 0.0, 90.0, 200.0, 1e30];
        assert_close(&[Cuda::row(&out, 0)], &[want.to_vec()], 8e-3, gpu.path());
    }
}

#[test]
fn rope_far_out() {
    for gpu in &mut gpus() {
        assert_close(&turned(gpu), &turned(&mut Oracle::default()), 1e-7, gpu.path());
    }
}

#[test]
fn gathered_rows_are_copies() {
    for gpu in &mut gpus() {
        for dtype in [DType::F32, DType::Bf16] {
            let x = gpu.filled(dtype, &Random::new(1).rows(5, 19));
            let mut out = gpu.buffer(dtype, 4, 19).unwrap();
            let step = sampled_step(gpu, 5, &[4, 0, 4, 2].map(|row| (row, Draw::GREEDY)));
            run(gpu, &step, |gpu| gpu.gather_sampled(&step, &x, &mut out));
            assert_eq!(Cuda::rows(&out, 4), [4, 0, 4, 2].map(|row| Cuda::row(&x, row)));
        }
    }
}

fn assert_attention(sequences: &Sequences, steps: &[Vec<(usize, usize)>]) {
    let want = sequences.run(&mut Oracle::default(), steps);
    for gpu in &mut gpus() {
        let got = sequences.run(gpu, steps);
        for (sequence, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_close(got, want, 1.5e-2, &format!("{} {sequences:?} sequence {sequence}", gpu.path()));
        }
    }
}

fn sequences(units: usize, group: usize, head_dim: usize, lengths: &[usize]) -> Sequences {
    Sequences {
        units,
        group,
        head_dim,
        compute: DType::Bf16,
        kv: DType::Bf16,
        seed: (head_dim + group) as u64,
        lengths: lengths.to_vec(),
        recycled: true,
    }
}

#[test]
fn attention_of_all_head_shapes() {
    for head_dim in [16, 32, 64, 128] {
        for group in [1, 2, 7, 8, 20] {
            // Prefill in chunks with decoding beside it, then decoding alone.
            let steps = [
                vec![(0, 40), (1, 32)],
                vec![(1, 1), (0, 25), (2, 127)],
                vec![(0, 1), (2, 1)],
                vec![(2, 2), (0, 4)],
            ];
            assert_attention(&sequences(2, group, head_dim, &[70, 33, 130]), &steps);
        }
    }
}

#[test]
fn attention_over_several_spans() {
    let steps = [vec![(0, 500), (1, 510)], vec![(1, 4), (0, 798)], vec![(0, 1), (1, 1)], vec![(0, 1)]];
    assert_attention(&sequences(1, 3, 32, &[1300, 515]), &steps);
}

#[test]
fn attention_is_the_same_bits_in_every_cut() {
    for gpu in &mut gpus() {
        let all = sequences(2, 7, 32, &[700, 90, 140]);
        let whole = all.run(gpu, &all.whole());
        let chunks: Vec<_> = [(0, 300), (1, 60), (0, 200), (2, 140), (0, 196), (1, 29)]
            .map(|part| vec![part])
            .into_iter()
            .chain([vec![(0, 1), (1, 1)], vec![(0, 1)], vec![(0, 2)]])
            .collect();
        for (whole, cut) in whole.iter().zip(all.run(gpu, &chunks)) {
            assert_eq!(bits(whole), bits(&cut), "{}", gpu.path());
        }
    }
}

#[test]
fn a_linear_row_does_not_see_the_others() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    for (k, n) in [(72, 33), (1096, 50), (2560, 16)] {
        let rows = Random::new(k as u64).rows(150, k);
        let weight = common::weight(&gpu, n, k, SourceType::Bf16, DType::Bf16, &mut Random::new(1));
        let weights = std::slice::from_ref(&weight);
        let mut product = |rows: &[Vec<f32>]| {
            let x = gpu.filled(DType::Bf16, rows);
            let mut out = gpu.buffer(DType::F32, rows.len(), n).unwrap();
            gpu.linear(rows.len(), &x, weights, &mut out).unwrap();
            bits(&Cuda::rows(&out, rows.len()))
        };
        let alone: Vec<_> = [0, 7, 8, 149].iter().map(|&row| product(&rows[row..=row])[0].clone()).collect();
        for count in [8, 9, 16, 32, 64, 150] {
            let many = product(&rows[..count]);
            for (&row, alone) in [0, 7, 8, 149].iter().zip(&alone) {
                assert!(many.get(row).is_none_or(|got| got == alone), "row {row} of {count}, k = {k}");
            }
        }
    }
}

#[test]
fn partial_sums_are_the_same_bits_for_any_rows_and_held_units() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let units = 6;
    let tree = Tree { units };
    let one = bits(&partials(&mut gpu, BF16, 8, 3, units, 0..units));
    // The halves' sums, added here, are the whole's.
    let halves = [0..3, 3..6].map(|held| partials(&mut gpu, BF16, 8, 3, units, held));
    assert_eq!(tree.subtrees(&(0..3)).len(), 1);
    let added: Vec<Vec<f32>> = halves[0]
        .iter()
        .zip(&halves[1])
        .map(|(left, right)| left.iter().zip(right).map(|(l, r)| l + r).collect())
        .collect();
    assert_eq!(bits(&added), one);
}

#[test]
fn sampling_chooses_as_the_host_does() {
    for gpu in &mut gpus() {
        let vocabulary = 997;
        let mut random = Random::new(3);
        let draws: Vec<Draw> = (0..24)
            .map(|i| Draw {
                temperature: [0.0, 0.7, 1.0, 2.0][i % 4],
                top_k: [0, 1, 20, 5000][i / 4 % 4],
                top_p: [1.0, 0.9, 0.3][i % 3],
                seed: random.next(),
                position: i as u32 * 7,
            })
            .collect();
        let rows: Vec<Vec<f32>> =
            (0..24).map(|_| random.row(vocabulary).into_iter().map(|x| x * 8.0).collect()).collect();
        let sampled: Vec<_> = draws.iter().copied().enumerate().collect();
        let step = sampled_step(gpu, 24, &sampled);
        let logits = gpu.filled(DType::F32, &rows);
        let mut chosen = gpu.buffer(DType::F32, 24, 2).unwrap();
        run(gpu, &step, |gpu| gpu.sample(&step, &logits, &mut chosen));
        let choices = gpu.choices().unwrap();
        assert_eq!(choices.len(), 24);
        for ((choice, row), draw) in choices.iter().zip(&rows).zip(&draws) {
            let want = sample::sample(row, draw);
            assert_eq!(choice.id, want.id, "{draw:?}");
            assert!((choice.logprob - want.logprob).abs() < 1e-5, "{choice:?} {want:?}");
        }
        assert!(gpu.choices().is_err(), "nothing more was sampled");
    }
}

/// Decoding steps through a little network of ops, recorded and not.
fn decode(gpu: &mut Cuda, record: bool, steps: usize) -> Vec<Vec<Vec<u32>>> {
    let (units, group, head_dim, hidden) = (2, 2, 16, 32);
    let shape = KvShape { layers: 1, units, group, head_dim, dtype: DType::Bf16 };
    let mut kv = gpu.kv_cache(shape, 40).unwrap();
    let mut random = Random::new(11);
    let mut weight = |n, k| common::weight(gpu, n, k, SourceType::Bf16, DType::Bf16, &mut random);
    let qkv_weights: Vec<_> = (0..units).map(|_| weight((group + 2) * head_dim, hidden)).collect();
    let o_weights: Vec<_> = (0..units).map(|_| weight(hidden, group * head_dim)).collect();
    let data = common::bytes(&random.row(50 * hidden), SourceType::Bf16);
    let table = gpu.table(common::block(&data, SourceType::Bf16, 50, hidden), 0, DType::Bf16).unwrap();
    let ones = common::bytes(&vec![1.0; hidden], SourceType::F32);
    let norm = gpu.vector(common::block(&ones, SourceType::F32, 1, hidden)).unwrap();
    let frequencies: Vec<f64> = (0..head_dim / 2).map(|i| 0.5f64.powi(i as i32)).collect();
    let most = 4;
    let f32s = |gpu: &Cuda, cols| gpu.buffer(DType::F32, most, cols).unwrap();
    let bf16s = |gpu: &Cuda, cols| gpu.buffer(DType::Bf16, most, cols).unwrap();
    let (mut x, mut rope) = (f32s(gpu, hidden), f32s(gpu, head_dim));
    let (mut normed, mut qkv) = (bf16s(gpu, hidden), f32s(gpu, units * (group + 2) * head_dim));
    let (mut q, mut attended) = (bf16s(gpu, units * group * head_dim), bf16s(gpu, units * group * head_dim));
    let tree = Tree { units };
    let mut sums = [Partial { units: 0..units, sum: f32s(gpu, hidden) }];
    let mut chosen = f32s(gpu, 2);
    let mut results = Vec::new();
    for at in 0..steps {
        // Three sequences, then two; the contexts cross the border of a block and of a span.
        let count = if at % 5 == 4 { 2 } else { 3 };
        let starts = [at, 60 + at, 505 + at];
        let tables: [Vec<u32>; 3] = [vec![0], vec![1, 2], (3..13).collect()];
        let slices =
            (0..count).map(|i| Slice { start: starts[i], len: 1, blocks: tables[i].clone() }).collect();
        let tokens = (0..count as u32).map(|i| Token::Id((at as u32 * 3 + i) % 50)).collect();
        let sampled = (0..count).map(|row| SampledRow { row, slot: None, draw: Draw::GREEDY }).collect();
        let step = gpu.step(tokens, Batch { slices }, sampled);
        let rows = step.rows;
        gpu.run::<kernels::Error>(&step, record, |gpu| {
            gpu.rope_table(&step, &frequencies, &mut rope)?;
            gpu.embed(&step, &table, &mut x)?;
            gpu.rms_norm(rows, &x, &norm, 1e-5, &mut normed)?;
            gpu.linear(rows, &normed, &qkv_weights, &mut qkv)?;
            gpu.rope_write_kv(&step, &qkv, &rope, 0, &mut kv, &mut q)?;
            gpu.attend(&step, &q, 0, &kv, 0.25, &mut attended)?;
            gpu.linear_partials(rows, &attended, &o_weights, 0, tree, &mut sums)?;
            gpu.sample(&step, &sums[0].sum, &mut chosen)
        })
        .unwrap();
        let choices = gpu.choices().unwrap();
        let mut rows = bits(&Cuda::rows(&sums[0].sum, count));
        rows.push(choices.iter().map(|choice| choice.id).collect());
        results.push(rows);
    }
    results
}

#[test]
fn recorded_steps_are_the_same_bits() {
    for gpu in &mut gpus() {
        let eager = decode(gpu, false, 24);
        assert_eq!(decode(gpu, true, 24), eager, "{}", gpu.path());
    }
    if gpu::present() {
        let mut without = gpu::open_with(CudaOptions { graphs: false, ..CudaOptions::default() });
        assert_eq!(decode(&mut without, true, 24), decode(&mut gpu::open(false), false, 24));
    }
}

#[test]
fn ops_outside_of_a_step_are_errors() {
    for gpu in &mut gpus() {
        let batch = Batch { slices: vec![Slice { start: 0, len: 2, blocks: vec![0] }] };
        let step = step(gpu, batch);
        let mut out = gpu.buffer(DType::F32, 2, 8).unwrap();
        assert!(gpu.rope_table(&step, &[1.0; 4], &mut out).is_err());
    }
}

#[test]
fn f32_is_refused_in_words() {
    for gpu in &mut gpus() {
        let shape = KvShape { layers: 1, units: 1, group: 1, head_dim: 16, dtype: DType::F32 };
        let error = gpu.kv_cache(shape, 1).unwrap_err().to_string();
        assert!(error.contains("--dtype bf16"), "{error}");
        let shape = KvShape { head_dim: 24, dtype: DType::Bf16, ..shape };
        let error = gpu.kv_cache(shape, 1).unwrap_err().to_string();
        assert!(error.contains("head_dim 24"), "{error}");
    }
}
