//! Groups through joins, losses and changes.

use engine::MemoryNeeds;

use super::*;

fn report() -> ModelReport {
    ModelReport {
        name: "yi".into(),
        vocabulary: 100,
        max_context: 64,
        units: 4,
        block_size: 16,
        eos: vec![2],
        fingerprint: "a".into(),
        needs: MemoryNeeds { layers: 1, ..MemoryNeeds::default() },
    }
}

fn policy(shape: Shape) -> Policy {
    Policy { shape, replicas: 1, context: None }
}

fn fixed(ranks: usize, min_ranks: usize) -> Policy {
    policy(Shape::Fixed { stages: 1, ranks, min_ranks })
}

fn join(group: &mut Groups, host: &str) -> WorkerId {
    try_join(group, host, report()).unwrap()
}

fn try_join(group: &mut Groups, host: &str, report: ModelReport) -> Result<WorkerId, String> {
    let resources =
        Resources { zone: String::new(), device: "cpu".into(), memory: 1 << 30, kv_memory: 1 << 30 };
    group.join(Newcomer { address: format!("{host}:1"), host: host.into(), report, resources })
}

fn group_of_two() -> (Groups, WorkerId, WorkerId) {
    let mut group = Groups::new(fixed(2, 2), 9);
    let first = join(&mut group, "host1");
    assert_eq!(group.muster(false), []);
    assert_eq!(group.state().unwrap().to_string(), "waiting for workers: 1 of 2 joined");
    let second = join(&mut group, "host2");
    (group, first, second)
}

fn epoch(counter: u64) -> Epoch {
    Epoch { term: 9, counter }
}

/// The ranks that are given out, in order, with the epoch.
fn assigned(effects: &[Effect]) -> (Vec<WorkerId>, Option<u64>) {
    let assignments = effects.iter().filter_map(|effect| match effect {
        Effect::Assign(worker, assignment) => Some((*worker, assignment)),
        _ => None,
    });
    let (workers, assignments): (Vec<_>, Vec<_>) = assignments.unzip();
    for group in assignments.chunk_by(|one, next| one.group == next.group) {
        assert!(group.iter().enumerate().all(|(number, told)| told.number(told.stage, told.rank) == number));
    }
    (workers, assignments.first().map(|assignment| assignment.epoch.counter))
}

fn capacity(kv_blocks: u32) -> Capacity {
    let steps_in_flight = 1 + kv_blocks % 2;
    Capacity { kv_blocks, steps_in_flight, step_rows: None, sampled_rows: Some(10 * kv_blocks) }
}

/// All members of the epoch that loads come to serve.
fn serve(group: &mut Groups) -> Standing {
    let (epoch, members) = (group.standing().next().unwrap().1, group.members(0).to_vec());
    let mut effects = Vec::new();
    for (rank, worker) in members.iter().enumerate() {
        assert_eq!(effects, [], "served before rank {rank} was there");
        assert!(group.attach(*worker, epoch));
        effects = group.ready(*worker, epoch, capacity(10 - rank as u32));
    }
    let [Effect::Serve(standing)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(group.sampler(0), Some((epoch, members[0])));
    standing.clone()
}

fn serving() -> (Groups, WorkerId, WorkerId) {
    let (mut group, first, second) = group_of_two();
    assert_eq!(assigned(&group.muster(false)), (vec![first, second], Some(1)));
    assert_eq!(group.state(), Some(State::Loading));
    let standing = serve(&mut group);
    assert_eq!((standing.epoch, standing.ranks), (epoch(1), 2));
    let least = Capacity { kv_blocks: 9, steps_in_flight: 1, step_rows: None, sampled_rows: Some(90) };
    assert_eq!(standing.capacity, least);
    (group, first, second)
}

fn lost(effects: &[Effect]) -> (u64, Option<(usize, WorkerId)>, &str) {
    let loss = effects.iter().find_map(|effect| match effect {
        Effect::Lost(loss) => Some(loss),
        _ => None,
    });
    let loss = loss.expect("a loss");
    (loss.epoch.counter, loss.member.as_ref().map(|(place, worker)| (place.rank, worker.id)), &loss.cause)
}

#[test]
fn a_lost_member_ends_the_epoch_and_a_new_one_begins_the_next() {
    let (mut group, first, second) = serving();
    let effects = group.leave(second, "it is gone");
    assert_eq!(lost(&effects), (1, Some((1, second)), "it is gone"));
    assert_eq!(effects[1..], [Effect::Abandon(first, epoch(1))]);
    assert_eq!(group.state(), Some(State::Waiting(Shortage::Workers { joined: 1, wanted: 2 })));
    let third = join(&mut group, "host2");
    assert_ne!(third, second);
    assert_eq!(assigned(&group.muster(false)), (vec![first, third], Some(2)));
    // What comes late from the epoch before changes nothing.
    assert_eq!(group.ready(first, epoch(1), capacity(10)), []);
    assert_eq!(group.fail(first, epoch(1), "late", None), []);
    assert!(!group.attach(first, epoch(1)));
    assert_eq!(group.state(), Some(State::Loading));
}

#[test]
fn a_spare_takes_over_at_once_where_the_lost_rank_was() {
    let (mut group, first, second) = serving();
    let spare = join(&mut group, "host3");
    assert_eq!((group.muster(false), group.could_be_wider()), (vec![], vec![]));
    let effects = group.fail(first, epoch(1), "a broken step", None);
    assert_eq!(effects[0], Effect::Dismiss(first, "a broken step".into()));
    assert_eq!(lost(&effects), (1, Some((0, first)), "a broken step"));
    assert_eq!(effects[2], Effect::Abandon(second, epoch(1)));
    assert_eq!(assigned(&effects), (vec![spare, second], Some(2)));
}

#[test]
fn the_rank_that_a_failure_is_due_to_is_dismissed() {
    let (mut group, first, second) = serving();
    let spare = join(&mut group, "host3");
    let effects = group.fail(first, epoch(1), "lost rank 1", Some(1));
    assert_eq!(effects[0], Effect::Dismiss(second, "lost rank 1".into()));
    assert_eq!(assigned(&effects), (vec![first, spare], Some(2)));
    // Its own end comes later; so does what the others thought of it.
    assert_eq!(group.leave(second, "it is gone"), []);
    assert_eq!(group.fail(first, epoch(1), "late", Some(1)), []);
    // A rank that does not exist is nobody's fault but the worker's that named it.
    let effects = group.fail(first, epoch(2), "lost rank 7", Some(7));
    assert_eq!(effects[0], Effect::Dismiss(first, "lost rank 7".into()));
}

#[test]
fn a_group_closes_ranks_and_widens_again_when_it_is_asked_to() {
    let mut group = Groups::new(fixed(3, 1), 9);
    let workers: Vec<_> = (1..=3).map(|host| join(&mut group, &format!("host{host}"))).collect();
    group.muster(false);
    serve(&mut group);
    let effects = group.leave(workers[1], "it is gone");
    assert_eq!(assigned(&effects), (vec![workers[0], workers[2]], Some(2)));
    // Lost again before it served.
    let effects = group.leave(workers[0], "it is gone too");
    assert_eq!(lost(&effects), (2, Some((0, workers[0])), "it is gone too"));
    assert_eq!(assigned(&effects), (vec![workers[2]], Some(3)));
    let fourth = join(&mut group, "host4");
    assert_eq!((group.muster(true), group.could_be_wider()), (vec![], vec![]), "not while it loads");
    serve(&mut group);
    assert_eq!(group.muster(true), []);
    assert_eq!(group.could_be_wider(), [(0, 2)]);
    let effects = group.reform(0, "wider".into());
    assert_eq!(lost(&effects), (3, None, "wider"));
    assert_eq!(effects[1], Effect::Abandon(workers[2], epoch(3)));
    assert_eq!(assigned(&effects).1, Some(4));
    assert!(assigned(&effects).0.contains(&fourth));
    assert_eq!(serve(&mut group).ranks, 2);
    assert_eq!(group.could_be_wider(), []);
}

#[test]
fn the_first_group_waits_for_all_who_may_come() {
    let mut group = Groups::new(fixed(3, 1), 9);
    let first = join(&mut group, "host1");
    assert_eq!(group.muster(false), []);
    assert_eq!(group.state().unwrap().to_string(), "waiting for workers: 1 of 3 joined");
    assert_eq!(assigned(&group.muster(true)), (vec![first], Some(1)));

    let mut group = Groups::new(policy(Shape::Auto { max_stages: 1 }), 9);
    for host in ["host1", "host2", "host3"] {
        join(&mut group, host);
        assert_eq!(group.muster(false), []);
    }
    assert_eq!(group.state().unwrap().to_string(), "waiting for more workers: 3 joined");
    join(&mut group, "host4");
    // As many as the model has units.
    assert_eq!(assigned(&group.muster(false)).0.len(), 4);
}

#[test]
fn a_worker_whose_load_failed_does_not_count_until_it_joins_again() {
    let (mut group, first, second) = group_of_two();
    group.muster(false);
    let effects = group.fail(second, epoch(1), "no memory", None);
    assert_eq!(effects[0], Effect::Dismiss(second, "no memory".into()));
    assert_eq!(effects[2..], [Effect::Abandon(first, epoch(1))]);
    assert_eq!(group.state(), Some(State::Failed("worker at host2:1: no memory".into())));
    assert_eq!(group.leave(second, "it is gone"), []);
    join(&mut group, "host2");
    assert_eq!(group.muster(false).len(), 2);
    assert_eq!(group.state(), Some(State::Loading));
}

#[test]
fn only_the_same_model_joins() {
    let (mut group, first, second) = serving();
    let other = ModelReport { units: 2, ..report() };
    let refusal = "worker at host3:1 serves units 2, the group 4";
    assert_eq!(try_join(&mut group, "host3", other.clone()), Err(refusal.into()));
    // Requests may be in flight when nobody is there.
    group.leave(first, "it is gone");
    group.leave(second, "it is gone");
    assert_eq!(try_join(&mut group, "host3", other), Err(refusal.into()));
}

#[test]
fn another_fingerprint_forms_groups_of_its_own() {
    let mut groups = Groups::new(fixed(2, 1), 9);
    let upgraded = ModelReport { fingerprint: "b".into(), ..report() };
    let old = [join(&mut groups, "host1"), join(&mut groups, "host2")];
    assert_eq!(assigned(&groups.muster(false)), (old.to_vec(), Some(1)));
    serve(&mut groups);
    assert_eq!(groups.scale(Policy { replicas: 2, ..fixed(2, 1) }), Ok(vec![]));
    let new = try_join(&mut groups, "host3", upgraded.clone()).unwrap();
    assert_eq!(groups.muster(false), [], "it may become wider");
    assert_eq!(assigned(&groups.muster(true)), (vec![new], Some(2)));
    assert_eq!(groups.members(0), old, "the first one stays");
    // The old ones are replaced one by one.
    assert_eq!(assigned(&groups.leave(old[0], "it is replaced")), (vec![old[1]], Some(3)));
    let other = try_join(&mut groups, "host1", upgraded).unwrap();
    assert_eq!(groups.muster(true), []);
    assert_eq!(groups.members(0), [old[1]], "kinds do not mix");
    assert_eq!(assigned(&groups.leave(old[1], "it is replaced")), (vec![other], Some(4)));
}

/// Two groups of two ranks that serve; their workers in order.
fn two_groups() -> (Groups, Vec<WorkerId>) {
    let mut groups = Groups::new(Policy { replicas: 2, ..fixed(2, 1) }, 9);
    for host in ["host1", "host2", "host3", "host4"] {
        join(&mut groups, host);
    }
    groups.muster(false);
    let epochs: Vec<_> = groups.standing().map(|(group, epoch)| (group.number, epoch.counter)).collect();
    assert_eq!(epochs, [(0, 1), (1, 2)]);
    let workers = [groups.members(0), groups.members(1)].concat();
    for worker in &workers {
        let (_, epoch) = groups.seat(*worker).unwrap();
        assert!(groups.attach(*worker, epoch));
        groups.ready(*worker, epoch, capacity(10));
    }
    assert!(groups.is_serving(0) && groups.is_serving(1));
    (groups, workers)
}

#[test]
fn what_happens_to_one_group_does_not_disturb_another() {
    let (mut groups, workers) = two_groups();
    let effects = groups.leave(workers[2], "it is gone");
    assert_eq!(lost(&effects), (2, Some((0, workers[2])), "it is gone"));
    assert_eq!(assigned(&effects), (vec![workers[3]], Some(3)));
    assert!(groups.is_serving(0) && !groups.is_serving(1));
    assert_eq!(groups.state(), None, "one serves");
    // Reports of one are of no matter to the other.
    assert_eq!(groups.fail(workers[0], epoch(3), "not its epoch", None), []);
    let effects = groups.leave(workers[3], "it is gone too");
    assert_eq!(assigned(&effects).0, []);
    assert_eq!(groups.standing().count(), 1);
    // Whoever comes now takes the place, not one beside those who are in a full group.
    let fifth = join(&mut groups, "host5");
    assert_eq!(assigned(&groups.muster(false)), (vec![fifth], Some(4)));
    assert_eq!(groups.seat(fifth), Some((1, epoch(4))));
}

#[test]
fn a_drained_worker_has_no_part_until_it_is_restored() {
    let (mut groups, workers) = two_groups();
    let host = groups.worker(workers[2]).unwrap().host.clone();
    let address = format!("{host}:1");
    let effects = groups.drain(&address, true).unwrap();
    assert_eq!(lost(&effects), (2, None, &*format!("drained: {address}")));
    assert_eq!(assigned(&effects), (vec![workers[3]], Some(3)));
    assert!(groups.is_serving(0), "the other group is left alone");
    assert_eq!(groups.seat(workers[2]), None);
    assert_eq!((groups.muster(true), groups.could_be_wider()), (vec![], vec![]));
    // It stays drained when it comes again.
    groups.leave(workers[2], "it is restarted");
    let again = join(&mut groups, &host);
    assert_eq!((groups.muster(true), groups.could_be_wider()), (vec![], vec![]));
    groups.attach(workers[3], epoch(3));
    groups.ready(workers[3], epoch(3), capacity(10));
    assert_eq!(groups.drain(&address, false), Ok(vec![]));
    assert_eq!(groups.could_be_wider(), [(1, 2)]);
    assert_eq!(assigned(&groups.reform(1, "wider".into())).0, [workers[3], again]);
    assert_eq!(groups.drain(&address, false), Err(format!("no worker at {address} is drained")));
    assert_eq!(groups.drain("host9:1", true), Err("no worker has joined at host9:1".into()));
}

#[test]
fn a_worker_that_cannot_be_spared_is_not_drained() {
    let (mut groups, first, second) = serving();
    let refusal = "the worker at host1:1 cannot be spared: waiting for workers: 1 of 2 joined";
    assert_eq!(groups.drain("host1:1", true), Err(refusal.into()));
    assert_eq!(groups.members(0), [first, second]);
    let third = join(&mut groups, "host3");
    let effects = groups.drain("host1:1", true).unwrap();
    assert_eq!(assigned(&effects), (vec![third, second], Some(2)));
}

#[test]
fn another_policy_changes_the_groups_that_it_wants_otherwise() {
    let (mut groups, workers) = two_groups();
    let wider = Policy { replicas: 1, ..fixed(3, 1) };
    let effects = groups.scale(wider).unwrap();
    assert_eq!(effects.iter().filter(|effect| matches!(effect, Effect::Lost(_))).count(), 2);
    assert_eq!(assigned(&effects).0.len(), 3);
    assert!(workers[..2].iter().all(|worker| groups.members(0).contains(worker)), "least movement");
    assert_eq!(groups.standing().count(), 1);
    let narrower = groups.scale(Policy { replicas: 4, ..fixed(1, 1) }).unwrap();
    assert_eq!((assigned(&narrower).0.len(), groups.standing().count()), (4, 4));
    assert!(groups.scale(fixed(4, 4)).is_ok());
    // The same workers in the same order, but in other stages.
    let needs = MemoryNeeds { layers: 2, ..MemoryNeeds::default() };
    let mut deep = Groups::new(fixed(2, 2), 9);
    for host in ["host1", "host2"] {
        try_join(&mut deep, host, ModelReport { needs, ..report() }).unwrap();
    }
    assert_eq!(assigned(&deep.muster(false)).0.len(), 2);
    let pipeline = policy(Shape::Fixed { stages: 2, ranks: 1, min_ranks: 1 });
    assert_eq!(assigned(&deep.scale(pipeline).unwrap()).0.len(), 2);
    assert_eq!(assigned(&deep.scale(fixed(2, 2)).unwrap()).0.len(), 2);
    let refused =
        groups.scale(Policy { replicas: 1, ..policy(Shape::Fixed { stages: 2, ranks: 4, min_ranks: 4 }) });
    assert!(refused.is_err());
    assert_eq!(groups.policy(), &fixed(4, 4));
}

#[test]
fn a_width_that_the_model_does_not_have_is_refused() {
    let mut group = Groups::new(fixed(5, 5), 1);
    let refusal = try_join(&mut group, "host1", report()).unwrap_err();
    assert!(refusal.starts_with("5 workers asked for"), "{refusal}");
    assert_eq!(group.state(), Some(State::Failed(refusal)));
}
