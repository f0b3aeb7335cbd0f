//! What is lost while answers run costs no answer and no token: workers, links, several at once; and changes that were planned.
//!
//! Whole clusters of real processes on the CPU. Each test compares all tokens and their probabilities with those of a cluster that
//! nothing happened to, and prints how long it took to notice, to form, to load, and to see the next token.

mod embedded;
mod faults;
mod groups;
mod orders;
mod pipelines;

use std::io::Write;
use std::time::{Duration, Instant};

use client::{Client, ClusterStatus, Incident};
use phalanx_tests::etcd::Etcd;
use phalanx_tests::link::{Link, Place};
use phalanx_tests::members::{FIRST, Members, rank_count, ranks, start_coordinator, start_worker};
use phalanx_tests::process::{LIMIT, Phalanx, Program, Signal};
use phalanx_tests::streams::{Answer, Ended, Load, Streams};
use tokio::sync::{Mutex, MutexGuard, OnceCell};

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
const STREAMS: u32 = 16;
const TOKENS: u32 = 120;
/// Answers that are lost with a worker would end with an error: nothing is asked for again.
const AT_ONCE: Duration = Duration::ZERO;

/// One test after the other, since they tell how long things take.
async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

/// Two coordinators, of which the first leads with a lease of 2 s, and workers that are all its ranks.
struct Pair {
    leader: Phalanx,
    other: Phalanx,
    /// Where workers and operators reach them.
    joins: [String; 2],
    /// Where clients do.
    clients: [String; 2],
    workers: Vec<Phalanx>,
}

impl Pair {
    fn start(etcd: &Etcd, ranks: usize) -> Self {
        let coordinator = || {
            let ranks = ranks.to_string();
            let args =
                ["--ranks", &ranks, "--grpc", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--lease", "2"];
            start_coordinator(PHALANX, &[&args[..], &["--etcd", &etcd.url]].concat())
        };
        let (mut leader, join, clients) = coordinator();
        leader.line(|line| line.starts_with("waiting for workers").then_some(()));
        let (other, other_join, other_clients) = coordinator();
        let worker = |number: usize| {
            let place = Place { host: format!("127.0.0.{}", 2 + number), ..Place::default() };
            start_worker(PHALANX, &["--etcd", &etcd.url], &place)
        };
        let workers = (0..ranks).map(worker).collect();
        let serving = format!("serving yi-nano on {ranks} ranks");
        leader.line(|line| line.starts_with(&serving).then_some(()));
        Self { leader, other, joins: [join, other_join], clients: [clients, other_clients], workers }
    }
}

/// What clients get if nothing happens.
async fn undisturbed() -> &'static [Answer] {
    static ANSWERS: OnceCell<Vec<Answer>> = OnceCell::const_new();
    let answers = ANSWERS.get_or_init(|| async {
        let mut server = PHALANX.command(["serve", "--grpc", "127.0.0.1:0", "--workers", "1"]).start();
        let address = server.served_at();
        Streams::start(&address, STREAMS, 0, TOKENS, AT_ONCE).await.end().await.answers
    });
    answers.await
}

async fn streams(members: &Members) -> Streams {
    Streams::start(&members.clients, STREAMS, 0, TOKENS, AT_ONCE).await
}

/// Waits for answers, which are what they would have been anyway.
async fn answered(name: &str, streams: Streams) -> Ended {
    let ended = streams.end().await;
    ended.check(name, undisturbed().await);
    ended
}

/// Checks the answers, and prints what happened.
async fn check(name: &str, streams: Streams, lost: Instant, status: impl AsyncFnOnce() -> ClusterStatus) {
    let pause = answered(name, streams).await.pause_after(lost);
    let status = status().await;
    // The last one in which somebody was lost: by now whoever came back may have a part again.
    let lost = |incident: &&Incident| incident.losses.iter().any(|loss| loss.worker.is_some());
    let incidents = &status.incidents;
    let incident = incidents.iter().find(lost).or(incidents.first()).expect("an incident");
    report(name, incident, Some(pause));
}

fn report(name: &str, incident: &Incident, pause: Option<Duration>) {
    let seconds = |micros: Option<u64>| micros.map_or("-".into(), |m| format!("{:.3} s", m as f64 / 1e6));
    say(&format!(
        "{name}: ranks {} -> {}, detected after {}, formed {}, loaded {} ({:.1} MB), recomputed {}{}",
        incident.ranks_before,
        incident.ranks_after,
        seconds(Some(incident.detect_micros)),
        seconds(incident.form_micros),
        seconds(incident.load_micros),
        incident.loaded_bytes as f64 / 1e6,
        seconds(incident.recompute_micros),
        pause
            .map_or(String::new(), |pause| format!("; clients saw nothing for {:.3} s", pause.as_secs_f64())),
    ));
}

/// On the standard error itself: a test that passes may say something too.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_rank_in_turn_is_killed() {
    let _turn = turn().await;
    for rank in 0..3 {
        let mut members = Members::start(PHALANX, &["--ranks", "3", "--min-ranks", "1"], 3);
        members.width(3).await;
        let mut streams = streams(&members).await;
        streams.until(20).await;
        let lost = Instant::now();
        members.kill(members.ranks().await[rank]);
        check(&format!("rank {rank} of 3 killed"), streams, lost, async || members.width(2).await).await;
        members.end();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_takes_the_place_of_a_rank() {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &["--ranks", "2"], 3);
    // It holds all that it may need.
    let status = members.until("a spare that is prepared", prepared).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    let lost = Instant::now();
    members.kill(ranks(&status)[0]);
    check("a rank killed, a spare there", running, lost, async || members.width(2).await).await;
    let incident = members.status().await.incidents.remove(0);
    // Tables of the embedding go with the ranks; half of its rows, in bf16, are all that is read.
    assert_eq!(incident.loaded_bytes, 4608 / 2 * 256 * 2, "{incident:?}");

    // The spare is lost: nothing else happens.
    let spare = members.add();
    let before = members.until("a spare that is prepared", prepared).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    members.kill(spare);
    answered("a spare killed", running).await;
    let after = members.until("no spare", |status| status.spares.is_empty()).await;
    assert_eq!(after.groups[0].counter, before.groups[0].counter, "the group was formed anew for a spare");
    members.end();
}

/// Whether there is one spare, which has loaded what it may need.
fn prepared(status: &ClusterStatus) -> bool {
    status.serving
        && matches!(&status.spares[..], [spare] if spare.held_bytes > 0 && spare.activity == "idle")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_stops_without_a_word() {
    let _turn = turn().await;
    let members = Members::start(PHALANX, &["--ranks", "3", "--min-ranks", "1"], 3);
    members.width(3).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    let stopped = members.ranks().await[1];
    let lost = Instant::now();
    members.signal(stopped, Signal::STOP);
    check("rank 1 of 3 stopped", running, lost, async || members.width(2).await).await;
    // It comes to itself, finds that it was given up, and joins again.
    members.signal(stopped, Signal::CONT);
    members.width(3).await;
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_of_a_rank_is_cut() {
    let _turn = turn().await;
    let far = 2;
    let here: Vec<usize> = [1].into_iter().chain([FIRST, FIRST + 1]).collect();
    let (link, network) = Link::make(&here, FIRST + far);
    let shape = ["--ranks", "3", "--min-ranks", "1"];
    let mut members = Members::start_in(PHALANX, &network, &shape, 2);
    let (place, join) = link.place(members.host(far), &members.join);
    members.add_at(&join, &place);
    members.width(3).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    let lost = Instant::now();
    link.cut();
    let name = format!("the link of a rank of 3 cut ({})", link.kind());
    check(&name, running, lost, async || members.width(2).await).await;
    members.kill(far);
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ranks_are_lost_at_once_and_one_while_the_group_forms() {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &["--ranks", "4", "--min-ranks", "1"], 4);
    members.width(4).await;
    let mut running = streams(&members).await;
    running.until(15).await;
    let ranks = members.ranks().await;
    let lost = Instant::now();
    members.kill(ranks[0]);
    members.kill(ranks[2]);
    check("two of 4 killed", running, lost, async || members.width(2).await).await;

    for number in [ranks[0], ranks[2]] {
        members.restart(number);
    }
    members.width(4).await;
    let mut running = streams(&members).await;
    running.until(15).await;
    let counter = members.status().await.groups[0].counter;
    let ranks = members.ranks().await;
    let lost = Instant::now();
    members.kill(ranks[3]);
    members
        .until("a group that forms", |status| {
            status.groups.first().is_some_and(|group| group.counter > counter)
        })
        .await;
    members.kill(ranks[1]);
    check("a second one killed while 3 form", running, lost, async || members.width(2).await).await;
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn widths_change_under_load() {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &["--ranks", "4", "--min-ranks", "1"], 4);
    members.width(4).await;
    let expected = undisturbed().await;
    // From width to width, answers run all the time: when those of one are over, others go on.
    let loads = [(); 2].map(|()| Load::start(members.clients.clone(), expected, TOKENS, AT_ONCE));
    for width in [3, 1, 2, 4] {
        let status = members.status().await;
        let (now, there) = (rank_count(&status), ranks(&status));
        for number in there.iter().take(now.saturating_sub(width)) {
            members.leave(*number);
        }
        let away: Vec<usize> = (0..4).filter(|number| !there.contains(number)).collect();
        for number in away.into_iter().take(width.saturating_sub(now)) {
            members.restart(number);
        }
        members.width(width).await;
        let over = |status: &ClusterStatus| {
            status.incidents.first().is_some_and(|incident| incident.recompute_micros.is_some())
        };
        let status = members.until("a token at the new width", over).await;
        report(&format!("from width {now} to {width}"), &status.incidents[0], None);
    }
    let [one, other] = loads;
    say(&format!("{} answers meanwhile, all right", one.end().await + other.end().await));
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_s_own_workers_are_started_again() {
    let _turn = turn().await;
    let mut server = PHALANX.command(["serve", "--grpc", "127.0.0.1:0", "--workers", "2"]).start();
    let address = server.served_at();
    let client = Client::connect(&address).await.expect("a server");
    let mut running = Streams::start(&address, STREAMS, 0, TOKENS, AT_ONCE).await;
    running.until(20).await;
    let before = server.workers();
    let lost = Instant::now();
    before[0].signal(Signal::KILL);
    let both_again = async || loop {
        let status = client.status().await.expect("a status");
        if status.serving && status.incidents.len() >= 2 && rank_count(&status) == 2 {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let status = async || tokio::time::timeout(LIMIT, both_again()).await.expect("it is started again");
    check("a worker of serve killed, and started again", running, lost, status).await;
    assert_eq!(server.workers().len(), 2);
    server.signal(Signal::TERM);
    let ended = tokio::task::spawn_blocking(|| server.end()).await.expect("no panic");
    assert!(ended.status.success() && ended.left.is_empty(), "{ended:?}");
    assert!(ended.stderr.contains("is started again"), "{}", ended.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leading_coordinator_is_killed() {
    let _turn = turn().await;
    let Some(etcd) = Etcd::start() else { return };
    let Pair { leader, mut other, clients, workers, .. } = Pair::start(&etcd, 2);
    let mut running = Streams::start(&clients.join(","), STREAMS, 0, TOKENS, client::PATIENCE).await;
    running.until(20).await;
    let lost = Instant::now();
    leader.signal(Signal::KILL);
    leader.end();
    other.line(|line| line.starts_with("serving yi-nano on 2 ranks").then_some(()));
    let pause = answered("the leader killed", running).await.pause_after(lost);
    say(&format!(
        "the leading coordinator killed, lease 2 s: clients saw nothing for {:.3} s",
        pause.as_secs_f64()
    ));
    for part in workers.into_iter().chain([other]) {
        part.signal(Signal::TERM);
        part.end().success();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_away_while_a_rank_is_lost() {
    /// Many times the lease.
    const AWAY: Duration = Duration::from_secs(30);
    let _turn = turn().await;
    let Some(etcd) = Etcd::start() else { return };
    let args = ["--ranks", "2", "--min-ranks", "1", "--lease", "2", "--etcd", &etcd.url];
    let mut members = Members::start(PHALANX, &args, 2);
    members.width(2).await;
    etcd.pause();
    let away = Instant::now();
    let mut running = streams(&members).await;
    running.until(20).await;
    let lost = Instant::now();
    members.kill(members.ranks().await[1]);
    check("etcd away, a rank killed", running, lost, async || members.width(1).await).await;
    let frozen =
        |status: &ClusterStatus| status.complaints.iter().any(|it| it.contains("elections are frozen"));
    members.until("word of etcd", frozen).await;
    // The lease is long over, and answers go on.
    while away.elapsed() < AWAY {
        answered("etcd away", streams(&members).await).await;
    }
    let added = members.add();
    members.width(2).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    let lost = Instant::now();
    members.kill(added);
    check("etcd away, a rank killed that had come meanwhile", running, lost, async || members.width(1).await)
        .await;
    etcd.resume();
    members.until("etcd back", |status| !frozen(status)).await;
    answered("etcd back", streams(&members).await).await;
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_restarted_one_by_one() {
    let _turn = turn().await;
    let Some(etcd) = Etcd::start() else { return };
    let coordinator = |grpc: &str, listen: &str| {
        let args = ["--ranks", "3", "--min-ranks", "1", "--grpc", grpc, "--listen", listen];
        start_coordinator(PHALANX, &[&args[..], &["--etcd", &etcd.url]].concat())
    };
    let serving = |coordinator: &mut Phalanx, ranks: usize| {
        let serving = format!("serving yi-nano on {ranks} ranks");
        coordinator.line(|line| (line == serving).then_some(()));
    };
    let worker = |last: usize| {
        let place = Place { host: format!("127.0.0.{last}"), ..Place::default() };
        start_worker(PHALANX, &["--etcd", &etcd.url], &place)
    };
    let stop = |part: Phalanx| {
        part.signal(Signal::TERM);
        part.end().success();
    };
    let (mut leader, leader_join, leader_address) = coordinator("127.0.0.1:0", "127.0.0.1:0");
    leader.line(|line| line.starts_with("waiting for workers").then_some(()));
    let (mut other, other_join, other_address) = coordinator("127.0.0.1:0", "127.0.0.1:0");
    let mut workers: Vec<_> = (2..5).map(worker).collect();
    serving(&mut leader, 3);

    let expected = undisturbed().await;
    let begun = Instant::now();
    let servers = format!("{leader_address},{other_address}");
    let load = Load::start(servers, expected, TOKENS, client::PATIENCE);
    for last in 2..5 {
        stop(workers.remove(0));
        serving(&mut leader, 2);
        workers.push(worker(last));
        serving(&mut leader, 3);
    }
    stop(leader);
    serving(&mut other, 3);
    let (mut leader, ..) = coordinator(&leader_address, &leader_join);
    leader.line(|line| line.starts_with("standing by").then_some(()));
    stop(other);
    serving(&mut leader, 3);
    let (mut other, ..) = coordinator(&other_address, &other_join);
    other.line(|line| line.starts_with("standing by").then_some(()));
    let answers = load.end().await;
    say(&format!(
        "3 workers and 2 coordinators restarted one by one in {:.1} s: {answers} answers, all right",
        begun.elapsed().as_secs_f64(),
    ));
    workers.into_iter().chain([other, leader]).for_each(stop);
}
