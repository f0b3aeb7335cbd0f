//! Runs step plans: checks a plan against this rank, runs the forward pass, samples.

use std::collections::VecDeque;
use std::fmt::Display;

use comm::Collective;
use engine::{
    Epoch, SampledToken, Sampling, SamplingParams, SeqId, SeqSlice, StepId, StepOutput, StepPlan, Tokens,
};
use kernels::{Backend, Batch, Choice, Draw, KvShape, SampledRow, Slice, Step, Token};

use crate::error::{Error, Result};
use crate::forward::Model;
use crate::held::Held;
use crate::slots::Slots;
use crate::source::{ModelOptions, StepSize};

/// Rows of one plan: more than any sensible step, little enough that a false plan cannot exhaust memory.
const MAX_ROWS: usize = 65_536;

/// One rank of a group, driven by one thread.
pub trait Executor {
    /// Steps that may be launched before the oldest of them was polled; at least 1. 1 in a pipeline, which as a
    /// whole takes one for each stage: a launch waits for the stage in front, and outside the last stage there is nothing to poll for.
    fn steps_in_flight(&self) -> usize;
    /// Starts a step, which may go on with what the ones before it sample. Every rank of the group is given the same plans in the same
    /// order.
    fn launch(&mut self, plan: &StepPlan) -> Result<()>;
    /// Waits for the oldest step that was not polled yet: on the sampling rank, of the last stage, its output, elsewhere none.
    fn poll(&mut self) -> Result<Option<StepOutput>>;
    /// Whether [`Executor::poll`] would not wait. While a step is in flight this is to be asked again and again: in between, a device
    /// that waits for other ranks looks after them.
    fn is_ready(&mut self) -> Result<bool>;
    /// The largest step that its memory was taken for; `None`: it takes more as steps come.
    fn largest_step(&self) -> Option<StepSize>;
    /// KV blocks that this rank can hold.
    fn kv_blocks(&self) -> usize;
    /// Bytes of weights that this rank reads for a decoded token.
    fn weight_bytes(&self) -> u64;
}

/// What plans are checked against.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) vocabulary: usize,
    pub(crate) max_context: usize,
    pub(crate) kv_blocks: usize,
    pub(crate) block_size: usize,
    /// Of the pipeline.
    pub(crate) stages: usize,
}

/// Runs plans on one backend.
pub struct ModelExecutor<B: Backend, C> {
    model: Model<B, C>,
    kv_shape: KvShape,
    limits: Limits,
    steps_in_flight: usize,
    largest_step: Option<StepSize>,
    slots: Slots,
    /// Launched and not polled yet.
    running: VecDeque<Running>,
}

/// A step whose tokens are awaited.
struct Running {
    epoch: Epoch,
    step: StepId,
    /// The sequences that are sampled from, in order.
    sequences: Vec<SeqId>,
}

impl<B: Backend, C: Collective<B::Buffer>> ModelExecutor<B, C> {
    pub(crate) fn new(model: Model<B, C>, kv_shape: KvShape, limits: Limits, options: &ModelOptions) -> Self {
        let ModelOptions { steps_in_flight, largest_step, .. } = *options;
        // Whoever waits for another stage does not look after a step that runs, whose output would come late.
        let steps_in_flight = if limits.stages > 1 { 1 } else { steps_in_flight };
        let (slots, running) = (Slots::default(), VecDeque::new());
        Self { model, kv_shape, limits, steps_in_flight, largest_step, slots, running }
    }

    /// The backend, for measurements between steps.
    pub fn backend_mut(&mut self) -> &mut B {
        self.model.backend_mut()
    }

    /// Leaves the group. KV cache and activations are freed; backend and weights are what the next one may begin with.
    ///
    /// # Errors
    /// The backend's, where it cannot be relied on any more.
    pub fn leave(self) -> Result<Held<B>> {
        let (backend, weights) = self.model.leave()?;
        Ok(Held::with(backend, weights.into_parts()))
    }

    /// Replaces the KV cache by one of `blocks` blocks, all zeros: what was in it is forgotten, and steps that were not polled are
    /// too. For tools that measure: serving keeps the cache that it began with.
    ///
    /// # Errors
    /// The backend's where there is no room for it; one block is left then.
    pub fn resize_kv(&mut self, blocks: usize) -> Result<()> {
        while self.poll()?.is_some() {}
        self.limits.kv_blocks = 1;
        self.model.resize_kv(self.kv_shape, blocks.max(1))?;
        self.limits.kv_blocks = blocks.max(1);
        Ok(())
    }

    /// Runs a plan and returns, for every slice with sampling, the logits `[vocabulary]` of its last row; nothing
    /// on ranks that do not sample. For tests and tools: serving never moves logits.
    pub fn logits(&mut self, plan: &StepPlan) -> Result<Vec<Vec<f32>>> {
        let step = self.step(plan)?;
        self.model.logits(&step)
    }

    fn step(&self, plan: &StepPlan) -> Result<Step> {
        self.limits.check(plan)?;
        if let Some((seq, what)) = self.slots.fault(plan) {
            return Err(refused(plan, format!("sequence {seq}: {what}")));
        }
        Ok(self.model.step(tokens(plan), batch(plan), sampled_rows(plan)))
    }
}

impl<B: Backend, C: Collective<B::Buffer>> Executor for ModelExecutor<B, C> {
    fn steps_in_flight(&self) -> usize {
        self.steps_in_flight
    }

    fn launch(&mut self, plan: &StepPlan) -> Result<()> {
        let step = self.step(plan)?;
        self.model.begin(&step)?;
        self.slots.note(plan);
        if self.model.samples() {
            let sampled = plan.slices.iter().filter(|slice| slice.sampling.is_some());
            let sequences = sampled.map(|slice| slice.seq).collect();
            self.running.push_back(Running { epoch: plan.epoch, step: plan.step, sequences });
        }
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<StepOutput>> {
        let Some(Running { epoch, step, sequences }) = self.running.pop_front() else { return Ok(None) };
        let choices = if sequences.is_empty() { Vec::new() } else { self.model.choices()? };
        let token =
            |(seq, choice): (SeqId, Choice)| SampledToken { seq, id: choice.id, logprob: choice.logprob };
        let tokens = sequences.into_iter().zip(choices).map(token).collect();
        Ok(Some(StepOutput { epoch, step, tokens }))
    }

    fn is_ready(&mut self) -> Result<bool> {
        match self.running.front() {
            Some(oldest) if !oldest.sequences.is_empty() => self.model.choices_are_there(),
            _ => Ok(true),
        }
    }

    fn largest_step(&self) -> Option<StepSize> {
        self.largest_step
    }

    fn kv_blocks(&self) -> usize {
        self.limits.kv_blocks
    }

    fn weight_bytes(&self) -> u64 {
        self.model.step_bytes() as u64
    }
}

impl Limits {
    /// A plan comes over the network: nothing in it may reach past a buffer.
    fn check(&self, plan: &StepPlan) -> Result<()> {
        let rows = plan.rows();
        if rows == 0 || rows > MAX_ROWS {
            return Err(refused(plan, format!("it has {rows} rows, allowed are 1 to {MAX_ROWS}")));
        }
        for slice in &plan.slices {
            if let Some(what) = self.fault(slice) {
                return Err(refused(plan, format!("sequence {}: {what}", slice.seq)));
            }
        }
        Ok(())
    }

    fn fault(&self, slice: &SeqSlice) -> Option<String> {
        let end = slice.start as usize + slice.tokens.len();
        let above = |what: &str, found: &dyn Display, limit: usize| {
            Some(format!("{what} {found}, the limit is {limit}"))
        };
        if slice.tokens.is_empty() {
            return Some("a slice without tokens".into());
        }
        if end > self.max_context {
            return above("positions up to", &end, self.max_context);
        }
        if let Tokens::Ids(ids) = &slice.tokens
            && let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocabulary)
        {
            return above("token id", id, self.vocabulary - 1);
        }
        if slice.tokens == Tokens::LastSampled && self.stages > 1 {
            return Some(format!(
                "its token is to be the last sampled, which of {} stages only the last knows: plans of a pipeline carry ids",
                self.stages
            ));
        }
        if let Some(block) = slice.blocks.iter().find(|block| block.0 as usize >= self.kv_blocks) {
            return above("KV block", block, self.kv_blocks - 1);
        }
        let needed = end.div_ceil(self.block_size);
        if slice.blocks.len() < needed {
            return Some(format!(
                "{} KV blocks for {end} positions, which need {needed}",
                slice.blocks.len()
            ));
        }
        None
    }
}

fn refused(plan: &StepPlan, what: String) -> Error {
    Error::Plan { step: plan.step.0, what }
}

fn tokens(plan: &StepPlan) -> Vec<Token> {
    let slices = plan.slices.iter();
    slices
        .flat_map(|slice| match &slice.tokens {
            Tokens::Ids(ids) => ids.iter().copied().map(Token::Id).collect(),
            Tokens::LastSampled => vec![Token::LastSampled(slice.slot.0)],
        })
        .collect()
}

fn batch(plan: &StepPlan) -> Batch {
    let slice = |s: &SeqSlice| Slice {
        start: s.start as usize,
        len: s.tokens.len(),
        blocks: s.blocks.iter().map(|block| block.0).collect(),
    };
    Batch { slices: plan.slices.iter().map(slice).collect() }
}

/// The last row of every slice that is sampled from.
fn sampled_rows(plan: &StepPlan) -> Vec<SampledRow> {
    let mut end = 0;
    let mut rows = Vec::new();
    for slice in &plan.slices {
        end += slice.tokens.len();
        if let Some(Sampling { params, position }) = slice.sampling {
            let SamplingParams { temperature, top_k, top_p, seed } = params;
            let draw = Draw { temperature, top_k, top_p, seed, position };
            rows.push(SampledRow { row: end - 1, slot: plan.keep_sampled.then_some(slice.slot.0), draw });
        }
    }
    rows
}
