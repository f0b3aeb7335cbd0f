//! Coordinators that are lost, refuse, or are followed by others.

use super::*;

#[tokio::test]
async fn a_lost_coordinator_is_joined_again() {
    let mut scene = Scene::start(FakeLoad::default()).await;
    let (mut wire, session) = scene.welcome().await;
    wire.assign(1).await;
    wire.ready(1).await;
    let steps = scene.attached(&session, 1).await;
    drop((wire, steps));
    // A coordinator that starts anew may count from anywhere.
    let (mut wire, _) = scene.welcome().await;
    wire.assign(1).await;
    wire.ready(1).await;
}

#[tokio::test]
async fn a_coordinator_of_an_earlier_term_is_left() {
    let mut scene = Scene::start(FakeLoad::default()).await;
    let (mut wire, _) = scene.welcome().await;
    wire.assign_epoch(Epoch { term: 7, counter: 1 }).await;
    assert!(matches!(wire.hear().await, Up::Ready(_)));
    drop(wire);
    // The one that led before has not noticed.
    let (mut wire, _) = scene.welcome().await;
    wire.assign_epoch(Epoch { term: 6, counter: 9 }).await;
    let Up::Failed(failed) = wire.hear().await else { panic!("it takes the assignment") };
    assert!(failed.reason.contains("has served in term 7, and takes no earlier one (6)"), "{failed:?}");
    drop(wire);
    let (mut wire, _) = scene.welcome().await;
    wire.assign_epoch(Epoch { term: 8, counter: 1 }).await;
    assert!(matches!(wire.hear().await, Up::Ready(_)));
}

#[tokio::test]
async fn the_leader_of_the_registry_is_joined_and_left_for_a_later_one() {
    let registry = Arc::new(MemoryRegistry::new(&"test".parse::<ClusterName>().expect("a name")));
    let secret = Secret::random();
    let coordinators = Coordinators::Elected(registry.clone());
    let coordinator = Whereabouts::open(&coordinators).await.expect("it answers");
    let identity = Identity { coordinator, ..identity("unused:1", &secret).await };
    tokio::spawn(async move { serve(&identity, FakeLoad::default()).await });
    let lease = registry.lease(LEASE).await.expect("it answers");
    // Each stays where it is: only the registry tells that it leads no more.
    let mut coordinators = Vec::new();
    for term in 5..8 {
        let (address, mut scene) = Scene::without_worker(&secret).await;
        let leader = format!(
            "{{\"term\": {term}, \"candidate\": \"x\", \"clients\": \"nowhere:1\", \"workers\": \"{address}\"}}"
        );
        let elect = Transaction::default().put("election/leader", leader.into(), Some(lease.id()));
        registry.transact(elect).await.expect("it answers");
        let (mut wire, _) = scene.welcome().await;
        wire.assign_epoch(Epoch { term, counter: 1 }).await;
        assert!(matches!(wire.hear().await, Up::Ready(_)));
        coordinators.push((scene, wire));
    }
}

#[tokio::test]
async fn a_refusal_is_final() {
    let mut scene = Scene::start(FakeLoad::default()).await;
    let wire = scene.join().await;
    wire.down.send(Err(Status::failed_precondition("another model"))).await.expect("the worker listens");
    let error = scene.end().await;
    assert_eq!(error.to_string(), "the coordinator refused this worker: another model");
}

#[tokio::test]
async fn a_coordinator_without_the_secret_is_not_obeyed() {
    let mut scene = Scene::start(FakeLoad::default()).await;
    let _wire = scene.challenge(&Secret::random()).await;
    assert!(matches!(scene.end().await, WorkerError::Secret(_)));
}

#[tokio::test]
async fn nobody_there_is_said_in_time() {
    let closed =
        TcpListener::bind("127.0.0.1:0").await.expect("a free port").local_addr().expect("an address");
    let mut identity = identity(&closed.to_string(), &Secret::random()).await;
    identity.join_timeout = Duration::ZERO;
    let error = serve(&identity, FakeLoad::default()).await.expect_err("nobody is there").to_string();
    assert!(error.contains("Connection refused"), "{error}");
    identity.coordinator = "nowhere".into();
    let error = serve(&identity, FakeLoad::default()).await.expect_err("it is no address").to_string();
    assert_eq!(error, "'nowhere' is not an address such as localhost:7000");
}
