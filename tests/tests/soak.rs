//! Faults by chance while answers run: `PHALANX_SOAK_SECONDS` (20) of them, from `PHALANX_SOAK_SEED` (1).
//!
//! Workers are killed, stopped for a while, asked to leave, and started again. Every answer is right, and in the end the coordinator
//! holds no more memory and no more descriptors than it did at the beginning.

use std::io::Write;
use std::str::FromStr;
use std::time::{Duration, Instant};

use phalanx_tests::members::Members;
use phalanx_tests::process::{Program, Signal};
use phalanx_tests::streams::{Answer, Load, Streams};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
const WORKERS: usize = 4;
const STREAMS: u32 = 8;
const TOKENS: u32 = 80;
/// What a coordinator may have more than after its first answers: its allocator keeps some of what it had.
const MORE_MEMORY: u64 = 48 << 20;
const MORE_DESCRIPTORS: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worker {
    Runs,
    Stopped,
    Gone,
}

fn variable<T: FromStr>(name: &str, usual: T) -> T {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(usual)
}

/// Bytes of memory and open descriptors of a process.
fn holds(pid: u32) -> (u64, usize) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    (kib << 10, std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count())
}

async fn undisturbed() -> &'static [Answer] {
    let mut server = PHALANX.command(["serve", "--grpc", "127.0.0.1:0", "--workers", "1"]).start();
    let address = server.served_at();
    let streams = Streams::start(&address, STREAMS, 0, TOKENS, Duration::ZERO).await;
    streams.end().await.answers.leak()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn faults_by_chance_cost_no_answer() {
    let (seconds, seed) = (variable("PHALANX_SOAK_SECONDS", 20), variable("PHALANX_SOAK_SEED", 1));
    let mut chance = StdRng::seed_from_u64(seed);
    let expected = undisturbed().await;
    let mut members = Members::start(PHALANX, &["--ranks", "4", "--min-ranks", "1"], WORKERS);
    members.width(WORKERS).await;
    // Whatever comes with the first answers is there now.
    for _ in 0..3 {
        let streams = Streams::start(&members.clients, STREAMS, 0, TOKENS, Duration::ZERO).await;
        streams.end().await.check("before any fault", expected);
    }
    let coordinator = members.coordinator.as_ref().expect("it runs").pid();
    let (memory, descriptors) = holds(coordinator);

    let load = Load::start(members.clients.clone(), expected, TOKENS, Duration::ZERO);
    let mut workers = [Worker::Runs; WORKERS];
    let mut faults = 0;
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        let number = chance.random_range(0..WORKERS);
        let others = workers.iter().enumerate().filter(|&(n, w)| n != number && *w == Worker::Runs).count();
        workers[number] = match workers[number] {
            // Somebody is to go on.
            Worker::Runs if others == 0 => Worker::Runs,
            Worker::Runs => {
                faults += 1;
                match chance.random_range(0..3) {
                    0 => {
                        members.kill(number);
                        Worker::Gone
                    }
                    1 => {
                        members.signal(number, Signal::STOP);
                        Worker::Stopped
                    }
                    _ => {
                        members.leave(number);
                        Worker::Gone
                    }
                }
            }
            Worker::Stopped => {
                members.signal(number, Signal::CONT);
                Worker::Runs
            }
            Worker::Gone => {
                members.restart(number);
                Worker::Runs
            }
        };
        tokio::time::sleep(Duration::from_millis(chance.random_range(0..1200))).await;
    }
    for (number, worker) in workers.into_iter().enumerate() {
        match worker {
            Worker::Runs => {}
            Worker::Stopped => members.signal(number, Signal::CONT),
            Worker::Gone => members.restart(number),
        }
    }
    let answers = load.end().await;
    let status = members.width(WORKERS).await;
    let (memory_then, descriptors_then) = holds(coordinator);
    let line = format!(
        "soak of {seconds} s, seed {seed}: {faults} faults, {answers} answers, all right; epoch {}; \
         the coordinator: {} -> {} MiB, {descriptors} -> {descriptors_then} descriptors\n",
        status.groups[0].counter,
        memory >> 20,
        memory_then >> 20,
    );
    let _ = std::io::stderr().write_all(line.as_bytes());
    assert!(memory_then <= memory + MORE_MEMORY, "{line}");
    assert!(descriptors_then <= descriptors + MORE_DESCRIPTORS, "{line}");
    members.end();
}
