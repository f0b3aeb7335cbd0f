//! One request on its way through the scheduler.

use crate::admission::{AdmitError, room};
use crate::block_pool::BlockTable;
use crate::config::SchedulerConfig;
use crate::{FinishReason, Request, SamplingParams, SeqId, SlotId, Usage};

/// A request's tokens and when they end; all that is needed to compute it anew.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    /// The prompt, then what was generated.
    pub(crate) tokens: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    prompt_tokens: usize,
    max_tokens: u32,
    stop_ids: Vec<u32>,
}

impl Sequence {
    /// `max_tokens`: how many the request may generate, the context considered.
    pub(crate) fn new(id: SeqId, request: Request, max_tokens: u32) -> Self {
        Self {
            id,
            prompt_tokens: request.prompt.len(),
            tokens: [request.prompt.as_slice(), request.answered()].concat(),
            sampling: request.sampling,
            max_tokens,
            stop_ids: request.stop_ids,
        }
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
        Usage { prompt_tokens: self.prompt_tokens as u32, completion_tokens: self.generated() }
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
    /// Leading tokens whose keys and values are in the blocks.
    pub(crate) computed: usize,
    /// Tokens after these that the step in flight computes.
    pub(crate) rows: usize,
    /// To be dropped when the step in flight was applied.
    pub(crate) cancelled: bool,
}

impl Running {
    pub(crate) fn new(sequence: Sequence, slot: SlotId) -> Self {
        Self { sequence, slot, table: BlockTable::default(), computed: 0, rows: 0, cancelled: false }
    }

    /// Tokens that are not computed yet, those in flight included; at least 1.
    pub(crate) fn remaining(&self) -> usize {
        self.sequence.tokens.len() - self.computed
    }

    /// Whether the step in flight yields this sequence's next token.
    pub(crate) fn samples(&self) -> bool {
        self.rows > 0 && self.rows == self.remaining()
    }
}
