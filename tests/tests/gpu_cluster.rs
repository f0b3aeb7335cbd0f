//! Clusters of workers with GPUs, each a process: what connects them, and the loss of one. On the emulator.
#![cfg(feature = "cuda")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use client::{Client, Event, GenerateRequest, Generation, Prompt, SamplingOptions};
use futures_util::StreamExt;
use phalanx_tests::process::{Ended, Invocation, Phalanx, Program, Signal};
use tempfile::TempDir;

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
const SECRET: &str = "a secret of the GPU cluster's tests";
/// A kernel waits this long for another rank's, unless something frees it sooner: what the tests of lost ranks are about.
const PATIENCE: Duration = Duration::from_secs(60);
const GENERATE: [&str; 7] =
    ["generate", "--prompt", "In the beginning", "--max-tokens", "12", "--device", "cuda"];

/// The emulator's libraries, with a folder for compiled kernels.
struct Emulator {
    libraries: PathBuf,
    cache: TempDir,
}

impl Emulator {
    /// None, and a sentence, where there is no compiler for it.
    fn find() -> Option<Self> {
        match emulator::libraries() {
            Ok(libraries) => Some(Self { libraries, cache: tempfile::tempdir().expect("a folder") }),
            Err(absent) => {
                eprintln!("skipped: {absent}");
                None
            }
        }
    }

    /// The program on a machine with `gpus` GPUs and these libraries, which tells what connects them.
    fn command_with(&self, libraries: &Path, gpus: usize, args: &[&str]) -> Invocation {
        PHALANX
            .command(args)
            .env("LD_LIBRARY_PATH", libraries.to_str().expect("UTF-8"))
            .env("PHALANX_EMULATOR_DEVICES", &gpus.to_string())
            // All of it becomes KV cache.
            .env("PHALANX_EMULATOR_MEMORY", &(5_u64 << 28).to_string())
            // As a GPU does: the host goes on while kernels wait for each other.
            .env("PHALANX_EMULATOR_BESIDE", "1")
            .env("PHALANX_KERNEL_CACHE", self.cache.path().to_str().expect("UTF-8"))
            .env("RUST_LOG", "warn,comm=info,worker=info")
            .env("NO_COLOR", "1")
    }

    fn command(&self, gpus: usize, args: &[&str]) -> Invocation {
        self.command_with(&self.libraries, gpus, args)
    }

    /// The libraries without NCCL.
    fn without_nccl(&self) -> TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["libcuda.so", "libnvrtc.so", "libcublasLt.so"] {
            std::os::unix::fs::symlink(self.libraries.join(name), folder.path().join(name)).expect("a link");
        }
        folder
    }
}

/// The text that a command printed, whose GPUs exchanged by `used`.
#[track_caller]
fn text_by(used: &str, ended: Ended) -> String {
    assert!(ended.status.success(), "{}", ended.stderr);
    let told = |line: &&str| line.contains("the GPUs exchange by");
    let ways: Vec<_> = ended.stderr.lines().filter(told).collect();
    assert!(!ways.is_empty() && ways.iter().all(|way| way.contains(used)), "{used}: {}", ended.stderr);
    ended.success()
}

#[test]
fn answers_are_alike_at_any_width_whatever_connects_the_gpus() {
    let Some(emulator) = Emulator::find() else { return };
    let run = |gpus, more: &[&str]| {
        emulator.command(gpus, &[&GENERATE[..], &["--deterministic"], more].concat()).run()
    };
    let expected = run(1, &[]).success();
    assert!(!expected.trim().is_empty());
    // Left to itself it takes the best of all, of which it needs both.
    let both = "memory that they share, and NCCL for long messages";
    let ways = [
        ("auto", both),
        ("peer", "used=\"memory that they share\""),
        ("nccl", "used=\"NCCL\""),
        ("host", "used=\"the host's memory\""),
    ];
    for gpus in [2, 3] {
        for (choice, used) in ways {
            assert_eq!(text_by(used, run(gpus, &["--collective", choice])), expected, "{choice}, {gpus}");
        }
    }
    // These were a step ahead of what the coordinator knew.
    assert_eq!(text_by(both, run(2, &["--steps-in-flight", "1"])), expected);
}

#[test]
fn what_is_missing_is_done_without_and_told() {
    let Some(emulator) = Emulator::find() else { return };
    let generate = [&GENERATE[..], &["--deterministic"]].concat();
    let without = emulator.without_nccl();
    let ended = emulator.command_with(without.path(), 2, &generate).run();
    assert!(ended.stderr.contains("NCCL (libnccl.so.2) is not installed"), "{}", ended.stderr);
    let expected = text_by("used=\"memory that they share\"", ended);

    let ended = emulator.command(2, &generate).env("PHALANX_EMULATOR_SHARES", "0").run();
    assert!(ended.stderr.contains("cannot share memory between processes"), "{}", ended.stderr);
    assert_eq!(text_by("used=\"NCCL\"", ended), expected);

    let one_gpu: Vec<_> = generate
        .iter()
        .map(|arg| if *arg == "cuda" { "cuda:0" } else { arg })
        .chain(["--workers", "2"])
        .collect();
    let ended = emulator.command(2, &one_gpu).run();
    assert!(ended.stderr.contains("its GPU is that of rank 0"), "{}", ended.stderr);
    assert_eq!(text_by("used=\"the host's memory\"", ended), expected);
}

#[test]
fn a_choice_that_cannot_be_is_an_error_that_says_why() {
    let Some(emulator) = Emulator::find() else { return };
    let quiet = |command: Invocation| command.env("RUST_LOG", "error").run();
    let one_gpu = ["generate", "--prompt", "a", "--device", "cuda:0", "--workers", "2", "--collective"];
    for choice in ["peer", "nccl"] {
        let ended = quiet(emulator.command(1, &[&one_gpu[..], &[choice]].concat()));
        ended.failure(&["--collective", choice, "rank 1", "its GPU is that of rank 0"]);
    }
    let without = emulator.without_nccl();
    let nccl = [&GENERATE[..], &["--collective", "nccl"]].concat();
    quiet(emulator.command_with(without.path(), 2, &nccl)).failure(&["rank 0", "NCCL", "is not installed"]);
    let peer = [&GENERATE[..], &["--collective", "peer"]].concat();
    let ended = quiet(emulator.command(2, &peer).env("PHALANX_EMULATOR_SHARES", "0"));
    ended.failure(&["--collective peer", "rank 0", "cannot share memory"]);
    PHALANX.run(["generate", "--prompt", "a", "--collective", "peer"]).failure(&["--collective", "GPUs"]);
    PHALANX.run(["serve", "--collective", "ib"]).failure(&["'ib' is not auto, nccl, peer or host"]);
}

fn worker(emulator: &Emulator, coordinator: &str, gpu: &str, collective: &str) -> Phalanx {
    let place = ["worker", "--coordinator", coordinator, "--listen", "127.0.0.1:0", "--device", gpu];
    let args = [&place[..], &["--deterministic", "--collective", collective]].concat();
    emulator.command(2, &args).env("PHALANX_SECRET", SECRET).start()
}

/// The next token; none at the end.
async fn next_token(stream: &mut Generation) -> Option<u32> {
    loop {
        match stream.next().await?.expect("no error") {
            Event::Started(_) => {}
            Event::Token(token) => return Some(token.id),
            Event::Finished(_) => return None,
        }
    }
}

/// A worker hangs, so that the kernels of the other wait for it, and is then killed: the other is freed, and with a new worker the
/// answer goes on as if nothing had been. Both make a group of the form `group`; the other tells that it exchanged by `used`.
async fn an_answer_outlives_a_worker(group: &[&str], collective: &str, used: &str) {
    let Some(emulator) = Emulator::find() else { return };
    let place = ["coordinator", "--grpc", "127.0.0.1:0", "--listen", "127.0.0.1:0"];
    let args = [&place[..], group].concat();
    let mut coordinator = PHALANX.command(&args).env("PHALANX_SECRET", SECRET).start();
    let (join, address) = coordinator.line(|line| {
        let (join, address) = line.strip_prefix("workers join at ")?.split_once(", clients connect at ")?;
        Some((join.to_owned(), address.to_owned()))
    });
    let first = worker(&emulator, &join, "cuda:0", collective);
    let second = worker(&emulator, &join, "cuda:1", collective);
    let mut serving =
        || coordinator.line(|line| line.starts_with("serving yi-nano on 2 ranks").then_some(()));
    serving();
    let client = Client::connect(&address).await.expect("a server");
    let generate = || async {
        let request = GenerateRequest {
            prompt: Some(Prompt::Text("In the beginning".into())),
            max_tokens: Some(60),
            sampling: Some(SamplingOptions { temperature: Some(0.9), seed: Some(5), ..Default::default() }),
            ignore_eos: true,
            ..GenerateRequest::default()
        };
        client.generate(request).await.expect("accepted")
    };
    let mut stream = generate().await;
    let mut seen = Vec::new();
    for _ in 0..8 {
        seen.extend(next_token(&mut stream).await);
    }
    second.signal(Signal::STOP);
    tokio::time::sleep(Duration::from_millis(300)).await;
    second.signal(Signal::KILL);
    let killed = Instant::now();
    second.end();
    let third = worker(&emulator, &join, "cuda:1", collective);
    serving();
    assert!(killed.elapsed() < PATIENCE, "the other rank was freed by its patience alone");
    while let Some(token) = next_token(&mut stream).await {
        seen.push(token);
    }
    let mut undisturbed = Vec::new();
    let mut stream = generate().await;
    while let Some(token) = next_token(&mut stream).await {
        undisturbed.push(token);
    }
    assert_eq!(undisturbed.len(), 60);
    assert_eq!(seen, undisturbed);
    for part in [third, coordinator] {
        part.signal(Signal::TERM);
        part.end().success();
    }
    first.signal(Signal::TERM);
    let told = first.end().stderr;
    let freed = told.contains("the group is abandoned") || told.contains("lost rank");
    assert!(freed && !told.contains("panicked"), "{told}");
    let ways: Vec<_> = told.lines().filter(|line| line.contains("exchange")).collect();
    assert!(ways.len() == 2 && ways.iter().all(|way| way.contains(&format!("used=\"{used}\""))), "{told}");
}

const TENSOR_PARALLEL: [&str; 2] = ["--ranks", "2"];
const PIPELINE: [&str; 4] = ["--ranks", "1", "--stages", "2"];

#[tokio::test]
async fn an_answer_outlives_a_worker_whose_memory_is_shared() {
    an_answer_outlives_a_worker(&TENSOR_PARALLEL, "peer", "memory that they share").await;
}

#[tokio::test]
async fn an_answer_outlives_a_worker_connected_by_nccl() {
    an_answer_outlives_a_worker(&TENSOR_PARALLEL, "nccl", "NCCL").await;
}

#[tokio::test]
async fn an_answer_outlives_a_stage_connected_by_nccl() {
    an_answer_outlives_a_worker(&PIPELINE, "auto", "NCCL").await;
}

#[tokio::test]
async fn an_answer_outlives_a_stage_connected_by_the_host() {
    an_answer_outlives_a_worker(&PIPELINE, "host", "the host's memory").await;
}

/// A number of bytes as the line tells it, in MiB.
fn mebibytes(text: &str) -> f64 {
    match text.split_once(' ') {
        Some((number, "MiB")) => number.parse().expect("a number"),
        Some((number, "GiB")) => number.parse::<f64>().expect("a number") * 1024.0,
        _ => panic!("{text}: not a size"),
    }
}

#[test]
fn workers_tell_where_memory_went_and_what_context_fits() {
    let Some(emulator) = Emulator::find() else { return };
    let args = ["serve", "--grpc", "127.0.0.1:0", "--device", "cuda", "--kv-memory", "10MiB"];
    let mut server = emulator.command(2, &args).env("RUST_LOG", "error").start();
    server.line(|line| line.starts_with("serving yi-nano on 2 workers").then_some(()));
    server.signal(Signal::TERM);
    let told = server.end().stderr;
    // Whoever joins first is rank 0.
    let lines: Vec<_> = told.lines().filter(|line| line.contains(" on cuda:")).collect();
    assert_eq!(lines.len(), 2, "{told}");
    for number in 0..2 {
        for named in
            [format!("rank {number} of stage 0 on "), format!(" on cuda:{number}, Phalanx emulator: ")]
        {
            assert_eq!(lines.iter().filter(|line| line.contains(&named)).count(), 1, "{named}: {told}");
        }
    }
    for line in lines {
        let (_, line) = line.split_once("emulator: ").expect("parts");
        let part = |name: &str| {
            let (_, rest) = line.split_once(name).unwrap_or_else(|| panic!("no {name}: {line}"));
            rest.trim_start().split(',').next().expect("a size")
        };
        let (kv, tokens) = part("KV cache").split_once(" for ").expect("tokens");
        // Of a token, a rank with 2 of 4 units keeps 5 layers · 2 heads · 32 elements of keys, and of values, in bf16.
        assert_eq!(
            (kv, tokens),
            ("10.0 MiB", format!("{} tokens", (10 << 20) / (5 * 2 * 32 * 2 * 2)).as_str())
        );
        let (free, total) = part("free").split_once(" of ").expect("all of it");
        let parts = ["weights", "activations", "work space", "driver and others"];
        let sum: f64 =
            parts.iter().map(|name| mebibytes(part(name))).sum::<f64>() + mebibytes(kv) + mebibytes(free);
        // Each is rounded to a tenth.
        assert!((sum - mebibytes(total)).abs() < 1.0, "{line}");
    }
    // An answer is all that this one is asked for.
    let generate = [&GENERATE[..], &["--deterministic"]].concat();
    let ended = emulator.command(1, &generate).env("RUST_LOG", "error").run();
    assert!(!ended.stderr.contains("KV cache"), "{}", ended.stderr);
    ended.success();
}
