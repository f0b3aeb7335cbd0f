//! A request in token ids, and what comes back of it.

use crate::SeqId;

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy (the highest logit, the lowest id among equals).
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of likeliest tokens whose probabilities add up to at least this; 1 keeps all.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl SamplingParams {
    /// Greedy decoding.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
}

/// A request as the scheduler sees it: ids in, ids out.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Stop after this many generated tokens; at least 1.
    pub max_tokens: u32,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Ids that end the sequence when generated (they are reported as its last token); empty to ignore them.
    pub stop_ids: Vec<u32>,
    /// Where this goes on with an answer that another coordinator began: its tokens so far, which count towards
    /// `max_tokens` and are not reported again. An answer may have begun without any.
    pub resume: Option<Vec<u32>>,
}

impl Request {
    /// Tokens of the answer that exist already.
    pub(crate) fn answered(&self) -> &[u32] {
        self.resume.as_deref().unwrap_or_default()
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An id of `stop_ids` was generated (or, set by the gateway, a stop string was).
    Stop,
    /// `max_tokens`, or the model's context, was reached.
    Length,
}

/// Token counts of a finished request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, the stop token included.
    pub completion_tokens: u32,
    /// Tokens of the prompt that were never computed for it, because other requests had begun with the same.
    pub cached_tokens: u32,
}

/// What happened to a sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event {
    /// A token was generated.
    Token {
        /// Whose.
        seq: SeqId,
        /// The token.
        id: u32,
        /// Natural logarithm of its probability.
        logprob: f32,
        /// As [`Usage::cached_tokens`]: who ends the answer at this token hears of no usage.
        cached_tokens: u32,
    },
    /// The sequence ended; nothing follows, and its blocks are free.
    Finished {
        /// Whose.
        seq: SeqId,
        /// Why.
        reason: FinishReason,
        /// How much.
        usage: Usage,
    },
}
