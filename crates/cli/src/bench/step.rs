//! `phalanx bench step`: the engine's speed without network or gRPC, beside this machine's own limit.
//!
//! The ranks are threads of this process. Read bandwidth is measured between the decode steps, so that both figures are of the
//! same minute of a noisy machine.

use std::ops::Range;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use comm::{LocalTransport, MeshCollective, Transport, local_group};
use engine::{
    BlockId, Epoch, Sampling, SamplingParams, SeqId, SeqSlice, SlotId, StepId, StepPlan, Tokens, rank_ranges,
};
use kernels::cpu::read_bandwidth;
use kernels::{Backend, Cpu};
use model::{Executor, ModelOptions, ModelSource, SAMPLING_RANK};
use serde::Serialize;

use super::spread::Spread;
use crate::args::ModelArgs;

/// Memory that the bandwidth is measured on: far more than any cache.
const BANDWIDTH_BYTES: usize = 1 << 30;
/// More sequences, or tokens of one, are a slip of the keyboard; their products stay far from overflow.
const MAX_COUNT: usize = 1 << 20;
/// Rows of a prefill chunk, as the scheduler's.
const PREFILL_CHUNK: usize = 512;
/// The bandwidth is measured about this often between the decode steps.
const BANDWIDTH_SAMPLES: usize = 8;

#[derive(Debug, Args)]
pub(crate) struct StepArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tensor ranks
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: usize,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens decoded of each sequence
    #[arg(long, value_name = "N", default_value_t = 64)]
    decode_tokens: usize,
    /// Sequences that decode together
    #[arg(long, value_name = "B", default_value_t = 1)]
    batch: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was measured; rates are medians over steps or prompts.
#[derive(Debug, Serialize)]
struct Figures {
    model: String,
    fingerprint: String,
    workers: usize,
    threads_per_worker: usize,
    batch: usize,
    prompt_tokens: usize,
    decode_tokens: usize,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    decode_tokens_per_second_range: [f64; 2],
    decode_step_milliseconds: f64,
    weight_bytes_per_step: u64,
    /// Weights read a second in decode.
    weight_gigabytes_per_second: f64,
    /// Of this machine, with as many threads, between the same steps.
    read_bandwidth_gigabytes_per_second: f64,
    read_bandwidth_share: f64,
}

impl StepArgs {
    pub(super) fn run(self) -> Result<()> {
        let figures = step(&self)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        } else {
            print!("{figures}");
        }
        Ok(())
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { workers, threads_per_worker: threads, batch, .. } = self;
        let [low, high] = self.decode_tokens_per_second_range;
        writeln!(f, "{} ({})", self.model, self.fingerprint)?;
        writeln!(f, "workers {workers} x {threads} threads, batch {batch}, prompt {}", self.prompt_tokens)?;
        writeln!(f, "prefill     {:8.1} tokens/s", self.prefill_tokens_per_second)?;
        writeln!(f, "decode      {:8.2} tokens/s [{low:.2}-{high:.2}]", self.decode_tokens_per_second)?;
        writeln!(
            f,
            "weights     {:8.3} GB a step, {:.1} GB/s",
            self.weight_bytes_per_step as f64 / 1e9,
            self.weight_gigabytes_per_second
        )?;
        writeln!(
            f,
            "this machine{:8.1} GB/s read, measured between the steps",
            self.read_bandwidth_gigabytes_per_second
        )?;
        writeln!(f, "share       {:8.3} of the read bandwidth", self.read_bandwidth_share)
    }
}

fn step(args: &StepArgs) -> Result<Figures> {
    for (flag, count) in [
        ("--batch", args.batch),
        ("--prompt-tokens", args.prompt_tokens),
        ("--decode-tokens", args.decode_tokens),
    ] {
        if count == 0 || count > MAX_COUNT {
            bail!("{flag} {count}: from 1 to {MAX_COUNT} are allowed");
        }
    }
    let dir = args.model.dir()?;
    let threads = args.model.threads(args.workers);
    let mut options = args.model.options(!args.json);
    let tokens = args.prompt_tokens + args.decode_tokens;
    let mut group = Group::start(&dir, &mut options, args.workers, threads, args.batch * tokens)?;
    if tokens > group.max_context {
        bail!("{tokens} tokens are more than the context of {}", group.max_context);
    }
    let mut meter = Cpu::new(threads * args.workers)?;

    let blocks_each = tokens.div_ceil(group.block_size);
    let prompt = |seq: usize| (0..args.prompt_tokens).map(move |i| (i * 31 + seq * 7 + 11) as u32);
    let slice = |seq: usize, start: usize, tokens: Vec<u32>, sampled: bool| SeqSlice {
        seq: SeqId(seq as u64),
        slot: SlotId(seq as u32),
        start: start as u32,
        blocks: (0..blocks_each).map(|i| BlockId((seq * blocks_each + i) as u32)).collect(),
        sampling: sampled
            .then(|| Sampling { params: SamplingParams::GREEDY, position: (start + tokens.len()) as u32 }),
        tokens: Tokens::Ids(tokens),
    };

    let mut prefill_times = Vec::new();
    let mut last = Vec::new();
    // The first prompt runs once more at the start: buffers grow and pages are touched outside the measurement.
    for seq in std::iter::once(0).chain(0..args.batch) {
        let ids: Vec<u32> = prompt(seq).map(|id| id % group.vocabulary).collect();
        let started = Instant::now();
        let mut sampled = Vec::new();
        for (index, chunk) in ids.chunks(PREFILL_CHUNK).enumerate() {
            let start = index * PREFILL_CHUNK;
            let ends = start + chunk.len() == ids.len();
            sampled = group.run(vec![slice(seq, start, chunk.to_vec(), ends)])?;
        }
        prefill_times.push(started.elapsed());
        last.push(sampled[0]);
    }
    prefill_times.remove(0);
    last.remove(0);

    let mut decode_times = Vec::new();
    let mut bandwidths = Vec::new();
    let every = args.decode_tokens.div_ceil(BANDWIDTH_SAMPLES);
    for index in 0..args.decode_tokens {
        if index % every == 0 {
            bandwidths.push(read_bandwidth(&mut meter, BANDWIDTH_BYTES)?);
        }
        let position = args.prompt_tokens + index;
        let slices = last.iter().enumerate().map(|(seq, &id)| slice(seq, position, vec![id], true)).collect();
        let started = Instant::now();
        last = group.run(slices)?;
        decode_times.push(started.elapsed());
    }

    let step_seconds = Spread::of(decode_times.iter().map(Duration::as_secs_f64)).median;
    let prefill_seconds = Spread::of(prefill_times.iter().map(Duration::as_secs_f64)).median;
    let rate = |time: Option<&Duration>| time.map_or(0.0, |t| args.batch as f64 / t.as_secs_f64());
    let weight_rate = group.weight_bytes as f64 / step_seconds / 1e9;
    let bandwidth = Spread::of(bandwidths).median;
    Ok(Figures {
        model: group.name.clone(),
        fingerprint: group.fingerprint.clone(),
        workers: args.workers,
        threads_per_worker: threads,
        batch: args.batch,
        prompt_tokens: args.prompt_tokens,
        decode_tokens: args.decode_tokens,
        prefill_tokens_per_second: args.prompt_tokens as f64 / prefill_seconds,
        decode_tokens_per_second: args.batch as f64 / step_seconds,
        decode_tokens_per_second_range: [rate(decode_times.iter().max()), rate(decode_times.iter().min())],
        decode_step_milliseconds: step_seconds * 1e3,
        weight_bytes_per_step: group.weight_bytes,
        weight_gigabytes_per_second: weight_rate,
        read_bandwidth_gigabytes_per_second: bandwidth,
        read_bandwidth_share: weight_rate / bandwidth,
    })
}

/// A group whose ranks are threads.
struct Group {
    name: String,
    fingerprint: String,
    vocabulary: u32,
    max_context: usize,
    block_size: usize,
    weight_bytes: u64,
    steps: u64,
    plans: Vec<mpsc::Sender<StepPlan>>,
    /// One answer of each rank for each plan: the sampled ids, which only one rank has.
    answers: mpsc::Receiver<Result<Vec<u32>>>,
}

impl Group {
    fn start(
        dir: &Path,
        options: &mut ModelOptions,
        workers: usize,
        threads: usize,
        tokens: usize,
    ) -> Result<Self> {
        let probe = Cpu::new(1)?;
        let source = ModelSource::open(dir, options.clone())?;
        let report = source.report(probe.path());
        let ranges = rank_ranges(report.units as usize, workers)?;
        // Just what the benchmark needs, a block more for each sequence.
        if options.kv_memory.is_none() {
            options.kv_memory = Some(
                source.kv_bytes(&probe, tokens + 2 * tokens.next_multiple_of(report.block_size as usize)),
            );
        }
        let (answer, answers) = mpsc::channel();
        let (loaded, weight_bytes) = mpsc::channel();
        let mut plans = Vec::new();
        for transport in local_group(workers) {
            let (plan, inbox) = mpsc::channel();
            let (dir, options, ranges) = (dir.to_owned(), options.clone(), ranges.clone());
            let (loaded, answer) = (loaded.clone(), answer.clone());
            thread::spawn(move || match load(&dir, options, threads, transport, ranges) {
                // A closed channel means that the benchmark has ended.
                Ok(mut executor) => {
                    let _ = loaded.send(Ok(executor.weight_bytes()));
                    while let Ok(plan) = inbox.recv()
                        && answer.send(run(&mut executor, &plan)).is_ok()
                    {}
                }
                Err(error) => {
                    let _ = loaded.send(Err(error));
                }
            });
            plans.push(plan);
        }
        drop(loaded);
        let weight_bytes = (0..workers)
            .map(|_| weight_bytes.recv().context("a rank ended while loading")?)
            .sum::<Result<u64>>()?;
        Ok(Self {
            name: report.name,
            fingerprint: report.fingerprint,
            vocabulary: report.vocabulary,
            max_context: report.max_context as usize,
            block_size: report.block_size as usize,
            weight_bytes,
            steps: 0,
            plans,
            answers,
        })
    }

    /// Runs one step on all ranks; returns the sampled ids.
    fn run(&mut self, slices: Vec<SeqSlice>) -> Result<Vec<u32>> {
        let plan =
            StepPlan { epoch: Epoch::default(), step: StepId(self.steps), keep_sampled: false, slices };
        self.steps += 1;
        for rank in &self.plans {
            rank.send(plan.clone()).map_err(|_| anyhow!("a rank has ended"))?;
        }
        let mut sampled = Vec::new();
        for _ in &self.plans {
            sampled.extend(self.answers.recv()??);
        }
        Ok(sampled)
    }
}

/// Loads one rank, on its own thread.
fn load(
    dir: &Path,
    options: ModelOptions,
    threads: usize,
    transport: LocalTransport,
    ranges: Vec<Range<usize>>,
) -> Result<impl Executor> {
    let progress = options.progress && transport.rank() == SAMPLING_RANK;
    let source = ModelSource::open(dir, ModelOptions { progress, ..options })?;
    let collective = MeshCollective::new(transport, ranges.clone())?;
    Ok(source.executor(Cpu::new(threads)?, &ranges, collective)?)
}

/// The ids that a step sampled; none on ranks that do not sample.
fn run(executor: &mut impl Executor, plan: &StepPlan) -> Result<Vec<u32>> {
    executor.launch(plan)?;
    let output = executor.poll()?;
    Ok(output.into_iter().flat_map(|output| output.tokens).map(|token| token.id).collect())
}
