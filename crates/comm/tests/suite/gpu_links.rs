//! Links between stages whose ranks have GPUs, on the emulator: by NCCL, by the host's memory, and by both.

use std::sync::{Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use comm::cuda::{ConnectOptions, connect_stages};
use comm::{AbortHandle, CollectiveChoice, Error, Neighbours, StageLink, TcpTransport, Transport};
use kernels::Cuda;
use kernels::cuda::Buffer;

use crate::gpu::{buffer, open, present, values, waits_on_callers};
use crate::groups::{LONG, each_rank};
use crate::pipelines::tcp_pipeline;

use CollectiveChoice::{Auto, Host, Nccl, Peer};

/// A rank between forming and the end of the test: its GPU first, since what connects it goes before.
struct Rank {
    link: Box<dyn StageLink<Buffer>>,
    cuda: Cuda,
    /// Other ranks would take this one for lost if it closed its connections.
    mesh: TcpTransport,
}

fn asked(choice: CollectiveChoice) -> ConnectOptions {
    ConnectOptions { choice, deterministic: true, limit: LONG }
}

/// Emulated GPUs that run beside the host.
fn can_wait() -> bool {
    present() && !waits_on_callers()
}

/// To free memory waits for all that its GPU has begun, also in other tests: and they for this one.
static TURN: Mutex<()> = Mutex::new(());

/// Runs `body` for every rank of a pipeline, each on a thread and a GPU of its own, with what was chosen for it.
fn each<R: Send>(
    widths: &[usize],
    choice: impl Fn(usize) -> CollectiveChoice + Sync,
    body: impl Fn(usize, Rank) -> R + Sync,
) -> Vec<R> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    each_rank(tcp_pipeline(widths), |index, (mesh, neighbours): (TcpTransport, Neighbours)| {
        let cuda = open(index);
        let link = connect_stages(&cuda, neighbours, asked(choice(index))).unwrap();
        body(index, Rank { link, cuda, mesh })
    })
}

fn rows(message: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| (message * 1000 + index) as f32).collect()
}

/// Sends messages of many lengths through a pipeline, of which every stage adds one to all numbers.
fn passes_on(widths: &[usize], choice: impl Fn(usize) -> CollectiveChoice + Sync) {
    each(widths, choice, |_, Rank { mut link, cuda, .. }| {
        let (stage, stages) = (link.stage(), link.stages());
        assert_eq!(stages, widths.len());
        for (message, len) in [1, 7, 20_000, 3, 20_000].into_iter().enumerate() {
            let mut x = buffer(&cuda, &rows(message, len));
            if stage > 0 {
                x = buffer(&cuda, &vec![f32::NAN; len]);
                link.receive(len, &mut x).unwrap();
                let expected: Vec<f32> = rows(message, len).iter().map(|x| x + stage as f32 - 1.0).collect();
                assert_eq!(values(&x), expected, "message {message} at stage {stage}");
            }
            let next: Vec<f32> = values(&x).iter().map(|x| x + f32::from(stage > 0)).collect();
            let mut next = buffer(&cuda, &next);
            link.send(len, &next).unwrap();
            // What was sent may be changed.
            next.write(&vec![f32::NAN; len]).unwrap();
        }
    });
}

#[test]
fn exchange_at_any_widths() {
    if !can_wait() {
        return;
    }
    for widths in [&[1, 1][..], &[1, 3], &[3, 2], &[2, 4], &[2, 1, 3], &[1], &[1, 2, 2, 1]] {
        passes_on(widths, |_| Nccl);
    }
}

/// Some connections are by NCCL, others are not.
#[test]
fn ways_may_differ_by_connection() {
    if !can_wait() {
        return;
    }
    for others in [Host, Peer] {
        passes_on(&[1, 3], |index| if index == 2 { others } else { Auto });
        passes_on(&[2, 2, 1], |index| if index % 2 == 0 { others } else { Auto });
    }
}

/// On one GPU NCCL does not work: left to themselves, stages take the host.
#[test]
fn stages_on_one_gpu_go_over_the_host() {
    if !can_wait() {
        return;
    }
    each_rank(tcp_pipeline(&[1, 1]), |stage, (_mesh, neighbours)| {
        let cuda = open(0);
        let mut link = connect_stages(&cuda, neighbours, asked(Auto)).unwrap();
        let mut x = buffer(&cuda, &rows(stage, 5));
        if stage == 0 {
            link.send(5, &x).unwrap()
        } else {
            link.receive(5, &mut x).unwrap()
        }
        assert_eq!(values(&x), rows(0, 5));
    });
}

/// The errors with which both ranks of two stages end, of choices and GPUs that do not go together.
fn connecting_fails(choices: [CollectiveChoice; 2], gpus: [usize; 2]) -> Vec<String> {
    each_rank(tcp_pipeline(&[1, 1]), |stage, (_mesh, neighbours)| {
        let connected = connect_stages(&open(gpus[stage]), neighbours, asked(choices[stage]));
        connected.err().unwrap().to_string()
    })
}

#[test]
fn a_way_that_is_not_open_is_an_error_at_both_ends() {
    if !can_wait() {
        return;
    }
    for words in connecting_fails([Nccl, Auto], [0, 0]) {
        assert!(
            words.starts_with("stage 1: --collective nccl is not possible: rank 0: its GPU is that of"),
            "{words}"
        );
    }
    for words in connecting_fails([Host, Nccl], [0, 1]) {
        assert!(words.contains("it has --collective nccl") && words.starts_with("stage 1: "), "{words}");
    }
}

/// Numbers that no buffer on the way holds.
const LARGE: usize = 1 << 20;

/// One message may wait for its receiver; with a second one the sender waits, and says for whom.
#[test]
fn one_message_waits_for_a_slow_receiver() {
    if !can_wait() {
        return;
    }
    let held_up = Barrier::new(2);
    each(
        &[1, 1],
        |_| Nccl,
        |stage, Rank { mut link, cuda, mesh }| {
            if stage == 0 {
                // Kept, since to free memory waits for all that the device has begun.
                let x = [0, 1].map(|message| buffer(&cuda, &rows(message, LARGE)));
                link.send(LARGE, &x[0]).unwrap();
                let abort = mesh.abort_handle();
                assert_eq!(abort.waits_for(), None);
                thread::scope(|scope| {
                    scope.spawn(|| {
                        wait_until_it_waits_for(&abort, 1);
                        held_up.wait();
                    });
                    link.send(LARGE, &x[1]).unwrap();
                });
            } else {
                held_up.wait();
                for message in 0..2 {
                    let mut received = buffer(&cuda, &vec![f32::NAN; LARGE]);
                    link.receive(LARGE, &mut received).unwrap();
                    assert!(values(&received) == rows(message, LARGE));
                }
            }
        },
    );
}

fn wait_until_it_waits_for(abort: &AbortHandle, member: usize) {
    while abort.waits_for() != Some(member) {
        thread::yield_now();
    }
}

/// Both ends wait for what the other one does not do, until they are told not to.
#[test]
fn abort_frees_a_blocked_rank() {
    if !can_wait() {
        return;
    }
    for blocked in [0, 1] {
        let over = Barrier::new(2);
        each(
            &[1, 1],
            |_| Nccl,
            |stage, Rank { mut link, cuda, mesh }| {
                if stage != blocked {
                    over.wait();
                    return;
                }
                let (abort, told) = (mesh.abort_handle(), Mutex::new(None));
                let mut x = buffer(&cuda, &vec![0.0; LARGE]);
                thread::scope(|scope| {
                    scope.spawn(|| {
                        wait_until_it_waits_for(&abort, 1 - blocked);
                        *told.lock().unwrap() = Some(Instant::now());
                        abort.abort();
                    });
                    let mut call =
                        || if stage == 0 { link.send(LARGE, &x) } else { link.receive(LARGE, &mut x) };
                    let error = (0..3).find_map(|_| call().err()).unwrap();
                    assert!(matches!(error, Error::Aborted), "{error}");
                    assert!(matches!(call(), Err(Error::Ended)), "a lost pipeline stays lost");
                });
                drop(link);
                assert!(told.lock().unwrap().unwrap().elapsed() < Duration::from_secs(2));
                over.wait();
            },
        );
    }
}

#[track_caller]
fn names(error: &Error, stage: usize, rank: usize) {
    let Error::Stage { stage: found, source } = error else { panic!("{error}") };
    assert!(*found == stage && matches!(**source, Error::Lost { rank: r, .. } if r == rank), "{error}");
}

#[test]
fn a_dead_neighbour_is_named() {
    if !can_wait() {
        return;
    }
    each(
        &[2, 2],
        |_| Nccl,
        |index, Rank { mut link, cuda, .. }| {
            let mut x = buffer(&cuda, &vec![0.0; LARGE]);
            match index {
                // Rank 0 of the first stage waits for room, rank 1 of the second one for a message.
                0 => names(&(0..3).find_map(|_| link.send(LARGE, &x).err()).unwrap(), 1, 0),
                3 => names(&link.receive(LARGE, &mut x).unwrap_err(), 0, 1),
                _ => {}
            }
        },
    );
}

/// What a rank sent before it ended in peace still counts.
#[test]
fn a_leaving_senders_message_still_counts() {
    if !can_wait() {
        return;
    }
    let left = Barrier::new(2);
    each(
        &[1, 1],
        |_| Nccl,
        |stage, Rank { mut link, cuda, .. }| {
            let mut x = buffer(&cuda, &rows(stage, 5));
            if stage == 0 {
                link.send(5, &x).unwrap();
                left.wait();
            } else {
                left.wait();
                link.receive(5, &mut x).unwrap();
                assert_eq!(values(&x), rows(0, 5));
                names(&link.receive(5, &mut x).unwrap_err(), 0, 0);
            }
        },
    );
}
