//! Sampling of backends that compute on the host: what was chosen and not asked for yet, and the ids that are kept by slot.

use std::collections::VecDeque;

use crate::sample::{nothing_asked, sample};
use crate::{CHOSEN_COLS, Choice, MAX_SLOTS, Result, Step, Token};

/// Sizes are checked by `shape` before.
#[derive(Debug)]
pub(crate) struct HostSampler {
    choices: VecDeque<Vec<Choice>>,
    /// By slot.
    last: Vec<u32>,
}

impl Default for HostSampler {
    fn default() -> Self {
        Self { choices: VecDeque::new(), last: vec![0; MAX_SLOTS] }
    }
}

impl HostSampler {
    /// [`crate::Backend::sample`]: `logits` `[sampled rows, vocabulary]`, `chosen` `[sampled rows, 2]`.
    pub(crate) fn sample(&mut self, step: &Step, logits: &[f32], vocabulary: usize, chosen: &mut [f32]) {
        let rows = step.sampled.iter().zip(logits.chunks_exact(vocabulary));
        let choices: Vec<Choice> = rows.map(|(sampled, row)| sample(row, &sampled.draw)).collect();
        for (row, choice) in chosen.chunks_exact_mut(CHOSEN_COLS).zip(&choices) {
            row.copy_from_slice(&[f32::from_bits(choice.id), choice.logprob]);
        }
        self.keep(step, chosen);
        self.choices.push_back(choices);
    }

    /// [`crate::Backend::keep`].
    pub(crate) fn keep(&mut self, step: &Step, chosen: &[f32]) {
        for (sampled, row) in step.sampled.iter().zip(chosen.chunks_exact(CHOSEN_COLS)) {
            if let Some(slot) = sampled.slot {
                self.last[slot as usize] = row[0].to_bits();
            }
        }
    }

    /// [`crate::Backend::choices`].
    pub(crate) fn choices(&mut self) -> Result<Vec<Choice>> {
        self.choices.pop_front().ok_or_else(nothing_asked)
    }

    /// [`crate::Backend::settle`].
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// The ids of a step's rows.
    pub(crate) fn ids(&self, step: &Step) -> Vec<u32> {
        let id = |token: &Token| match *token {
            Token::Id(id) => id,
            Token::LastSampled(slot) => self.last[slot as usize],
        };
        step.tokens.iter().map(id).collect()
    }
}
