//! Continuous batching: which tokens of which sequences run in the next step.
//!
//! First come, first served: rows go to the oldest first. A sequence joins when all before it have their rows and some
//! are left, so whatever runs decodes and gets its row in every step, and at most the youngest is in prefill, chunk by
//! chunk. A sequence takes blocks as it grows. When they run out, the youngest goes back to waiting and is recomputed
//! later: so the oldest can always go on, and since each request was checked to fit by itself, every request ends.
//!
//! A sequence begins behind the longest run of full blocks that an earlier one computed for the same tokens ([`BlockPool::begin`]). A
//! block is shared only once the step that wrote its last token was applied, and nothing is written into it any more.
//!
//! Steps may be planned while earlier ones are in flight: a sequence whose next token is being sampled goes on with it unseen.
//! What is in flight keeps its blocks. If the youngest is, whoever lacks a block, and all that are younger, sit out until it is not.
//!
//! In a pipeline, sequences spread over as many steps as there are stages ([`spread`]); a prompt's chunks may follow each other
//! through the stages, but nothing goes on with what is being sampled.

use std::collections::VecDeque;

use crate::admission::{AdmitError, admit};
use crate::block_pool::BlockPool;
use crate::config::SchedulerConfig;
use crate::sequence::{Running, Sequence};
use crate::{Epoch, Event, Request, SampledToken, SeqId, SeqSlice, SlotId, StepId, StepOutput, StepPlan};

mod handover;
mod spread;
#[cfg(test)]
mod tests;

/// An output that no correct rank would send. The group cannot be trusted; the scheduler is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutputError {
    /// Not the sequences that the plan samples.
    #[error("step {step} samples sequences {planned:?}, its output has {found:?}")]
    Sequences {
        /// The step.
        step: StepId,
        /// Sequences of the plan with sampling.
        planned: Vec<SeqId>,
        /// Sequences of the output.
        found: Vec<SeqId>,
    },
    /// An id outside the vocabulary.
    #[error("step {step} gave sequence {seq} token id {id}, which is outside the vocabulary of {vocabulary}")]
    Token {
        /// The step.
        step: StepId,
        /// The sequence.
        seq: SeqId,
        /// The id.
        id: u32,
        /// Ids are below this.
        vocabulary: u32,
    },
}

/// How much is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Sequences with a slot.
    pub running: usize,
    /// Sequences without.
    pub waiting: usize,
    /// Tokens of both that are known and not computed yet. Those that wait may find a part of theirs cached.
    pub pending_rows: usize,
    /// Blocks that nobody holds, without anything of use.
    pub free_blocks: usize,
    /// Blocks that nobody holds, with a prefix that may come again. They are as good as free.
    pub cached_blocks: usize,
    /// Blocks in all.
    pub blocks: usize,
}

/// All requests of a group.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    epoch: Epoch,
    next_step: StepId,
    /// The oldest step in flight, or the next one where none is.
    next_output: StepId,
    next_seq: SeqId,
    pool: BlockPool,
    /// The next to be taken is the last.
    free_slots: Vec<SlotId>,
    /// Oldest first, all older than those that wait.
    running: Vec<Running>,
    /// Oldest first.
    waiting: VecDeque<Sequence>,
}

impl Scheduler {
    /// A scheduler without requests.
    pub fn new(config: SchedulerConfig, epoch: Epoch) -> Self {
        Self {
            config,
            epoch,
            next_step: StepId(0),
            next_output: StepId(0),
            next_seq: SeqId(0),
            pool: BlockPool::new(config.blocks, config.block_size()),
            free_slots: slots(&config),
            running: Vec::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Takes a request, or says why it can never be served.
    pub fn submit(&mut self, request: Request) -> Result<SeqId, AdmitError> {
        let max_tokens = admit(&request, &self.config)?;
        let id = self.next_seq;
        self.next_seq.0 += 1;
        self.waiting.push_back(Sequence::new(id, request, max_tokens));
        Ok(id)
    }

    /// Drops a sequence: no event of it follows. One in flight keeps its blocks until all steps that have it are applied. Unknown
    /// or ended sequences are ignored.
    pub fn cancel(&mut self, seq: SeqId) {
        self.waiting.retain(|sequence| sequence.id != seq);
        let Some(at) = self.running.iter().position(|running| running.sequence.id == seq) else { return };
        if self.running[at].is_in_flight() {
            self.running[at].ended = true;
        } else {
            let running = self.running.remove(at);
            self.release(running);
        }
    }

    /// The next step. None while as many are in flight as may be, or as long as there is nothing to do: try again after
    /// [`Self::apply`] or [`Self::submit`].
    pub fn plan(&mut self) -> Option<StepPlan> {
        if self.in_flight() >= self.config.steps_in_flight() {
            return None;
        }
        let seats = self.seats();
        let mut budget = self.config.max_batch_tokens.max(1) as usize;
        let mut slices = Vec::new();
        let mut at = 0;
        let mut goes_on = true;
        // Preemption shortens the list, but only from `at` on.
        while goes_on && slices.len() < seats && at < self.running.len() {
            goes_on = self.schedule(at, &mut budget, &mut slices);
            at += 1;
        }
        while goes_on
            && slices.len() < seats
            && budget > 0
            && let Some(at) = self.join()
        {
            goes_on = self.schedule(at, &mut budget, &mut slices);
        }
        if slices.is_empty() {
            return None;
        }
        let step = self.next_step;
        self.next_step.0 += 1;
        Some(StepPlan { epoch: self.epoch, step, keep_sampled: self.config.looks_ahead(), slices })
    }

    /// Takes the output of the oldest step in flight and returns what happened, in order. Output of another epoch or step is
    /// dropped.
    pub fn apply(&mut self, output: &StepOutput) -> Result<Vec<Event>, OutputError> {
        let step = self.next_output;
        if output.epoch != self.epoch || output.step != step || step == self.next_step {
            return Ok(Vec::new());
        }
        self.check(output)?;
        self.next_output.0 += 1;
        let mut events = Vec::new();
        let mut tokens = output.tokens.iter();
        for mut running in std::mem::take(&mut self.running) {
            let token = if running.is_sampled_in(step) { tokens.next() } else { None };
            running.arrive(step);
            // A step that was planned before the sequence ended samples it in vain.
            if let Some(token) = token.filter(|_| !running.ended) {
                running.ended = advance(&mut running.sequence, token, &mut events);
            }
            if running.ended && !running.is_in_flight() {
                self.release(running);
            } else {
                running.share(&mut self.pool);
                self.running.push(running);
            }
        }
        Ok(events)
    }

    /// The group was lost and stands again, in a later epoch and with these limits: everything that ran waits again, in
    /// its old order, and is recomputed with the tokens that it has. No event is repeated and none is missing. Nothing is cached.
    ///
    /// If the limits may be narrower than before, [`Self::evict_unfit`] belongs behind it.
    pub fn restart(&mut self, config: SchedulerConfig, epoch: Epoch) {
        self.config = config;
        self.epoch = epoch;
        (self.next_step, self.next_output) = (StepId(0), StepId(0));
        self.pool = BlockPool::new(config.blocks, config.block_size());
        self.free_slots = slots(&config);
        for running in self.running.drain(..).rev().filter(|running| !running.ended) {
            self.waiting.push_front(running.sequence);
        }
    }

    /// Drops the waiting sequences that the limits no longer allow, and returns them with the reason. An answer for which
    /// there is less room than before is clipped.
    pub fn evict_unfit(&mut self) -> Vec<(SeqId, AdmitError)> {
        let mut evicted = Vec::new();
        let config = &self.config;
        self.waiting.retain_mut(|sequence| match sequence.refit(config) {
            Ok(()) => true,
            Err(error) => {
                evicted.push((sequence.id, error));
                false
            }
        });
        evicted
    }

    /// How many of a prompt's tokens would not have to be computed, if it came now.
    pub fn cached_prefix(&self, tokens: &[u32]) -> usize {
        self.pool.cached_prefix(tokens)
    }

    /// How much is going on.
    pub fn load(&self) -> Load {
        let running = self.running.iter().map(Running::pending);
        let waiting = self.waiting.iter().map(|sequence| sequence.tokens.len());
        Load {
            running: self.running.len(),
            waiting: self.waiting.len(),
            pending_rows: running.chain(waiting).sum(),
            free_blocks: self.pool.free(),
            cached_blocks: self.pool.cached(),
            blocks: self.pool.total(),
        }
    }

    /// Plans as many rows of a running sequence as the budget allows. While blocks are missing, the youngest goes back to waiting, at
    /// last this one itself. False if it cannot, because it is in flight: then the step ends here.
    fn schedule(&mut self, at: usize, budget: &mut usize, slices: &mut Vec<SeqSlice>) -> bool {
        while let Some(running) = self.running.get_mut(at) {
            let rows = spread::ready(&self.config, running).min(*budget);
            if rows == 0 {
                break;
            }
            let blocks = self.config.blocks_for(running.planned_with(rows));
            if self.pool.grow(&mut running.table, blocks) {
                slices.push(running.depart(self.next_step, rows));
                *budget -= rows;
                break;
            }
            if !self.preempt_youngest() {
                return false;
            }
        }
        true
    }

    /// Sends the youngest running sequence, which has no rows in this step yet, back to waiting; false if it is in flight.
    fn preempt_youngest(&mut self) -> bool {
        let Some(youngest) = self.running.pop_if(|running| !running.is_in_flight()) else { return false };
        let sequence = self.release(youngest);
        self.waiting.push_front(sequence);
        true
    }

    /// Gives the oldest waiting sequence a slot, if one is free and there are blocks for all the tokens that it has;
    /// returns its place among the running. Whoever was preempted in this step finds too few, for its blocks were needed, unless it now
    /// shares what it had computed beside others.
    fn join(&mut self) -> Option<usize> {
        if self.free_slots.is_empty()
            || self.pool.needed(&self.waiting.front()?.tokens) > self.pool.available()
        {
            return None;
        }
        let slot = self.free_slots.pop()?;
        let sequence = self.waiting.pop_front()?;
        self.running.push(Running::new(sequence, slot, &mut self.pool));
        Some(self.running.len() - 1)
    }

    /// Takes back blocks and slot.
    fn release(&mut self, running: Running) -> Sequence {
        let (sequence, slot) = running.end(&mut self.pool);
        self.free_slots.push(slot);
        sequence
    }

    /// Steps that were planned and not applied yet.
    fn in_flight(&self) -> u64 {
        self.next_step.0 - self.next_output.0
    }

    fn check(&self, output: &StepOutput) -> Result<(), OutputError> {
        let step = output.step;
        let planned = self
            .running
            .iter()
            .filter(|running| running.is_sampled_in(step))
            .map(|running| running.sequence.id);
        let found = output.tokens.iter().map(|token| token.seq);
        if !planned.clone().eq(found.clone()) {
            return Err(OutputError::Sequences { step, planned: planned.collect(), found: found.collect() });
        }
        let vocabulary = self.config.vocabulary;
        match output.tokens.iter().find(|token| token.id >= vocabulary) {
            Some(&SampledToken { seq, id, .. }) => Err(OutputError::Token { step, seq, id, vocabulary }),
            None => Ok(()),
        }
    }
}

fn slots(config: &SchedulerConfig) -> Vec<SlotId> {
    (0..config.slots()).rev().map(SlotId).collect()
}

/// Appends a sampled token; returns whether the sequence ends with it.
fn advance(sequence: &mut Sequence, token: &SampledToken, events: &mut Vec<Event>) -> bool {
    let SampledToken { seq, id, logprob } = *token;
    let reason = sequence.push(id);
    let usage = sequence.usage();
    events.push(Event::Token { seq, id, logprob, cached_tokens: usage.cached_tokens });
    if let Some(reason) = reason {
        events.push(Event::Finished { seq, reason, usage });
    }
    reason.is_some()
}
