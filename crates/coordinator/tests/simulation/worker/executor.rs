//! What runs plans in place of a model: it keeps of every KV entry what it was computed from, and so knows a plan that relies on
//! what this rank does not have.

use std::collections::{BTreeSet, HashMap};

use engine::{SampledToken, Sampling, SeqId, SeqSlice, SlotId, StepId, StepPlan, Tokens};

use super::model::{Prefix, VOCABULARY};

/// What a rank can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) block_size: u32,
    pub(crate) kv_blocks: u32,
    pub(crate) steps_in_flight: u32,
    /// 0: as they come.
    pub(crate) step_rows: u32,
    pub(crate) sampled_rows: u32,
}

/// One rank's part in one epoch.
#[derive(Debug)]
pub(crate) struct Executor {
    limits: Limits,
    /// What every sequence begins with.
    empty: Prefix,
    next: StepId,
    /// By block and offset.
    kv: HashMap<(u32, u32), Entry>,
    sampled: HashMap<SlotId, Sampled>,
}

/// Keys and values of a token.
#[derive(Debug, Clone, Copy)]
struct Entry {
    position: u32,
    token: u32,
    /// With this token.
    prefix: Prefix,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sampled {
    seq: SeqId,
    position: u32,
    token: u32,
}

impl Executor {
    pub(crate) fn new(limits: Limits, fingerprint: &str) -> Self {
        let empty = Prefix::under(fingerprint);
        Self { limits, empty, next: StepId(0), kv: HashMap::new(), sampled: HashMap::new() }
    }

    /// Runs a plan; an error is what no right coordinator plans.
    pub(crate) fn run(&mut self, plan: &StepPlan) -> Result<Vec<SampledToken>, String> {
        check(plan.step == self.next, || format!("after step {} it should be {}", plan.step, self.next))?;
        self.next.0 += 1;
        self.check_size(plan)?;
        let written = plan.slices.iter().map(|slice| self.write(slice)).collect::<Result<Vec<_>, _>>()?;
        let each: BTreeSet<_> = written.iter().flatten().collect();
        check(each.len() == plan.rows(), || "two sequences write to one place".to_owned())?;
        let sampled = plan.slices.iter().filter_map(|slice| Some((slice, slice.sampling?)));
        sampled.map(|(slice, sampling)| self.sample(slice, sampling)).collect()
    }

    fn check_size(&self, plan: &StepPlan) -> Result<(), String> {
        let Limits { kv_blocks, step_rows, sampled_rows, .. } = self.limits;
        let within = |count: usize, limit: u32| limit == 0 || count <= limit as usize;
        let sampled = plan.slices.iter().filter(|slice| slice.sampling.is_some()).count();
        check(within(plan.rows(), step_rows), || format!("{} rows, of {step_rows}", plan.rows()))?;
        check(within(sampled, sampled_rows), || format!("{sampled} sampled rows, of {sampled_rows}"))?;
        let slots: BTreeSet<_> = plan.slices.iter().map(|slice| slice.slot).collect();
        let sequences: BTreeSet<_> = plan.slices.iter().map(|slice| slice.seq).collect();
        let each_once = slots.len() == plan.slices.len() && sequences.len() == plan.slices.len();
        check(each_once, || "a sequence or a slot comes twice".to_owned())?;
        let mut blocks = plan.slices.iter().flat_map(|slice| &slice.blocks);
        match blocks.find(|block| block.0 >= kv_blocks) {
            Some(block) => Err(format!("block {block}, of {kv_blocks}")),
            None => Ok(()),
        }
    }

    /// Computes keys and values of a slice; returns where they are.
    fn write(&mut self, slice: &SeqSlice) -> Result<Vec<(u32, u32)>, String> {
        let mut prefix = self.prefix(slice, slice.start)?;
        let ids = match &slice.tokens {
            Tokens::Ids(ids) => ids.clone(),
            Tokens::LastSampled => vec![self.last_sampled(slice)?],
        };
        let mut written = Vec::with_capacity(ids.len());
        for (position, token) in (slice.start..).zip(ids) {
            check(token < VOCABULARY, || format!("token {token}"))?;
            prefix = prefix.with(token);
            let place = self.place(slice, position)?;
            self.kv.insert(place, Entry { position, token, prefix });
            written.push(place);
        }
        Ok(written)
    }

    fn sample(&mut self, slice: &SeqSlice, sampling: Sampling) -> Result<SampledToken, String> {
        let (seq, position) = (slice.seq, sampling.position);
        let end = slice.start + slice.tokens.len() as u32;
        check(position == end, || format!("sequence {seq} samples at {position} after {end} tokens"))?;
        let token = self.prefix(slice, position)?.next(sampling.params, position);
        self.sampled.insert(slice.slot, Sampled { seq, position, token });
        Ok(SampledToken { seq, id: token, logprob: -1.0 })
    }

    fn last_sampled(&self, slice: &SeqSlice) -> Result<u32, String> {
        let sampled = self.sampled.get(&slice.slot);
        let ours = sampled.filter(|sampled| (sampled.seq, sampled.position) == (slice.seq, slice.start));
        let missing =
            || format!("sequence {} goes on with what was not sampled at {}", slice.seq, slice.start);
        ours.map(|sampled| sampled.token).ok_or_else(missing)
    }

    /// What the first `count` tokens of a sequence come to: attention reads all of them.
    fn prefix(&self, slice: &SeqSlice, count: u32) -> Result<Prefix, String> {
        (0..count).try_fold(self.empty, |prefix, position| {
            let entry = self.kv.get(&self.place(slice, position)?);
            let whole =
                |entry: &&Entry| entry.position == position && entry.prefix == prefix.with(entry.token);
            let missing = || format!("sequence {} has no keys at {position}, of {count}", slice.seq);
            entry.filter(whole).map(|entry| entry.prefix).ok_or_else(missing)
        })
    }

    fn place(&self, slice: &SeqSlice, position: u32) -> Result<(u32, u32), String> {
        let Limits { block_size, .. } = self.limits;
        let block = slice.blocks.get((position / block_size) as usize);
        let missing = || format!("sequence {} has no block for position {position}", slice.seq);
        Ok((block.ok_or_else(missing)?.0, position % block_size))
    }
}

fn check(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}
