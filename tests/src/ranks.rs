//! A group whose ranks are threads of the test, for looking at logits.

use std::ops::Range;
use std::path::Path;
use std::thread;

use anyhow::{Result, ensure};
use comm::{Collective, MeshCollective, local_group};
use engine::{
    BlockId, Epoch, Sampling, SamplingParams, SeqId, SeqSlice, SlotId, StepId, StepPlan, Tokens, rank_ranges,
};
use kernels::{Backend, DType};
use model::{ModelExecutor, ModelOptions, ModelSource, SAMPLING_RANK};

/// Options for a test: room for `tokens` tokens of one sequence is enough for every golden prompt.
pub fn options(dtype: DType) -> ModelOptions {
    ModelOptions {
        dtype,
        kv_dtype: dtype,
        max_context: None,
        kv_memory: Some(64 << 20),
        largest_step: None,
        steps_in_flight: 1,
        progress: false,
    }
}

/// Runs `plans` on `width` ranks and returns the logits of every sampled row, in order.
pub fn logits<B: Backend>(
    dir: &Path,
    options: &ModelOptions,
    width: usize,
    backend: impl Fn() -> Result<B> + Sync,
    plans: &[StepPlan],
) -> Result<Vec<Vec<f32>>>
where
    B::Buffer: kernels::HostBuffer,
{
    let join = |transport, ranges: &[Range<usize>]| {
        Ok((backend()?, MeshCollective::new(transport, ranges.to_vec())?))
    };
    logits_of(dir, options, local_group(width), join, plans)
}

/// Likewise, for ranks that take their places by `join`, each on its own thread.
pub fn logits_of<P: Send, B: Backend, C: Collective<B::Buffer>>(
    dir: &Path,
    options: &ModelOptions,
    places: Vec<P>,
    join: impl Fn(P, &[Range<usize>]) -> Result<(B, C)> + Sync,
    plans: &[StepPlan],
) -> Result<Vec<Vec<f32>>> {
    on_ranks(dir, options, places, join, |_, executor| {
        let mut logits = Vec::new();
        for plan in plans {
            logits.extend(executor.logits(plan)?);
        }
        Ok(logits)
    })
}

/// Loads a model on ranks that take their places by `join`, and runs `body` for each on its own thread; returns what the sampling rank
/// found.
pub fn on_ranks<P: Send, B: Backend, C: Collective<B::Buffer>, R: Send>(
    dir: &Path,
    options: &ModelOptions,
    places: Vec<P>,
    join: impl Fn(P, &[Range<usize>]) -> Result<(B, C)> + Sync,
    body: impl Fn(usize, &mut ModelExecutor<B, C>) -> Result<R> + Sync,
) -> Result<R> {
    let width = places.len();
    let places = places.into_iter().enumerate().collect();
    let mut all = each_rank(places, |(rank, place)| {
        let source = ModelSource::open(dir, options.clone())?;
        let ranges = rank_ranges(source.config().shape.kv_heads, width)?;
        let (backend, collective) = join(place, &ranges)?;
        body(rank, &mut source.executor(backend, &ranges, collective)?)
    })?;
    Ok(all.swap_remove(SAMPLING_RANK))
}

/// Does the work of every place on a thread of its own; returns what came of it, in order.
///
/// # Errors
/// Where a rank failed, in the words of all that did: those that waited for it fail too.
pub fn each_rank<P: Send, T: Send>(places: Vec<P>, work: impl Fn(P) -> Result<T> + Sync) -> Result<Vec<T>> {
    let results: Vec<Result<T>> = thread::scope(|scope| {
        let threads: Vec<_> = places.into_iter().map(|place| scope.spawn(|| work(place))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic in a rank")).collect()
    });
    let failed = |(rank, result): (usize, &Result<T>)| {
        result.as_ref().err().map(|error| format!("rank {rank} failed: {error:#}"))
    };
    let failures: Vec<String> = results.iter().enumerate().filter_map(failed).collect();
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    results.into_iter().collect()
}

/// One sequence, cut into slices that end (exclusively) at `ends`; the last row of each is sampled. Blocks are handed out
/// backwards, so that no test passes by their being in order.
pub fn plans(ids: &[u32], ends: &[usize], block_size: usize) -> Vec<StepPlan> {
    let blocks: Vec<u32> = (0..ids.len().div_ceil(block_size) as u32).rev().collect();
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let slices = starts
        .zip(ends)
        .map(|(start, &end)| vec![slice(0, &ids[..end], start, &blocks, SamplingParams::GREEDY)]);
    slices.enumerate().map(|(step, slices)| plan(step, slices)).collect()
}

/// A step of these slices.
pub fn plan(step: usize, slices: Vec<SeqSlice>) -> StepPlan {
    StepPlan { epoch: Epoch::default(), step: StepId(step as u64), keep_sampled: false, slices }
}

/// The tokens of sequence `seq` from position `start` to the end of `ids`, of which the last is sampled from.
pub fn slice(seq: usize, ids: &[u32], start: usize, blocks: &[u32], params: SamplingParams) -> SeqSlice {
    SeqSlice {
        seq: SeqId(seq as u64),
        slot: SlotId(seq as u32),
        start: start as u32,
        tokens: Tokens::Ids(ids[start..].to_vec()),
        blocks: blocks.iter().copied().map(BlockId).collect(),
        sampling: Some(Sampling { params, position: ids.len() as u32 }),
    }
}
