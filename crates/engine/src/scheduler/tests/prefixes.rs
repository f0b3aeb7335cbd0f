//! What is shared, with whom, when, and for how long.

use proptest::prelude::*;

use super::*;

const ROOMY: SchedulerConfig = SchedulerConfig { blocks: 100, max_batch_tokens: 64, ..CONFIG };

/// A request whose prompt is `0, 1, 2 …` up to `prompt` tokens, then `rest`.
fn counting(prompt: u32, rest: &[u32], max_tokens: u32) -> Request {
    let counted = (0..prompt).map(|id| id % VOCABULARY);
    Request { prompt: counted.chain(rest.iter().copied()).collect(), ..request(1, max_tokens) }
}

fn finish(world: &mut World) {
    while world.plan() || world.apply() {
        world.check_books();
    }
}

/// The cached tokens that the client of a finished request was told of.
fn cached(world: &World, seq: u64) -> usize {
    let client = &world.clients[&SeqId(seq)];
    assert!(client.finished);
    client.cached
}

#[test]
fn the_second_of_two_prompts_computes_its_tail() {
    let mut world = World::new(ROOMY);
    for rest in [&[][..], &[], &[5], &[5, 6, 7, 8, 9]] {
        world.submit(counting(12, rest, 3));
        finish(&mut world);
    }
    assert_eq!([0, 1, 2, 3].map(|seq| cached(&world, seq)), [0, 8, 12, 12]);
}

#[test]
fn a_conversation_goes_on_behind_the_answer_before() {
    let mut world = World::new(ROOMY);
    world.submit(counting(6, &[], 7));
    finish(&mut world);
    let tokens = world.clients[&SeqId(0)].tokens.clone();
    assert_eq!(tokens.len(), 13);
    world.submit(Request { prompt: [tokens.as_slice(), &[1, 2]].concat(), ..request(1, 2) });
    assert_eq!(world.scheduler.cached_prefix(&tokens), 12);
    assert_eq!(shape(&mut world), [(1, 12, 3)], "all that was computed: the last token never was");
}

#[test]
fn what_a_running_sequence_has_computed_is_shared_and_counted_once() {
    let mut world = World::new(ROOMY);
    world.submit(counting(12, &[1], 9));
    world.plan();
    world.apply();
    world.submit(counting(12, &[2], 9));
    assert_eq!(shape(&mut world), [(0, 13, 1), (1, 12, 1)]);
    let load = world.scheduler.load();
    assert_eq!((load.free_blocks, load.cached_blocks), (100 - 5, 0));
    world.cancel(0);
    world.apply();
    let load = world.scheduler.load();
    assert_eq!((load.free_blocks, load.cached_blocks), (100 - 4, 0), "the prefix has a holder still");
    finish(&mut world);
    assert_eq!(world.scheduler.load().cached_blocks, 5);
}

#[test]
fn nothing_of_a_step_in_flight_is_shared() {
    for config in [SchedulerConfig { steps_in_flight: 2, ..ROOMY }, SchedulerConfig { stages: 2, ..ROOMY }] {
        let mut world = World::new(config);
        world.submit(counting(13, &[], 9));
        world.plan();
        world.submit(counting(13, &[], 9));
        assert_eq!(world.scheduler.cached_prefix(&world.clients[&SeqId(1)].tokens), 0);
        assert_eq!(shape(&mut world).last(), Some(&(1, 0, 13)));
        world.apply();
        world.submit(counting(13, &[], 9));
        assert_eq!(shape(&mut world).last(), Some(&(2, 12, 1)));
        finish(&mut world);
    }
}

#[test]
fn whoever_computed_the_same_beside_another_ends_up_with_the_same_blocks() {
    let mut world = World::new(ROOMY);
    (0..3).for_each(|_| world.submit(counting(12, &[], 9)));
    assert_eq!(shape(&mut world), [(0, 0, 12), (1, 0, 12), (2, 0, 12)]);
    assert_eq!(world.scheduler.load().free_blocks, 100 - 9);
    world.apply();
    assert_eq!(world.scheduler.load().free_blocks, 100 - 3);
    finish(&mut world);
}

/// The step behind the one that ends the sequence computes a token that nobody is told of.
#[test]
fn what_was_computed_in_vain_is_not_cached() {
    let mut world = World::new(SchedulerConfig { steps_in_flight: 3, ..ROOMY });
    world.submit(counting(6, &[], 9));
    (0..3).for_each(|_| assert!(world.plan()));
    world.cancel(0);
    finish(&mut world);
    let load = world.scheduler.load();
    assert_eq!((load.free_blocks, load.cached_blocks), (99, 1), "of eight computed tokens six are known");
}

#[test]
fn cached_blocks_make_room() {
    let mut world = World::new(CONFIG);
    for (seq, prompt) in [13, 14, 13].into_iter().enumerate() {
        world.submit(request(prompt, 1 + seq as u32));
        finish(&mut world);
    }
    let load = world.scheduler.load();
    assert_eq!((load.free_blocks, load.cached_blocks), (1, 7), "of the first only the start is there");
    let prefixes = [1, 2, 3].map(|id| world.scheduler.cached_prefix(&[id; 20]));
    assert_eq!(prefixes, [4, 12, 12]);
    world.submit(request(30, 3));
    finish(&mut world);
    assert_eq!(cached(&world, 3), 12);
}

#[test]
fn a_new_group_has_nothing_cached() {
    let mut world = World::new(ROOMY);
    world.submit(counting(13, &[], 3));
    finish(&mut world);
    world.submit(counting(13, &[], 3));
    assert_eq!(shape(&mut world), [(1, 12, 1)]);
    world.restart(100, 1);
    assert_eq!(world.scheduler.cached_prefix(&[0, 1, 2, 3, 4]), 0);
    assert_eq!(shape(&mut world), [(1, 0, 13)]);
    finish(&mut world);
    assert_eq!(cached(&world, 1), 0, "they were computed again after all");
}

#[test]
fn the_load_tells_what_is_still_to_be_computed() {
    let mut world = World::new(CONFIG);
    world.submit(request(20, 5));
    world.submit(request(3, 6));
    let mut pending = vec![];
    for _ in 0..5 {
        pending.push(world.scheduler.load().pending_rows);
        world.plan();
        world.apply();
    }
    assert_eq!(pending, [23, 15, 7, 2, 2]);
}

proptest! {
    /// Where there is room, a prompt that was answered before is never computed again, but for its last block.
    #[test]
    fn whatever_was_computed_is_found(request in requests(), stages in 1u32..4, steps_in_flight in 1u32..3) {
        let mut world = World::new(SchedulerConfig { stages, steps_in_flight, ..ROOMY });
        world.submit(request.clone());
        finish(&mut world);
        let again = (request.prompt.len() - 1) / 4 * 4;
        prop_assert_eq!(world.scheduler.cached_prefix(&request.prompt), again);
        world.submit(request);
        finish(&mut world);
        prop_assert_eq!(cached(&world, 1), again);
    }
}
