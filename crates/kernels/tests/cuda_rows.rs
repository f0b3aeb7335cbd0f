//! What works on rows element by element, on a GPU or the emulator: to the last bit where that can be told, and up to the last element.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Device, Random, block, bytes, gpu, ids_step, run, sampled_step, step};
use half::bf16;
use kernels::{Backend, Batch, Cuda, DType, Draw, Slice, SourceType};

/// Results are in bf16, so an error of f32's last bits shows only where the exact result lies next to the border between two numbers.
#[test]
fn silu_mul_rounds_the_exact_result() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let (rows, cols) = (64, 1000);
    let mut values = Random::new(1).rows(rows, 2 * cols);
    values.iter_mut().for_each(|row| row[..cols].iter_mut().for_each(|gate| *gate *= 20.0));
    let gate_up = gpu.filled(DType::F32, &values);
    let mut out = gpu.buffer(DType::Bf16, rows, cols).unwrap();
    gpu.silu_mul(rows, &gate_up, &[cols], &mut out).unwrap();
    let exact = |gate: f32, up: f32| f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(up);
    let mut others = 0;
    for (values, got) in values.iter().zip(Cuda::rows(&out, rows)) {
        let want = (0..cols).map(|i| bf16::from_f64(exact(values[i], values[cols + i])).to_f32());
        others += want.zip(got).filter(|(want, got)| want != got).count();
    }
    // Of the numbers that differ by 3 · 2⁻²⁴ of themselves about 3 · 2⁻²⁴ / 2⁻⁸ have a border between them.
    assert!(others <= 5, "{others} of {} are not the nearest", rows * cols);
}

/// Angles are taken in f64, so that the nearest f32 comes out, also for positions beyond 131,072.
#[test]
fn rope_tables_are_the_nearest_numbers() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let frequencies: Vec<f64> = (0..64).map(|i| 5e6f64.powf(-f64::from(i) / 64.0)).collect();
    let starts = [0, 1000, 131_040, 199_960, 999_960];
    let slice = |&start: &usize| Slice { start, len: 40, blocks: vec![0; (start + 40).div_ceil(64)] };
    let step = step(&gpu, Batch { slices: starts.iter().map(slice).collect() });
    let mut out = gpu.buffer(DType::F32, step.rows, 128).unwrap();
    run(&mut gpu, &step, |gpu| gpu.rope_table(&step, &frequencies, &mut out));
    let positions = starts.iter().flat_map(|&start| start..start + 40);
    for (position, row) in positions.zip(Cuda::rows(&out, step.rows)) {
        let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
        let (cosines, sines): (Vec<_>, Vec<_>) =
            angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        assert_eq!(row, [cosines, sines].concat(), "position {position}");
    }
}

/// The last row ends where its allocation does, and a page that cannot be touched begins.
#[test]
fn copies_of_rows_end_with_the_row() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    for cols in [64, 1088, 2048] {
        let values = Random::new(5).rows(10, cols);
        let data = bytes(&values.concat(), SourceType::F32);
        let table = gpu.table(block(&data, SourceType::F32, 10, cols), 20, DType::Bf16).unwrap();
        let mut out = gpu.buffer(DType::F32, 4, cols).unwrap();
        let step = ids_step(&gpu, &[20, 7, 30, 29]);
        run(&mut gpu, &step, |gpu| gpu.embed(&step, &table, &mut out));
        let rounded =
            |row: usize| values[row].iter().map(|&x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>();
        assert_eq!(Cuda::rows(&out, 4), [rounded(0), vec![0.0; cols], vec![0.0; cols], rounded(9)]);

        for dtype in [DType::F32, DType::Bf16] {
            let x = gpu.filled(dtype, &values);
            let mut out = gpu.buffer(dtype, 4, cols).unwrap();
            let step = sampled_step(&gpu, 10, &[9, 0, 4, 2].map(|row| (row, Draw::GREEDY)));
            run(&mut gpu, &step, |gpu| gpu.gather_sampled(&step, &x, &mut out));
            assert_eq!(Cuda::rows(&out, 4), [9, 0, 4, 2].map(|row| Cuda::row(&x, row)));
        }
    }
}
