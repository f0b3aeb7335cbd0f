//! The limits that requests are held against and steps are planned in.

/// Limits of a group and of its batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// KV blocks that every rank has.
    pub blocks: u32,
    /// Tokens of a block; 0 counts as 1.
    pub block_size: u32,
    /// Tokens that prompt and answer may have together.
    pub max_context: u32,
    /// Ids are below this.
    pub vocabulary: u32,
    /// Rows of a step; 0 counts as 1.
    pub max_batch_tokens: u32,
    /// Sequences that run at once, as far as `max_batch_tokens` has a row for each; 0 counts as 1.
    pub max_sequences: u32,
    /// Steps that a rank takes before the first of them was applied; 0 counts as 1. A pipeline takes one more for each further stage.
    pub steps_in_flight: u32,
    /// Stages of the pipeline, each of which runs another step at the same time; 0 counts as 1. With more than one, a step takes a
    /// part of the sequences, and none is planned again before its sampled token is known.
    pub stages: u32,
}

impl SchedulerConfig {
    /// Blocks that `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size())
    }

    /// Tokens of a block, at least 1.
    pub(crate) fn block_size(&self) -> usize {
        self.block_size.max(1) as usize
    }

    /// Seats of the running batch.
    pub(crate) fn slots(&self) -> u32 {
        self.max_sequences.min(self.max_batch_tokens).max(1)
    }

    /// Steps between planning and applying: one in every stage, and in the last one as many as a rank takes.
    pub(crate) fn steps_in_flight(&self) -> u64 {
        u64::from(self.steps_in_flight.max(1)) + self.stages() as u64 - 1
    }

    /// Stages of the pipeline, at least 1.
    pub(crate) fn stages(&self) -> usize {
        self.stages.max(1) as usize
    }

    /// Whether a sequence goes on with the token that is being sampled, which ranks then keep. Only the last stage of a pipeline
    /// samples, and the first one would need it.
    pub(crate) fn looks_ahead(&self) -> bool {
        self.stages() == 1 && self.steps_in_flight() > 1
    }
}
