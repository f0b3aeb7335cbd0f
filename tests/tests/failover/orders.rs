//! Operators' orders hold under whoever leads.

use client::{Client, ClusterStatus};
use phalanx_tests::etcd::Etcd;
use phalanx_tests::link::Place;
use phalanx_tests::members::{operate, rank_count, start_coordinator, start_worker};
use phalanx_tests::process::Signal;
use phalanx_tests::streams::Streams;

use super::{PHALANX, STREAMS, TOKENS, answered, turn};

async fn status(clients: &str) -> ClusterStatus {
    Client::connect(clients).await.expect("it listens").status().await.expect("it leads")
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_hold_when_another_coordinator_takes_over() {
    let _turn = turn().await;
    let Some(etcd) = Etcd::start() else { return };
    let coordinator = || {
        let args = ["--ranks", "3", "--grpc", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--lease", "2"];
        start_coordinator(PHALANX, &[&args[..], &["--etcd", &etcd.url]].concat())
    };
    let (mut first, join, first_address) = coordinator();
    first.line(|line| line.starts_with("waiting for workers").then_some(()));
    let (mut second, other_join, second_address) = coordinator();
    let workers = [2, 3, 4].map(|last| {
        let place = Place { host: format!("127.0.0.{last}"), ..Place::default() };
        start_worker(PHALANX, &["--etcd", &etcd.url], &place)
    });
    first.line(|line| line.starts_with("serving yi-nano on 3 ranks").then_some(()));
    let servers = format!("{first_address},{second_address}");
    let mut running = Streams::start(&servers, STREAMS, 0, TOKENS, client::PATIENCE).await;
    running.until(10).await;

    let ordered = |join: &str, order: &[&str]| operate(PHALANX, join, order).success();
    ordered(&join, &["scale", "--ranks", "2", "--min-ranks", "1"]);
    let drained = status(&first_address).await.groups[0].ranks[0].worker.clone().expect("a worker").address;
    let done = ordered(&join, &["drain", &drained]);
    assert!(!done.contains("take"), "it is put down: {done}");

    first.signal(Signal::KILL);
    first.end();
    second.line(|line| line.starts_with("serving yi-nano on 2 ranks").then_some(()));
    answered("the leader killed after orders", running).await;
    let after = status(&second_address).await;
    let spares: Vec<_> = after.spares.iter().map(|spare| (&spare.address, spare.drained)).collect();
    assert_eq!((rank_count(&after), spares), (2, vec![(&drained, true)]), "{after:?}");

    // The new leader can take the order back, and puts that down, too.
    ordered(&other_join, &["drain", &drained, "--undo"]);
    ordered(&other_join, &["scale", "--ranks", "3"]);
    second.line(|line| line.starts_with("serving yi-nano on 3 ranks").then_some(()));
    for part in workers.into_iter().chain([second]) {
        part.signal(Signal::TERM);
        part.end().success();
    }
}
