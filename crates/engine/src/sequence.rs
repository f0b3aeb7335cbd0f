//! One request on its way through the scheduler.

use std::collections::VecDeque;

use crate::admission::{AdmitError, room};
use crate::block_pool::{BlockPool, BlockTable};
use crate::config::SchedulerConfig;
use crate::{
    FinishReason, Request, Sampling, SamplingParams, SeqId, SeqSlice, SlotId, StepId, Tokens, Usage,
};

/// A request's tokens and when they end; all that is needed to compute it anew.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    /// The prompt, then what was generated.
    pub(crate) tokens: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    prompt_tokens: usize,
    /// Tokens of the prompt that were found computed whenever it began, so far.
    cached_tokens: usize,
    max_tokens: u32,
    stop_ids: Vec<u32>,
}

impl Sequence {
    /// `max_tokens`: how many the request may generate, the context considered.
    pub(crate) fn new(id: SeqId, request: Request, max_tokens: u32) -> Self {
        Self {
            id,
            prompt_tokens: request.prompt.len(),
            cached_tokens: request.prompt.len(),
            tokens: [request.prompt.as_slice(), request.answered()].concat(),
            sampling: request.sampling,
            max_tokens,
            stop_ids: request.stop_ids,
        }
    }

    /// The request that goes on with it.
    pub(crate) fn into_request(self) -> Request {
        let Self { mut tokens, sampling, prompt_tokens, max_tokens, stop_ids, .. } = self;
        let resume = Some(tokens.split_off(prompt_tokens));
        Request { prompt: tokens, max_tokens, sampling, stop_ids, resume }
    }

    /// Fits the rest of the answer to other limits; fails if they leave no room for it.
    pub(crate) fn refit(&mut self, config: &SchedulerConfig) -> Result<(), AdmitError> {
        let generated = self.generated();
        self.max_tokens = generated + room(&self.tokens, self.max_tokens - generated, config)?;
        Ok(())
    }

    /// Appends a generated token; returns why the sequence ends with it, if it does.
    pub(crate) fn push(&mut self, id: u32) -> Option<FinishReason> {
        self.tokens.push(id);
        if self.stop_ids.contains(&id) {
            Some(FinishReason::Stop)
        } else if self.generated() >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens as u32,
            completion_tokens: self.generated(),
            cached_tokens: self.cached_tokens as u32,
        }
    }

    /// Whether another token is to be generated after `more` that are on their way, should none of them end it.
    fn goes_on_after(&self, more: usize) -> bool {
        self.generated() as usize + more < self.max_tokens as usize
    }

    fn generated(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens) as u32
    }
}

/// A sequence with a slot and blocks.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) sequence: Sequence,
    pub(crate) slot: SlotId,
    pub(crate) table: BlockTable,
    /// Leading tokens whose keys and values are in the blocks, written by steps that were applied.
    computed: usize,
    /// Leading tokens whose keys and values are in the blocks when all steps in flight have run.
    planned: usize,
    /// The steps in flight that it is part of, oldest first.
    flights: VecDeque<Flight>,
    /// Nothing is planned for it and no event of it follows: it is released when no step in flight has it any more.
    pub(crate) ended: bool,
}

/// A sequence's part in a step in flight.
#[derive(Debug, Clone, Copy)]
struct Flight {
    step: StepId,
    /// Leading tokens that are computed when the step has run.
    end: usize,
    /// The step yields its next token.
    samples: bool,
}

impl Running {
    /// Begins with the tokens that are computed already, in blocks that it shares.
    pub(crate) fn new(mut sequence: Sequence, slot: SlotId, pool: &mut BlockPool) -> Self {
        let (table, computed) = pool.begin(&sequence.tokens);
        sequence.cached_tokens = sequence.cached_tokens.min(computed);
        Self { sequence, slot, table, computed, planned: computed, flights: VecDeque::new(), ended: false }
    }

    /// Lets others share what is computed.
    pub(crate) fn share(&mut self, pool: &mut BlockPool) {
        let in_flight = self.is_in_flight();
        pool.share(&mut self.table, known(&self.sequence, self.computed), in_flight);
    }

    /// Gives back all blocks. No step in flight may have it.
    pub(crate) fn end(self, pool: &mut BlockPool) -> (Sequence, SlotId) {
        pool.give_back(self.table, known(&self.sequence, self.computed));
        (self.sequence, self.slot)
    }

    /// Tokens that are known and not computed yet.
    pub(crate) fn pending(&self) -> usize {
        if self.ended { 0 } else { self.sequence.tokens.len() - self.computed }
    }

    /// Tokens that can be planned: those that are known or being sampled, as far as the answer needs them computed.
    pub(crate) fn remaining(&self) -> usize {
        let sampling = self.sampling();
        if self.ended || !self.sequence.goes_on_after(sampling) {
            return 0;
        }
        self.sequence.tokens.len() + sampling - self.planned
    }

    /// Tokens that are computed after `rows` more rows.
    pub(crate) fn planned_with(&self, rows: usize) -> usize {
        self.planned + rows
    }

    /// Takes part in `step` with the next `rows` tokens, at most [`Self::remaining`].
    pub(crate) fn depart(&mut self, step: StepId, rows: usize) -> SeqSlice {
        let (start, end) = (self.planned, self.planned + rows);
        let samples = rows == self.remaining();
        // What is being sampled is one token, as it takes a step to sample the next.
        let tokens = match self.sequence.tokens.get(start..end) {
            Some(ids) => Tokens::Ids(ids.to_vec()),
            None => Tokens::LastSampled,
        };
        self.planned = end;
        self.flights.push_back(Flight { step, end, samples });
        SeqSlice {
            seq: self.sequence.id,
            slot: self.slot,
            start: start as u32,
            tokens,
            blocks: self.table.blocks().to_vec(),
            sampling: samples.then_some(Sampling { params: self.sequence.sampling, position: end as u32 }),
        }
    }

    /// Whether `step`, the oldest in flight, samples it.
    pub(crate) fn is_sampled_in(&self, step: StepId) -> bool {
        self.flights.front().is_some_and(|flight| flight.step == step && flight.samples)
    }

    /// `step`, the oldest in flight, has run.
    pub(crate) fn arrive(&mut self, step: StepId) {
        if let Some(flight) = self.flights.pop_front_if(|flight| flight.step == step) {
            self.computed = flight.end;
        }
    }

    /// Whether a step in flight has it.
    pub(crate) fn is_in_flight(&self) -> bool {
        !self.flights.is_empty()
    }

    /// Tokens that steps in flight sample.
    pub(crate) fn sampling(&self) -> usize {
        self.flights.iter().filter(|flight| flight.samples).count()
    }
}

/// The first `computed` tokens, but for those that a sequence was never told because it ended before.
fn known(sequence: &Sequence, computed: usize) -> &[u32] {
    &sequence.tokens[..computed.min(sequence.tokens.len())]
}
