//! The contract on bits: a row depends on its inputs alone, not on rows, threads, batch, chunks or who holds a unit.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::HashMap;
use std::ops::Range;

use common::{Device, Random, Sequences, bits, weight};
use kernels::cpu::Path;
use kernels::{Backend, Cpu, DType, Partial, SourceType, Tree};
use proptest::prelude::*;

fn path() -> impl Strategy<Value = Path> {
    prop::sample::select(Path::available())
}

fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F32, DType::Bf16])
}

/// Outputs of `sequence` rows cut into steps of random sequences and lengths.
fn steps(lengths: &[usize], seed: u64) -> Vec<Vec<(usize, usize)>> {
    let mut random = Random::new(seed);
    let mut left = lengths.to_vec();
    let mut steps = Vec::new();
    while left.iter().any(|&left| left > 0) {
        let mut order: Vec<usize> = (0..lengths.len()).filter(|&sequence| left[sequence] > 0).collect();
        random.shuffle(&mut order);
        order.truncate(1 + random.next() as usize % order.len());
        let mut step = Vec::new();
        for sequence in order {
            let most = [1, 2, 7, 64, 300, 2000][random.next() as usize % 6];
            let len = (1 + random.next() as usize % most).min(left[sequence]);
            left[sequence] -= len;
            step.push((sequence, len));
        }
        steps.push(step);
    }
    steps
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_linear_row_does_not_see_the_others(
        path in path(), compute in dtype(), weights in dtype(), threads in 1usize..5,
        rows in prop_oneof![1usize..40, Just(512), 512usize..700], half_k in 1usize..600, n in 1usize..300,
        seed in any::<u64>(),
    ) {
        let k = 2 * half_k;
        let mut random = Random::new(seed);
        let values = random.rows(rows, k);
        let mut many = Cpu::with_path(threads, path).unwrap();
        let matrix = weight(&many, n, k, SourceType::F32, weights, &mut random);
        let x = many.filled(compute, &values);
        let mut out = many.buffer(DType::F32, rows, n).unwrap();
        many.linear(rows, &x, std::slice::from_ref(&matrix), &mut out).unwrap();

        let mut alone = Cpu::with_path(1, path).unwrap();
        for row in [0, rows / 2, rows - 1] {
            let x = alone.filled(compute, &values[row..=row]);
            let mut one = alone.buffer(DType::F32, 1, n).unwrap();
            alone.linear(1, &x, std::slice::from_ref(&matrix), &mut one).unwrap();
            prop_assert_eq!(bits(&[one.row(0)]), bits(&[out.row(row)]));
        }
    }

    #[test]
    fn widened_weights_are_the_same_numbers(path in path(), rows in 1usize..30, half_k in 1usize..300, n in 1usize..70) {
        let k = 2 * half_k;
        let values = Random::new(k as u64).rows(rows, k);
        let mut cpu = Cpu::with_path(2, path).unwrap();
        let x = cpu.filled(DType::F32, &values);
        let results = [SourceType::Bf16, SourceType::F32].map(|source| {
            let rounded: Vec<f32> = Random::new(9).row(n * k).iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
            let data = common::bytes(&rounded, source);
            let matrix = cpu.matrix(&[common::block(&data, source, n, k)], DType::F32).unwrap();
            let mut out = cpu.buffer(DType::F32, rows, n).unwrap();
            cpu.linear(rows, &x, &[matrix], &mut out).unwrap();
            bits(&<Cpu as Device>::rows(&out, rows))
        });
        prop_assert_eq!(&results[0], &results[1]);
    }

    #[test]
    fn partial_sums_do_not_see_who_holds_a_unit(
        path in path(), compute in dtype(), threads in 1usize..5, rows in 1usize..60, units in 1usize..9,
        cuts in prop::collection::vec(0usize..9, 0..4), n in 1usize..150, seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let widths: Vec<usize> = (0..units).map(|_| 2 + 2 * (random.next() as usize % 400)).collect();
        let values = random.rows(rows, widths.iter().sum());
        let data: Vec<Vec<u8>> =
            widths.iter().map(|&k| common::bytes(&random.row(n * k), SourceType::Bf16)).collect();
        let tree = Tree { units };
        let held = |cpu: &mut Cpu, held: Range<usize>, sums: &mut HashMap<Range<usize>, Vec<Vec<f32>>>| {
            let first: usize = widths[..held.start].iter().sum();
            let last: usize = widths[..held.end].iter().sum();
            let x: Vec<Vec<f32>> = values.iter().map(|row| row[first..last].to_vec()).collect();
            let x = cpu.filled(compute, &x);
            let weights: Vec<_> = held
                .clone()
                .map(|u| cpu.matrix(&[common::block(&data[u], SourceType::Bf16, n, widths[u])], compute).unwrap())
                .collect();
            let mut partials: Vec<_> = tree
                .subtrees(&held)
                .into_iter()
                .map(|units| Partial { units, sum: cpu.buffer(DType::F32, rows, n).unwrap() })
                .collect();
            cpu.linear_partials(rows, &x, &weights, held.start, tree, &mut partials).unwrap();
            sums.extend(partials.into_iter().map(|p| (p.units, <Cpu as Device>::rows(&p.sum, rows))));
        };

        let mut whole = HashMap::new();
        held(&mut Cpu::with_path(threads, path).unwrap(), 0..units, &mut whole);
        let mut ranks = HashMap::new();
        let mut borders: Vec<usize> = cuts.into_iter().map(|cut| cut.min(units)).chain([0, units]).collect();
        borders.sort_unstable();
        borders.dedup();
        for rank in borders.windows(2) {
            held(&mut Cpu::with_path(1, path).unwrap(), rank[0]..rank[1], &mut ranks);
        }
        prop_assert_eq!(bits(&whole[&(0..units)]), bits(&reduce(0..units, &ranks)));
    }

    #[test]
    fn attention_does_not_see_chunks_threads_or_batch(
        path in path(), compute in dtype(), kv in dtype(), threads in 1usize..5, units in 1usize..3,
        group in prop::sample::select(vec![1usize, 2, 3, 4, 7, 8]),
        head_dim in prop::sample::select(vec![16usize, 24, 32, 80]),
        lengths in prop::collection::vec(prop_oneof![1usize..150, 500usize..530, 600usize..1100], 1..4),
        seed in any::<u64>(),
    ) {
        let mut sequences = Sequences { units, group, head_dim, compute, kv, seed, lengths, recycled: false };
        let want = sequences.run(&mut Cpu::with_path(1, path).unwrap(), &sequences.whole());
        // Besides, blocks that held NaN before give the same as fresh ones.
        sequences.recycled = true;
        let steps = steps(&sequences.lengths, seed);
        let got = sequences.run(&mut Cpu::with_path(threads, path).unwrap(), &steps);
        for (got, want) in got.iter().zip(&want) {
            prop_assert_eq!(bits(got), bits(want));
        }
    }

    #[test]
    fn rowwise_ops_do_not_see_other_rows(
        path in path(), compute in dtype(), threads in 1usize..5, rows in 1usize..200, cols in 1usize..500,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let values = random.rows(rows, 2 * cols);
        let weight = random.row(2 * cols);
        let run = |threads: usize, values: &[Vec<f32>]| {
            let mut cpu = Cpu::with_path(threads, path).unwrap();
            let x = cpu.filled(DType::F32, values);
            let weight = cpu.filled(DType::F32, std::slice::from_ref(&weight));
            let mut normed = cpu.buffer(compute, values.len(), 2 * cols).unwrap();
            cpu.rms_norm(values.len(), &x, &weight, 1e-6, &mut normed).unwrap();
            let mut gated = cpu.buffer(compute, values.len(), cols).unwrap();
            cpu.silu_mul(values.len(), &x, &[cols / 2, cols - cols / 2], &mut gated).unwrap();
            let rows = 0..values.len();
            bits(&rows.map(|row| [normed.row(row), gated.row(row)].concat()).collect::<Vec<_>>())
        };
        let all = run(threads, &values);
        let row = rows / 2;
        prop_assert_eq!(&run(1, &values[row..=row])[0], &all[row]);
    }
}

/// Adds ranks' sub-trees along the tree.
fn reduce(node: Range<usize>, sums: &HashMap<Range<usize>, Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
    if let Some(sum) = sums.get(&node) {
        return sum.clone();
    }
    let middle = Tree::split(&node);
    let mut left = reduce(node.start..middle, sums);
    for (left, right) in left.iter_mut().zip(reduce(middle..node.end, sums)) {
        left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
    }
    left
}

#[test]
fn decoding_after_prefill_is_prefill() {
    for path in Path::available() {
        for (compute, kv) in [(DType::F32, DType::F32), (DType::Bf16, DType::Bf16)] {
            let sequences = Sequences {
                units: 1,
                group: 4,
                head_dim: 64,
                compute,
                kv,
                seed: 11,
                lengths: vec![1040],
                recycled: true,
            };
            let mut cpu = Cpu::with_path(2, path).unwrap();
            let whole = sequences.run(&mut cpu, &sequences.whole());
            // Over the border of a span, and with some steps of a few tokens.
            let mut steps = vec![vec![(0, 500)]];
            steps.extend(vec![vec![(0, 1)]; 30]);
            steps.extend(vec![vec![(0, 2)]; 200]);
            steps.extend(vec![vec![(0, 1)]; 110]);
            assert_eq!(bits(&sequences.run(&mut cpu, &steps)[0]), bits(&whole[0]), "{path:?}");
        }
    }
}
