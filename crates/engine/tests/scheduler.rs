//! The scheduler under random workloads, with an executor that remembers tokens by (block, offset) as a rank remembers KV: a
//! wrong block table, a lost token or a block in two sequences changes what it answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use engine::{
    AdmitError, BlockId, Epoch, Event, FinishReason, OutputError, Request, SampledToken, SamplingParams,
    Scheduler, SchedulerConfig, SeqId, StepId, StepOutput, StepPlan,
};
use proptest::prelude::*;

const VOCABULARY: u32 = 1000;
const BLOCK_SIZE: u32 = 4;

fn config(blocks: u32, max_batch_tokens: u32, max_sequences: u32) -> SchedulerConfig {
    let max_context = 64;
    SchedulerConfig {
        blocks,
        block_size: BLOCK_SIZE,
        max_context,
        vocabulary: VOCABULARY,
        max_batch_tokens,
        max_sequences,
    }
}

fn request(prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request { prompt, max_tokens, sampling: SamplingParams::GREEDY, stop_ids: vec![7] }
}

/// The token that follows a prefix: any function of the whole of it.
fn next_token(prefix: &[u32]) -> u32 {
    let hash = prefix
        .iter()
        .fold(17u64, |h, &t| h.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(t) + 1));
    ((hash >> 33) % u64::from(VOCABULARY)) as u32
}

/// What a request gets that is alone and undisturbed.
fn undisturbed(request: &Request, max_context: usize) -> (Vec<u32>, FinishReason) {
    let mut tokens = request.prompt.clone();
    loop {
        let next = next_token(&tokens);
        tokens.push(next);
        let generated = tokens[request.prompt.len()..].to_vec();
        if request.stop_ids.contains(&next) {
            return (generated, FinishReason::Stop);
        }
        if generated.len() == request.max_tokens as usize || tokens.len() == max_context {
            return (generated, FinishReason::Length);
        }
    }
}

#[derive(Default)]
struct FakeRank {
    memory: HashMap<(BlockId, u32), u32>,
}

impl FakeRank {
    fn run(&mut self, plan: &StepPlan, config: &SchedulerConfig) -> StepOutput {
        let mut owners = BTreeMap::new();
        let mut sequences = BTreeSet::new();
        let mut slots = BTreeSet::new();
        assert!(plan.rows() <= config.max_batch_tokens as usize, "row budget");
        let mut tokens = Vec::new();
        for slice in &plan.slices {
            assert!(!slice.tokens.is_empty());
            assert!(sequences.insert(slice.seq), "sequence planned twice");
            assert!(slots.insert(slice.slot) && slice.slot.0 < config.max_sequences, "slot");
            for block in &slice.blocks {
                assert!(block.0 < config.blocks);
                assert_eq!(
                    owners.insert(*block, slice.seq),
                    None,
                    "a block in two sequences, or twice in one"
                );
            }
            let end = slice.start + slice.tokens.len() as u32;
            assert!(slice.blocks.len() >= end.div_ceil(BLOCK_SIZE) as usize, "block table too short");
            let place =
                |position: u32| (slice.blocks[(position / BLOCK_SIZE) as usize], position % BLOCK_SIZE);
            for (position, &token) in (slice.start..).zip(&slice.tokens) {
                self.memory.insert(place(position), token);
            }
            if let Some(sampling) = slice.sampling {
                assert_eq!(sampling.position, end);
                let prefix: Vec<u32> = (0..end).map(|position| self.memory[&place(position)]).collect();
                tokens.push(SampledToken { seq: slice.seq, id: next_token(&prefix), logprob: -1.0 });
            }
        }
        StepOutput { epoch: plan.epoch, step: plan.step, tokens }
    }
}

#[derive(Debug, Clone)]
enum Action {
    Submit(Vec<u32>, u32),
    Cancel(usize),
    Step,
    /// A plan whose output is lost with the group; the next group has so many blocks.
    Restart(u32),
    /// An output that comes when it is no longer wanted.
    Stale,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (prop::collection::vec(0..VOCABULARY, 1..30), 1u32..40).prop_map(|(p, m)| Action::Submit(p, m)),
        1 => (0usize..30).prop_map(Action::Cancel),
        12 => Just(Action::Step),
        1 => (17u32..40).prop_map(Action::Restart),
        1 => Just(Action::Stale),
    ]
}

proptest! {
    #[test]
    fn every_stream_is_that_of_an_undisturbed_run(
        actions in prop::collection::vec(action(), 1..120),
        blocks in 17u32..40, rows in 1u32..40, seats in 1u32..9,
    ) {
        let mut limits = config(blocks, rows, seats);
        let mut epoch = Epoch { term: 1, counter: 0 };
        let mut scheduler = Scheduler::new(limits, epoch);
        let mut rank = FakeRank::default();
        let mut requests: BTreeMap<SeqId, Request> = BTreeMap::new();
        let mut streams: BTreeMap<SeqId, Vec<u32>> = BTreeMap::new();
        let mut ended: BTreeMap<SeqId, FinishReason> = BTreeMap::new();
        let mut cancelled = BTreeSet::new();
        let mut last_output = None;

        let mut queue: std::collections::VecDeque<_> = actions.into();
        let mut drain = 0;
        while drain < 5_000 {
            let action = queue.pop_front().unwrap_or(Action::Step);
            if queue.is_empty() {
                drain += 1;
            }
            match action {
                Action::Submit(prompt, max_tokens) => {
                    let request = request(prompt, max_tokens);
                    let seq = scheduler.submit(request.clone()).expect("every request fits 17 blocks");
                    requests.insert(seq, request);
                }
                Action::Cancel(index) => {
                    if let Some(&seq) = requests.keys().nth(index) {
                        scheduler.cancel(seq);
                        if !ended.contains_key(&seq) {
                            cancelled.insert(seq);
                        }
                    }
                }
                Action::Step => {
                    let Some(plan) = scheduler.plan() else {
                        if queue.is_empty() {
                            break;
                        }
                        continue;
                    };
                    prop_assert!(scheduler.plan().is_none(), "one step in flight");
                    let output = rank.run(&plan, &limits);
                    for event in scheduler.apply(&output).expect("a right output") {
                        match event {
                            Event::Token { seq, id, .. } => streams.entry(seq).or_default().push(id),
                            Event::Finished { seq, reason, usage } => {
                                prop_assert_eq!(usage.completion_tokens as usize, streams[&seq].len());
                                prop_assert!(ended.insert(seq, reason).is_none(), "ended twice");
                            }
                        }
                    }
                    last_output = Some(output);
                }
                Action::Restart(blocks) => {
                    let lost = scheduler.plan();
                    epoch.counter += 1;
                    limits.blocks = blocks;
                    scheduler.restart(limits, epoch);
                    prop_assert!(scheduler.evict_unfit().is_empty());
                    rank = FakeRank::default();
                    if let Some(plan) = lost {
                        last_output = Some(FakeRank::default().run(&StepPlan { slices: vec![], ..plan }, &limits));
                    }
                }
                Action::Stale => {
                    if let Some(output) = &last_output {
                        prop_assert_eq!(scheduler.apply(output), Ok(vec![]));
                    }
                }
            }
        }

        let load = scheduler.load();
        prop_assert_eq!((load.running, load.waiting), (0, 0), "every request ends");
        prop_assert_eq!(load.free_blocks, load.blocks, "every block is free again");
        for (seq, request) in &requests {
            let (tokens, reason) = undisturbed(request, limits.max_context as usize);
            let stream = streams.remove(seq).unwrap_or_default();
            if cancelled.contains(seq) {
                prop_assert_eq!(&tokens[..stream.len()], &stream[..]);
            } else {
                prop_assert_eq!(stream, tokens);
                prop_assert_eq!(ended.get(seq), Some(&reason));
            }
        }
    }
}

#[test]
fn a_step_holds_all_decodes_and_fills_up_with_prefill() {
    let mut scheduler = Scheduler::new(config(64, 10, 8), Epoch::default());
    let first = scheduler.submit(request(vec![1, 2, 3], 20)).expect("fits");
    let mut rank = FakeRank::default();
    let plan = scheduler.plan().expect("work");
    scheduler.apply(&rank.run(&plan, &config(64, 10, 8))).expect("right");
    let second = scheduler.submit(request((0..30).collect(), 5)).expect("fits");
    let rows: Vec<_> =
        scheduler.plan().expect("work").slices.iter().map(|s| (s.seq, s.tokens.len())).collect();
    assert_eq!(rows, [(first, 1), (second, 9)]);
}

#[test]
fn requests_that_cannot_be_served_say_what_they_need() {
    let mut scheduler = Scheduler::new(config(4, 8, 8), Epoch::default());
    let mut refused = |request: Request| scheduler.submit(request).expect_err("refused").to_string();
    assert!(refused(request(vec![], 1)).contains("empty"));
    assert!(refused(request(vec![1, 1000], 1)).contains("token id 1000 at position 1"));
    assert!(refused(request(vec![1; 64], 1)).contains("64 tokens, but the context is 64"));
    assert!(refused(request(vec![1; 10], 10)).contains("19 tokens need 5 KV blocks, but there are 4"));
    assert!(refused(request(vec![1], 0)).contains("max_tokens is 0"));
    let with = |temperature, top_p| Request {
        sampling: SamplingParams { temperature, top_p, ..SamplingParams::GREEDY },
        ..request(vec![1], 1)
    };
    assert!(refused(with(f32::NAN, 1.0)).contains("temperature"));
    assert!(refused(with(-1.0, 1.0)).contains("temperature"));
    assert!(refused(with(0.0, 0.0)).contains("top_p"));
    assert_eq!(
        scheduler.submit(request(vec![1; 63], 9)),
        Err(AdmitError::TooLarge { tokens: 63, needed: 16, blocks: 4 })
    );
}

#[test]
fn an_output_that_no_correct_rank_sends_is_refused_and_changes_nothing() {
    let mut scheduler = Scheduler::new(config(8, 8, 8), Epoch::default());
    let seq = scheduler.submit(request(vec![1], 3)).expect("fits");
    let plan = scheduler.plan().expect("work");
    let output = |tokens| StepOutput { epoch: plan.epoch, step: plan.step, tokens };
    let token = |seq, id| SampledToken { seq, id, logprob: 0.0 };
    assert!(matches!(scheduler.apply(&output(vec![])), Err(OutputError::Sequences { step: StepId(0), .. })));
    assert!(matches!(scheduler.apply(&output(vec![token(SeqId(9), 1)])), Err(OutputError::Sequences { .. })));
    assert!(matches!(
        scheduler.apply(&output(vec![token(seq, 1000)])),
        Err(OutputError::Token { id: 1000, .. })
    ));
    let events = scheduler.apply(&output(vec![token(seq, 5)])).expect("right");
    assert_eq!(events, [Event::Token { seq, id: 5, logprob: 0.0 }]);
}

#[test]
fn cancelling_frees_at_once_or_when_the_step_is_applied() {
    let mut scheduler = Scheduler::new(config(8, 8, 8), Epoch::default());
    let (a, b) = (request(vec![1, 2], 3), request(vec![3], 3));
    let (a, b) = (scheduler.submit(a).expect("fits"), scheduler.submit(b).expect("fits"));
    scheduler.cancel(b);
    let plan = scheduler.plan().expect("work");
    assert_eq!(plan.slices.len(), 1);
    scheduler.cancel(a);
    assert_eq!(scheduler.load().running, 1, "in flight until its output comes");
    let events = scheduler.apply(&FakeRank::default().run(&plan, &config(8, 8, 8))).expect("right");
    assert_eq!(events, []);
    assert_eq!((scheduler.load().running, scheduler.load().free_blocks), (0, 8));
}
