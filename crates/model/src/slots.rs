//! Whose token is kept in which slot, so that no plan gets another's.
//!
//! The ids themselves are the backend's; which they are follows from the plans alone, so every rank knows without being told.

use std::collections::{HashMap, HashSet};

use engine::{SeqId, SeqSlice, SlotId, StepPlan, Tokens};
use kernels::MAX_SLOTS;

/// The tokens that are kept.
#[derive(Debug, Default)]
pub(crate) struct Slots(HashMap<SlotId, Kept>);

/// The next token of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    seq: SeqId,
    position: u32,
}

impl Slots {
    /// What is wrong with the slots of a plan: with which sequence's, and what.
    pub(crate) fn fault(&self, plan: &StepPlan) -> Option<(SeqId, String)> {
        let mut used = HashSet::new();
        plan.slices.iter().find_map(|slice| {
            let what = if used.insert(slice.slot) {
                self.fault_of(slice)?
            } else {
                format!("slot {} is another sequence's in this step", slice.slot)
            };
            Some((slice.seq, what))
        })
    }

    fn fault_of(&self, slice: &SeqSlice) -> Option<String> {
        let SeqSlice { seq, slot, start, .. } = *slice;
        if slot.0 as usize >= MAX_SLOTS {
            return Some(format!("slot {slot}, the limit is {}", MAX_SLOTS - 1));
        }
        if slice.tokens != Tokens::LastSampled {
            return None;
        }
        let found = match self.0.get(&slot) {
            Some(kept) if *kept == (Kept { seq, position: start }) => return None,
            Some(kept) => format!("it is that of sequence {} at {}", kept.seq, kept.position),
            None => "none is kept".into(),
        };
        Some(format!("its token at {start} is to be the last sampled in slot {slot}, but there {found}"))
    }

    /// A plan without fault was launched: its slots have what it keeps, and nothing else.
    pub(crate) fn note(&mut self, plan: &StepPlan) {
        for slice in &plan.slices {
            let position = slice.start + slice.tokens.len() as u32;
            if plan.keep_sampled && slice.sampling.is_some() {
                self.0.insert(slice.slot, Kept { seq: slice.seq, position });
            } else {
                self.0.remove(&slice.slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use engine::{Epoch, Sampling, SamplingParams, StepId};

    use super::*;

    fn slice(seq: u64, slot: u32, start: u32, tokens: Tokens, samples: bool) -> SeqSlice {
        let position = start + tokens.len() as u32;
        SeqSlice {
            seq: SeqId(seq),
            slot: SlotId(slot),
            start,
            tokens,
            blocks: Vec::new(),
            sampling: samples.then_some(Sampling { params: SamplingParams::GREEDY, position }),
        }
    }

    fn ids(seq: u64, slot: u32, count: usize, samples: bool) -> SeqSlice {
        slice(seq, slot, 0, Tokens::Ids(vec![1; count]), samples)
    }

    fn next(seq: u64, slot: u32, start: u32) -> SeqSlice {
        slice(seq, slot, start, Tokens::LastSampled, true)
    }

    fn plan(keep_sampled: bool, slices: &[SeqSlice]) -> StepPlan {
        StepPlan { epoch: Epoch::default(), step: StepId(0), keep_sampled, slices: slices.to_vec() }
    }

    #[track_caller]
    fn refused(slots: &Slots, slices: &[SeqSlice], seq: u64, what: &str) {
        assert_eq!(slots.fault(&plan(true, slices)), Some((SeqId(seq), what.to_owned())));
    }

    #[test]
    fn a_sequence_goes_on_with_its_own_token() {
        let mut slots = Slots::default();
        for step in [[ids(1, 0, 3, true), ids(2, 7, 2, true)], [next(1, 0, 3), next(2, 7, 2)]] {
            let plan = plan(true, &step);
            assert_eq!(slots.fault(&plan), None);
            slots.note(&plan);
        }
        assert_eq!(slots.fault(&plan(true, &[next(2, 7, 3), next(1, 0, 4)])), None);
    }

    #[test]
    fn whoever_has_no_token_is_refused() {
        let mut slots = Slots::default();
        let nothing = "its token at 3 is to be the last sampled in slot 5, but there none is kept";
        refused(&slots, &[next(1, 5, 3)], 1, nothing);
        slots.note(&plan(true, &[ids(1, 5, 3, true)]));
        let other = |seq, start| {
            format!(
                "its token at {start} is to be the last sampled in slot 5, but there it is that of sequence {seq} at 3"
            )
        };
        refused(&slots, &[next(1, 5, 4)], 1, &other(1, 4));
        refused(&slots, &[next(2, 5, 3)], 2, &other(1, 3));
        // Whoever has the slot next, and does not sample yet, ends what was kept; so does a step that keeps nothing.
        for ends in [plan(true, &[ids(9, 5, 3, false)]), plan(false, &[ids(1, 5, 3, true)])] {
            let mut slots = Slots::default();
            slots.note(&plan(true, &[ids(1, 5, 3, true)]));
            slots.note(&ends);
            refused(&slots, &[next(1, 5, 3)], 1, nothing);
        }
    }

    #[test]
    fn slots_are_bounded_and_used_once() {
        let slots = Slots::default();
        refused(&slots, &[ids(1, 4096, 1, true)], 1, "slot 4096, the limit is 4095");
        refused(&slots, &[next(1, u32::MAX, 1)], 1, "slot 4294967295, the limit is 4095");
        let twice = [ids(1, 2, 1, true), ids(2, 2, 1, true)];
        refused(&slots, &twice, 2, "slot 2 is another sequence's in this step");
    }
}
