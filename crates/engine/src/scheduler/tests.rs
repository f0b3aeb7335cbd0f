//! The rules of the scheduler under random workloads, and by example.

mod pipeline;
mod prefixes;
mod rank;
mod world;

use proptest::prelude::*;

use super::*;
use crate::{SamplingParams, Tokens};
use world::{VOCABULARY, World};

#[derive(Debug, Clone)]
enum Action {
    Submit(Request),
    Resume(Request, usize),
    /// The next turn of a conversation: its prompt is what there is of an earlier one, and more.
    Continue(Request, usize),
    Cancel(usize),
    Plan,
    Apply,
    Nonsense(usize),
    Restart(u32, u32),
}

/// Many begin with the same tokens, and some have the same answers.
fn requests() -> impl Strategy<Value = Request> {
    let tokens = |most| prop::collection::vec(0..VOCABULARY, 1..most);
    let alike = (0u32..3, 0usize..40, tokens(4)).prop_map(|(prefix, length, rest)| {
        [(0..VOCABULARY).map(|id| id * (id + prefix) % VOCABULARY).cycle().take(length).collect(), rest]
            .concat()
    });
    let prompt = prop_oneof![1 => tokens(40), 3 => alike];
    let seed = prop_oneof![any::<u64>(), 0u64..2];
    (prompt, 1u32..30, seed, prop::collection::vec(0..VOCABULARY, 0..2)).prop_map(
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
        2 => (requests(), any::<usize>()).prop_map(|(request, turn)| Action::Continue(request, turn)),
        2 => any::<usize>().prop_map(Action::Cancel),
        20 => Just(Action::Plan),
        20 => Just(Action::Apply),
        2 => any::<usize>().prop_map(Action::Nonsense),
        1 => (5u32..30, 1u32..4).prop_map(|(blocks, steps)| Action::Restart(blocks, steps)),
    ];
    prop::collection::vec(action, 1..200)
}

fn configs() -> impl Strategy<Value = SchedulerConfig> {
    (5u32..30, 1u32..9, 20u32..70, 1u32..40, 1u32..8, 1u32..4, 1u32..5).prop_map(
        |(blocks, block_size, max_context, max_batch_tokens, max_sequences, steps_in_flight, stages)| {
            SchedulerConfig {
                blocks,
                block_size,
                max_context,
                vocabulary: VOCABULARY,
                max_batch_tokens,
                max_sequences,
                steps_in_flight,
                stages,
            }
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
                Action::Continue(request, turn) => world.submit_after(turn, request),
                Action::Cancel(index) => world.cancel(index),
                Action::Plan => drop(world.plan()),
                Action::Apply => drop(world.apply()),
                Action::Nonsense(index) => world.apply_nonsense(index),
                Action::Restart(blocks, steps) => world.restart(blocks, steps),
            }
            world.check_books();
        }
        // Left alone, everything ends, and soon: were each token computed alone, these steps would do.
        let alone: usize = world.clients.values().map(|c| 2 * (c.request.prompt.len() + 30)).sum();
        let mut steps = 0;
        while world.plan() || world.apply() {
            world.check_books();
            steps += 1;
            prop_assert!(steps <= 80 * alone, "no progress");
        }
        prop_assert_eq!(world.live().count(), 0);
        let Load { running, waiting, pending_rows, free_blocks, cached_blocks, blocks } = world.scheduler.load();
        prop_assert_eq!((running, waiting, pending_rows), (0, 0, 0));
        prop_assert_eq!(free_blocks + cached_blocks, blocks);
    }
}

const CONFIG: SchedulerConfig = SchedulerConfig {
    blocks: 8,
    block_size: 4,
    max_context: 100,
    vocabulary: VOCABULARY,
    max_batch_tokens: 8,
    max_sequences: 4,
    steps_in_flight: 1,
    stages: 1,
};

/// The prompts of answers of different lengths have nothing in common.
fn request(prompt: usize, max_tokens: u32) -> Request {
    Request {
        prompt: vec![max_tokens % VOCABULARY; prompt],
        max_tokens,
        sampling: SamplingParams::GREEDY,
        stop_ids: vec![],
        resume: None,
    }
}

/// Sequence, start and rows of every slice of the next step.
fn shape(world: &mut World) -> Vec<(u64, u32, usize)> {
    assert!(world.plan());
    let plan = &world.in_flight.back().unwrap().plan;
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
    let load = Load { running: 1, waiting: 1, pending_rows: 10, free_blocks: 0, cached_blocks: 1, blocks: 4 };
    assert_eq!(world.scheduler.load(), load);
    while world.clients[&SeqId(0)].tokens.len() < 13 {
        world.apply();
        world.plan();
    }
    let slice = &world.in_flight[0].plan.slices[0];
    assert_eq!(
        (slice.start, slice.tokens.len()),
        (4, 5),
        "recomputed, but for the block that is there still"
    );
}

#[test]
fn a_lost_group_costs_no_token() {
    let mut world = World::new(CONFIG);
    world.submit(request(6, 4));
    world.submit(request(2, 3));
    world.plan();
    world.apply();
    world.plan();
    let lost = world.in_flight[0].output.clone();
    world.restart(8, 1);
    assert_eq!(world.scheduler.apply(&lost), Ok(vec![]), "an output of the epoch before");
    assert_eq!(shape(&mut world), [(0, 0, 7), (1, 0, 1)]);
}

const TWO: SchedulerConfig = SchedulerConfig { steps_in_flight: 2, ..CONFIG };

/// The tokens of every slice of the latest step.
fn latest(world: &World) -> Vec<Tokens> {
    world.in_flight.back().unwrap().plan.slices.iter().map(|slice| slice.tokens.clone()).collect()
}

#[test]
fn the_next_step_goes_on_with_what_is_being_sampled() {
    let mut world = World::new(TWO);
    world.submit(request(3, 9));
    assert_eq!(shape(&mut world), [(0, 0, 3)]);
    for position in 3..8 {
        assert_eq!(shape(&mut world), [(0, position, 1)]);
        assert_eq!(latest(&world), [Tokens::LastSampled]);
        assert!(!world.plan(), "two steps are in flight");
        world.apply();
    }
    world.apply();
    let known = world.clients[&SeqId(0)].tokens[8];
    assert_eq!(shape(&mut world), [(0, 8, 1)]);
    assert_eq!(latest(&world), [Tokens::Ids(vec![known])]);
}

#[test]
fn a_prompt_is_read_ahead_and_others_join() {
    let mut world = World::new(TWO);
    world.submit(request(12, 3));
    world.submit(request(2, 3));
    assert_eq!(shape(&mut world), [(0, 0, 8)]);
    assert_eq!(shape(&mut world), [(0, 8, 4), (1, 0, 2)]);
    world.apply();
    assert_eq!(shape(&mut world), [(0, 12, 1), (1, 2, 1)]);
    assert_eq!(latest(&world), [Tokens::LastSampled, Tokens::LastSampled]);
}

#[test]
fn no_step_computes_more_than_the_answer_needs() {
    for (max_tokens, max_context) in [(2, 100), (100, 5)] {
        let mut world = World::new(SchedulerConfig { max_context, steps_in_flight: 3, ..CONFIG });
        world.submit(request(3, max_tokens));
        assert_eq!([shape(&mut world), shape(&mut world)], [[(0, 0, 3)], [(0, 3, 1)]]);
        assert!(!world.plan(), "both of its tokens are on their way");
        world.apply();
        world.apply();
        assert!(world.clients[&SeqId(0)].finished);
    }
}

/// Two steps in flight, of which the first ends the sequence.
#[test]
fn what_is_computed_in_vain_keeps_its_place_until_it_ends() {
    for cancelled in [false, true] {
        let mut world = World::new(SchedulerConfig { max_sequences: 1, ..TWO });
        let stop_ids = if cancelled { vec![] } else { (0..VOCABULARY).collect() };
        world.submit(Request { stop_ids, ..request(4, 9) });
        world.submit(request(2, 9));
        assert_eq!([shape(&mut world), shape(&mut world)], [[(0, 0, 4)], [(0, 4, 1)]]);
        if cancelled {
            world.cancel(0);
        }
        world.apply();
        assert_eq!(world.clients[&SeqId(0)].finished, !cancelled);
        assert!(!world.plan(), "the only slot is in flight");
        let load =
            Load { running: 1, waiting: 1, pending_rows: 2, free_blocks: 6, cached_blocks: 0, blocks: 8 };
        assert_eq!(world.scheduler.load(), load);
        world.apply();
        assert_eq!(
            world.clients[&SeqId(0)].tokens.len(),
            4 + usize::from(!cancelled),
            "a token after the end"
        );
        assert_eq!(shape(&mut world), [(1, 0, 2)]);
    }
}

#[test]
fn nobody_makes_room_in_flight() {
    let mut world = World::new(SchedulerConfig { blocks: 4, ..TWO });
    world.submit(request(4, 9));
    world.submit(request(4, 6));
    assert_eq!(shape(&mut world), [(0, 0, 4), (1, 0, 4)]);
    for position in 4..8 {
        assert_eq!(shape(&mut world), [(0, position, 1), (1, position, 1)]);
        world.apply();
    }
    assert!(!world.plan(), "the fifth block is not there, and who could give it is in flight");
    world.apply();
    assert_eq!(shape(&mut world), [(0, 8, 1)]);
    let load = Load { running: 1, waiting: 1, pending_rows: 10, free_blocks: 0, cached_blocks: 1, blocks: 4 };
    assert_eq!(world.scheduler.load(), load);
}

#[test]
fn a_group_that_is_lost_with_two_steps_in_flight_costs_no_token() {
    let mut world = World::new(TWO);
    world.submit(request(4, 6));
    world.plan();
    world.plan();
    world.apply();
    world.plan();
    let lost: Vec<_> = world.in_flight.iter().map(|flight| flight.output.clone()).collect();
    world.restart(8, 2);
    for output in lost {
        assert_eq!(world.scheduler.apply(&output), Ok(vec![]), "an output of the epoch before");
    }
    assert_eq!(shape(&mut world), [(0, 0, 5)]);
    while world.plan() || world.apply() {}
    assert!(world.clients[&SeqId(0)].finished);
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
        steps_in_flight: 0,
        stages: 0,
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
