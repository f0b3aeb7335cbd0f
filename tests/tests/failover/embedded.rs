//! The workers of `phalanx serve` that hang: they are killed, and started again.

use std::time::{Duration, Instant};

use client::Client;
use phalanx_tests::members::rank_count;
use phalanx_tests::process::{LIMIT, Phalanx, Signal};
use phalanx_tests::streams::Streams;

use super::{AT_ONCE, PHALANX, STREAMS, TOKENS, check, turn};

/// Starts `serve` with two workers, has answers run, `happen` something, and waits until both work again.
async fn disturbed(name: &str, arguments: &[&str], happen: impl FnOnce(&Phalanx)) {
    let _turn = turn().await;
    let serve = ["serve", "--grpc", "127.0.0.1:0", "--workers", "2", "--progress-timeout", "2"];
    let mut server = PHALANX.command([&serve, arguments].concat()).start();
    let address = server.served_at();
    let before: Vec<_> = server.workers().iter().map(|worker| worker.pid()).collect();
    let mut running = Streams::start(&address, STREAMS, 0, TOKENS, AT_ONCE).await;
    running.until(20).await;
    let lost = Instant::now();
    happen(&server);
    let client = Client::connect(&address).await.expect("a server");
    let both_again = async || loop {
        let status = client.status().await.expect("a status");
        if status.serving && !status.incidents.is_empty() && rank_count(&status) == 2 {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let status = async || tokio::time::timeout(LIMIT, both_again()).await.expect("it is started again");
    check(name, running, lost, status).await;
    let after: Vec<_> = server.workers().iter().map(|worker| worker.pid()).collect();
    assert_eq!((after.len(), after.iter().filter(|pid| before.contains(pid)).count()), (2, 1), "{name}");
    server.signal(Signal::TERM);
    let ended = tokio::task::spawn_blocking(|| server.end()).await.expect("no panic");
    assert!(ended.status.success() && ended.left.is_empty(), "{ended:?}");
    assert!(ended.stderr.contains("was given up by the coordinator, is killed"), "{}", ended.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_serve_that_was_stopped_is_killed() {
    disturbed("a worker of serve stopped", &[], |server| server.workers()[0].signal(Signal::STOP)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_serve_that_hangs_is_killed() {
    disturbed("a worker of serve hangs", &["--fault", "1:hang@40"], |_| {}).await;
}

#[test]
fn faults_that_are_none_are_told_what_is() {
    PHALANX
        .run(["serve", "--workers", "1", "--fault", "1:kill@1"])
        .failure(&["--fault 1:kill@1", "workers are 0 to 0"]);
    let ended = PHALANX.run(["worker", "--coordinator", "127.0.0.1:1", "--fault", "burn@1"]);
    assert!(
        !ended.status.success() && ended.stderr.contains("kill@STEP, hang@STEP[:SECONDS]"),
        "{}",
        ended.stderr
    );
}
