//! Sampling on a GPU or the emulator chooses what the host chooses: of any vocabulary, among equals, with all parameters.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Device, Random, gpu, run, sampled_step};
use kernels::{Backend, Choice, Cuda, DType, Draw, sample};

/// Rows of logits and how to draw from them: what the device chooses is what the host does, to the last bit of the logarithm.
fn assert_chosen(gpu: &mut Cuda, rows: &[Vec<f32>], draws: &[Draw]) {
    let step = sampled_step(gpu, rows.len(), &draws.iter().copied().enumerate().collect::<Vec<_>>());
    let logits = gpu.filled(DType::F32, rows);
    let mut chosen = gpu.buffer(DType::F32, rows.len(), 2).unwrap();
    run(gpu, &step, |gpu| gpu.sample(&step, &logits, &mut chosen));
    let choices = gpu.choices().unwrap();
    assert_eq!(choices.len(), rows.len());
    for (row, (choice, draw)) in choices.iter().zip(draws).enumerate() {
        let want = sample::sample(&rows[row], draw);
        // There are many NaN.
        let bits =
            |choice: &Choice| (choice.id, if choice.logprob.is_nan() { 0 } else { choice.logprob.to_bits() });
        assert_eq!(bits(choice), bits(&want), "row {row} of {}: {draw:?}", rows[row].len());
    }
}

/// `count` draws that differ in everything.
fn draws(count: usize, random: &mut Random) -> Vec<Draw> {
    (0..count)
        .map(|i| Draw {
            temperature: [1.0, 0.6, 0.0, 1.7, 0.05, 30.0, 1.0][i % 7],
            top_k: [0, 40, 1, 7, 0, 900, 3, 33, 2][i % 9],
            top_p: [1.0, 0.95, 0.5, 1.0, 0.999, 0.1, 1e-6, 0.8][i % 8],
            seed: random.next(),
            position: (random.next() >> (i % 40)) as u32,
        })
        .collect()
}

#[test]
fn vocabularies_of_any_size() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let mut random = Random::new(1);
    for (vocabulary, count) in [
        (1, 2),
        (2, 40),
        (31, 30),
        (32, 30),
        (33, 30),
        (1000, 30),
        (1024, 9),
        (1025, 30),
        (4100, 30),
        (64_000, 12),
    ] {
        let rows: Vec<Vec<f32>> =
            (0..count).map(|_| random.row(vocabulary).iter().map(|x| x * 9.0).collect()).collect();
        let draws = draws(count, &mut random);
        assert_chosen(&mut gpu, &rows, &draws);
    }
}

/// Where a truncation falls among equals, the lower ids count.
#[test]
fn equals_are_told_apart_by_their_ids() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let mut random = Random::new(2);
    for vocabulary in [3, 40, 1500, 5000] {
        let count = 60;
        let rows: Vec<Vec<f32>> = (0..count)
            .map(|i| {
                let levels = [1.0, 2.0, 4.0, 30.0][i % 4];
                random.row(vocabulary).iter().map(|x| (x * levels).round()).collect()
            })
            .collect();
        let draws = draws(count, &mut random);
        assert_chosen(&mut gpu, &rows, &draws);
        // All are equal, and the highest is not the first.
        let mut level = vec![vec![0.0; vocabulary]; count];
        level.iter_mut().skip(1).step_by(2).for_each(|row| row[vocabulary - 1] = 0.25);
        assert_chosen(&mut gpu, &level, &draws);
    }
}

#[test]
fn numbers_that_are_not_finite() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let mut random = Random::new(3);
    let vocabulary = 1100;
    let bad = [f32::NEG_INFINITY, f32::NAN, -1e30, f32::INFINITY, 3e38, -0.0];
    let rows: Vec<Vec<f32>> = (0..36)
        .map(|i| {
            // Few, half, all but one, or all are bad.
            let most = [20, 550, 1099, 1100][i % 4];
            let mut row = random.row(vocabulary);
            row.iter_mut().rev().take(most).for_each(|x| *x = bad[i % 6]);
            row
        })
        .collect();
    let draws = draws(rows.len(), &mut random);
    assert_chosen(&mut gpu, &rows, &draws);
}

/// Every weight from 1 down to 0 decides once where the threshold lies, whether it has a mantissa of many bits or of few.
#[test]
fn thresholds_among_weights_of_all_magnitudes() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let mut random = Random::new(4);
    let vocabulary = 300;
    let rows: Vec<Vec<f32>> = (0..80)
        .map(|i| (0..vocabulary).map(|id| -0.3 * (id * 7 % vocabulary) as f32 - i as f32 / 9.0).collect())
        .collect();
    let draws: Vec<Draw> = (0..80)
        .map(|i| Draw {
            temperature: [1.0, 0.25, 4.0, 60.0][i % 4],
            top_k: [0, 1 + 3 * i as u32][i % 2],
            top_p: 1.0 - [0.0, 0.5f32.powi(i as i32 / 4 + 1)][i / 2 % 2],
            seed: random.next(),
            position: i as u32,
        })
        .collect();
    assert_chosen(&mut gpu, &rows, &draws);
}
