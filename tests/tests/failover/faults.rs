//! Faults that a rank is asked for (`--fault`): each costs no answer, and whoever fell silent or hung is named.

use std::time::Instant;

use client::Incident;
use phalanx_tests::members::{FIRST, Members};
use phalanx_tests::process::Signal;

use super::{PHALANX, answered, check, report, streams, turn};

/// Ranks that hang are given up soon.
const SHAPE: [&str; 6] = ["--ranks", "3", "--min-ranks", "1", "--progress-timeout", "2"];

/// The workers that an incident names, in their order.
fn named(incident: &Incident) -> Vec<usize> {
    let number = |address: &str| {
        let (host, _) = address.rsplit_once(':')?;
        host.rsplit_once('.')?.1.parse::<usize>().ok()?.checked_sub(FIRST)
    };
    incident.losses.iter().filter_map(|loss| number(&loss.address)).collect()
}

/// What comes after a fault in the middle of the answers.
enum After {
    /// The process is gone.
    Gone,
    /// It has to be told to go on.
    Stopped,
    /// It ends by itself.
    Hung,
    /// It joins again.
    Back,
}

/// Has rank 2 of 3 break in a step between the prompts and the last tokens; `certain`: it is the one that is named.
async fn strikes(fault: &str, certain: bool, after: After) {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &SHAPE, 2);
    let faulty = members.add_faulty(fault);
    let counter = members.width(3).await.groups[0].counter;
    let running = streams(&members).await;
    let begun = Instant::now();
    let over = async || {
        let formed = |s: &client::ClusterStatus| s.serving && s.groups[0].counter > counter;
        members.until("another epoch", formed).await
    };
    check(fault, running, begun, over).await;
    let incidents = members.status().await.incidents;
    let first = incidents.last().expect("an incident");
    assert!(!certain || named(first).first() == Some(&faulty), "{fault}: {incidents:?}");
    match after {
        After::Gone => members.kill(faulty),
        After::Stopped => {
            members.signal(faulty, Signal::CONT);
            members.width(3).await;
        }
        After::Hung => members.fails(faulty, &["the executor thread hangs", "start this worker again"]),
        After::Back => drop(members.width(3).await),
    }
    answered("afterwards", streams(&members).await).await;
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_kills_itself() {
    strikes("kill@40", true, After::Gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_hangs_and_its_process_ends() {
    strikes("hang@40", true, After::Hung).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_hangs_for_a_while() {
    strikes("hang@40:8", true, After::Back).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_stops_itself() {
    strikes("stop@40", true, After::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_panics() {
    strikes("panic@40", true, After::Back).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_sends_a_damaged_message() {
    strikes("corrupt@40", true, After::Back).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_a_rank_is_lost() {
    strikes("drop@40", false, After::Back).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connections_of_a_rank_are_cut() {
    strikes("cut@40", false, After::Back).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_rank_is_waited_for() {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &SHAPE, 2);
    members.add_faulty("slow@40:30");
    let counter = members.width(3).await.groups[0].counter;
    answered("slow@40:30", streams(&members).await).await;
    assert_eq!(members.width(3).await.groups[0].counter, counter, "a slow rank was given up");
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_hangs_while_it_loads() {
    let _turn = turn().await;
    // In the first group, which goes on without it; and as one that a group is formed anew for.
    let mut members = Members::start(PHALANX, &SHAPE, 1);
    let first = members.add_faulty("hang@load");
    members.width(1).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    let second = members.add_faulty("hang@load");
    let given_up = |status: &client::ClusterStatus| {
        let in_loading =
            |incident: &Incident| incident.losses.iter().any(|loss| loss.cause.contains("in loading"));
        status.serving && status.incidents.iter().any(|i| in_loading(i) && named(i).contains(&second))
    };
    answered("hang@load", running).await;
    let status = members.until("the one that hangs given up", given_up).await;
    report("a rank hangs while it loads", &status.incidents[0], None);
    for number in [first, second] {
        members.fails(number, &["the executor thread hangs"]);
    }
    answered("afterwards", streams(&members).await).await;
    members.end();
}
