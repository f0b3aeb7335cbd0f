//! Prints how near the kernels come to what this machine can do in the same seconds.
//!
//! `cargo run --release -p phalanx-kernels --example kernel_speed [threads] [path] [f32]`: every line is the median of
//! pairs (a ceiling, then the kernel), so that other work on the machine touches both sides.

use std::sync::OnceLock;
use std::time::Instant;

use kernels::cpu::{Path, read_bandwidth};
use kernels::{Backend, Batch, Cpu, DType, KvShape, Partial, RowBlock, Slice, SourceType, Step, Token, Tree};

const ROUNDS: usize = 7;

/// The shape of a 1B model.
const HIDDEN: usize = 2048;
const FFN: usize = 5632;
const UNITS: usize = 4;
const GROUP: usize = 4;
const HEAD: usize = 128;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(Ok(2), |threads| threads.parse())?;
    let path = match arguments.next() {
        Some(name) => {
            Path::available().into_iter().find(|path| path.name() == name).ok_or("no such path here")?
        }
        None => Path::from_env()?,
    };
    let mut cpu = Cpu::with_path(threads, path)?;
    println!(
        "{} with {threads} threads; ceilings now: {:.1} GB/s read, {:.0} GFLOP/s dpbf16",
        cpu.path().to_owned(),
        read_bandwidth(&mut cpu, 1 << 30)?,
        peak(threads)
    );
    let dtype = if arguments.next().as_deref() == Some("f32") { DType::F32 } else { DType::Bf16 };
    decode(&mut cpu, dtype)?;
    prefill(&mut cpu, dtype)?;
    attention(&mut cpu, dtype)?;
    Ok(())
}

/// Weights that no cache holds, read once a step.
fn decode(cpu: &mut Cpu, dtype: DType) -> kernels::Result<()> {
    for (name, n, k, count) in
        [("gate_up", 2 * FFN, HIDDEN, 16), ("qkv", 3072, HIDDEN, 64), ("head", 64_000, HIDDEN, 3)]
    {
        let weights = (0..count).map(|_| matrix(cpu, n, k, dtype)).collect::<kernels::Result<Vec<_>>>()?;
        let bytes: usize = weights.iter().map(|weight| cpu.matrix_bytes(weight)).sum();
        for rows in [1, 4, 8, 16] {
            let x = cpu.buffer(dtype, rows, k)?;
            let mut out = cpu.buffer(DType::F32, rows, n)?;
            let ratios = (0..ROUNDS).map(|_| {
                let bandwidth = read_bandwidth(cpu, 1 << 30)?;
                let seconds = time(|| {
                    weights.iter().try_for_each(|w| cpu.linear(rows, &x, std::slice::from_ref(w), &mut out))
                })?;
                Ok((bytes as f64 / seconds / 1e9, bandwidth))
            });
            report(&format!("linear {name} {n}×{k}, {rows} rows"), "GB/s", ratios)?;
        }
    }
    down(cpu, dtype)
}

/// The row-parallel matrix of one rank that holds all units.
fn down(cpu: &mut Cpu, dtype: DType) -> kernels::Result<()> {
    let (tree, k, threads) = (Tree { units: UNITS }, FFN / UNITS, cpu.threads());
    let layers = (0..32)
        .map(|_| (0..UNITS).map(|_| matrix(cpu, HIDDEN, k, dtype)).collect::<kernels::Result<Vec<_>>>())
        .collect::<kernels::Result<Vec<_>>>()?;
    let bytes: usize = layers.iter().flatten().map(|weight| cpu.matrix_bytes(weight)).sum();
    for rows in [1, 16, 512] {
        let x = cpu.buffer(dtype, rows, FFN)?;
        let mut partials = [Partial { units: 0..UNITS, sum: cpu.buffer(DType::F32, rows, HIDDEN)? }];
        let ratios = (0..ROUNDS).map(|_| {
            let ceiling = if rows < 100 { read_bandwidth(cpu, 1 << 30)? } else { peak(cpu.threads()) };
            let some = if rows < 100 { &layers[..] } else { &layers[..8] };
            let work =
                || some.iter().try_for_each(|w| cpu.linear_partials(rows, &x, w, 0, tree, &mut partials));
            let seconds = if rows < 100 { time(work)? } else { compute_time(threads, work)? };
            let work = if rows < 100 { bytes as f64 } else { (some.len() * 2 * rows * FFN * HIDDEN) as f64 };
            Ok((work / seconds / 1e9, ceiling))
        });
        report(&format!("linear_partials {HIDDEN}×{FFN}, {rows} rows"), "G", ratios)?;
    }
    Ok(())
}

fn prefill(cpu: &mut Cpu, dtype: DType) -> kernels::Result<()> {
    for (rows, n, k) in
        [(512, FFN, HIDDEN), (512, 2 * FFN, HIDDEN), (512, 3072, HIDDEN), (128, 2 * FFN, HIDDEN)]
    {
        let weights = [matrix(cpu, n, k, dtype)?];
        let x = cpu.buffer(dtype, rows, k)?;
        let mut out = cpu.buffer(DType::F32, rows, n)?;
        let ratios = (0..ROUNDS).map(|_| {
            let peak = peak(cpu.threads());
            let times = 4;
            let seconds = compute_time(cpu.threads(), || {
                (0..times).try_for_each(|_| cpu.linear(rows, &x, &weights, &mut out))
            })?;
            Ok(((times * 2 * rows * n * k) as f64 / seconds / 1e9, peak))
        });
        report(&format!("linear {n}×{k}, {rows} rows"), "GFLOP/s", ratios)?;
    }
    Ok(())
}

fn attention(cpu: &mut Cpu, dtype: DType) -> kernels::Result<()> {
    let cols = UNITS * GROUP * HEAD;
    let blocks: Vec<u32> = (0..1024).collect();
    let layers = 8;
    let mut kv =
        cpu.kv_cache(KvShape { layers, units: UNITS, group: GROUP, head_dim: HEAD, dtype }, blocks.len())?;
    fill(cpu, &mut kv, layers, &blocks, dtype)?;
    let scale = 0.088;
    for context in [512, 2048, 8192] {
        let rows = 512;
        let (q, mut out) = (cpu.buffer(dtype, rows, cols)?, cpu.buffer(dtype, rows, cols)?);
        let batch =
            Batch { slices: vec![Slice { start: context - rows, len: rows, blocks: blocks.clone() }] };
        let keys: usize = batch.positions().map(|position| position + 1).sum();
        let step = step(batch);
        let ratios = (0..ROUNDS).map(|_| {
            let peak = peak(cpu.threads());
            let seconds = compute_time(cpu.threads(), || cpu.attend(&step, &q, 0, &kv, scale, &mut out))?;
            Ok(((4 * keys * cols) as f64 / seconds / 1e9, peak))
        });
        report(&format!("attend, {rows} rows up to {context}"), "GFLOP/s", ratios)?;
    }
    for (sequences, context) in [(1, 65_536), (16, 4096)] {
        let (q, mut out) = (cpu.buffer(dtype, sequences, cols)?, cpu.buffer(dtype, sequences, cols)?);
        let own = |i: usize| blocks[i * context / 64..(i + 1) * context / 64].to_vec();
        let slices = (0..sequences).map(|i| Slice { start: context - 1, len: 1, blocks: own(i) }).collect();
        let step = step(Batch { slices });
        let bytes = 2 * layers * sequences * context * UNITS * HEAD * dtype.size();
        let ratios = (0..ROUNDS).map(|_| {
            let bandwidth = read_bandwidth(cpu, 1 << 30)?;
            let seconds = time(|| {
                (0..layers).try_for_each(|layer| cpu.attend(&step, &q, layer, &kv, scale, &mut out))
            })?;
            Ok((bytes as f64 / seconds / 1e9, bandwidth))
        });
        report(&format!("attend, {sequences} decoding behind {context}"), "GB/s", ratios)?;
    }
    Ok(())
}

/// Writes every block, since memory that nobody wrote is one page of zeros.
fn fill(
    cpu: &mut Cpu,
    kv: &mut <Cpu as Backend>::KvCache,
    layers: usize,
    blocks: &[u32],
    dtype: DType,
) -> kernels::Result<()> {
    let len = 1024;
    let qkv = cpu.buffer(DType::F32, len, UNITS * (GROUP + 2) * HEAD)?;
    let rope = cpu.buffer(DType::F32, len, HEAD)?;
    let mut q = cpu.buffer(dtype, len, UNITS * GROUP * HEAD)?;
    for start in (0..blocks.len() * 64).step_by(len) {
        let step = step(Batch { slices: vec![Slice { start, len, blocks: blocks.to_vec() }] });
        (0..layers).try_for_each(|layer| cpu.rope_write_kv(&step, &qkv, &rope, layer, kv, &mut q))?;
    }
    Ok(())
}

fn step(batch: Batch) -> Step {
    Step::new(vec![Token::Id(0); batch.rows()], batch, Vec::new())
}

/// A weight of ones.
fn matrix(cpu: &Cpu, n: usize, k: usize, dtype: DType) -> kernels::Result<<Cpu as Backend>::Matrix> {
    let (bytes, source) = match dtype {
        DType::F32 => (1.0f32.to_le_bytes().repeat(n * k), SourceType::F32),
        DType::Bf16 => (0x3f80u16.to_le_bytes().repeat(n * k), SourceType::Bf16),
    };
    cpu.matrix(&[RowBlock { bytes: &bytes, dtype: source, rows: n, cols: k }], dtype)
}

/// Seconds on the clock, for what waits on memory.
fn time(work: impl FnOnce() -> kernels::Result<()>) -> kernels::Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of computing.
fn compute_time(threads: usize, work: impl FnOnce() -> kernels::Result<()>) -> kernels::Result<f64> {
    let start = now(threads);
    work()?;
    Ok(now(threads) - start)
}

/// Seconds; with one thread those that it ran, so that other work on its core does not count.
fn now(threads: usize) -> f64 {
    let ran = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    match ran.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()) {
        Some(nanoseconds) if threads == 1 => nanoseconds / 1e9,
        _ => START.get_or_init(Instant::now).elapsed().as_secs_f64(),
    }
}

static START: OnceLock<Instant> = OnceLock::new();

/// Prints the medians of `(rate, ceiling)` and of their ratio; the first pair warms up.
fn report(
    name: &str,
    unit: &str,
    pairs: impl Iterator<Item = kernels::Result<(f64, f64)>>,
) -> kernels::Result<()> {
    let pairs = pairs.skip(1).collect::<kernels::Result<Vec<_>>>()?;
    let median = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let mut values: Vec<f64> = pairs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (rate, ceiling) = (median(&|pair| pair.0), median(&|pair| pair.1));
    let ratio = median(&|pair| pair.0 / pair.1);
    println!("{name:<42} {rate:8.1} of {ceiling:8.1} {unit}: {:5.1}%", 100.0 * ratio);
    Ok(())
}

/// GFLOP/s of bf16 dot products on registers alone.
fn peak(threads: usize) -> f64 {
    let rounds = 4_000_000;
    let start = now(threads);
    std::thread::scope(|scope| {
        (1..threads).for_each(|_| drop(scope.spawn(|| dots(rounds))));
        dots(rounds);
    });
    (threads * rounds * 24 * 64) as f64 / (now(threads) - start) / 1e9
}

#[cfg(target_arch = "x86_64")]
fn dots(rounds: usize) {
    use std::arch::{asm, x86_64::*};

    // In assembly, since a compiler keeps so many sums in registers only when it feels like it.
    macro_rules! sums {
        ($rounds:expr, $($sum:tt)*) => {
            asm!(
                "2:",
                $(concat!("vdpbf16ps ", $sum, ", zmm30, zmm31"),)*
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) $rounds => _,
                $(inout($sum) _mm512_setzero_ps() => _,)*
                in("zmm30") _mm512_setzero_ps(),
                in("zmm31") _mm512_setzero_ps(),
            )
        };
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn run(rounds: usize) {
        // SAFETY: changes only the registers that it names.
        unsafe {
            sums!(rounds, "zmm0" "zmm1" "zmm2" "zmm3" "zmm4" "zmm5" "zmm6" "zmm7" "zmm8" "zmm9" "zmm10" "zmm11"
                "zmm12" "zmm13" "zmm14" "zmm15" "zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22" "zmm23")
        }
    }

    if is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the CPU has it.
        unsafe { run(rounds) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn dots(_: usize) {}
