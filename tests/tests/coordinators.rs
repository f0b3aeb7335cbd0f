//! Coordinators that are lost in the middle of answers, and clients that do not notice.

use phalanx_tests::process::{Ended, Phalanx, Program, Signal};

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
const SECRET: &str = "a secret of the coordinators' tests";

fn coordinator(grpc: &str, listen: &str) -> Phalanx {
    let args = ["coordinator", "--workers", "2", "--grpc", grpc, "--listen", listen];
    PHALANX.command(args).env("PHALANX_SECRET", SECRET).start()
}

fn worker(coordinator: &str) -> Phalanx {
    let args = ["worker", "--coordinator", coordinator, "--listen", "127.0.0.1:0", "--threads", "1"];
    PHALANX.command(args).env("PHALANX_SECRET", SECRET).start()
}

/// Starts an answer; the second one of the same seed says the same, unless something is lost.
fn generate(server: &str, tokens: &str) -> Phalanx {
    let prompt = ["--prompt", "In the beginning", "--ignore-eos", "--max-tokens", tokens];
    let sampling = ["--temperature", "0.8", "--seed", "11"];
    let args = [&["generate", "--server", server], &prompt[..], &sampling].concat();
    PHALANX.command(args).env("RUST_LOG", "client=warn").start()
}

#[test]
fn an_answer_outlives_its_coordinator() {
    let mut first = coordinator("127.0.0.1:0", "127.0.0.1:0");
    let (join, address) = first.coordinates_at();
    let workers = [worker(&join), worker(&join)];
    let undisturbed = generate(&address, "2000").end().success();

    let mut running = generate(&address, "2000");
    let begun = running.line(|line| Some(line.to_owned() + "\n"));
    first.signal(Signal::KILL);
    first.end();
    let second = coordinator(&address, &join);
    let Ended { stdout, stderr, status, .. } = running.end();
    assert!(status.success(), "{stderr}");
    assert!(stderr.contains("asking again"), "it was over before the coordinator was lost: {stderr}");
    assert_eq!(begun + &stdout, undisturbed);

    for part in workers.into_iter().chain([second]) {
        part.signal(Signal::TERM);
        part.end().success();
    }
}
