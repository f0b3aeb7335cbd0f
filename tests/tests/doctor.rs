//! `phalanx doctor` in front of whole clusters of real processes: it names who is at fault, and nobody else.
//!
//! Machines that run tests are busy, and their disks may be slow: of that it may complain, and what it says of it is not looked at.

use phalanx_tests::link::{Link, Place};
use phalanx_tests::members::{FIRST, Members};
use phalanx_tests::process::{Program, Signal};
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard};

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
/// More workers than come: no group is formed, and links are measured in full.
const WAITING: [&str; 4] = ["--ranks", "4", "--stages", "2"];

/// One test after the other, since they measure.
async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

async fn joined(members: &Members, workers: usize) {
    members.until("workers", |status| status.spares.len() == workers).await;
}

/// What it says as JSON. Its exit code tells whether there are complaints.
fn examine(members: &Members, args: &[&str]) -> Value {
    let ended = members.operate(&[&["doctor", "--json"], args].concat());
    let report: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
    let complaints = list(&report, "complaints").len();
    assert_eq!(ended.status.success(), complaints == 0, "{ended:?}");
    assert_eq!(ended.stderr.contains("complaint"), complaints > 0, "{ended:?}");
    report
}

fn list<'a>(report: &'a Value, name: &str) -> &'a [Value] {
    report[name].as_array().map_or(&[], Vec::as_slice)
}

/// Complaints that are not about what a busy machine does.
fn complaints(report: &Value) -> Vec<(Vec<&str>, &str)> {
    let all = list(report, "complaints").iter().map(|complaint| {
        let workers = list(complaint, "workers").iter().filter_map(Value::as_str).collect();
        (workers, complaint["what"].as_str().expect("a text"))
    });
    let excused = ["latency", "reads its checkpoint"];
    all.filter(|(_, what)| !excused.iter().any(|excused| what.contains(excused))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_cluster_has_nothing_to_complain_of() {
    let _turn = turn().await;
    let members = Members::start(PHALANX, &WAITING, 4);
    joined(&members, 4).await;
    let report = examine(&members, &[]);
    assert_eq!(complaints(&report), [], "{report:#}");
    let (workers, links) = (list(&report, "workers"), list(&report, "links"));
    assert_eq!((workers.len(), links.len()), (4, 6), "{report:#}");
    for worker in workers {
        assert_eq!(worker["program"]["version"], env!("CARGO_PKG_VERSION"), "{report:#}");
        assert_eq!(worker["program"]["hash"], workers[0]["program"]["hash"], "{report:#}");
        assert_eq!(worker["interface"]["loopback"], true, "{report:#}");
    }
    let disks = workers.iter().filter(|worker| worker["disk"]["bytes_per_second"].as_u64() > Some(0));
    assert_eq!(disks.count(), 1, "they share a machine: {report:#}");
    for link in links {
        assert!(link["latency_ms"].as_f64() > Some(0.0), "{report:#}");
        let measured = |way: &str| link[way].as_u64().is_some_and(|bytes| bytes > 0);
        assert!(measured("bytes_per_second_there") && measured("bytes_per_second_back"), "{report:#}");
    }
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_behind_a_slow_link_is_named() {
    let _turn = turn().await;
    let far = 3;
    let here: Vec<usize> = [1].into_iter().chain(FIRST..FIRST + far).collect();
    let (link, network) = Link::make(&here, FIRST + far);
    let mut members = Members::start_in(PHALANX, &network, &WAITING, far);
    // The last one is probed for its bandwidth, and not the other way round: proxies are only in front of it.
    joined(&members, far).await;
    let (place, join) = link.place(members.host(far), &members.join);
    members.add_at(&join, &place);
    joined(&members, 4).await;
    link.slow(20);
    let report = examine(&members, &[]);
    let complaints = complaints(&report);
    let [(workers, what)] = &complaints[..] else { panic!("{}: {report:#}", link.kind()) };
    assert!(workers.len() == 1 && workers[0].starts_with(&format!("{}:", members.host(far))), "{report:#}");
    assert!(what.starts_with("the bandwidth of its links with"), "{report:#}");
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_others_cannot_reach_is_named() {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &WAITING, 3);
    // It tells others an address at which nobody is.
    let listen = Some(members.host(3));
    let lost = Place { host: "127.0.0.250".into(), listen, ..Place::default() };
    let join = members.join.clone();
    members.add_at(&join, &lost);
    joined(&members, 4).await;
    let report = examine(&members, &[]);
    let complaints = complaints(&report);
    let [(workers, what)] = &complaints[..] else { panic!("{report:#}") };
    assert!(workers[..].iter().all(|worker| worker.starts_with("127.0.0.250:")), "{report:#}");
    assert!(what.starts_with("no connection with") && what.contains("refused"), "{report:#}");
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_does_not_answer_is_named() {
    let _turn = turn().await;
    let members = Members::start(PHALANX, &WAITING, 3);
    joined(&members, 3).await;
    members.signal(1, Signal::STOP);
    let report = examine(&members, &[]);
    let host = format!("{}:", members.host(1));
    assert!(
        complaints(&report).iter().any(|(workers, _)| workers.iter().any(|worker| worker.starts_with(&host))),
        "{report:#}"
    );
    members.signal(1, Signal::CONT);
    joined(&members, 3).await;
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_works_is_not_disturbed_unasked() {
    let _turn = turn().await;
    let members = Members::start(PHALANX, &["--ranks", "2"], 2);
    members.width(2).await;
    let carried = |report: &Value| !list(report, "links")[0]["bytes_per_second_there"].is_null();
    let report = examine(&members, &[]);
    assert!(!carried(&report), "{report:#}");
    assert!(list(&report, "remarks")[0].as_str().is_some_and(|r| r.contains("--bandwidth")), "{report:#}");
    assert!(carried(&examine(&members, &["--bandwidth"])));
    // It still serves, by the same epoch, and people can read of it.
    let status = members.status().await;
    assert!(status.serving && status.incidents.is_empty(), "{status:?}");
    let text = members.operate(&["doctor"]).stdout;
    println!("{text}");
    for part in ["2 workers\n", "machine", "MTU", "latency", "complaints\n"] {
        assert!(text.contains(part), "no '{part}' in:\n{text}");
    }
    members.end();
}
