//! What a worker holds from one epoch to the next: weights that both have are not read again.

use cluster::Part;

use super::*;

/// A scene, and how many devices were opened.
async fn scene(load: FakeLoad) -> (Scene, Arc<AtomicUsize>) {
    let opened = load.opened.clone();
    (Scene::start(load).await, opened)
}

fn opened(counter: &AtomicUsize) -> usize {
    counter.load(Ordering::SeqCst)
}

#[tokio::test]
async fn the_next_share_reads_what_it_lacks() {
    let (mut scene, devices) = scene(FakeLoad::default()).await;
    let (mut wire, session) = scene.welcome().await;
    // Units that a share does not have are let go.
    let shares = [(0..2, 2), (0..3, 1), (1..4, 1), (1..4, 0), (3..4, 0), (0..4, 3)];
    for (counter, (units, read)) in (1..).zip(shares) {
        wire.assign_units(epoch(counter), units).await;
        assert_eq!(wire.loaded_units(epoch(counter)).await, read, "epoch {counter}");
        let _steps = scene.attached(&session, counter).await;
        // The next assignment ends an epoch too.
        if counter % 2 == 0 {
            wire.say(Down::Abandon(epoch(counter).into())).await;
        }
    }
    assert_eq!(opened(&devices), 1);
}

#[tokio::test]
async fn weights_outlive_steps_that_others_failed() {
    let lost = || {
        model::Error::Collective(comm::Error::Lost { rank: 1, source: std::io::ErrorKind::BrokenPipe.into() })
    };
    let (mut scene, devices) = scene(FakeLoad { broken: Some(lost), ..FakeLoad::default() }).await;
    let (mut wire, session) = scene.welcome().await;
    for counter in 1..4 {
        wire.assign_units(epoch(counter), 0..3).await;
        assert_eq!(wire.loaded_units(epoch(counter)).await, if counter == 1 { 3 } else { 0 });
        scene.attached(&session, counter).await.plan(counter, 0).await;
        let Up::Failed(failed) = wire.hear().await else { panic!("it did not fail") };
        assert_eq!(failed.at_member, Some(1));
    }
    assert_eq!(opened(&devices), 1);
}

#[tokio::test]
async fn weights_outlive_the_coordinator() {
    let (mut scene, devices) = scene(FakeLoad::default()).await;
    for (term, read) in [(1, 3), (2, 0), (3, 0)] {
        let (mut wire, _) = scene.welcome().await;
        let epoch = Epoch { term, counter: 1 };
        wire.assign_units(epoch, 1..4).await;
        assert_eq!(wire.loaded_units(epoch).await, read, "term {term}");
    }
    assert_eq!(opened(&devices), 1);
}

#[tokio::test]
async fn a_load_is_cut_short_and_goes_on_in_the_next_epoch() {
    let (mut scene, devices) = scene(FakeLoad { slow: Some(2), ..FakeLoad::default() }).await;
    let (mut wire, _) = scene.welcome().await;
    wire.assign_units(epoch(1), 0..4).await;
    wire.say(Down::Abandon(epoch(1).into())).await;
    wire.assign_units(epoch(2), 0..2).await;
    assert_eq!(wire.loaded_units(epoch(2)).await, 0);
    wire.assign_units(epoch(3), 1..4).await;
    wire.assign_units(epoch(4), 0..2).await;
    assert_eq!(wire.loaded_units(epoch(4)).await, 1);
    assert_eq!(opened(&devices), 1);
}

#[tokio::test]
async fn a_device_that_failed_is_opened_anew() {
    let device = || {
        model::Error::Kernel(kernels::Error::Device {
            what: "a step".into(),
            why: "it fell off the bus".into(),
        })
    };
    let (mut scene, devices) = scene(FakeLoad { broken: Some(device), ..FakeLoad::default() }).await;
    let (mut wire, session) = scene.welcome().await;
    for counter in 1..4 {
        wire.assign_units(epoch(counter), 0..3).await;
        assert_eq!(wire.loaded_units(epoch(counter)).await, 3, "all is read again");
        assert_eq!(opened(&devices) as u64, counter);
        scene.attached(&session, counter).await.plan(counter, 0).await;
        assert!(matches!(wire.hear().await, Up::Failed(_)));
    }
}

#[tokio::test]
async fn a_panic_takes_the_device_with_it_and_no_more() {
    let panics = || panic!("as the test wants");
    let (mut scene, devices) = scene(FakeLoad { broken: Some(panics), ..FakeLoad::default() }).await;
    let (mut wire, session) = scene.welcome().await;
    for counter in 1..3 {
        wire.assign_units(epoch(counter), 0..3).await;
        assert_eq!(wire.loaded_units(epoch(counter)).await, 3);
        assert_eq!(opened(&devices) as u64, counter);
        scene.attached(&session, counter).await.plan(counter, 0).await;
        let Up::Failed(failed) = wire.hear().await else { panic!("it did not fail") };
        assert_eq!(failed.reason, "the executor thread panicked");
    }
}

#[tokio::test]
async fn a_spare_holds_what_it_may_need() {
    let (mut scene, devices) = scene(FakeLoad { slow: Some(7), ..FakeLoad::default() }).await;
    let (mut wire, session) = scene.welcome().await;
    let prepare = |units| Down::Prepare(Part { layers: 0..2, units }.into());
    wire.say(prepare(0..3)).await;
    assert_eq!(wire.beat(|progress| progress.held == 3 * UNIT_BYTES).await.activity, Activity::Idle);
    wire.assign_units(epoch(1), 2..4).await;
    assert_eq!(wire.loaded_units(epoch(1)).await, 1, "one of the two was there");
    let _steps = scene.attached(&session, 1).await;
    // Whoever has a part in a group holds that.
    wire.say(prepare(0..1)).await;
    wire.say(Down::Abandon(epoch(1).into())).await;
    // It comes to units 4 to 6, and no further; an assignment does not wait for it.
    wire.say(prepare(4..8)).await;
    wire.beat(|progress| progress.epoch.is_none() && progress.activity == Activity::Loading).await;
    wire.assign_units(epoch(2), 3..7).await;
    assert_eq!(wire.loaded_units(epoch(2)).await, 1, "only unit 3 was let go");
    assert_eq!(opened(&devices), 1);
    wire.say(Down::Prepare(Part { layers: 0..2, units: 0..0 }.into())).await;
}
