//! Operators' orders hold under whoever leads.

use client::{Client, ClusterStatus};
use phalanx_tests::etcd::Etcd;
use phalanx_tests::members::{operate, rank_count};
use phalanx_tests::process::Signal;
use phalanx_tests::streams::Streams;

use super::{PHALANX, Pair, STREAMS, TOKENS, answered, turn};

async fn status(clients: &str) -> ClusterStatus {
    Client::connect(clients).await.expect("it listens").status().await.expect("it leads")
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_hold_when_another_coordinator_takes_over() {
    let _turn = turn().await;
    let Some(etcd) = Etcd::start() else { return };
    let Pair { leader, mut other, joins, clients, workers } = Pair::start(&etcd, 3);
    let mut running = Streams::start(&clients.join(","), STREAMS, 0, TOKENS, client::PATIENCE).await;
    running.until(10).await;

    let ordered = |join: &str, order: &[&str]| operate(PHALANX, join, order).success();
    ordered(&joins[0], &["scale", "--ranks", "2", "--min-ranks", "1"]);
    let drained = status(&clients[0]).await.groups[0].ranks[0].worker.clone().expect("a worker").address;
    let done = ordered(&joins[0], &["drain", &drained]);
    assert!(!done.contains("takes over"), "it is put down: {done}");

    leader.signal(Signal::KILL);
    leader.end();
    other.line(|line| line.starts_with("serving yi-nano on 2 ranks").then_some(()));
    answered("the leader killed after orders", running).await;
    let after = status(&clients[1]).await;
    let spares: Vec<_> = after.spares.iter().map(|spare| (&spare.address, spare.drained)).collect();
    assert_eq!((rank_count(&after), spares), (2, vec![(&drained, true)]), "{after:?}");

    // The new leader can take the order back, and puts that down, too.
    ordered(&joins[1], &["drain", &drained, "--undo"]);
    ordered(&joins[1], &["scale", "--ranks", "3"]);
    other.line(|line| line.starts_with("serving yi-nano on 3 ranks").then_some(()));
    for part in workers.into_iter().chain([other]) {
        part.signal(Signal::TERM);
        part.end().success();
    }
}
