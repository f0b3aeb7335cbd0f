//! A model on a GPU, and steps whose time is taken.

use std::time::{Duration, Instant};

use anyhow::Result;
use comm::cuda::StagedCollective;
use comm::{LocalTransport, local_group};
use engine::{
    BlockId, Epoch, ModelShape, Sampling, SamplingParams, SeqId, SeqSlice, SlotId, StepId, StepPlan, Tokens,
};
use kernels::{BLOCK_TOKENS, Backend, Cuda};
use model::{Executor, ModelExecutor, ModelSource};

use super::Gb;
use crate::bench::spread::Spread;

/// Steps before those that count: one that runs, one that is recorded, one that is replayed.
const WARM_UP_STEPS: usize = 3;
/// A prompt is read so often, unless that takes longer than [`PROMPT_TIME`].
const PROMPTS: usize = 5;
const PROMPT_TIME: Duration = Duration::from_secs(4);

/// One rank with all units.
pub(super) struct Runner<'a> {
    executor: ModelExecutor<Cuda, StagedCollective<LocalTransport>>,
    source: &'a ModelSource,
    steps: u64,
}

/// Milliseconds of decoding steps.
pub(super) struct StepTimes {
    /// From one step's tokens to the next one's, two steps in flight.
    pub(super) steps: Spread,
    /// Likewise, by the GPU's clock, on average.
    pub(super) by_device: f64,
    /// From a step's plan to its tokens, one step in flight.
    pub(super) alone: Spread,
}

impl<'a> Runner<'a> {
    /// Loads the weights; also returns the seconds that it took.
    pub(super) fn load(cuda: Cuda, source: &'a ModelSource) -> Result<(Self, f64)> {
        let started = Instant::now();
        let whole = 0..source.config().shape.kv_heads;
        let ranges = std::slice::from_ref(&whole);
        let collective = StagedCollective::new(&cuda, local_group(1).remove(0), ranges.to_vec())?;
        let mut executor = source.executor(cuda, ranges, collective)?;
        executor.backend_mut().synchronize()?;
        Ok((Self { executor, source, steps: 0 }, started.elapsed().as_secs_f64()))
    }

    /// The model's sizes.
    pub(super) fn shape(&self) -> ModelShape {
        self.source.config().shape
    }

    /// Bytes of weights that a decoding step reads.
    pub(super) fn weight_bytes(&self) -> u64 {
        self.executor.weight_bytes()
    }

    /// Where the GPU's memory went.
    pub(super) fn memory(&mut self) -> Result<String> {
        Ok(self.executor.backend_mut().memory_report()?.to_string())
    }

    /// See [`Cuda::set_deterministic`].
    pub(super) fn set_deterministic(&mut self, deterministic: bool) -> Result<()> {
        Ok(self.executor.backend_mut().set_deterministic(deterministic)?)
    }

    /// Makes the KV cache as large as `batch` sequences of `tokens` tokens need it. Says what is missing where there is no room.
    pub(super) fn make_room(&mut self, batch: usize, tokens: usize) -> Result<Option<String>> {
        self.executor.resize_kv(1)?;
        let each = tokens.div_ceil(BLOCK_TOKENS);
        let backend = self.executor.backend_mut();
        let (needed, free) =
            (self.source.kv_bytes(backend, batch * each * BLOCK_TOKENS), backend.kv_budget(u64::MAX)?);
        if needed > free {
            return Ok(Some(format!("{} of keys and values, {} are free", Gb(needed), Gb(free))));
        }
        self.executor.resize_kv(batch * each)?;
        Ok(None)
    }

    /// Runs steps in which each of `batch` sequences gets the last of its `context` tokens. All steps are the same one, over keys and
    /// values of zeros, so that all read as much.
    pub(super) fn decode(&mut self, batch: usize, context: usize, steps: usize) -> Result<StepTimes> {
        let slices: Vec<_> = (0..batch)
            .map(|seq| {
                let blocks = (0..context.div_ceil(BLOCK_TOKENS)).map(|i| i * batch + seq).collect();
                self.slice(seq, context - 1..context, blocks, true)
            })
            .collect();
        for _ in 0..WARM_UP_STEPS {
            self.launch(&slices)?;
            self.executor.poll()?;
        }
        let mut alone = Vec::new();
        for _ in 0..steps {
            let started = Instant::now();
            self.launch(&slices)?;
            self.executor.poll()?;
            alone.push(milliseconds_since(started));
        }
        let mut each = Vec::new();
        let begun = self.executor.backend_mut().moment()?;
        self.launch(&slices)?;
        let mut last = Instant::now();
        for step in 0..=steps {
            self.launch(&slices)?;
            self.executor.poll()?;
            // The first had nothing before it.
            if step > 0 {
                each.push(milliseconds_since(last));
            }
            last = Instant::now();
        }
        let ended = self.executor.backend_mut().moment()?;
        self.executor.poll()?;
        let by_device = 1e3 * ended.seconds_since(&begun)? / (steps + 2) as f64;
        Ok(StepTimes { steps: Spread::of(each), by_device, alone: Spread::of(alone) })
    }

    /// Reads prompts of `tokens` tokens in chunks of `chunk`, and samples a token after each; milliseconds of one.
    pub(super) fn prefill(&mut self, tokens: usize, chunk: usize) -> Result<Spread> {
        // What is prepared for a size of step is prepared now.
        self.prompt(tokens.min(chunk), chunk)?;
        let begun = Instant::now();
        let mut times = Vec::new();
        while times.is_empty() || times.len() < PROMPTS && begun.elapsed() < PROMPT_TIME {
            let started = Instant::now();
            self.prompt(tokens, chunk)?;
            times.push(milliseconds_since(started));
        }
        Ok(Spread::of(times))
    }

    fn prompt(&mut self, tokens: usize, chunk: usize) -> Result<()> {
        for start in (0..tokens).step_by(chunk) {
            let end = tokens.min(start + chunk);
            let blocks = (0..end.div_ceil(BLOCK_TOKENS)).collect();
            let slice = self.slice(0, start..end, blocks, end == tokens);
            self.launch(&[slice])?;
            self.executor.poll()?;
        }
        Ok(())
    }

    fn launch(&mut self, slices: &[SeqSlice]) -> Result<()> {
        let plan = StepPlan {
            epoch: Epoch::default(),
            step: StepId(self.steps),
            keep_sampled: false,
            slices: slices.to_vec(),
        };
        self.steps += 1;
        Ok(self.executor.launch(&plan)?)
    }

    fn slice(
        &self,
        seq: usize,
        positions: std::ops::Range<usize>,
        blocks: Vec<usize>,
        sampled: bool,
    ) -> SeqSlice {
        let id = |position: usize| ((position * 31 + seq * 7 + 11) % self.shape().vocab) as u32;
        SeqSlice {
            seq: SeqId(seq as u64),
            slot: SlotId(seq as u32),
            start: positions.start as u32,
            tokens: Tokens::Ids(positions.clone().map(id).collect()),
            blocks: blocks.into_iter().map(|block| BlockId(block as u32)).collect(),
            sampling: sampled
                .then_some(Sampling { params: SamplingParams::GREEDY, position: positions.end as u32 }),
        }
    }
}

fn milliseconds_since(started: Instant) -> f64 {
    1e3 * started.elapsed().as_secs_f64()
}
