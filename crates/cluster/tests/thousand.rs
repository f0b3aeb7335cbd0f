//! A thousand workers that join, fail and come back: what stands keeps standing, and how long forming takes is printed.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use cluster::{Candidate, Formation, GroupFormation, ModelReport, Policy, Resources, Shape, WorkerId, form};
use engine::MemoryNeeds;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{RngExt, SeedableRng};

const MACHINES: u64 = 125;
const GPUS: u64 = 8;
/// A few machines stay behind as spares.
const REPLICAS: usize = 120;
const EVENTS: usize = 200;

/// About Yi-34B in bf16 on GPUs of 80 GB.
fn worker(id: u64) -> Candidate {
    let needs = MemoryNeeds {
        layers: 60,
        layer_unit: 139_000_000,
        embedding_unit: 115_000_000,
        head_unit: 115_000_000,
        activation_unit: 130_000_000,
        rank: 600_000_000,
        kv_token: 512,
    };
    let machine = format!("machine{}", id / GPUS);
    Candidate {
        id: WorkerId(id),
        address: format!("{machine}:{}", id % GPUS),
        host: machine.clone(),
        report: ModelReport {
            name: "yi-34b".into(),
            vocabulary: 64_000,
            max_context: 4096,
            units: 8,
            block_size: 64,
            eos: vec![2],
            fingerprint: "a".into(),
            needs,
        },
        resources: Resources {
            zone: machine,
            device: "cuda".into(),
            memory: 72_000_000_000,
            kv_memory: 72_000_000_000,
        },
    }
}

fn form_in(workers: &BTreeMap<u64, Candidate>, policy: &Policy, before: &Formation) -> (Formation, Duration) {
    let begun = Instant::now();
    let formation = form(workers.values(), policy, before);
    (formation, begun.elapsed())
}

fn stands(group: &GroupFormation, workers: &BTreeMap<u64, Candidate>) -> bool {
    group.workers().all(|worker| workers.contains_key(&worker.0))
}

#[test]
fn a_thousand_workers_join_fail_and_come_back() {
    let policy = Policy {
        shape: Shape::Fixed { stages: 1, ranks: GPUS as usize, min_ranks: 2 },
        replicas: REPLICAS,
        context: None,
    };
    let mut workers = BTreeMap::new();
    let mut formation = Formation::default();
    let mut joining = Vec::new();
    for id in 0..MACHINES * GPUS {
        workers.insert(id, worker(id));
        let (next, took) = form_in(&workers, &policy, &formation);
        joining.push(took);
        formation = next;
    }
    assert_eq!(formation.groups.len(), REPLICAS);
    assert!(formation.groups.iter().all(|group| group.workers().count() == GPUS as usize));

    let mut chance = StdRng::seed_from_u64(7);
    let mut failing = Vec::new();
    let mut gone: Vec<u64> = Vec::new();
    for _ in 0..EVENTS {
        if gone.len() > 20 || (!gone.is_empty() && chance.random_bool(0.4)) {
            let id = gone.swap_remove(chance.random_range(0..gone.len()));
            workers.insert(id, worker(id));
        } else {
            let lost = chance.random_range(1..4);
            for id in workers.keys().copied().sample(&mut chance, lost) {
                workers.remove(&id);
                gone.push(id);
            }
        }
        let (next, took) = form_in(&workers, &policy, &formation);
        failing.push(took);
        assert_eq!(next.groups.len(), REPLICAS, "{:?}", next.shortage);
        assert!(next.groups.iter().all(|group| stands(group, &workers)));
        // Who was not touched, and was as wide as is wanted, is as it was.
        let whole =
            |group: &&GroupFormation| stands(group, &workers) && group.workers().count() == GPUS as usize;
        for group in formation.groups.iter().filter(whole) {
            assert!(next.groups.contains(group), "group {} moved", group.number);
        }
        formation = next;
    }
    tell("joining, one after the other", joining);
    tell("failing and coming back", failing);
}

/// On the standard error itself: a test that passes may say something too.
fn tell(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let line = format!(
        "{} workers {what}: formed in {:?} (median), {:?} (longest)\n",
        MACHINES * GPUS,
        times[times.len() / 2],
        times[times.len() - 1],
    );
    let _ = std::io::stderr().write_all(line.as_bytes());
}
