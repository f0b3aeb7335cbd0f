//! The step plan: identical for every rank of a group, and all that a rank is told.

use crate::{BlockId, Epoch, SamplingParams, SeqId, SlotId, StepId};

/// What one group computes in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPlan {
    /// The life of the group that this plan is for; ranks of another epoch drop it.
    pub epoch: Epoch,
    /// Position of this step in the epoch.
    pub step: StepId,
    /// Whether ranks keep what this step samples, each id by its slot, for [`Tokens::LastSampled`] in later plans.
    pub keep_sampled: bool,
    /// The work, at most one slice for a sequence.
    pub slices: Vec<SeqSlice>,
}

impl StepPlan {
    /// Tokens that run in this step: the rows of every matrix.
    pub fn rows(&self) -> usize {
        self.slices.iter().map(|s| s.tokens.len()).sum()
    }
}

/// Tokens of one sequence to run in this step; decode is a slice of length one.
#[derive(Debug, Clone, PartialEq)]
pub struct SeqSlice {
    /// Whose tokens these are.
    pub seq: SeqId,
    /// The sequence's seat; reuse of a slot ends whatever a rank remembered under it.
    pub slot: SlotId,
    /// Position of the first token in the sequence.
    pub start: u32,
    /// The tokens at `start..start + tokens.len()`; at least one.
    pub tokens: Tokens,
    /// The whole block table, covering positions `0..start + tokens.len()`: ranks keep none.
    pub blocks: Vec<BlockId>,
    /// `None`: a prefill chunk that ends before the prompt does, so nothing is sampled.
    pub sampling: Option<Sampling>,
}

/// What runs in a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokens {
    /// Tokens that are known.
    Ids(Vec<u32>),
    /// One token: the id last sampled for this slot, by an earlier step of this epoch that may not have ended yet. So a step can
    /// be on its way before the one in front of it has told what it chose.
    LastSampled,
}

impl Tokens {
    /// Rows that they take.
    pub fn len(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::LastSampled => 1,
        }
    }

    /// Whether there are none, as no plan of a scheduler has it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How to choose the token that follows a slice: a pure function of logits, these values and the position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Temperature, truncation and seed.
    pub params: SamplingParams,
    /// Index of the token to be drawn within the whole sequence (= `start + tokens.len()`): the counter of the
    /// random number, so that a replayed sequence draws the same numbers.
    pub position: u32,
}

/// What a group's sampling rank answers to a [`StepPlan`].
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// Copied from the plan.
    pub epoch: Epoch,
    /// Copied from the plan.
    pub step: StepId,
    /// One for every slice with `sampling`, in the order of the slices.
    pub tokens: Vec<SampledToken>,
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampledToken {
    /// Whose.
    pub seq: SeqId,
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability under the untempered, untruncated distribution.
    pub logprob: f32,
}
