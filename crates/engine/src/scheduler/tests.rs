//! The rules of the scheduler under random workloads, with an executor that notices every wrong position or block.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{BlockId, FinishReason, SamplingParams, Usage};

const VOCABULARY: u32 = 13;

/// What a model without flaw would say: a hash of all tokens so far and of the seed.
fn next_token(tokens: &[u32], seed: u64) -> u32 {
    let hash = tokens.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
    });
    (hash % u64::from(VOCABULARY)) as u32
}

/// All tokens of a request that nothing disturbs, and why it ends.
fn undisturbed(request: &Request, max_context: u32) -> (Vec<u32>, FinishReason) {
    let mut tokens = request.prompt.clone();
    let limit =
        request.prompt.len() + (request.max_tokens as usize).min(max_context as usize - request.prompt.len());
    loop {
        let id = next_token(&tokens, request.sampling.seed);
        tokens.push(id);
        if request.stop_ids.contains(&id) {
            return (tokens, FinishReason::Stop);
        }
        if tokens.len() == limit {
            return (tokens, FinishReason::Length);
        }
    }
}

/// The KV of a group: which token of which position of which sequence was put where.
#[derive(Default)]
struct Executor {
    cells: BTreeMap<(BlockId, u32), (SeqId, u32, u32)>,
}

impl Executor {
    /// Writes the slices' tokens, then samples from nothing but what the block tables lead to.
    fn run(&mut self, plan: &StepPlan, block_size: u32) -> StepOutput {
        let cell = |slice: &SeqSlice, position: u32| {
            (slice.blocks[(position / block_size) as usize], position % block_size)
        };
        for slice in &plan.slices {
            for (position, &token) in (slice.start..).zip(&slice.tokens) {
                self.cells.insert(cell(slice, position), (slice.seq, position, token));
            }
        }
        let sampled = plan.slices.iter().filter_map(|slice| Some((slice, slice.sampling?)));
        let tokens = sampled.map(|(slice, sampling)| {
            let end = slice.start + slice.tokens.len() as u32;
            assert_eq!(sampling.position, end);
            let prefix = (0..end).map(|position| {
                let (seq, stored, token) = self.cells[&cell(slice, position)];
                assert_eq!((seq, stored), (slice.seq, position), "somebody else's block");
                token
            });
            let id = next_token(&prefix.collect::<Vec<_>>(), sampling.params.seed);
            SampledToken { seq: slice.seq, id, logprob: -(end as f32) }
        });
        StepOutput { epoch: plan.epoch, step: plan.step, tokens: tokens.collect() }
    }
}

/// What a client saw of its request.
struct Client {
    request: Request,
    tokens: Vec<u32>,
    finished: bool,
    /// It wants no more.
    gone: bool,
}

/// A scheduler with everything around it; checks the rules after every action.
struct World {
    scheduler: Scheduler,
    executor: Executor,
    in_flight: Option<StepPlan>,
    clients: BTreeMap<SeqId, Client>,
    /// Positions of every sequence that were computed since it last began.
    computed: BTreeMap<SeqId, u32>,
    outputs: Vec<StepOutput>,
}

impl World {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config, Epoch { term: 1, counter: 0 }),
            executor: Executor::default(),
            in_flight: None,
            clients: BTreeMap::new(),
            computed: BTreeMap::new(),
            outputs: Vec::new(),
        }
    }

    fn submit(&mut self, request: Request) {
        if let Ok(seq) = self.scheduler.submit(request.clone()) {
            let tokens = [request.prompt.as_slice(), request.answered()].concat();
            let client = Client { tokens, request, finished: false, gone: false };
            assert!(self.clients.insert(seq, client).is_none(), "an id was used twice");
        }
    }

    /// A request of which the client has a part of the answer, from another scheduler.
    fn resume(&mut self, mut request: Request, answered: usize) {
        let max_context = self.scheduler.config.max_context;
        if request.prompt.len() < max_context as usize {
            let (tokens, _) = undisturbed(&request, max_context);
            let answer = &tokens[request.prompt.len()..];
            request.resume = Some(answer[..answered % answer.len()].to_vec());
        }
        self.submit(request);
    }

    fn cancel(&mut self, index: usize) {
        let live: Vec<SeqId> = self.live().collect();
        if !live.is_empty() {
            let seq = live[index % live.len()];
            self.scheduler.cancel(seq);
            self.clients.get_mut(&seq).unwrap().gone = true;
        }
    }

    fn live(&self) -> impl Iterator<Item = SeqId> {
        self.clients.iter().filter(|(_, client)| !client.finished && !client.gone).map(|(seq, _)| *seq)
    }

    /// Returns whether there was anything to plan.
    fn plan(&mut self) -> bool {
        let Some(plan) = self.scheduler.plan() else {
            assert!(self.in_flight.is_some() || self.live().next().is_none(), "a request is stuck");
            return false;
        };
        assert!(self.in_flight.is_none(), "planned with a step in flight");
        self.check(&plan);
        self.outputs.push(self.executor.run(&plan, self.scheduler.config.block_size));
        self.in_flight = Some(plan);
        true
    }

    fn check(&mut self, plan: &StepPlan) {
        let config = &self.scheduler.config;
        assert_eq!(plan.epoch, self.scheduler.epoch);
        assert!((1..=config.max_batch_tokens as usize).contains(&plan.rows()), "row budget");
        let slots: BTreeSet<SlotId> = plan.slices.iter().map(|slice| slice.slot).collect();
        assert_eq!(slots.len(), plan.slices.len(), "a slot is used twice");
        assert!(slots.iter().all(|slot| slot.0 < config.max_sequences));
        let blocks: BTreeSet<BlockId> = plan.slices.iter().flat_map(|slice| slice.blocks.clone()).collect();
        assert_eq!(
            blocks.len(),
            plan.slices.iter().map(|slice| slice.blocks.len()).sum::<usize>(),
            "shared blocks"
        );
        assert!(blocks.iter().all(|block| block.0 < config.blocks));
        assert!(plan.slices.is_sorted_by(|a, b| a.seq < b.seq), "a sequence is planned twice");
        for slice in &plan.slices {
            let client = &self.clients[&slice.seq];
            assert!(!client.gone && !client.finished);
            let (start, end) = (slice.start as usize, slice.start as usize + slice.tokens.len());
            let computed = self.computed.entry(slice.seq).or_default();
            assert!(slice.start == *computed || slice.start == 0, "a gap or a repetition");
            *computed = end as u32;
            assert_eq!(slice.tokens, client.tokens[start..end]);
            assert_eq!(slice.sampling.is_some(), end == client.tokens.len());
            assert!(slice.sampling.is_none_or(|sampling| sampling.params == client.request.sampling));
            assert_eq!(slice.blocks.len(), config.blocks_for(end), "blocks do not cover the slice");
        }
        let idle = config.max_batch_tokens as usize - plan.rows();
        assert!(
            idle == 0 || self.scheduler.running.iter().all(Running::samples),
            "{idle} rows could be used"
        );
        // Whoever decodes is in every step.
        for running in self.scheduler.running.iter().filter(|running| running.remaining() == 1) {
            assert!(
                plan.slices.iter().any(|slice| slice.seq == running.sequence.id),
                "a decode was left out"
            );
        }
    }

    fn apply(&mut self) {
        if self.in_flight.take().is_some() {
            let output = self.outputs.last().unwrap().clone();
            let events = self.scheduler.apply(&output).unwrap();
            self.deliver(events);
            let live: BTreeSet<SeqId> = self.live().collect();
            let held = self.scheduler.running.iter().map(|running| running.sequence.id);
            assert!(held.into_iter().all(|seq| live.contains(&seq)), "a cancelled sequence was not released");
        }
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
                    assert!(
                        expected.starts_with(&client.tokens),
                        "{:?} is no start of {expected:?}",
                        client.tokens
                    );
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

    /// Outputs that came before are dropped, those of no correct rank are refused; neither changes anything.
    fn apply_nonsense(&mut self, index: usize) {
        let before = format!("{:?}", self.scheduler);
        let current = self.in_flight.as_ref().map(|plan| (plan.epoch, plan.step));
        if !self.outputs.is_empty() {
            let output = &self.outputs[index % self.outputs.len()];
            if current != Some((output.epoch, output.step)) {
                assert_eq!(self.scheduler.apply(output), Ok(vec![]));
            }
        }
        if self.in_flight.is_some() {
            let good = self.outputs.last().unwrap();
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

    fn restart(&mut self, blocks: u32) {
        let config = SchedulerConfig { blocks, ..self.scheduler.config };
        let epoch = Epoch { counter: self.scheduler.epoch.counter + 1, ..self.scheduler.epoch };
        self.scheduler.restart(config, epoch);
        for (seq, error) in self.scheduler.evict_unfit() {
            let client = self.clients.get_mut(&seq).unwrap();
            assert!(matches!(error, AdmitError::TooLarge { .. }), "{error}");
            assert!(self.scheduler.submit(client.request.clone()).is_err(), "it would have fitted");
            client.gone = true;
        }
        self.executor = Executor::default();
        self.computed.clear();
        self.in_flight = None;
    }

    fn check_books(&self) {
        let Scheduler { pool, running, waiting, free_slots, config, .. } = &self.scheduler;
        let held: Vec<BlockId> = running.iter().flat_map(|r| r.table.blocks().to_vec()).collect();
        assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), held.len(), "a block is held twice");
        assert_eq!(pool.free() + held.len(), config.blocks as usize, "blocks are lost");
        assert_eq!(free_slots.len() + running.len(), config.slots() as usize, "slots are lost");
        let order: Vec<SeqId> =
            running.iter().map(|r| r.sequence.id).chain(waiting.iter().map(|s| s.id)).collect();
        assert!(order.is_sorted(), "not first come, first served");
        for slice in self.in_flight.iter().flat_map(|plan| &plan.slices) {
            let holder = running.iter().find(|r| r.sequence.id == slice.seq);
            assert_eq!(holder.unwrap().table.blocks(), slice.blocks, "released in flight");
        }
    }
}

#[derive(Debug, Clone)]
enum Action {
    Submit(Request),
    Resume(Request, usize),
    Cancel(usize),
    Plan,
    Apply,
    Nonsense(usize),
    Restart(u32),
}

fn requests() -> impl Strategy<Value = Request> {
    let prompt = prop::collection::vec(0..VOCABULARY, 1..40);
    (prompt, 1u32..30, any::<u64>(), prop::collection::vec(0..VOCABULARY, 0..2)).prop_map(
        |(prompt, max_tokens, seed, stop_ids)| Request {
            prompt,
            max_tokens,
            sampling: SamplingParams { seed, ..SamplingParams::GREEDY },
            stop_ids,
            resume: None,
        },
    )
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        6 => requests().prop_map(Action::Submit),
        2 => (requests(), any::<usize>()).prop_map(|(request, answered)| Action::Resume(request, answered)),
        2 => any::<usize>().prop_map(Action::Cancel),
        20 => Just(Action::Plan),
        20 => Just(Action::Apply),
        2 => any::<usize>().prop_map(Action::Nonsense),
        1 => (5u32..30).prop_map(Action::Restart),
    ];
    prop::collection::vec(action, 1..200)
}

fn configs() -> impl Strategy<Value = SchedulerConfig> {
    (5u32..30, 1u32..9, 20u32..70, 1u32..40, 1u32..8).prop_map(
        |(blocks, block_size, max_context, max_batch_tokens, max_sequences)| SchedulerConfig {
            blocks,
            block_size,
            max_context,
            vocabulary: VOCABULARY,
            max_batch_tokens,
            max_sequences,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_request_gets_its_undisturbed_answer(config in configs(), actions in actions()) {
        let mut world = World::new(config);
        for action in actions {
            match action {
                Action::Submit(request) => world.submit(request),
                Action::Resume(request, answered) => world.resume(request, answered),
                Action::Cancel(index) => world.cancel(index),
                Action::Plan => drop(world.plan()),
                Action::Apply => world.apply(),
                Action::Nonsense(index) => world.apply_nonsense(index),
                Action::Restart(blocks) => world.restart(blocks),
            }
            world.check_books();
        }
        // Left alone, everything ends, and soon: were each token computed alone, these steps would do.
        let alone: usize = world.clients.values().map(|c| 2 * (c.request.prompt.len() + 30)).sum();
        let mut steps = 0;
        world.apply();
        while world.plan() {
            world.apply();
            world.check_books();
            steps += 1;
            prop_assert!(steps <= 40 * alone, "no progress");
        }
        prop_assert_eq!(world.live().count(), 0);
        let Load { running, waiting, free_blocks, blocks } = world.scheduler.load();
        prop_assert_eq!((running, waiting, free_blocks), (0, 0, blocks));
    }
}

const CONFIG: SchedulerConfig = SchedulerConfig {
    blocks: 8,
    block_size: 4,
    max_context: 100,
    vocabulary: VOCABULARY,
    max_batch_tokens: 8,
    max_sequences: 4,
};

fn request(prompt: usize, max_tokens: u32) -> Request {
    Request {
        prompt: vec![1; prompt],
        max_tokens,
        sampling: SamplingParams::GREEDY,
        stop_ids: vec![],
        resume: None,
    }
}

/// Sequence, start and rows of every slice of the next step.
fn shape(world: &mut World) -> Vec<(u64, u32, usize)> {
    assert!(world.plan());
    let plan = world.in_flight.as_ref().unwrap();
    plan.slices.iter().map(|slice| (slice.seq.0, slice.start, slice.tokens.len())).collect()
}

#[test]
fn decodes_come_first_and_prefill_takes_the_rest() {
    let mut world = World::new(CONFIG);
    world.submit(request(3, 5));
    world.submit(request(12, 2));
    world.submit(request(2, 2));
    assert_eq!(shape(&mut world), [(0, 0, 3), (1, 0, 5)]);
    world.apply();
    assert_eq!(shape(&mut world), [(0, 3, 1), (1, 5, 7)]);
    world.apply();
    assert_eq!(shape(&mut world), [(0, 4, 1), (1, 12, 1), (2, 0, 2)]);
    world.apply();
    assert_eq!(shape(&mut world), [(0, 5, 1), (2, 2, 1)], "the second has its two tokens");
}

#[test]
fn the_youngest_makes_room_and_comes_back() {
    let mut world = World::new(SchedulerConfig { blocks: 4, ..CONFIG });
    world.submit(request(4, 9));
    world.submit(request(4, 6));
    assert_eq!(shape(&mut world), [(0, 0, 4), (1, 0, 4)]);
    for position in 4..8 {
        world.apply();
        assert_eq!(shape(&mut world), [(0, position, 1), (1, position, 1)]);
    }
    world.apply();
    assert_eq!(shape(&mut world), [(0, 8, 1)], "the fifth block is not there");
    assert_eq!(world.scheduler.load(), Load { running: 1, waiting: 1, free_blocks: 1, blocks: 4 });
    while world.clients[&SeqId(0)].tokens.len() < 13 {
        world.apply();
        world.plan();
    }
    assert_eq!(world.in_flight.as_ref().unwrap().slices[0].tokens.len(), 8, "recomputed, as far as rows go");
}

#[test]
fn a_lost_group_costs_no_token() {
    let mut world = World::new(CONFIG);
    world.submit(request(6, 4));
    world.submit(request(2, 3));
    world.plan();
    world.apply();
    world.plan();
    let lost = world.outputs.last().unwrap().clone();
    world.restart(8);
    assert_eq!(world.scheduler.apply(&lost), Ok(vec![]), "an output of the epoch before");
    assert_eq!(shape(&mut world), [(0, 0, 7), (1, 0, 1)]);
}

#[test]
fn narrower_limits_clip_or_evict() {
    let mut world = World::new(CONFIG);
    world.submit(request(20, 10));
    world.submit(request(8, 10));
    world.scheduler.restart(SchedulerConfig { max_context: 10, ..CONFIG }, Epoch { term: 2, counter: 0 });
    let too_long = AdmitError::PromptTooLong { prompt: 20, max_context: 10 };
    assert_eq!(world.scheduler.evict_unfit(), [(SeqId(0), too_long)]);
    for end in [9, 10] {
        world.plan();
        world.apply();
        assert_eq!(world.clients[&SeqId(1)].tokens.len(), end);
    }
    assert!(world.clients[&SeqId(1)].finished);
}

#[test]
fn limits_of_zero_do_not_panic() {
    let zero = SchedulerConfig {
        blocks: 0,
        block_size: 0,
        max_context: 0,
        vocabulary: 0,
        max_batch_tokens: 0,
        max_sequences: 0,
    };
    let mut scheduler = Scheduler::new(zero, Epoch::default());
    assert!(scheduler.submit(request(1, 1)).is_err());
    assert_eq!(scheduler.plan(), None);
    let least = SchedulerConfig { blocks: 9, max_context: 9, vocabulary: 9, ..zero };
    let mut world = World::new(SchedulerConfig { max_batch_tokens: 1, max_sequences: 1, ..least });
    world.scheduler = Scheduler::new(least, Epoch { term: 1, counter: 0 });
    assert!(world.scheduler.submit(request(2, 2)).is_ok());
    assert_eq!(world.scheduler.plan().map(|plan| plan.rows()), Some(1));
}
