//! What the device has not read yet is not overwritten, and what it has not written is not read: these tests wait only at their end.
//! They run twice: once where the emulator runs work at once, once where it runs none before somebody waits for it.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::env;
use std::process::Command;

use common::{Device, block, bytes, gpu, ids_step};
use kernels::{
    Backend, Batch, CHOSEN_COLS, Cuda, DType, Draw, Error, KvShape, SampledRow, Slice, SourceType, Step,
    Token,
};

/// See `emulator`.
const LATE: &str = "PHALANX_EMULATOR_LATE";
const COLS: usize = 24;

#[test]
fn also_where_work_runs_late() {
    if env::var_os(LATE).is_some() || !gpu::present() {
        return;
    }
    let output = Command::new(env::current_exe().unwrap()).env(LATE, "1").output().unwrap();
    let said = |stream: &[u8]| String::from_utf8_lossy(stream).into_owned();
    assert!(output.status.success(), "{}{}", said(&output.stdout), said(&output.stderr));
}

/// Rows whose greatest element is that of their own number.
fn peaks(rows: usize, cols: usize) -> Vec<Vec<f32>> {
    (0..rows)
        .map(|row| (0..cols).map(|col| if col == row { 9.0 } else { col as f32 / 16.0 }).collect())
        .collect()
}

fn table(gpu: &Cuda) -> kernels::cuda::Table {
    let data = bytes(&peaks(COLS, COLS).concat(), SourceType::Bf16);
    gpu.table(block(&data, SourceType::Bf16, COLS, COLS), 0, DType::Bf16).unwrap()
}

/// One decoding row at the end of `blocks` blocks.
fn decoding(gpu: &Cuda, id: u32, blocks: u32) -> Step {
    let slice = Slice { start: 64 * blocks as usize - 1, len: 1, blocks: (0..blocks).collect() };
    let sampled = vec![SampledRow { row: 0, slot: None, draw: Draw::GREEDY }];
    gpu.step(vec![Token::Id(id)], Batch { slices: vec![slice] }, sampled)
}

#[test]
fn steps_follow_one_another() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let table = table(&gpu);
    // The words of the fifth take more room than there is at first.
    let steps: Vec<Step> = (0..9).map(|i| decoding(&gpu, 2 * i, if i == 4 { 300_000 } else { 1 })).collect();
    let mut outs: Vec<_> = steps.iter().map(|_| gpu.buffer(DType::F32, 1, COLS).unwrap()).collect();
    for (step, out) in steps.iter().zip(&mut outs) {
        gpu.run::<Error>(step, false, |gpu| gpu.embed(step, &table, out)).unwrap();
    }
    for (i, out) in outs.iter().enumerate() {
        assert_eq!(Cuda::row(out, 0), peaks(COLS, COLS)[2 * i], "step {i}");
    }
}

#[test]
fn choices_of_two_steps_may_be_under_way() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let table = table(&gpu);
    let shape = KvShape { layers: 1, units: 1, group: 1, head_dim: 16, dtype: DType::Bf16 };
    let _kv = gpu.kv_cache(shape, 4).unwrap();
    let mut logits = gpu.buffer(DType::F32, 1, COLS).unwrap();
    let mut all_chosen = gpu.buffer(DType::F32, 1, CHOSEN_COLS).unwrap();
    for record in [false, true] {
        let mut begin = |gpu: &mut Cuda, id: u32| {
            let step = decoding(gpu, id, 1 + id % 3);
            gpu.run::<Error>(&step, record, |gpu| {
                gpu.embed(&step, &table, &mut logits)?;
                gpu.sample(&step, &logits, &mut all_chosen)
            })
        };
        let mut chosen = Vec::new();
        begin(&mut gpu, 3).unwrap();
        for id in 4..12 {
            begin(&mut gpu, id).unwrap();
            chosen.extend(gpu.choices().unwrap());
        }
        begin(&mut gpu, 12).unwrap();
        let third = begin(&mut gpu, 13).unwrap_err().to_string();
        assert!(third.contains("2 steps are in flight"), "{third}");
        chosen.extend(gpu.choices().unwrap());
        chosen.extend(gpu.choices().unwrap());
        let ids: Vec<u32> = chosen.iter().map(|choice| choice.id).collect();
        assert_eq!(ids, (3..13).collect::<Vec<_>>());
        assert!(gpu.choices().is_err(), "nothing more was sampled");
    }
}

#[test]
fn uploads_follow_one_another() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    let (n, k) = (3, 8);
    let weights: Vec<_> = (0..7)
        .map(|i| {
            let data = bytes(&vec![(i + 1) as f32; n * k], SourceType::Bf16);
            gpu.matrix(&[block(&data, SourceType::Bf16, n, k)], DType::Bf16).unwrap()
        })
        .collect();
    let x = gpu.filled(DType::Bf16, &[vec![1.0; k]]);
    let mut out = gpu.buffer(DType::F32, 1, 7 * n).unwrap();
    gpu.linear(1, &x, &weights, &mut out).unwrap();
    let want: Vec<f32> = (0..7 * n).map(|i| (8 * (i / n + 1)) as f32).collect();
    assert_eq!(Cuda::row(&out, 0), want);
}

/// One upload that takes several turns of the page-locked buffers.
#[test]
fn a_long_upload_arrives_whole() {
    if !gpu::present() {
        return;
    }
    let mut gpu = gpu::open(true);
    // 20 MiB and a little: parts of 8 MiB.
    let rows = (20 << 20) / (2 * 1024) + 1;
    let values: Vec<f32> = (0..rows * 1024).map(|i| (i / 1024 % 251 + i % 5) as f32).collect();
    let data = bytes(&values, SourceType::Bf16);
    let table = gpu.table(block(&data, SourceType::Bf16, rows, 1024), 0, DType::Bf16).unwrap();
    let ids: Vec<u32> = (0..rows as u32).step_by(97).collect();
    let step = ids_step(&gpu, &ids);
    let mut out = gpu.buffer(DType::F32, ids.len(), 1024).unwrap();
    gpu.run::<Error>(&step, false, |gpu| gpu.embed(&step, &table, &mut out)).unwrap();
    for (row, &id) in ids.iter().enumerate() {
        let first = id as usize * 1024;
        assert_eq!(Cuda::row(&out, row), values[first..first + 1024], "row {id}");
    }
}
