//! What happens on the device alone: waits of kernels that end without the others, recorded calls, and NCCL's own ways.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use comm::cuda::{ConnectOptions, LocalGpu, connect, local_gpu_group};
use comm::{AbortHandle, Collective, CollectiveChoice, Error, LocalTransport, Transport};
use kernels::cuda::{Board, Buffer, Communicator, Mailbox, Missed, NcclId, OneShot};
use kernels::{Backend, Batch, Cuda, DType, Draw, KvShape, Partial, SampledRow, Slice, Step, Token, Tree};

use crate::gpu::{Auto, Nccl, Peer, Process, buffer, open, present, values, waits_on_callers};
use crate::groups::{Kind, LONG, each_rank};

fn asked(choice: CollectiveChoice) -> ConnectOptions {
    ConnectOptions { choice, deterministic: true, limit: LONG }
}

/// Rank 0 of two, of which the other never launches; what `end` does while rank 0's kernel waits.
fn waits_alone(patience: Duration, end: impl Fn(&Board) + Sync) -> Option<Missed> {
    let cuda = open(0);
    let board = Arc::new(Board::new(&cuda).unwrap());
    let mailboxes = (0..2).map(|_| Arc::new(Mailbox::new(&cuda).unwrap())).collect();
    let mut one_shot = OneShot::new(&cuda, 0, mailboxes, board.clone(), patience).unwrap();
    let partials = [Partial { units: 0..1, sum: buffer(&cuda, &[1.0; 5000]) }];
    let mut out = buffer(&cuda, &[0.0; 5000]);
    let subtrees = [vec![0..1], vec![1..2]];
    let mut reduce = || one_shot.reduce(Tree { units: 2 }, 5000, &subtrees, &partials, &mut out).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // Whether it waits by now or not.
            thread::sleep(Duration::from_millis(20));
            end(&board);
        });
        reduce();
        cuda.synchronize().unwrap();
    });
    let begun = Instant::now();
    reduce();
    cuda.synchronize().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500), "after a failure nothing waits");
    one_shot.missed()
}

#[test]
fn a_kernel_that_waits_is_aborted() {
    if present() {
        assert_eq!(waits_alone(LONG, |board| board.abort(0)), Some(Missed::Aborted));
    }
}

#[test]
fn a_kernel_notices_a_rank_that_left() {
    if present() {
        assert_eq!(waits_alone(LONG, |board| board.leave(1)), Some(Missed::Left(1)));
    }
}

#[test]
fn a_kernel_does_not_wait_for_ever() {
    if present() {
        assert_eq!(waits_alone(Duration::from_millis(50), |_| ()), Some(Missed::Late(1)));
    }
}

/// The decoding of one token.
fn decoding(cuda: &Cuda) -> Step {
    let slice = Slice { start: 0, len: 1, blocks: vec![0] };
    let draw = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, position: 0 };
    cuda.step(
        vec![Token::Id(0)],
        Batch { slices: vec![slice] },
        vec![SampledRow { row: 0, slot: None, draw }],
    )
}

/// Begins a step that only reduces and broadcasts, so that it may be recorded.
fn collective_step(
    cuda: &mut Cuda,
    collective: &mut impl Collective<Buffer>,
    partials: &[Partial<Buffer>],
    out: &mut Buffer,
    shared: &mut Buffer,
) {
    let step = decoding(cuda);
    let tree = Tree { units: collective.size() };
    collective.begin_step().unwrap();
    let run = cuda.run(&step, collective.can_be_recorded(), |_| {
        // Two in one step.
        collective.tree_reduce(tree, 3000, partials, out).map_err(words)?;
        collective.tree_reduce(tree, 3000, partials, out).map_err(words)?;
        collective.broadcast(1, 2, shared).map_err(words)
    });
    run.unwrap();
    cuda.synchronize().unwrap();
    collective.check().unwrap();
}

fn words(error: Error) -> kernels::Error {
    kernels::Error::Unsupported(error.to_string())
}

/// A step is called, recorded and replayed: every time with other values.
fn replays<K: Kind<Site = Cuda, Buffer = Buffer>>() {
    const SIZE: usize = 3;
    each_rank(K::group(SIZE), |rank, end| {
        let ranges: Vec<_> = (0..SIZE).map(|rank| rank..rank + 1).collect();
        let (mut cuda, mut collective) = K::join(end, &ranges).unwrap();
        let shape = KvShape { layers: 1, units: 1, group: 1, head_dim: 64, dtype: DType::Bf16 };
        let _kv = cuda.kv_cache(shape, 4).unwrap();
        let mut partials = [Partial { units: rank..rank + 1, sum: buffer(&cuda, &[0.0; 3000]) }];
        let (mut out, mut shared) = (buffer(&cuda, &[0.0; 3000]), buffer(&cuda, &[0.0; 3]));
        for turn in 0..6 {
            let value = (turn * SIZE + rank) as f32;
            partials[0].sum.write(&[value; 3000]).unwrap();
            shared.write(&[value; 3]).unwrap();
            collective_step(&mut cuda, &mut collective, &partials, &mut out, &mut shared);
            let sent = (turn * SIZE + 1) as f32;
            assert_eq!(values(&shared), [sent, sent, value], "turn {turn}");
            let expected: f32 = (0..SIZE).map(|rank| (turn * SIZE + rank) as f32).sum();
            assert_eq!(values(&out), [expected; 3000], "turn {turn}");
        }
        // The communicator has the records that name it forgotten, and is gone before memory.
        drop(collective);
    });
}

#[test]
fn one_shot_kernels_are_replayed() {
    if present() {
        replays::<LocalGpu>();
    }
}

#[test]
fn calls_of_processes_are_replayed() {
    if present() {
        replays::<Process<Peer, LocalTransport>>();
        replays::<Process<Nccl, LocalTransport>>();
        replays::<Process<Auto, LocalTransport>>();
    }
}

/// While steps are replayed the host meets nobody: the kernels themselves notice.
#[test]
fn a_rank_that_stops_replaying_is_noticed() {
    if !present() {
        return;
    }
    each_rank(local_gpu_group(2), |rank, seat| {
        let mut cuda = open(rank);
        let mut collective = seat.join(&cuda, vec![0..1, 1..2], AbortHandle::default(), LONG).unwrap();
        let shape = KvShape { layers: 1, units: 1, group: 1, head_dim: 64, dtype: DType::Bf16 };
        let _kv = cuda.kv_cache(shape, 4).unwrap();
        let partials = [Partial { units: rank..rank + 1, sum: buffer(&cuda, &[1.0; 3000]) }];
        let (mut out, mut shared) = (buffer(&cuda, &[0.0; 3000]), buffer(&cuda, &[0.0; 2]));
        for _ in 0..4 {
            collective_step(&mut cuda, &mut collective, &partials, &mut out, &mut shared);
        }
        if rank == 1 {
            // Before memory is freed, which waits for the other's kernel where both are on one device.
            return drop(collective);
        }
        let step = decoding(&cuda);
        cuda.run(&step, true, |_| Err(kernels::Error::Unsupported("not replayed".into()))).unwrap();
        cuda.synchronize().unwrap();
        let error = collective.check().unwrap_err();
        assert!(matches!(error, Error::Lost { rank: 1, .. }), "{error}");
        assert!(matches!(collective.check(), Err(Error::Ended)));
    });
}

/// In NCCL's own order sums need not have the tree's bits.
#[test]
fn nccl_adds_in_its_own_order() {
    if !present() {
        return;
    }
    each_rank(comm::local_group(3), |rank, transport| {
        let cuda = open(rank);
        let ranges = vec![0..3, 3..4, 4..8];
        let options = ConnectOptions { deterministic: false, ..asked(CollectiveChoice::Nccl) };
        let mut nccl = connect(&cuda, transport, ranges.clone(), options).unwrap();
        let tree = Tree { units: 8 };
        let sum = |units: &std::ops::Range<usize>| units.clone().sum::<usize>() as f32;
        let partial =
            |units: std::ops::Range<usize>| Partial { sum: buffer(&cuda, &[sum(&units); 300]), units };
        let partials: Vec<_> = tree.subtrees(&ranges[rank]).into_iter().map(partial).collect();
        let mut out = buffer(&cuda, &[0.0; 301]);
        nccl.tree_reduce(tree, 300, &partials, &mut out).unwrap();
        nccl.check().unwrap();
        assert_eq!(values(&out), [vec![28.0; 300], vec![0.0]].concat());
    });
}

/// A mesh that loses rank 1 when it is told to, as that of a machine whose process was killed.
struct Breaking(LocalTransport, Arc<AtomicBool>);

impl Transport for Breaking {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn exchange(
        &mut self,
        outgoing: &[(usize, &[u8])],
        incoming: &mut [(usize, &mut [u8])],
    ) -> comm::Result<()> {
        self.0.exchange(outgoing, incoming)
    }

    fn check(&self) -> comm::Result<()> {
        match self.1.load(Ordering::Relaxed) {
            true => Err(Error::Lost { rank: 1, source: std::io::ErrorKind::ConnectionAborted.into() }),
            false => self.0.check(),
        }
    }

    fn abort_handle(&self) -> AbortHandle {
        self.0.abort_handle()
    }
}

/// Rank 1 dies without a word on the board: the mesh tells, and the kernel that waits is ended.
#[test]
fn a_rank_that_died_is_noticed_while_a_kernel_waits() {
    if !present() || waits_on_callers() {
        return;
    }
    for choice in [CollectiveChoice::Peer, CollectiveChoice::Nccl] {
        let over = Barrier::new(2);
        let dead = Arc::new(AtomicBool::new(false));
        let ends = comm::local_group(2).into_iter().map(|end| Breaking(end, dead.clone())).collect();
        each_rank(ends, |rank, transport: Breaking| {
            let cuda = open(rank);
            let mut collective = connect(&cuda, transport, vec![0..1, 1..2], asked(choice)).unwrap();
            if rank == 0 {
                let partials = [Partial { units: 0..1, sum: buffer(&cuda, &[1.0; 8]) }];
                let mut out = buffer(&cuda, &[0.0; 8]);
                collective.tree_reduce(Tree { units: 2 }, 8, &partials, &mut out).unwrap();
                dead.store(true, Ordering::Relaxed);
                let begun = Instant::now();
                cuda.synchronize().unwrap();
                let error = collective.check().unwrap_err();
                assert!(matches!(error, Error::Lost { rank: 1, .. }), "{error}");
                assert!(begun.elapsed() < LONG / 2, "it was freed by the kernel's patience");
                assert!(matches!(collective.check(), Err(Error::Ended)));
            }
            over.wait();
        });
    }
}

#[test]
fn nccl_does_not_wait_for_a_rank_that_is_gone() {
    if !present() {
        return;
    }
    each_rank(comm::local_group(2), |rank, transport| {
        let cuda = open(rank);
        let options = asked(CollectiveChoice::Nccl);
        let mut nccl = connect(&cuda, transport, vec![0..1, 1..2], options).unwrap();
        if rank == 0 {
            let partials = [Partial { units: 0..1, sum: buffer(&cuda, &[1.0; 8]) }];
            let mut out = buffer(&cuda, &[0.0; 8]);
            let called = nccl.tree_reduce(Tree { units: 2 }, 8, &partials, &mut out).and_then(|()| {
                cuda.synchronize()?;
                nccl.check()
            });
            let error = called.unwrap_err();
            assert!(matches!(error, Error::Lost { rank: 1, .. } | Error::Device(_)), "{error}");
            let again = nccl.tree_reduce(Tree { units: 2 }, 8, &partials, &mut out);
            assert!(matches!(again, Err(Error::Ended)), "{again:?}");
        }
    });
}

/// Nobody else comes: the rank gives up when it is told to, and its communicator can be dropped.
#[test]
fn connecting_by_nccl_is_given_up() {
    if !present() {
        return;
    }
    let cuda = open(0);
    let begun = Instant::now();
    let mut go_on = || begun.elapsed() < Duration::from_millis(30);
    let connected = Communicator::connect(&cuda, NcclId::new().unwrap(), 0, 2, &mut go_on);
    assert!(matches!(connected, Err(kernels::Error::Device { .. })), "{connected:?}");
}

#[test]
fn connecting_is_aborted() {
    if !present() {
        return;
    }
    let freed = Barrier::new(2);
    let ends = comm::local_group(2);
    let abort = ends[0].abort_handle();
    each_rank(ends, |rank, transport| {
        if rank == 1 {
            thread::sleep(Duration::from_millis(20));
            abort.abort();
        } else {
            let options = asked(CollectiveChoice::Auto);
            let connected = connect(&open(0), transport, vec![0..1, 1..2], options);
            assert!(matches!(connected, Err(Error::Aborted)));
        }
        freed.wait();
    });
}

/// Connects two ranks, each with its own choice and GPU; the errors that both end with.
fn connecting_fails(choices: [CollectiveChoice; 2], gpus: [usize; 2]) -> Vec<String> {
    each_rank(comm::local_group(2), |rank, transport| {
        let options = asked(choices[rank]);
        let connected = connect(&open(gpus[rank]), transport, vec![0..1, 1..2], options);
        let error = connected.err().unwrap();
        assert!(matches!(error, Error::Unavailable { rank: 1, .. }), "{error}");
        error.to_string()
    })
}

#[test]
fn a_way_that_is_not_open_is_an_error_on_all_ranks() {
    if !present() {
        return;
    }
    use CollectiveChoice::{Auto, Host, Nccl, Peer};
    let expected = "--collective peer is not possible: rank 1: its GPU is that of rank 0, and each rank needs one of its own";
    assert_eq!(connecting_fails([Peer, Peer], [0, 0]), [expected; 2]);
    assert_eq!(
        connecting_fails([Nccl, Auto], [0, 0]),
        [expected.replace("peer", "nccl"), expected.replace("peer", "nccl")]
    );
    for words in connecting_fails([Nccl, Host], [0, 1]) {
        assert!(words.contains("rank 1: it has --collective host, rank 0 has nccl"), "{words}");
    }
}

/// On one GPU neither NCCL nor memory that processes share would do: left to itself, the group takes the host.
#[test]
fn two_ranks_on_one_gpu_go_over_the_host() {
    if !present() {
        return;
    }
    each_rank(comm::local_group(2), |rank, transport| {
        let cuda = open(0);
        let options = asked(CollectiveChoice::Auto);
        let mut collective = connect(&cuda, transport, vec![0..1, 1..2], options).unwrap();
        assert!(!collective.can_be_recorded(), "the host has a part in every call");
        let partials = [Partial { units: rank..rank + 1, sum: buffer(&cuda, &[1.0; 8]) }];
        let mut out = buffer(&cuda, &[0.0; 8]);
        collective.tree_reduce(Tree { units: 2 }, 8, &partials, &mut out).unwrap();
        assert_eq!(values(&out), [2.0; 8]);
    });
}

#[test]
fn what_is_no_shared_memory_is_refused() {
    if !present() {
        return;
    }
    let cuda = open(0);
    let (pipe, _other_end) = std::io::pipe().unwrap();
    let mailbox = Mailbox::import(&cuda, std::os::fd::AsFd::as_fd(&pipe));
    assert!(matches!(mailbox, Err(kernels::Error::Device { .. })), "{mailbox:?}");
    let board = Board::import(&cuda, pipe.into());
    assert!(matches!(board, Err(kernels::Error::Unsupported(_))), "{board:?}");
    // A file that its owner could cut under the feet of others.
    let file = rustix::fs::memfd_create("cut", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    assert!(Board::import(&cuda, file).is_err());
}
