//! A rank that remembers what was written to its KV memory, and notices whatever reads something else.

use std::collections::BTreeMap;

use super::super::*;
use super::world::VOCABULARY;
use crate::{BlockId, Tokens};

/// What a model without flaw would say: a hash of all tokens so far and of the seed.
pub(super) fn next_token(tokens: &[u32], seed: u64) -> u32 {
    let hash = tokens.iter().fold(seed ^ NOTHING, |hash, &token| followed_by(hash, token));
    (hash % u64::from(VOCABULARY)) as u32
}

/// The hash of no tokens.
const NOTHING: u64 = 0xcbf2_9ce4_8422_2325;

fn followed_by(hash: u64, token: u32) -> u64 {
    (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
}

/// A rank of one epoch.
#[derive(Default)]
pub(super) struct Rank {
    cells: BTreeMap<(BlockId, u32), Cell>,
    /// What was last sampled for a slot: whose, at which position, and what.
    last_sampled: BTreeMap<SlotId, (SeqId, u32, u32)>,
}

/// Keys and values of one token.
#[derive(Clone, Copy)]
struct Cell {
    position: u32,
    token: u32,
    /// Hash of all tokens up to this one: what it was computed from.
    context: u64,
    /// Who wrote it, and when.
    seq: SeqId,
    step: StepId,
}

impl Rank {
    /// Writes the slices' tokens, then samples from nothing but what the block tables lead to. Steps below `applied` were applied
    /// when this one was planned.
    pub(super) fn run(&mut self, plan: &StepPlan, block_size: u32, applied: StepId) -> StepOutput {
        for slice in &plan.slices {
            self.write(slice, plan.step, block_size);
        }
        let mut tokens = Vec::new();
        for slice in &plan.slices {
            let prefix = self.read(slice, block_size, applied);
            let Some(sampling) = slice.sampling else { continue };
            let end = prefix.len() as u32;
            assert_eq!(sampling.position, end);
            let id = next_token(&prefix, sampling.params.seed);
            if plan.keep_sampled {
                self.last_sampled.insert(slice.slot, (slice.seq, end, id));
            }
            tokens.push(SampledToken { seq: slice.seq, id, logprob: -(end as f32) });
        }
        StepOutput { epoch: plan.epoch, step: plan.step, tokens }
    }

    /// Checks that a block that may be shared holds the end of `prefix`, written by steps that were applied.
    pub(super) fn check_shared(&self, block: BlockId, prefix: &[u32], block_size: u32, applied: StepId) {
        let mut context = NOTHING;
        for (position, &token) in (0..).zip(prefix) {
            context = followed_by(context, token);
            if position >= prefix.len() as u32 - block_size {
                let cell = self.cells[&(block, position % block_size)];
                assert_eq!((cell.position, cell.context), (position, context), "it holds something else");
                assert!(cell.step < applied, "shared before its step was applied");
            }
        }
    }

    fn write(&mut self, slice: &SeqSlice, step: StepId, block_size: u32) {
        let seq = slice.seq;
        let ids = match &slice.tokens {
            Tokens::Ids(ids) => ids.clone(),
            Tokens::LastSampled => {
                let (whose, position, id) = self.last_sampled[&slice.slot];
                assert_eq!((whose, position), (seq, slice.start), "somebody else's token");
                vec![id]
            }
        };
        let before =
            slice.start.checked_sub(1).map(|last| self.cells[&place(slice, last, block_size)].context);
        let mut context = before.unwrap_or(NOTHING);
        for (position, token) in (slice.start..).zip(ids) {
            context = followed_by(context, token);
            let cell = Cell { position, token, context, seq, step };
            self.cells.insert(place(slice, position, block_size), cell);
        }
    }

    /// All tokens up to the end of a slice.
    fn read(&self, slice: &SeqSlice, block_size: u32, applied: StepId) -> Vec<u32> {
        let mut context = NOTHING;
        let one = |position| {
            let cell = self.cells[&place(slice, position, block_size)];
            context = followed_by(context, cell.token);
            assert_eq!((cell.position, cell.context), (position, context), "another prefix's block");
            assert!(cell.seq == slice.seq || cell.step < applied, "shared before its step was applied");
            cell.token
        };
        (0..slice.start + slice.tokens.len() as u32).map(one).collect()
    }
}

fn place(slice: &SeqSlice, position: u32, block_size: u32) -> (BlockId, u32) {
    (slice.blocks[(position / block_size) as usize], position % block_size)
}
