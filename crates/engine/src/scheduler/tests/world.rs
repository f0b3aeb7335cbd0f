//! A scheduler with everything around it: clients that know their answers, and a rank that notices every wrong position,
//! block or token.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::super::*;
use super::rank::{Rank, next_token};
use crate::sequence::Running;
use crate::{BlockId, FinishReason, Tokens, Usage};

pub(super) const VOCABULARY: u32 = 13;

/// Tokens that a request has at the end, if it meets no stop id.
fn limit(request: &Request, max_context: u32) -> usize {
    let prompt = request.prompt.len();
    prompt + (request.max_tokens as usize).min(max_context as usize - prompt)
}

/// All tokens of a request that nothing disturbs, one step at a time, and why it ends.
fn undisturbed(request: &Request, max_context: u32) -> (Vec<u32>, FinishReason) {
    let mut tokens = request.prompt.clone();
    loop {
        let id = next_token(&tokens, request.sampling.seed);
        tokens.push(id);
        if request.stop_ids.contains(&id) {
            return (tokens, FinishReason::Stop);
        }
        if tokens.len() == limit(request, max_context) {
            return (tokens, FinishReason::Length);
        }
    }
}

/// What a client saw of its request.
pub(super) struct Client {
    pub(super) request: Request,
    pub(super) tokens: Vec<u32>,
    pub(super) finished: bool,
    /// Where the first slice of it started, wherever that was lowest: all in front of it came from others.
    pub(super) cached: usize,
    /// It wants no more.
    gone: bool,
}

/// A step in flight.
pub(super) struct Flight {
    pub(super) plan: StepPlan,
    pub(super) output: StepOutput,
}

/// Checks the rules after every action.
pub(super) struct World {
    pub(super) scheduler: Scheduler,
    rank: Rank,
    /// Oldest first.
    pub(super) in_flight: VecDeque<Flight>,
    pub(super) clients: BTreeMap<SeqId, Client>,
    /// Positions of every sequence that were planned since it last began.
    planned: BTreeMap<SeqId, u32>,
    /// All there ever were.
    outputs: Vec<StepOutput>,
}

impl World {
    pub(super) fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config, Epoch { term: 1, counter: 0 }),
            rank: Rank::default(),
            in_flight: VecDeque::new(),
            clients: BTreeMap::new(),
            planned: BTreeMap::new(),
            outputs: Vec::new(),
        }
    }

    pub(super) fn submit(&mut self, request: Request) {
        if let Ok(seq) = self.scheduler.submit(request.clone()) {
            let tokens = [request.prompt.as_slice(), request.answered()].concat();
            let cached = request.prompt.len();
            let client = Client { tokens, request, finished: false, cached, gone: false };
            assert!(self.clients.insert(seq, client).is_none(), "an id was used twice");
        }
    }

    /// A request of which the client has a part of the answer, from another scheduler.
    pub(super) fn resume(&mut self, mut request: Request, answered: usize) {
        let max_context = self.scheduler.config.max_context;
        if request.prompt.len() < max_context as usize {
            let (tokens, _) = undisturbed(&request, max_context);
            let answer = &tokens[request.prompt.len()..];
            request.resume = Some(answer[..answered % answer.len()].to_vec());
        }
        self.submit(request);
    }

    /// A request whose prompt goes on with what a client has.
    pub(super) fn submit_after(&mut self, index: usize, mut request: Request) {
        if !self.clients.is_empty() {
            let (_, earlier) = self.clients.iter().nth(index % self.clients.len()).unwrap();
            request.prompt.splice(0..0, earlier.tokens.iter().copied());
        }
        self.submit(request);
    }

    pub(super) fn cancel(&mut self, index: usize) {
        let live: Vec<SeqId> = self.live().collect();
        if !live.is_empty() {
            let seq = live[index % live.len()];
            self.scheduler.cancel(seq);
            self.clients.get_mut(&seq).unwrap().gone = true;
        }
    }

    pub(super) fn live(&self) -> impl Iterator<Item = SeqId> {
        self.clients.iter().filter(|(_, client)| !client.finished && !client.gone).map(|(seq, _)| *seq)
    }

    /// Returns whether there was anything to plan.
    pub(super) fn plan(&mut self) -> bool {
        let Some(plan) = self.scheduler.plan() else {
            self.check_stages_are_busy();
            assert!(!self.in_flight.is_empty() || self.live().next().is_none(), "a request is stuck");
            return false;
        };
        self.check(&plan);
        let applied = self.in_flight.front().map_or(plan.step, |oldest| oldest.plan.step);
        let output = self.rank.run(&plan, self.scheduler.config.block_size, applied);
        self.outputs.push(output.clone());
        self.in_flight.push_back(Flight { plan, output });
        true
    }

    fn check(&mut self, plan: &StepPlan) {
        let config = &self.scheduler.config;
        let stages = config.stages.max(1);
        let most = (config.steps_in_flight.max(1) + stages - 1) as usize;
        assert!(self.in_flight.len() < most, "too many steps in flight");
        assert_eq!(plan.epoch, self.scheduler.epoch);
        assert_eq!(plan.keep_sampled, stages == 1 && config.steps_in_flight > 1);
        let part = self.live().count().div_ceil(stages as usize);
        assert!(stages == 1 || plan.slices.len() <= part, "more than a stage's part of the sequences");
        assert!((1..=config.max_batch_tokens as usize).contains(&plan.rows()), "row budget");
        let slots: BTreeSet<SlotId> = plan.slices.iter().map(|slice| slice.slot).collect();
        assert_eq!(slots.len(), plan.slices.len(), "a slot is used twice");
        assert!(slots.iter().all(|slot| slot.0 < config.max_sequences));
        let blocks: BTreeSet<BlockId> = plan.slices.iter().flat_map(|slice| slice.blocks.clone()).collect();
        assert!(blocks.iter().all(|block| block.0 < config.blocks));
        assert!(plan.slices.is_sorted_by(|a, b| a.seq < b.seq), "a sequence is planned twice");
        let flying: BTreeSet<SeqId> =
            self.in_flight.iter().flat_map(|f| f.plan.slices.iter().map(|slice| slice.seq)).collect();
        let shared = self.scheduler.pool.holders();
        for slice in &plan.slices {
            let client = self.clients.get_mut(&slice.seq).unwrap();
            assert!(!client.gone && !client.finished);
            let (start, end) = (slice.start as usize, slice.start as usize + slice.tokens.len());
            client.cached = client.cached.min(start);
            let (before, own) = slice.blocks.split_at(start / config.block_size());
            let is_shared = |block: &BlockId| shared.contains_key(block);
            let begins = start.is_multiple_of(config.block_size()) && before.iter().all(is_shared);
            let planned = self.planned.entry(slice.seq).or_default();
            assert!(
                slice.start == *planned || begins && !flying.contains(&slice.seq),
                "a gap or a repetition"
            );
            *planned = end as u32;
            assert!(!own.iter().any(is_shared), "a write into a shared block");
            let sampling = self.in_flight.iter().flat_map(|flight| &flight.output.tokens);
            let coming = client.tokens.len() + sampling.filter(|token| token.seq == slice.seq).count();
            assert!(stages == 1 || coming == client.tokens.len(), "its token is not known yet");
            match &slice.tokens {
                Tokens::Ids(ids) => assert_eq!(ids, &client.tokens[start..end]),
                Tokens::LastSampled => assert!(start >= client.tokens.len() && end == coming),
            }
            assert_eq!(slice.sampling.is_some(), end == coming);
            assert!(coming < limit(&client.request, config.max_context), "more tokens than may be");
            assert!(slice.sampling.is_none_or(|sampling| sampling.params == client.request.sampling));
            assert_eq!(slice.blocks.len(), config.blocks_for(end), "blocks do not cover the slice");
        }
        self.check_nobody_waits_in_vain(plan);
    }

    /// Whoever has a slot is in every step, and rows are left over only where nobody could use them.
    fn check_nobody_waits_in_vain(&self, plan: &StepPlan) {
        let Scheduler { config, running, pool, .. } = &self.scheduler;
        let idle = config.max_batch_tokens.max(1) as usize - plan.rows();
        let chunks = plan.slices.iter().any(|slice| slice.sampling.is_none());
        assert!(idle == 0 || !chunks, "{idle} rows could be used");
        let is_planned = |r: &Running| plan.slices.iter().any(|slice| slice.seq == r.sequence.id);
        if config.stages > 1 {
            // Steps take a part of the sequences: see `check_stages_are_busy`.
            return;
        }
        let Some(out) = running.iter().find(|r| r.remaining() > 0 && !is_planned(r)) else { return };
        let needed = config.blocks_for(out.planned_with(out.remaining().min(idle)));
        assert!(needed > out.table.blocks().len() + pool.available(), "{out:?} was left out");
        let youngest = running.last().unwrap();
        assert!(youngest.is_in_flight() && !is_planned(youngest), "it could have made room");
    }

    /// Nothing was planned: either every stage has a step, or nobody could run one, at most for want of blocks.
    fn check_stages_are_busy(&self) {
        let Scheduler { config, running, pool, .. } = &self.scheduler;
        if self.in_flight.len() >= config.stages.max(1) as usize {
            return;
        }
        let Some(out) = running.iter().find(|r| r.remaining() > 0 && r.sampling() == 0) else { return };
        let rows = out.remaining().min(config.max_batch_tokens.max(1) as usize);
        let needed = config.blocks_for(out.planned_with(rows));
        assert!(needed > out.table.blocks().len() + pool.available(), "{out:?} was left out");
        assert!(running.last().unwrap().is_in_flight(), "it could have made room");
    }

    /// Applies the oldest step; false if there is none.
    pub(super) fn apply(&mut self) -> bool {
        let Some(Flight { output, .. }) = self.in_flight.pop_front() else { return false };
        let events = self.scheduler.apply(&output).unwrap();
        self.deliver(events);
        let live: BTreeSet<SeqId> = self.live().collect();
        let flying = |seq| self.in_flight.iter().any(|f| f.plan.slices.iter().any(|slice| slice.seq == seq));
        let mut held = self.scheduler.running.iter().map(|running| running.sequence.id);
        assert!(held.all(|seq| live.contains(&seq) || flying(seq)), "an ended sequence was not released");
        true
    }

    fn deliver(&mut self, events: Vec<Event>) {
        let max_context = self.scheduler.config.max_context;
        for event in events {
            let (Event::Token { seq, .. } | Event::Finished { seq, .. }) = event;
            let client = self.clients.get_mut(&seq).unwrap();
            assert!(!client.finished && !client.gone, "an event after the end");
            let (expected, why) = undisturbed(&client.request, max_context);
            match event {
                Event::Token { id, logprob, .. } => {
                    assert_eq!(logprob, -(client.tokens.len() as f32));
                    client.tokens.push(id);
                    let found = &client.tokens;
                    assert!(expected.starts_with(found), "{found:?} is no start of {expected:?}");
                }
                Event::Finished { reason, usage, .. } => {
                    client.finished = true;
                    assert_eq!((&client.tokens, reason), (&expected, why));
                    let prompt = client.request.prompt.len();
                    let expected = Usage {
                        prompt_tokens: prompt as u32,
                        completion_tokens: (expected.len() - prompt) as u32,
                        cached_tokens: client.cached as u32,
                    };
                    assert_eq!(usage, expected);
                }
            }
        }
    }

    /// Outputs out of turn are dropped, those of no correct rank are refused; neither changes anything.
    pub(super) fn apply_nonsense(&mut self, index: usize) {
        let before = format!("{:?}", self.scheduler);
        let oldest = self.in_flight.front();
        let current = oldest.map(|flight| (flight.plan.epoch, flight.plan.step));
        if !self.outputs.is_empty() {
            let output = &self.outputs[index % self.outputs.len()];
            if current != Some((output.epoch, output.step)) {
                assert_eq!(self.scheduler.apply(output), Ok(vec![]));
            }
        }
        if let Some(Flight { output: good, .. }) = oldest {
            let mut longer = good.clone();
            longer.tokens.push(SampledToken { seq: SeqId(u64::MAX), id: 0, logprob: 0.0 });
            assert!(matches!(self.scheduler.apply(&longer), Err(OutputError::Sequences { .. })));
            if !good.tokens.is_empty() {
                let at = index % good.tokens.len();
                let mut other = good.clone();
                other.tokens[at].seq.0 += 1000;
                assert!(matches!(self.scheduler.apply(&other), Err(OutputError::Sequences { .. })));
                let mut shorter = good.clone();
                shorter.tokens.remove(at);
                assert!(matches!(self.scheduler.apply(&shorter), Err(OutputError::Sequences { .. })));
                let mut unknown = good.clone();
                unknown.tokens[at].id = VOCABULARY;
                assert!(matches!(self.scheduler.apply(&unknown), Err(OutputError::Token { .. })));
            }
        }
        assert_eq!(before, format!("{:?}", self.scheduler));
    }

    /// The group is lost, and stands again with other limits.
    pub(super) fn restart(&mut self, blocks: u32, steps_in_flight: u32) {
        let config = SchedulerConfig { blocks, steps_in_flight, ..self.scheduler.config };
        let epoch = Epoch { counter: self.scheduler.epoch.counter + 1, ..self.scheduler.epoch };
        self.scheduler.restart(config, epoch);
        for (seq, error) in self.scheduler.evict_unfit() {
            let client = self.clients.get_mut(&seq).unwrap();
            assert!(matches!(error, AdmitError::TooLarge { .. }), "{error}");
            assert!(self.scheduler.submit(client.request.clone()).is_err(), "it would have fitted");
            client.gone = true;
        }
        self.rank = Rank::default();
        self.planned.clear();
        self.in_flight.clear();
    }

    pub(super) fn check_books(&self) {
        let Scheduler { pool, running, waiting, free_slots, config, .. } = &self.scheduler;
        let mut held = BTreeMap::<BlockId, usize>::new();
        for block in running.iter().flat_map(|r| r.table.blocks()) {
            *held.entry(*block).or_default() += 1;
        }
        let mut shared = pool.holders();
        let applied = self.in_flight.front().map_or(self.scheduler.next_step, |oldest| oldest.plan.step);
        for &block in shared.keys() {
            self.rank.check_shared(block, &pool.prefix(block), config.block_size, applied);
        }
        shared.retain(|_, holders| *holders > 0);
        let by_several = |(block, holders): (&BlockId, &usize)| *holders == 1 || shared.contains_key(block);
        assert!(held.iter().all(by_several), "held by several and not shared");
        assert!(shared.iter().all(|(block, holders)| held.get(block) == Some(holders)), "miscounted holders");
        assert_eq!(pool.free() + pool.cached() + held.len(), config.blocks as usize, "blocks are lost");
        assert_eq!(free_slots.len() + running.len(), config.slots() as usize, "slots are lost");
        let order: Vec<SeqId> =
            running.iter().map(|r| r.sequence.id).chain(waiting.iter().map(|s| s.id)).collect();
        assert!(order.is_sorted(), "not first come, first served");
        for slice in self.in_flight.iter().flat_map(|flight| &flight.plan.slices) {
            let holder = running.iter().find(|r| r.sequence.id == slice.seq).unwrap();
            assert!(holder.table.blocks().starts_with(&slice.blocks), "released in flight");
            assert_eq!(holder.slot, slice.slot, "moved in flight");
        }
    }
}
