//! The model against Hugging Face transformers, and against itself at every width and in every cut.

use kernels::cpu::Path;
use kernels::{BLOCK_TOKENS, Cpu, DType, Oracle};
use phalanx_tests::golden::{self, Golden};
use phalanx_tests::ranks::{logits, options, plans};

/// Of float32 logits, absolute.
const F32_TOLERANCE: f32 = 1e-3;
/// Of the bfloat16 error, against transformers' own.
const BF16_RATIO: f64 = 1.1;

fn ends(golden: &Golden) -> Vec<usize> {
    golden.positions.iter().map(|position| position + 1).collect()
}

fn cpu_logits(golden: &Golden, dtype: DType, width: usize, threads: usize, ends: &[usize]) -> Vec<Vec<f32>> {
    let block_size = BLOCK_TOKENS;
    let plans = plans(&golden.prompt, ends, block_size);
    logits(&golden.dir, &options(dtype), width, || Ok(Cpu::new(threads)?), &plans).expect("logits")
}

fn largest_difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().flatten().zip(expected.iter().flatten());
    pairs.map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() }).fold(0.0, f32::max)
}

fn relative_error(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f64 {
    let pairs = || found.iter().flatten().zip(expected.iter().flatten());
    let square = |x: f64| x * x;
    let difference: f64 = pairs().map(|(a, b)| square(f64::from(a - b))).sum();
    let norm: f64 = pairs().map(|(_, b)| square(f64::from(*b))).sum();
    (difference / norm).sqrt()
}

#[test]
fn f32_logits_are_those_of_transformers() {
    for name in golden::MODELS {
        let golden = golden::load(name);
        let found = cpu_logits(&golden, DType::F32, 1, 2, &ends(&golden));
        let difference = largest_difference(&found, &golden.logits);
        println!("{name}: largest difference {difference:.2e}");
        assert!(difference <= F32_TOLERANCE, "{name}: {difference}");
    }
}

#[test]
fn bf16_logits_are_as_near_as_those_of_transformers() {
    for name in golden::MODELS {
        let golden = golden::load(name);
        let found = cpu_logits(&golden, DType::Bf16, 1, 2, &ends(&golden));
        let error = relative_error(&found, &golden.logits);
        println!("{name}: error {error:.4}, transformers' {:.4}", golden.bf16_error);
        assert!(error <= BF16_RATIO * golden.bf16_error, "{name}: {error} against {}", golden.bf16_error);
    }
}

#[test]
fn logits_are_the_same_bits_at_every_width_and_in_every_cut() {
    for name in golden::MODELS {
        let golden = golden::load(name);
        let ends = [1, 2, 65, 700];
        // The same rows, with other chunks between: 511 + 188 rows, and one at a time at the end.
        let cuts = [1, 2, 30, 65, 66, 577, 698, 699, 700];
        for dtype in [DType::F32, DType::Bf16] {
            let expected = cpu_logits(&golden, dtype, 1, 1, &ends);
            let units = model::Config::load(&golden.dir).expect("config").shape.kv_heads;
            for width in 1..=units {
                let found = cpu_logits(&golden, dtype, width, 1 + width % 3, &cuts);
                let found: Vec<_> =
                    cuts.iter().zip(found).filter(|(cut, _)| ends.contains(cut)).map(|(_, l)| l).collect();
                assert!(found == expected, "{name}, {dtype:?}, width {width}: other bits than width 1");
            }
        }
    }
}

#[test]
fn every_cpu_path_and_the_oracle_agree() {
    for name in ["gqa7", "awq4"] {
        let golden = golden::load(name);
        let ends = [1, 65, 600];
        let block_size = BLOCK_TOKENS;
        let plans = plans(&golden.prompt, &ends, block_size);
        for dtype in [DType::F32, DType::Bf16] {
            let oracle =
                logits(&golden.dir, &options(dtype), 2, || Ok(Oracle::default()), &plans).expect("oracle");
            for path in Path::available() {
                let found = logits(&golden.dir, &options(dtype), 2, || Ok(Cpu::with_path(1, path)?), &plans)
                    .expect("logits");
                let error = relative_error(&found, &oracle);
                println!("{name}, {path:?}, {dtype:?}: {error:.2e} from the oracle");
                assert!(
                    error <= if dtype == DType::F32 { 1e-5 } else { 2e-2 },
                    "{name}, {path:?}, {dtype:?}: {error}"
                );
            }
        }
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    let golden = golden::load("yi-nano");
    assert!(!golden.greedy.is_empty());
    for greedy in &golden.greedy {
        let all: Vec<u32> = greedy.prompt_ids.iter().chain(&greedy.ids).copied().collect();
        let first = greedy.prompt_ids.len();
        // Each token must be the argmax after all before it, so all 64 hold together.
        let ends: Vec<usize> = (first..all.len()).collect();
        let found = logits(
            &golden.dir,
            &options(DType::F32),
            3,
            || Ok(Cpu::new(1)?),
            &plans(&all, &ends, BLOCK_TOKENS),
        );
        let chosen: Vec<u32> = found
            .expect("logits")
            .iter()
            .map(|row| kernels::sample::sample(row, &kernels::Draw::GREEDY).id)
            .collect();
        assert_eq!(chosen, greedy.ids, "{}", greedy.prompt);
    }
}
