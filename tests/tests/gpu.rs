//! The model on GPUs: against Hugging Face transformers, against itself at every width, and served. On the emulator.
#![cfg(feature = "cuda")]

use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use comm::AbortHandle;
use comm::cuda::{LocalGpu, LocalGpuSeat, local_gpu_group};
use kernels::cuda::Store;
use kernels::{BLOCK_TOKENS, Cuda, CudaOptions, DType};
use phalanx_tests::golden::{self, Golden};
use phalanx_tests::process::Program;
use phalanx_tests::ranks::{logits_of, options, plans};

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
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

/// The program with the emulator as its GPU.
fn on_gpus(args: &[&str], count: usize) -> Option<String> {
    let libraries = match emulator::libraries() {
        Ok(folder) => folder,
        Err(absent) => {
            eprintln!("skipped: {absent}");
            return None;
        }
    };
    let cache = tempfile::tempdir().expect("a folder");
    let ended = PHALANX
        .command(args)
        .env("LD_LIBRARY_PATH", libraries.to_str().expect("UTF-8"))
        .env("PHALANX_EMULATOR_DEVICES", &count.to_string())
        // All of it becomes KV cache.
        .env("PHALANX_EMULATOR_MEMORY", &(1_u64 << 30).to_string())
        .env("PHALANX_KERNEL_CACHE", cache.path().to_str().expect("UTF-8"))
        .run();
    assert!(ended.status.success(), "{}", ended.stderr);
    Some(ended.stdout)
}

#[test]
fn a_cluster_of_gpus_answers_alike_at_any_width() {
    let prompt = ["generate", "--prompt", "In the beginning", "--max-tokens", "12", "--device", "cuda"];
    let texts: Vec<_> = [1, 2, 3]
        .into_iter()
        .filter_map(|gpus| on_gpus(&[&prompt[..], &["--deterministic"]].concat(), gpus))
        .collect();
    assert!(texts.iter().all(|text| *text == texts[0] && !text.trim().is_empty()), "{texts:?}");
    // These were a step ahead of what the coordinator knew.
    let one_step = on_gpus(&[&prompt[..], &["--deterministic", "--steps-in-flight", "1"]].concat(), 2);
    assert_eq!(one_step.as_ref(), texts.first());
}

#[test]
fn without_a_gpu_it_is_one_sentence() {
    let empty = tempfile::tempdir().expect("a folder");
    let ended = PHALANX
        .command(["serve", "--device", "cuda"])
        .env("LD_LIBRARY_PATH", empty.path().to_str().expect("UTF-8"))
        .run();
    assert!(!ended.status.success());
    assert!(ended.stderr.contains("no GPU") || ended.stderr.contains("GPU"), "{}", ended.stderr);
    assert!(ended.stderr.lines().count() <= 2 && !ended.stderr.contains("panicked"), "{}", ended.stderr);
}
