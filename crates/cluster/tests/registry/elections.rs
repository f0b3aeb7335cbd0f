//! Who leads, and until when.

use std::sync::Arc;
use std::time::Duration;

use cluster::registry::election::{Addresses, Candidate, Election, Leadership};
use cluster::registry::{LeaseId, Registry, Snapshot, Transaction};
use tokio::time::{sleep, timeout};

use crate::entries::put;
use crate::stage::{LIMIT, Stage, TTL, until};

pub(crate) fn addresses(number: usize) -> Addresses {
    Addresses { clients: format!("host{number}:1"), workers: format!("host{number}:2") }
}

pub(crate) fn candidate(registry: &Arc<dyn Registry>, number: usize) -> Candidate {
    Candidate::new(registry.clone(), addresses(number), TTL)
}

pub(crate) async fn elected(candidate: &Candidate) -> Leadership {
    timeout(LIMIT, candidate.elected()).await.expect("in time").expect("it answers")
}

/// Waits until a candidate is known to lead.
pub(crate) async fn led_by(election: &mut Election, number: usize) -> u64 {
    let led = async {
        loop {
            if let Some(leader) = election.leader()
                && leader.addresses == addresses(number)
            {
                return leader.term;
            }
            election.changed().await;
        }
    };
    timeout(LIMIT, led).await.expect("in time")
}

/// The lease of whoever leads.
async fn lease_of_leader(registry: &dyn Registry) -> LeaseId {
    let mut watch = registry.watch("election/leader").await.expect("it answers");
    let there = |snapshot: &Snapshot| !snapshot.entries.is_empty();
    until(&mut watch, there).await.entries["election/leader"].lease.expect("it has one")
}

pub(crate) async fn one_candidate_leads_at_a_time_and_terms_rise(stage: &impl Stage) {
    let registry = stage.registry("first").await;
    let mut election = Election::watch(registry.as_ref()).await.expect("it answers");
    assert_eq!(election.leader(), None);
    let (sender, mut winners) = tokio::sync::mpsc::channel(8);
    for number in 0..3 {
        let candidate = candidate(&stage.registry("first").await, number);
        let sender = sender.clone();
        tokio::spawn(async move {
            for _ in 0..2 {
                let leadership = elected(&candidate).await;
                sender.send((number, leadership)).await.expect("the test listens");
            }
        });
    }
    let mut terms = Vec::new();
    for _ in 0..6 {
        let (number, leadership) = timeout(LIMIT, winners.recv()).await.expect("in time").expect("six");
        assert_eq!(led_by(&mut election, number).await, leadership.term());
        terms.push(leadership.term());
        // Nobody else, until it resigns.
        assert!(timeout(Duration::from_millis(100), winners.recv()).await.is_err());
        let over = leadership.over().clone();
        assert!(!over.is_cancelled());
        leadership.resign().await;
        assert!(over.is_cancelled());
    }
    assert!(terms.is_sorted_by(|a, b| a < b), "{terms:?}");
    // Another cluster elects by itself.
    let other = elected(&candidate(&stage.registry("second").await, 9)).await;
    assert!(!other.over().is_cancelled());
}

pub(crate) async fn a_lost_lease_ends_no_term(stage: &impl Stage) {
    let registry = stage.registry("first").await;
    let leadership = elected(&candidate(&registry, 1)).await;
    let standby = candidate(&stage.registry("first").await, 2);
    let waiting = tokio::spawn(async move { elected(&standby).await });
    for _ in 0..3 {
        let lease = lease_of_leader(registry.as_ref()).await;
        stage.expire(lease).await;
        let mut watch = registry.watch("election/leader").await.expect("it answers");
        let again = |snapshot: &Snapshot| {
            snapshot.entries.values().any(|e| e.lease.is_some_and(|other| other != lease))
        };
        until(&mut watch, again).await;
        let mut election = Election::watch(registry.as_ref()).await.expect("it answers");
        assert_eq!(led_by(&mut election, 1).await, leadership.term());
    }
    // An entry that somebody deletes is the same.
    let delete = Transaction::default().delete("election/leader");
    registry.transact(delete).await.expect("it answers");
    lease_of_leader(registry.as_ref()).await;
    assert!(!leadership.over().is_cancelled() && !waiting.is_finished());
    let term = leadership.term();
    leadership.resign().await;
    assert!(timeout(LIMIT, waiting).await.expect("in time").expect("no panic").term() > term);
}

pub(crate) async fn a_leader_that_was_superseded_stops(stage: &impl Stage) {
    let registry = stage.registry("first").await;
    let first = elected(&candidate(&registry, 1)).await;
    // Another was elected while this one did not look: as the registry tells it, there is a higher term.
    let term = first.term() + 1;
    let lease = registry.lease(TTL).await.expect("it answers");
    let other = format!(
        "{{\"term\": {term}, \"candidate\": \"x\", \"clients\": \"host2:1\", \"workers\": \"host2:2\"}}"
    );
    let record = format!("{{\"term\": {term}, \"resigned\": false}}");
    let elect = Transaction::default().put("election/leader", other.into(), Some(lease.id())).put(
        "election/term",
        record.into(),
        None,
    );
    registry.transact(elect).await.expect("it answers");
    timeout(LIMIT, first.over().cancelled()).await.expect("it is told");
    // It does not take the place again, not even when the other is gone.
    let mut election = Election::watch(registry.as_ref()).await.expect("it answers");
    assert_eq!(led_by(&mut election, 2).await, term);
    lease.end().await;
    sleep(Duration::from_millis(500)).await;
    assert_eq!(election.leader(), None);
    assert!(elected(&candidate(&registry, 3)).await.term() > term);
}

pub(crate) async fn rubbish_elects_nobody_and_stops_no_election(stage: &impl Stage) {
    let leader = |term: u64| {
        format!("{{\"term\": {term}, \"candidate\": \"x\", \"clients\": \"a:1\", \"workers\": \"a:2\"}}")
    };
    let cases = [
        ("not JSON".to_owned(), "nor this".to_owned()),
        // Nobody holds it, so nobody would ever end it.
        (leader(5), "{\"term\": 5, \"resigned\": false}".into()),
        (leader(u64::MAX), format!("{{\"term\": {}, \"resigned\": true}}", u64::MAX)),
        (leader(0), "{\"term\": -1, \"resigned\": true}".into()),
    ];
    for (number, (leader, term)) in cases.into_iter().enumerate() {
        let registry = stage.registry(&format!("cluster{number}")).await;
        put(registry.as_ref(), "election/leader", &leader).await;
        put(registry.as_ref(), "election/term", &term).await;
        put(registry.as_ref(), "election/other", "of no interest").await;
        let mut election = Election::watch(registry.as_ref()).await.expect("it answers");
        assert_eq!(election.leader(), None, "{leader}");
        let leadership = elected(&candidate(&registry, number)).await;
        assert_eq!(led_by(&mut election, number).await, leadership.term());
        assert!(leadership.term() > 5 && leadership.term() < u64::MAX / 2);
    }
}
