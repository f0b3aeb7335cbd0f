//! A thousand workers over the wire, in another process, and one coordinator: they join, fail, leave and come back, and what that takes
//! is printed. PHALANX_THOUSAND_WORKERS: another number of them.

mod crowd;
mod figures;
#[allow(dead_code, reason = "each test binary uses a part")]
#[path = "../simulation/journal.rs"]
mod journal;
#[allow(dead_code, reason = "each test binary uses a part")]
#[path = "../simulation/worker/mod.rs"]
mod worker;

use std::io::Write;
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use cluster::proto::{ClusterStatus, GroupStatus};
use cluster::{Policy, Shape};
use coordinator::{Coordinator, CoordinatorConfig, CoordinatorHandle, Engine, EngineError, EngineEvent};
use crowd::{CONTEXT, RANKS, secret};
use engine::{Request, SamplingParams};
use figures::{cpu_seconds, resident_megabytes, spread, tell};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use worker::model::answer;

const ADDRESS: &str = "PHALANX_THOUSAND_COORDINATOR";
const WORKERS: &str = "PHALANX_THOUSAND_WORKERS";
/// Members of groups that are lost one after the other.
const LOSSES: usize = 10;
/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

fn workers() -> usize {
    std::env::var(WORKERS).map_or(1000, |workers| workers.parse().expect("a number"))
}

/// Not a test: what the process of the workers runs.
#[test]
#[ignore = "started by the other test"]
fn the_process_of_the_workers() {
    if let Ok(coordinator) = std::env::var(ADDRESS) {
        crowd::serve(&coordinator, workers());
    }
}

struct Crowd {
    process: Child,
    told: ChildStdin,
}

impl Crowd {
    fn start(coordinator: SocketAddr) -> Self {
        let mut process = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "the_process_of_the_workers", "--ignored"])
            .env(ADDRESS, coordinator.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("this test, once more");
        let told = process.stdin.take().expect("a pipe");
        Self { process, told }
    }

    fn tell(&mut self, what: &str, workers: std::ops::Range<usize>) {
        writeln!(self.told, "{what} {} {}", workers.start, workers.end).expect("it listens");
    }

    fn end(mut self) {
        drop(self.told);
        self.process.wait().expect("it ends");
    }
}

/// A coordinator that listens for workers.
async fn coordinator(workers: usize) -> (CoordinatorHandle, SocketAddr) {
    let shape = Shape::Fixed { stages: 1, ranks: RANKS, min_ranks: 2 };
    // As many groups as there are full machines, but for a few that stay behind as spares.
    let policy = Policy { shape, replicas: (workers * 24 / 25 / RANKS).max(1), context: None };
    let config = CoordinatorConfig { policy, ..CoordinatorConfig::new(1, secret()) };
    let (handle, service) = Coordinator::start(config, 1, CancellationToken::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let server = Server::builder().add_service(service.into_server());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (handle, address)
}

/// Waits until the cluster is as it is wanted; returns how long that took.
async fn until(handle: &CoordinatorHandle, wanted: impl Fn(&ClusterStatus) -> bool) -> Duration {
    let begun = Instant::now();
    let reached = async {
        while !wanted(&handle.status().await.expect("it runs")) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, reached).await.expect("it is reached");
    begun.elapsed()
}

fn ranks(status: &ClusterStatus) -> usize {
    status.groups.iter().map(|group| group.ranks.len()).sum()
}

fn joined(status: &ClusterStatus) -> usize {
    ranks(status) + status.spares.len()
}

/// The worker of a group's first rank.
fn first_member(group: &GroupStatus) -> usize {
    let worker = group.ranks[0].worker.as_ref().expect("it is there");
    worker.address.trim_start_matches("worker").parse().expect("its number")
}

fn has(group: &GroupStatus, member: usize) -> bool {
    let address = format!("worker{member}");
    group.ranks.iter().filter_map(|rank| rank.worker.as_ref()).any(|worker| worker.address == address)
}

fn request(number: u32, max_tokens: u32) -> Request {
    Request {
        prompt: vec![number % 500, 2, 3],
        max_tokens,
        sampling: SamplingParams::GREEDY,
        stop_ids: vec![],
        resume: None,
    }
}

async fn answers_are_whole(handle: &CoordinatorHandle) {
    let mut submissions = Vec::new();
    for number in 0..50 {
        let request = request(number, 20);
        let submission = handle.submit(request.clone()).await.expect("it is taken");
        submissions.push((answer(&request, CONTEXT, &[], &submission.fingerprint), submission));
    }
    for (expected, mut submission) in submissions {
        let mut tokens = Vec::new();
        while let Some(event) = submission.events.recv().await {
            match event {
                EngineEvent::Token { id, .. } => tokens.push(id),
                EngineEvent::Finished { .. } | EngineEvent::Moved { .. } => {}
                EngineEvent::Failed(error) => panic!("{error}"),
            }
        }
        assert_eq!(tokens, expected);
    }
}

/// From a command to its answer, as often as that: the leader refuses a request without tokens at once.
async fn command_latencies(handle: &CoordinatorHandle) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        let refused = handle.submit(request(0, 0)).await.expect_err("it asks for nothing");
        assert!(matches!(refused, EngineError::Invalid(_)));
        times.push(begun.elapsed());
        sleep(Duration::from_millis(2)).await;
    }
    times
}

/// Has members of groups go, one after the other; returns how long their groups did not serve.
async fn lose_members(handle: &CoordinatorHandle, crowd: &mut Crowd, workers: usize) -> Vec<Duration> {
    let mut times = Vec::new();
    for loss in 0..LOSSES {
        let status = handle.status().await.expect("it runs");
        let group = &status.groups[loss % status.groups.len()];
        let (member, number) = (first_member(group), group.number);
        crowd.tell("leave", member..member + 1);
        let stands_again = |status: &ClusterStatus| {
            let group = status.groups.iter().find(|group| group.number == number);
            status.serving && group.is_some_and(|group| !has(group, member))
        };
        times.push(until(handle, stands_again).await);
        crowd.tell("start", member..member + 1);
        until(handle, |status| joined(status) == workers).await;
    }
    times
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_workers_join_fail_leave_and_come_back() {
    crowd::take_descriptors();
    let workers = workers();
    let (handle, address) = coordinator(workers).await;
    let mut crowd = Crowd::start(address);

    crowd.tell("start", 0..workers);
    let took = until(&handle, |status| joined(status) == workers && status.serving).await;
    tell(&format!(
        "{workers} workers joined, and a group serves, after {took:.1?}; CPU {:.2} s",
        cpu_seconds()
    ));
    answers_are_whole(&handle).await;

    let (begun, before) = (Instant::now(), cpu_seconds());
    let latencies = command_latencies(&handle).await;
    let status = handle.status().await.expect("it runs");
    let ages =
        status.spares.iter().map(|spare| Duration::from_millis(spare.heartbeat_millis.into())).collect();
    let busy = (cpu_seconds() - before) / begun.elapsed().as_secs_f64();
    tell(&format!("{} heartbeats a second: the last ones {} ago", workers * 4, spread(ages)));
    tell(&format!("beside them a command takes {}; CPU {:.0}%", spread(latencies), busy * 100.0));

    let times = lose_members(&handle, &mut crowd, workers).await;
    tell(&format!("a group that lost a member serves again after {}", spread(times)));

    // Some fall silent and others leave; with the first ones, maybe, members of a group.
    let part = workers / 20;
    crowd.tell("freeze", 0..part);
    crowd.tell("leave", part..2 * part);
    let took = until(&handle, |status| joined(status) == workers - 2 * part && status.serving).await;
    tell(&format!("{part} fell silent and {part} left: known, and serving, after {took:.1?}"));
    answers_are_whole(&handle).await;
    crowd.tell("start", 0..2 * part);
    let took = until(&handle, |status| joined(status) == workers && status.serving).await;
    tell(&format!("{} joined again after {took:.1?}", 2 * part));
    answers_are_whole(&handle).await;

    let status = handle.status().await.expect("it runs");
    let groups = status.groups.len();
    assert_eq!(status.spares.len(), workers - ranks(&status));
    assert!(groups > 0 && status.groups.iter().all(|group| group.ranks.len() <= RANKS));
    tell(&format!(
        "{groups} groups, {} spares; the coordinator took {:.2} s of CPU and has {:.0} MB",
        status.spares.len(),
        cpu_seconds(),
        resident_megabytes()
    ));
    crowd.end();
}
