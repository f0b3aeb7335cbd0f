//! Workers that break: on purpose, and whose thread does not come back.

use super::*;
use crate::fault::{Faults, FaultyLoad};

/// A worker that was asked for a fault.
async fn faulty(fault: &str) -> Scene {
    let faults = Faults::new(&[fault.parse().expect("a fault")]).expect("faults");
    Scene::start(FaultyLoad { load: FakeLoad::default(), faults }).await
}

#[tokio::test]
async fn steps_are_counted_over_all_epochs() {
    let mut scene = faulty("panic@3").await;
    let (mut wire, session) = scene.welcome().await;
    for (counter, count) in [(1, 2), (2, 0), (3, 0)] {
        wire.assign(counter).await;
        wire.ready(counter).await;
        let mut steps = scene.attached(&session, counter).await;
        for step in 0..count {
            steps.plan(counter, step).await;
            steps.output(counter, step).await;
        }
        if counter == 2 {
            steps.plan(counter, 0).await;
            let Up::Failed(failed) = wire.hear().await else { panic!("it did not fail") };
            assert_eq!(failed.reason, "the executor thread panicked");
        }
        if counter == 3 {
            // It happens once.
            steps.plan(counter, 0).await;
            steps.output(counter, 0).await;
        }
        wire.say(Down::Abandon(epoch(counter).into())).await;
    }
}

#[tokio::test]
async fn a_worker_ends_whose_thread_hangs_in_a_step() {
    let mut scene = faulty("hang@1").await;
    let (mut wire, session) = scene.welcome().await;
    wire.assign(1).await;
    wire.ready(1).await;
    scene.attached(&session, 1).await.plan(1, 0).await;
    wire.beat(|progress| progress.activity == Activity::Computing).await;
    wire.say(Down::Abandon(epoch(1).into())).await;
    assert!(matches!(scene.end().await, WorkerError::Hung { .. }));
}

#[tokio::test]
async fn a_worker_ends_whose_thread_hangs_in_loading_when_its_coordinator_is_gone() {
    let mut scene = faulty("hang@load").await;
    let (mut wire, _) = scene.welcome().await;
    wire.assign(1).await;
    wire.beat(|progress| progress.activity == Activity::Loading).await;
    drop(wire);
    assert!(matches!(scene.end().await, WorkerError::Hung { .. }));
}

#[tokio::test]
async fn connections_stay_until_the_coordinator_has_heard_of_a_failure() {
    let wrong = || model::Error::Collective(comm::Error::Protocol { rank: 1, what: "noise".into() });
    let load = FakeLoad { broken: Some(wrong), ..FakeLoad::default() };
    let alive = load.alive.clone();
    let mut scene = Scene::start(load).await;
    let (mut wire, session) = scene.welcome().await;
    wire.assign_units(epoch(1), 0..2).await;
    assert!(matches!(wire.hear().await, Up::Ready(_)));
    let steps = scene.attached(&session, 1).await;
    steps.plan(1, 0).await;
    let Up::Failed(failed) = wire.hear().await else { panic!("it did not fail") };
    assert_eq!(failed.at_member, Some(1));
    for _ in 0..5 {
        assert_eq!(wire.beat(|_| true).await.epoch, Some(epoch(1)));
        assert_eq!(alive.load(Ordering::SeqCst), 1);
    }
    wire.say(Down::Abandon(epoch(1).into())).await;
    wire.beat(|progress| progress.epoch.is_none()).await;
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}
