//! A scheduler with everything around it: clients that know their answers, and an executor that notices every wrong position,
//! block or token.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::super::*;
use crate::sequence::Running;
use crate::{BlockId, FinishReason, Tokens, Usage};

pub(super) const VOCABULARY: u32 = 13;

/// What a model without flaw would say: a hash of all tokens so far and of the seed.
fn next_token(tokens: &[u32], seed: u64) -> u32 {
    let hash = tokens.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
    });
    (hash % u64::from(VOCABULARY)) as u32
}

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

/// A rank of one epoch.
#[derive(Default)]
struct Executor {
    /// Which token of which position of which sequence was put where.
    cells: BTreeMap<(BlockId, u32), (SeqId, u32, u32)>,
    /// What was last sampled for a slot: whose, at which position, and what.
    last_sampled: BTreeMap<SlotId, (SeqId, u32, u32)>,
}

impl Executor {
    /// Writes the slices' tokens, then samples from nothing but what the block tables lead to.
    fn run(&mut self, plan: &StepPlan, block_size: u32) -> StepOutput {
        let cell = |slice: &SeqSlice, position: u32| {
            (slice.blocks[(position / block_size) as usize], position % block_size)
        };
        for slice in &plan.slices {
            let ids = match &slice.tokens {
                Tokens::Ids(ids) => ids.clone(),
                Tokens::LastSampled => {
                    let (seq, position, id) = self.last_sampled[&slice.slot];
                    assert_eq!((seq, position), (slice.seq, slice.start), "somebody else's token");
                    vec![id]
                }
            };
            for (position, token) in (slice.start..).zip(ids) {
                self.cells.insert(cell(slice, position), (slice.seq, position, token));
            }
        }
        let mut tokens = Vec::new();
        for (slice, sampling) in plan.slices.iter().filter_map(|slice| Some((slice, slice.sampling?))) {
            let end = slice.start + slice.tokens.len() as u32;
            assert_eq!(sampling.position, end);
            let prefix = (0..end).map(|position| {
                let (seq, stored, token) = self.cells[&cell(slice, position)];
                assert_eq!((seq, stored), (slice.seq, position), "somebody else's block");
                token
            });
            let id = next_token(&prefix.collect::<Vec<_>>(), sampling.params.seed);
            if plan.keep_sampled {
                self.last_sampled.insert(slice.slot, (slice.seq, end, id));
            }
            tokens.push(SampledToken { seq: slice.seq, id, logprob: -(end as f32) });
        }
        StepOutput { epoch: plan.epoch, step: plan.step, tokens }
    }
}

/// What a client saw of its request.
pub(super) struct Client {
    pub(super) request: Request,
    pub(super) tokens: Vec<u32>,
    pub(super) finished: bool,
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
    executor: Executor,
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
            executor: Executor::default(),
            in_flight: VecDeque::new(),
            clients: BTreeMap::new(),
            planned: BTreeMap::new(),
            outputs: Vec::new(),
        }
    }

    pub(super) fn submit(&mut self, request: Request) {
        if let Ok(seq) = self.scheduler.submit(request.clone()) {
            let tokens = [request.prompt.as_slice(), request.answered()].concat();
            let client = Client { tokens, request, finished: false, gone: false };
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
        let output = self.executor.run(&plan, self.scheduler.config.block_size);
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
        let listed = plan.slices.iter().map(|slice| slice.blocks.len()).sum::<usize>();
        assert_eq!(blocks.len(), listed, "shared blocks");
        assert!(blocks.iter().all(|block| block.0 < config.blocks));
        assert!(plan.slices.is_sorted_by(|a, b| a.seq < b.seq), "a sequence is planned twice");
        for slice in &plan.slices {
            let client = &self.clients[&slice.seq];
            assert!(!client.gone && !client.finished);
            let (start, end) = (slice.start as usize, slice.start as usize + slice.tokens.len());
            let planned = self.planned.entry(slice.seq).or_default();
            assert!(slice.start == *planned || slice.start == 0, "a gap or a repetition");
            *planned = end as u32;
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
        assert!(needed > out.table.blocks().len() + pool.free(), "{out:?} was left out");
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
        assert!(needed > out.table.blocks().len() + pool.free(), "{out:?} was left out");
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
        self.executor = Executor::default();
        self.planned.clear();
        self.in_flight.clear();
    }

    pub(super) fn check_books(&self) {
        let Scheduler { pool, running, waiting, free_slots, config, .. } = &self.scheduler;
        let held: Vec<BlockId> = running.iter().flat_map(|r| r.table.blocks().to_vec()).collect();
        assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), held.len(), "a block is held twice");
        assert_eq!(pool.free() + held.len(), config.blocks as usize, "blocks are lost");
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
