//! Faults by chance while answers run: `PHALANX_SOAK_SECONDS` (20) of them, from `PHALANX_SOAK_SEED` (1), which also says how groups
//! are cut.
//!
//! Workers are killed, stopped for a while, asked to leave, started again, some of them with a fault (`--fault`) to come; the link of
//! one is cut, and in the first half coordinators are killed. Every answer is right, and in the end coordinators and the worker that
//! lived through all of it hold no more memory and no more descriptors than they did.

mod cluster;

use std::io::Write;
use std::str::FromStr;
use std::time::{Duration, Instant};

use client::PATIENCE;
use phalanx_tests::process::Signal;
use phalanx_tests::streams::{Answer, Load, Streams};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use cluster::{Cluster, FAR, FORMS, Holds, WORKERS, alone};

const STREAMS: u32 = 8;
const TOKENS: u32 = 80;
/// What a process may have more than after its first answers: its allocator keeps some of what it had.
const MORE_MEMORY: u64 = 48 << 20;
const MORE_DESCRIPTORS: usize = 8;
/// Of the workers that are started again, one in so many is to break.
const BREAK: u32 = 3;
/// A coordinator is killed in one of so many faults.
const KILL_COORDINATOR: u32 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worker {
    Runs,
    /// It was asked for a fault, which may have happened.
    Breaks,
    Stopped,
    /// Its link is cut.
    Cut,
    Gone,
}

struct Soak {
    cluster: Cluster,
    chance: StdRng,
    fewest: usize,
    workers: [Worker; WORKERS],
    faults: u32,
    coordinators_killed: usize,
}

impl Soak {
    /// Something happens to a coordinator, if it `may`, or to a worker.
    fn happen(&mut self, may: bool) {
        if may && self.cluster.has_another_coordinator() && self.chance.random_range(0..KILL_COORDINATOR) == 0
        {
            // The one that leads: so far each took over from the other.
            self.cluster.replace_coordinator(self.coordinators_killed % 2);
            self.coordinators_killed += 1;
            return;
        }
        let number = self.chance.random_range(0..WORKERS);
        let others =
            self.workers.iter().enumerate().filter(|&(n, w)| n != number && *w == Worker::Runs).count();
        self.workers[number] = match self.workers[number] {
            // Somebody is to go on.
            Worker::Runs if others < self.fewest => Worker::Runs,
            Worker::Runs => self.strike(number),
            Worker::Gone if self.chance.random_range(0..BREAK) == 0 => {
                let fault = self.fault();
                self.cluster.restart(number, Some(&fault));
                self.faults += 1;
                Worker::Breaks
            }
            Worker::Breaks => {
                self.cluster.kill(number);
                Worker::Gone
            }
            _ => self.undo(number),
        };
    }

    fn strike(&mut self, number: usize) -> Worker {
        self.faults += 1;
        match (number, self.chance.random_range(0..3)) {
            (FAR, 0 | 1) => {
                self.cluster.link.cut();
                Worker::Cut
            }
            (FAR, _) | (_, 0) => {
                self.cluster.signal(number, Signal::STOP);
                Worker::Stopped
            }
            (_, 1) => {
                self.cluster.kill(number);
                Worker::Gone
            }
            _ => {
                self.cluster.leave(number);
                Worker::Gone
            }
        }
    }

    /// Has a worker run as it should.
    fn undo(&mut self, number: usize) -> Worker {
        match self.workers[number] {
            Worker::Runs => {}
            Worker::Stopped => self.cluster.signal(number, Signal::CONT),
            Worker::Cut => self.cluster.link.mend(),
            Worker::Gone => self.cluster.restart(number, None),
            Worker::Breaks => {
                self.cluster.kill(number);
                self.cluster.restart(number, None);
            }
        }
        Worker::Runs
    }

    /// A fault of the kinds that only a worker itself can have.
    fn fault(&mut self) -> String {
        let step = self.chance.random_range(1..300);
        match self.chance.random_range(0..8) {
            0 => "hang@load".to_owned(),
            1 => format!("hang@{step}"),
            2 => format!("hang@{step}:3"),
            3 => format!("slow@{step}:20"),
            4 => format!("cut@{step}"),
            5 => format!("drop@{step}"),
            6 => format!("corrupt@{step}"),
            _ => format!("panic@{step}"),
        }
    }
}

fn variable<T: FromStr>(name: &str, usual: T) -> T {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(usual)
}

async fn undisturbed() -> &'static [Answer] {
    let (_server, address) = alone();
    let streams = Streams::start(&address, STREAMS, 0, TOKENS, Duration::ZERO).await;
    streams.end().await.answers.leak()
}

fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Tells what a process held and holds, and checks it.
fn compare(who: &str, before: Holds, after: Holds) {
    let line = format!(
        "{who}: {} -> {} MiB, {} -> {} descriptors",
        before.memory >> 20,
        after.memory >> 20,
        before.descriptors,
        after.descriptors
    );
    say(&line);
    assert!(after.memory <= before.memory + MORE_MEMORY, "{line}");
    assert!(after.descriptors <= before.descriptors + MORE_DESCRIPTORS, "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn faults_by_chance_cost_no_answer() {
    let (seconds, seed) = (variable("PHALANX_SOAK_SECONDS", 20), variable("PHALANX_SOAK_SEED", 1));
    let form = FORMS[(seed % 3) as usize];
    let expected = undisturbed().await;
    let cluster = Cluster::start(form).await;
    say(&format!("soak of {seconds} s, seed {seed}: {}, the link is a {}", form.name, cluster.link.kind()));
    // Whatever comes with the first answers is there now.
    for _ in 0..3 {
        let streams = Streams::start(&cluster.clients(), STREAMS, 0, TOKENS, PATIENCE).await;
        streams.end().await.check("before any fault", expected);
    }
    let (mut coordinators, workers) = cluster.holdings();

    let load = Load::start(cluster.clients(), expected, TOKENS, PATIENCE);
    let mut soak = Soak {
        cluster,
        chance: StdRng::seed_from_u64(seed),
        fewest: form.fewest,
        workers: [Worker::Runs; WORKERS],
        faults: 0,
        coordinators_killed: 0,
    };
    let begun = Instant::now();
    let whole = Duration::from_secs(seconds);
    let mut halfway = false;
    while begun.elapsed() < whole {
        soak.happen(begun.elapsed() < whole / 2);
        tokio::time::sleep(Duration::from_millis(soak.chance.random_range(0..1200))).await;
        if !halfway && soak.coordinators_killed > 0 && begun.elapsed() >= whole * 3 / 4 {
            // Those that came for others have answered for a while.
            coordinators = soak.cluster.holdings().0;
            halfway = true;
        }
    }
    for number in 0..WORKERS {
        soak.workers[number] = soak.undo(number);
    }
    let answers = load.end().await;
    let Soak { cluster, faults, coordinators_killed, .. } = soak;
    cluster.whole().await;
    for _ in 0..3 {
        let streams = Streams::start(&cluster.clients(), STREAMS, 0, TOKENS, PATIENCE).await;
        streams.end().await.check("after all faults", expected);
    }
    let status = cluster.status().await.expect("a leader");
    let counter = status.groups.iter().map(|group| group.counter).max().unwrap_or_default();
    say(&format!(
        "{faults} faults of workers, {coordinators_killed} coordinators killed, {answers} answers, all right; epoch {counter}"
    ));
    let (coordinators_then, workers_then) = cluster.holdings();
    for (number, (before, after)) in coordinators.into_iter().zip(coordinators_then).enumerate() {
        compare(&format!("coordinator {number}"), before, after);
    }
    compare("the worker that lived through all", workers[FAR], workers_then[FAR]);
    cluster.end();
}
