//! What `form` promises, for any workers, policies and histories.

use engine::MemoryNeeds;
use proptest::prelude::*;

use super::*;
use crate::Resources;

const UNITS: u32 = 4;
/// Bytes of a unit's weights; a token's keys and values take one more byte in each unit.
const UNIT: u64 = 1000;
const CONTEXT: u64 = 64;

fn report(fingerprint: &str) -> ModelReport {
    ModelReport {
        name: "yi".into(),
        vocabulary: 64_000,
        max_context: CONTEXT as u32,
        units: UNITS,
        block_size: 16,
        eos: vec![2],
        fingerprint: fingerprint.into(),
        needs: MemoryNeeds { layers: 4, layer_unit: UNIT / 4, kv_token: 1, ..MemoryNeeds::default() },
    }
}

/// A worker with memory for so many units and a context.
fn worker(id: u64, zone: &str, units: u64) -> Candidate {
    Candidate {
        id: WorkerId(id),
        address: format!("host{id}:1"),
        host: format!("host{id}"),
        report: report("a"),
        resources: Resources {
            zone: zone.into(),
            device: "cpu".into(),
            memory: units * (UNIT + 4 * CONTEXT),
            kv_memory: u64::MAX,
        },
    }
}

fn workers(ids: impl IntoIterator<Item = u64>) -> Vec<Candidate> {
    ids.into_iter().map(|id| worker(id, "", 4)).collect()
}

fn fixed(ranks: usize, min_ranks: usize) -> Policy {
    Policy { shape: Shape::Fixed { stages: 1, ranks, min_ranks }, replicas: 1, context: None }
}

/// The one group there is: its workers with their units.
fn ranks(formation: &Formation) -> Vec<(u64, Range<usize>)> {
    assert_eq!(formation.groups.len(), 1, "{formation:?}");
    let ranks = formation.groups[0].stages.iter().flat_map(|stage| &stage.ranks);
    ranks.map(|rank| (rank.worker.0, rank.member.units.clone())).collect()
}

fn missing(formation: &Formation) -> String {
    assert_eq!(formation.groups, []);
    formation.shortage.as_ref().expect("a reason").to_string()
}

#[test]
fn the_first_come_serve_and_the_rest_are_spares() {
    let formation = form(&workers([6, 2, 1, 5]), &fixed(3, 3), &Formation::default());
    assert_eq!(ranks(&formation), [(1, 0..2), (2, 2..3), (5, 3..4)]);
    assert_eq!((formation.spares, formation.shortage), (vec![WorkerId(6)], None));
}

#[test]
fn a_spare_takes_the_place_of_the_lost() {
    let before = form(&workers(1..=5), &fixed(4, 4), &Formation::default());
    let after = form(&workers([1, 3, 4, 5]), &fixed(4, 4), &before);
    assert_eq!(ranks(&after), [(1, 0..1), (5, 1..2), (3, 2..3), (4, 3..4)]);
    assert_eq!(after.groups[0].number, before.groups[0].number);
}

#[test]
fn without_a_spare_the_group_closes_ranks_as_far_as_it_may() {
    let before = form(&workers(1..=4), &fixed(4, 4), &Formation::default());
    let narrower = form(&workers([1, 2, 4]), &fixed(4, 2), &before);
    assert_eq!(ranks(&narrower), [(1, 0..1), (2, 1..3), (4, 3..4)]);
    let wider = form(&workers([1, 2, 4, 7]), &fixed(4, 2), &narrower);
    assert_eq!(ranks(&wider), [(1, 0..1), (2, 1..2), (7, 2..3), (4, 3..4)]);
    let strict = form(&workers([1, 2, 4]), &fixed(4, 4), &before);
    assert_eq!(missing(&strict), "waiting for workers: 3 of 4 joined");
    assert_eq!(missing(&form(&workers([3]), &fixed(4, 2), &before)), "waiting for workers: 1 of 2 joined");
}

#[test]
fn memory_decides_how_narrow_a_group_may_be() {
    let small = |ids: &[u64]| ids.iter().map(|id| worker(*id, "", 2)).collect::<Vec<_>>();
    let auto = Policy { shape: Shape::Auto { max_stages: 1 }, replicas: 1, context: None };
    let before = form(&small(&[1, 2, 3]), &auto, &Formation::default());
    assert_eq!(ranks(&before).len(), 3);
    assert_eq!(ranks(&form(&small(&[1, 3]), &auto, &before)), [(1, 0..2), (3, 2..4)]);
    let reason = missing(&form(&small(&[3]), &auto, &before));
    assert!(
        reason.contains(
            "the workers that joined (1) have memory for 2 of the model's 4 units beside 64 tokens"
        ),
        "{reason}"
    );
    assert!(reason.contains("5024 bytes in all"), "{reason}");
    // The width that was asked for need only hold some tokens, a narrower one all of a context.
    let tight = |ids: &[u64]| {
        let mut workers = small(ids);
        workers.iter_mut().for_each(|w| w.resources.memory = 2 * (UNIT + 4 * 16));
        workers
    };
    let before = form(&tight(&[1, 2]), &fixed(2, 1), &Formation::default());
    assert_eq!(ranks(&before), [(1, 0..2), (2, 2..4)]);
    assert!(missing(&form(&tight(&[1, 2]), &fixed(3, 1), &Formation::default())).contains("memory for 2 of"));
    // An explicit limit of the KV cache counts too.
    let mut capped = workers(1..=2);
    capped.iter_mut().for_each(|w| w.resources.kv_memory = 2 * 4 * CONTEXT);
    assert_eq!(ranks(&form(&capped, &auto, &Formation::default())).len(), 2);
    assert!(missing(&form(&capped[..1], &auto, &Formation::default())).contains("memory for 2 of"));
}

#[test]
fn a_context_that_is_limited_takes_less() {
    let mut workers = vec![worker(1, "", 4)];
    workers[0].resources.memory = 4 * (UNIT + 4 * 32);
    let policy =
        |context| Policy { context, ..Policy { shape: Shape::Auto { max_stages: 1 }, ..fixed(1, 1) } };
    assert!(missing(&form(&workers, &policy(None), &Formation::default())).contains("64 tokens"));
    assert_eq!(ranks(&form(&workers, &policy(Some(20)), &Formation::default())), [(1, 0..4)]);
}

#[test]
fn ranks_are_of_one_zone_and_stages_span_zones() {
    let spread: Vec<_> = (1..=4).map(|id| worker(id, if id % 2 == 0 { "a" } else { "b" }, 2)).collect();
    let reason = missing(&form(&spread, &fixed(3, 3), &Formation::default()));
    assert!(
        reason.starts_with("4 workers joined, but at most 2 in one zone, and a stage takes 3"),
        "{reason}"
    );
    let policy = |stages| Policy { shape: Shape::Fixed { stages, ranks: 2, min_ranks: 2 }, ..fixed(2, 2) };
    let formation = form(&spread, &policy(2), &Formation::default());
    let stages = &formation.groups[0].stages;
    assert_eq!((stages[0].layers.clone(), stages[0].zone.as_str()), (0..2, "a"));
    assert_eq!((stages[1].layers.clone(), stages[1].zone.as_str()), (2..4, "b"));
    assert!(missing(&form(&spread, &policy(5), &Formation::default())).starts_with("5 stages asked for"));
    // What no zone can hold by itself is cut into stages.
    let weak: Vec<_> = (1..=2).map(|id| worker(id, &format!("{id}"), 2)).collect();
    let auto = |max_stages| Policy { shape: Shape::Auto { max_stages }, ..fixed(1, 1) };
    assert_eq!(form(&weak, &auto(2), &Formation::default()).groups[0].stages.len(), 2);
    assert_eq!(form(&weak, &auto(1), &Formation::default()).groups, []);
}

#[test]
fn groups_are_of_one_fingerprint() {
    let mut mixed = workers(1..=5);
    mixed.iter_mut().filter(|w| w.id.0 % 2 == 0).for_each(|w| w.report = report("b"));
    let formation = form(&mixed, &Policy { replicas: 9, ..fixed(2, 2) }, &Formation::default());
    let kinds: Vec<_> = formation.groups.iter().map(|group| group.report.fingerprint.as_str()).collect();
    assert_eq!((kinds, formation.spares), (vec!["a", "b"], vec![WorkerId(5)]));
}

#[test]
fn a_width_that_the_model_does_not_have_is_said() {
    let reason = missing(&form(&workers(1..=5), &fixed(5, 5), &Formation::default()));
    assert!(reason.starts_with("5 workers asked for, but the model has 4 units"), "{reason}");
}

#[test]
fn a_group_that_stands_gives_nobody_away() {
    let policy = Policy { replicas: 2, ..fixed(2, 2) };
    let before = form(&workers(1..=4), &policy, &Formation::default());
    assert_eq!(before.groups.len(), 2);
    let after = form(&workers([1, 3, 4]), &policy, &before);
    assert_eq!(after.groups, before.groups[1..]);
    assert_eq!(after.shortage, Some(Shortage::Workers { joined: 1, wanted: 2 }));
    // Two that lost members: the spare goes to one, and that which cannot stand gives its rest.
    let after = form(&workers([1, 3, 9]), &policy, &before);
    assert_eq!(after.groups.len(), 1);
    assert_eq!(ranks(&after), [(1, 0..2), (9, 2..4)]);
    assert_eq!(after.spares, [WorkerId(3)]);
}

// ---- properties

fn policy() -> impl Strategy<Value = Policy> {
    let shape = prop_oneof![
        (1usize..4, 1usize..5, 1usize..5).prop_map(|(stages, a, b)| Shape::Fixed {
            stages,
            ranks: a.max(b),
            min_ranks: a.min(b)
        }),
        (1usize..4).prop_map(|max_stages| Shape::Auto { max_stages }),
    ];
    (shape, 1usize..4, prop::option::of(1u32..100)).prop_map(|(shape, replicas, context)| Policy {
        shape,
        replicas,
        context,
    })
}

/// Workers with memory for `units` units each, in up to two zones and of up to two kinds.
fn fleet(units: impl Strategy<Value = u64>) -> impl Strategy<Value = Vec<Candidate>> {
    let one = (units, any::<bool>(), 0u8..5);
    prop::collection::vec(one, 0..14).prop_map(|fleet| {
        let one = |(id, (units, zone, kind)): (usize, (u64, bool, u8))| {
            let mut worker = worker(id as u64 + 1, if zone { "a" } else { "b" }, units);
            if kind == 0 {
                worker.report = report("b");
            }
            worker
        };
        fleet.into_iter().enumerate().map(one).collect()
    })
}

/// Who of a fleet is there, by the bits of a number.
fn present(fleet: &[Candidate], bits: u16) -> Vec<Candidate> {
    fleet.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1).map(|(_, worker)| worker.clone()).collect()
}

fn check(formation: &Formation, there: &[Candidate], policy: &Policy) -> Result<(), TestCaseError> {
    let by_id: BTreeMap<_, _> = there.iter().map(|worker| (worker.id, worker)).collect();
    let placed = formation.groups.iter().flat_map(GroupFormation::workers);
    let mut seen: Vec<_> = placed.chain(formation.spares.iter().copied()).collect();
    seen.sort_unstable();
    prop_assert!(seen.iter().eq(by_id.keys()), "everybody has one place: {formation:?}");
    prop_assert!(formation.groups.len() <= policy.replicas);
    prop_assert_eq!(formation.shortage.is_some(), formation.groups.len() < policy.replicas);
    prop_assert!(formation.groups.windows(2).all(|pair| pair[0].number < pair[1].number));
    for group in &formation.groups {
        let (fewest, most) = policy.shape.stages();
        prop_assert!((fewest..=most).contains(&group.stages.len()));
        let layers: Vec<_> = group.stages.iter().flat_map(|stage| stage.layers.clone()).collect();
        prop_assert!(layers.into_iter().eq(0..4), "stages tile the layers");
        for stage in &group.stages {
            let (fewest, most) = policy.shape.widths(UNITS as usize);
            prop_assert!((fewest..=most).contains(&stage.ranks.len()));
            let units: Vec<_> = stage.ranks.iter().flat_map(|rank| rank.member.units.clone()).collect();
            prop_assert!(units.into_iter().eq(0..UNITS as usize), "ranks tile the units");
            let asked = matches!(policy.shape, Shape::Fixed { ranks, .. } if ranks == stage.ranks.len());
            let context = policy.context.map_or(CONTEXT, u64::from).min(CONTEXT).next_multiple_of(16);
            for rank in &stage.ranks {
                let worker = by_id[&rank.worker];
                prop_assert_eq!(&worker.resources.zone, &stage.zone);
                prop_assert_eq!(&worker.report.fingerprint, &group.report.fingerprint);
                prop_assert_eq!(&worker.address, &rank.member.address);
                let tokens = if asked { 16 } else { context };
                let bytes = stage.layers.len() as u64 * (UNIT / 4 + tokens) * rank.member.units.len() as u64;
                prop_assert!(bytes <= worker.resources.memory, "memory is respected");
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn formations_hold_what_they_promise(
        fleet in fleet(0u64..6), policy in policy(), then in any::<u16>(), now in any::<u16>(), seed in any::<u64>(),
    ) {
        let (then, now) = (present(&fleet, then), present(&fleet, now));
        let before = form(&then, &policy, &Formation::default());
        check(&before, &then, &policy)?;
        let after = form(&now, &policy, &before);
        check(&after, &now, &policy)?;

        let mut shuffled = now.clone();
        shuffled.sort_by_key(|worker| (worker.id.0 + 1).wrapping_mul(seed | 1));
        prop_assert_eq!(&form(&shuffled, &policy, &before), &after, "the order of workers is of no matter");
        prop_assert_eq!(&form(&now, &policy, &after), &after, "what stands is formed again as it is");

        // A group all of whose members are there changes only to become wider, and then all of them stay.
        for group in &before.groups {
            let alive = group.workers().all(|id| now.iter().any(|worker| worker.id == id));
            if alive {
                let same = after.groups.iter().find(|other| other.number == group.number);
                let same = same.expect("a group that stood stands");
                if same != group {
                    let members: BTreeSet<_> = same.workers().collect();
                    prop_assert!(same.workers().count() > group.workers().count());
                    prop_assert!(group.workers().all(|id| members.contains(&id)));
                }
            }
        }
    }

    #[test]
    fn more_workers_never_make_fewer_groups(
        fleet in fleet(0u64..6), policy in policy(), there in any::<u16>(), newcomer in 0usize..14,
    ) {
        // Several numbers of stages to choose from are left out: a group of fewer stages may take what several of more would share.
        let shape = match policy.shape {
            Shape::Auto { .. } => Shape::Auto { max_stages: 1 },
            fixed => fixed,
        };
        let policy = Policy { shape, ..policy };
        let few = form(&present(&fleet, there), &policy, &Formation::default());
        let many = form(&present(&fleet, there | 1 << newcomer), &policy, &Formation::default());
        prop_assert!(many.groups.len() >= few.groups.len(), "{few:?}\n{many:?}");
    }

    #[test]
    fn a_newcomer_to_equals_takes_nothing_away(
        fleet in fleet(Just(2)), ranks in 1usize..5, min_ranks in 1usize..5, auto in any::<bool>(), replicas in 1usize..4,
        then in any::<u16>(), now in any::<u16>(), newcomer in 0usize..14,
    ) {
        let shape = if auto {
            Shape::Auto { max_stages: 1 }
        } else {
            Shape::Fixed { stages: 1, ranks: ranks.max(min_ranks), min_ranks: ranks.min(min_ranks) }
        };
        let policy = Policy { shape, replicas, context: None };
        let before = form(&present(&fleet, then), &policy, &Formation::default());
        let few = form(&present(&fleet, now), &policy, &before);
        let many = form(&present(&fleet, now | 1 << newcomer), &policy, &before);
        prop_assert!(many.groups.len() >= few.groups.len(), "{few:?}\n{many:?}");
        let width = |formation: &Formation| formation.groups.iter().flat_map(GroupFormation::workers).count();
        // Elsewhere a newcomer may move a group to a zone of its own.
        let alike = |worker: &Candidate| {
            worker.resources.zone == fleet[0].resources.zone && worker.report == fleet[0].report
        };
        if many.groups.len() == few.groups.len() && fleet.iter().all(alike) {
            prop_assert!(width(&many) >= width(&few), "{few:?}\n{many:?}");
        }
    }

    #[test]
    fn there_are_as_many_groups_of_equals_as_there_can_be(
        fleet in fleet(Just(2)), min_ranks in 1usize..5, replicas in 1usize..9,
    ) {
        let policy = Policy { replicas, ..fixed(4, min_ranks) };
        let formation = form(&fleet, &policy, &Formation::default());
        // Two units fit beside a context, so it takes two ranks.
        let mut zones: BTreeMap<_, usize> = BTreeMap::new();
        for worker in &fleet {
            *zones.entry((&worker.report.fingerprint, &worker.resources.zone)).or_default() += 1;
        }
        let most: usize = zones.into_values().map(|count| count / min_ranks.max(2)).sum();
        prop_assert_eq!(formation.groups.len(), most.min(replicas));
    }
}
