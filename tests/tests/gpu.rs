//! The model on GPUs: against Hugging Face transformers, and against itself at every width. On the emulator.
#![cfg(feature = "cuda")]

use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use comm::cuda::{LocalGpu, LocalGpuSeat, local_gpu_group};
use comm::{AbortHandle, Collective};
use kernels::cuda::Store;
use kernels::{BLOCK_TOKENS, Cuda, CudaOptions, DType};
use model::{Held, ModelSource, Stage};
use phalanx_tests::golden::{self, Golden};
use phalanx_tests::ranks::{each_rank, logits_of, options, plans};

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

/// Two ranks that go through groups of these ranges (of one rank: the first's) on GPUs that they hold: the logits of every group, and what
/// the first one's weights took in each.
fn held_through(golden: &Golden, groups: &[Vec<Range<usize>>]) -> Vec<(Vec<Vec<f32>>, u64)> {
    let ends = [65, 66, 130];
    let plans = plans(&golden.prompt[..130], &ends, BLOCK_TOKENS);
    let mut seats = vec![Vec::new(), Vec::new()];
    for ranges in groups {
        let group = local_gpu_group(ranges.len());
        for (seats, seat) in seats.iter_mut().zip(group.into_iter().map(Some).chain([None])) {
            seats.push(seat);
        }
    }
    let rank = |seats: Vec<Option<LocalGpuSeat>>| {
        let source = ModelSource::open(&golden.dir, options(DType::Bf16))?;
        let gpu = CudaOptions { separate_allocations: true, deterministic: true, ..CudaOptions::default() };
        let mut held = Held::new(Cuda::with_kernels(gpu, &Store::none())?);
        let mut found = Vec::new();
        for (ranges, seat) in groups.iter().zip(seats) {
            let Some(seat) = seat else { continue };
            let collective = seat.join(held.backend(), ranges.clone(), AbortHandle::default(), LIMIT)?;
            let stage = Stage::whole(shape(golden).layers);
            let share = source.share(&stage, ranges, collective.rank())?;
            source.load(&mut held, &share, &mut || Ok(()))?;
            let mut executor = source.start(held, stage, ranges, collective)?;
            let logits = plans.iter().map(|plan| executor.logits(plan)).collect::<model::Result<Vec<_>>>()?;
            let weights = executor.backend_mut().memory_report()?.weights;
            found.push((logits.concat(), weights));
            held = executor.leave()?;
        }
        Ok(found)
    };
    each_rank(seats, rank).expect("logits").swap_remove(0)
}

#[test]
fn weights_that_were_kept_give_the_same_bits_and_dropped_ones_their_memory() {
    if !emulator::open() {
        return;
    }
    for name in ["yi-nano", "gptq4"] {
        let golden = golden::load(name);
        let units = shape(&golden).kv_heads;
        let two = |border| vec![0..border, border..units];
        let one = || std::iter::once(0..units).collect::<Vec<_>>();
        let found = held_through(&golden, &[one(), two(1), two(units - 1), two(units / 2), one()]);
        let (logits, weights): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        assert!(logits[0].iter().any(|row| row.iter().any(|&x| x != 0.0)));
        assert!(logits.iter().all(|found| *found == logits[0]), "{name}: other bits");
        assert_eq!(weights[4], weights[0], "{name}");
        assert!(weights[1] * 3 < weights[0] * 2, "{name}: {weights:?}");
    }
}
