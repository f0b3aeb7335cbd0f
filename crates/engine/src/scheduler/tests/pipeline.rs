//! Pipelines: every stage has a step as long as there is work for it.

use proptest::prelude::*;

use super::{CONFIG, latest, request, shape};
use crate::scheduler::tests::world::World;
use crate::{SchedulerConfig, SeqId, Tokens};

fn stages(stages: u32) -> SchedulerConfig {
    SchedulerConfig { blocks: 1000, max_batch_tokens: 64, max_sequences: 32, stages, ..CONFIG }
}

/// Plans as long as there is something to plan; the sequences of each step.
fn plan_all(world: &mut World) -> Vec<Vec<u64>> {
    while world.plan() {}
    let steps = world.in_flight.iter();
    steps.map(|flight| flight.plan.slices.iter().map(|slice| slice.seq.0).collect()).collect()
}

#[test]
fn sequences_are_dealt_out_among_the_stages() {
    let mut world = World::new(stages(3));
    (0..4).for_each(|_| world.submit(request(2, 9)));
    assert_eq!(plan_all(&mut world), [vec![0, 1], vec![2], vec![3]]);
    for _ in 0..5 {
        for steps in [[vec![2], vec![3], vec![0, 1]], [vec![3], vec![0, 1], vec![2]]] {
            world.apply();
            assert_eq!(plan_all(&mut world), steps);
        }
        world.apply();
        assert_eq!(plan_all(&mut world), [vec![0, 1], vec![2], vec![3]]);
        if world.clients[&SeqId(0)].tokens.len() > 7 {
            break;
        }
    }
}

#[test]
fn the_chunks_of_a_prompt_follow_each_other_and_answers_interleave() {
    let mut world = World::new(SchedulerConfig { max_batch_tokens: 8, ..stages(2) });
    world.submit(request(24, 3));
    assert_eq!([shape(&mut world), shape(&mut world)], [[(0, 0, 8)], [(0, 8, 8)]]);
    world.apply();
    assert_eq!(shape(&mut world), [(0, 16, 8)]);
    world.submit(request(24, 4));
    world.apply();
    assert_eq!(shape(&mut world), [(1, 0, 8)], "the first one's token is being sampled");
    world.apply();
    assert_eq!(shape(&mut world), [(0, 24, 1)]);
    assert!(matches!(latest(&world)[..], [Tokens::Ids(_)]));
    world.apply();
    assert_eq!(shape(&mut world), [(1, 8, 8)]);
    world.apply();
    assert_eq!(shape(&mut world), [(0, 25, 1)]);
}

#[test]
fn a_step_more_waits_at_the_last_stage_where_ranks_take_two() {
    let mut world = World::new(SchedulerConfig { steps_in_flight: 2, max_batch_tokens: 8, ..stages(2) });
    world.submit(request(60, 3));
    assert_eq!(plan_all(&mut world).len(), 3);
}

proptest! {
    /// Sequences that are at least as many as the stages and have long answers: no stage is ever idle, and all get on alike.
    #[test]
    fn all_stages_are_busy_while_there_is_work(more in 0usize..20, stage_count in 1u32..6, prompt in 1usize..6) {
        let mut world = World::new(stages(stage_count));
        let busy = stage_count as usize;
        (0..busy + more).for_each(|_| world.submit(request(prompt, 80)));
        for _ in 0..40 * stage_count {
            prop_assert!(plan_all(&mut world).len() >= busy);
            world.apply();
        }
        let answers = world.clients.values().map(|client| client.tokens.len() - prompt);
        let (least, most) = (answers.clone().min().unwrap(), answers.max().unwrap());
        prop_assert!(least + 3 >= most && least >= 30, "{} to {} tokens", least, most);
    }
}
