//! Tells when the coordinator has given up a worker whose process still runs: it hangs, or was stopped.

use std::time::{Duration, Instant};

use cluster::proto::ClusterStatus;
use coordinator::{Contender, Engine};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::ChildStdout;
use tokio::time::sleep;

/// How often the coordinator is asked.
const LOOK: Duration = Duration::from_secs(1);
/// Whoever is sent away and is well joins again sooner.
const ABSENCE: Duration = Duration::from_secs(5);

/// Ends when a worker that had joined is away for too long. It tells on its standard output where it listens.
pub(super) async fn given_up(coordinator: &Contender, output: &mut ChildStdout) {
    let mut address = String::new();
    if !matches!(BufReader::new(output).read_line(&mut address).await, Ok(1..)) {
        // Its process ends, which is noticed elsewhere.
        return std::future::pending().await;
    }
    let mut seen: Option<Instant> = None;
    loop {
        match coordinator.status().await {
            Ok(status) if has_joined(&status, address.trim_end()) => seen = Some(Instant::now()),
            Ok(_) if seen.is_some_and(|seen| seen.elapsed() >= ABSENCE) => return,
            _ => {}
        }
        sleep(LOOK).await;
    }
}

fn has_joined(status: &ClusterStatus, address: &str) -> bool {
    let ranks = status.groups.iter().flat_map(|group| &group.ranks).filter_map(|rank| rank.worker.as_ref());
    ranks.chain(&status.spares).any(|worker| worker.address == address)
}
