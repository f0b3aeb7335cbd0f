//! The model on GPUs: against Hugging Face transformers, and against itself at every width. On the emulator.
#![cfg(feature = "cuda")]

use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use comm::AbortHandle;
use comm::cuda::{LocalGpu, LocalGpuSeat, local_gpu_group};
use kernels::cuda::Store;
use kernels::{BLOCK_TOKENS, Cuda, CudaOptions, DType};
use phalanx_tests::golden::{self, Golden};
use phalanx_tests::ranks::{logits_of, options, plans};

/// Of the bfloat16 error, against transformers' own.
const BF16_RATIO: f64 = 1.1;
/// The emulator takes a minute for the longest prompts.
const LAST_POSITION: usize = 700;
/// How long kernels of one rank wait for those of another.
const LIMIT: Duration = Duration::from_secs(60);

fn join(seat: LocalGpuSeat, ranges: &[Range<usize>], deterministic: bool) -> Result<(Cuda, LocalGpu)> {
    let gpu = Cuda::with_kernels(CudaOptions { deterministic, ..CudaOptions::default() }, &Store::none())?;
    let collective = seat.join(&gpu, ranges.to_vec(), AbortHandle::default(), LIMIT)?;
    Ok((gpu, collective))
}

fn gpu_logits(golden: &Golden, width: usize, deterministic: bool, ends: &[usize]) -> Vec<Vec<f32>> {
    logits_of(
        &golden.dir,
        &options(DType::Bf16),
        local_gpu_group(width),
        |seat, ranges| join(seat, ranges, deterministic),
        &plans(&golden.prompt[..*ends.last().expect("an end")], ends, BLOCK_TOKENS),
    )
    .expect("logits")
}

fn shape(golden: &Golden) -> engine::ModelShape {
    model::Config::load(&golden.dir).expect("config").shape
}

fn relative_error(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f64 {
    let pairs = || found.iter().flatten().zip(expected.iter().flatten());
    let square = |x: f64| x * x;
    let difference: f64 = pairs().map(|(a, b)| square(f64::from(a - b))).sum();
    let norm: f64 = pairs().map(|(_, b)| square(f64::from(*b))).sum();
    (difference / norm).sqrt()
}

#[test]
fn logits_are_as_near_as_those_of_transformers() {
    if !emulator::open() {
        return;
    }
    for name in golden::MODELS {
        let golden = golden::load(name);
        // Other heads are for the CPU alone.
        if ![16, 32, 64, 128].contains(&shape(&golden).head_dim) {
            continue;
        }
        let ends: Vec<usize> = golden
            .positions
            .iter()
            .map(|position| position + 1)
            .filter(|end| *end <= LAST_POSITION)
            .collect();
        assert!(ends.len() > 2, "{name}: few positions to compare");
        for deterministic in [true, false] {
            let found = gpu_logits(&golden, 1, deterministic, &ends);
            let error = relative_error(&found, &golden.logits[..ends.len()]);
            println!("{name}: error {error:.4}, transformers' {:.4}", golden.bf16_error);
            assert!(error <= BF16_RATIO * golden.bf16_error, "{name}: {error} against {}", golden.bf16_error);
        }
    }
}

#[test]
fn logits_are_the_same_bits_at_every_width_and_in_every_cut() {
    if !emulator::open() {
        return;
    }
    for name in ["yi-nano", "gqa7", "gptq4"] {
        let golden = golden::load(name);
        let ends = [1, 2, 65, 300];
        let cuts = [1, 2, 30, 65, 66, 270, 298, 299, 300];
        let expected = gpu_logits(&golden, 1, true, &ends);
        for width in 1..=shape(&golden).kv_heads {
            let found = gpu_logits(&golden, width, true, &cuts);
            let found: Vec<_> =
                cuts.iter().zip(found).filter(|(cut, _)| ends.contains(cut)).map(|(_, l)| l).collect();
            assert!(found == expected, "{name}, width {width}: other bits than width 1");
        }
    }
}
