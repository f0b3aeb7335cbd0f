//! Connecting ranks by memory of their GPUs: mailboxes and the board change hands, and a sum shows that every GPU sees the others.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::cuda::{Board, Buffer, Mailbox, OneShot};
use kernels::{Backend, Cuda, DType, Partial, Tree};

use super::agree::{Agreed, agree};
use super::guard::Guard;
use super::offer::Place;
use super::post::Post;
use crate::collective::Result;
use crate::transport::Transport;

/// The rank whose board is everybody's.
const BOARD_RANK: usize = 0;
/// How long the first sum may take. It is no step of a model: GPUs that see each other are done in microseconds.
const PROOF_LIMIT: Duration = Duration::from_secs(20);
/// Elements of the first sum: two rounds of every block, so that all of a mailbox is used.
const PROOF_ELEMENTS: usize = 1 << 15;

/// What a rank gives to the others of its machine.
#[derive(Debug)]
pub(super) struct Berth {
    post: Post,
    mailbox: Mailbox,
    board: Option<Board>,
}

impl Berth {
    /// Makes it on this rank's GPU, or says why that is not possible.
    pub(super) fn new(cuda: &Cuda, rank: usize) -> std::result::Result<Self, String> {
        let words = |error: kernels::Error| error.to_string();
        let mailbox = Mailbox::new(cuda).map_err(words)?;
        let board = (rank == BOARD_RANK).then(|| Board::new(cuda)).transpose().map_err(words)?;
        Ok(Self { post: Post::open()?, mailbox, board })
    }

    /// Where the others reach it.
    pub(super) fn place(&self) -> Place {
        self.post.place()
    }
}

/// Connects all ranks, each of which calls this with its berth and the places of all within `limit`, which later is how long a kernel
/// waits for that of another rank.
pub(super) fn connect<T: Transport>(
    cuda: &Cuda,
    guard: &mut Guard<T>,
    berth: Berth,
    places: &[Place],
    limit: Duration,
) -> Result<Agreed<OneShot>> {
    let traded = trade(guard, &berth, places, Instant::now() + limit)?;
    let opened = traded.and_then(|files| open(cuda, guard, berth, files));
    // Nobody begins a kernel that waits for the others before all can.
    let one_shot = match agree(&mut guard.transport, opened)? {
        Ok(one_shot) => one_shot,
        Err(obstacle) => return Ok(Err(obstacle)),
    };
    let proven = prove(cuda, guard, one_shot, limit);
    // Whoever is gone, or was told to stop, made the sum fail for another reason.
    guard.trouble()?;
    agree(&mut guard.transport, proven)
}

fn trade<T: Transport>(
    guard: &mut Guard<T>,
    berth: &Berth,
    places: &[Place],
    deadline: Instant,
) -> Result<std::result::Result<Vec<Vec<OwnedFd>>, String>> {
    let mailbox = match berth.mailbox.export() {
        Ok(file) => file,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let own: Vec<BorrowedFd<'_>> =
        std::iter::once(mailbox.as_fd()).chain(berth.board.as_ref().map(Board::export)).collect();
    let rank = guard.transport.rank();
    berth.post.trade(rank, places, &own, deadline, &mut || guard.trouble())
}

/// Takes what the others sent: of each its mailbox, of rank 0 also the board.
fn open<T: Transport>(
    cuda: &Cuda,
    guard: &Guard<T>,
    berth: Berth,
    files: Vec<Vec<OwnedFd>>,
) -> std::result::Result<OneShot, String> {
    let rank = guard.transport.rank();
    let (mut own, mut board) = (Some(berth.mailbox), berth.board);
    let mut mailboxes = Vec::with_capacity(files.len());
    for (from, files) in files.into_iter().enumerate() {
        let words = |error: kernels::Error| format!("what rank {from} shares: {error}");
        let mut files = files.into_iter();
        let mailbox = match (from == rank, files.next()) {
            (true, _) => own.take(),
            (false, Some(file)) => Some(Mailbox::import(cuda, file.as_fd()).map_err(words)?),
            (false, None) => None,
        };
        mailboxes.push(Arc::new(mailbox.ok_or_else(|| format!("rank {from} sent no memory"))?));
        if let (None, BOARD_RANK, Some(file)) = (&board, from, files.next()) {
            board = Some(Board::import(cuda, file).map_err(words)?);
        }
    }
    let board = Arc::new(board.ok_or_else(|| format!("rank {BOARD_RANK} sent no board"))?);
    let told = Arc::downgrade(&board);
    guard.transport.abort_handle().on_abort(move || {
        if let Some(board) = told.upgrade() {
            board.abort(rank);
        }
    });
    OneShot::new(cuda, rank, mailboxes, board, PROOF_LIMIT).map_err(|error| error.to_string())
}

/// Adds known numbers: a machine may say that its GPUs reach each other and yet lose what they write (on some, when its IOMMU is on).
fn prove<T: Transport>(
    cuda: &Cuda,
    guard: &Guard<T>,
    mut one_shot: OneShot,
    limit: Duration,
) -> std::result::Result<OneShot, String> {
    let (rank, size) = (guard.transport.rank(), guard.transport.size());
    let sum = first_sum(cuda, &mut one_shot, rank, size).map_err(|error| error.to_string())?;
    if let Some(missed) = one_shot.missed() {
        return Err(format!("a first sum over the GPUs' memory failed: {missed}"));
    }
    let expected = |index: usize| (0..size).map(|rank| number(rank, index)).sum::<f32>();
    if let Some(index) = (0..PROOF_ELEMENTS).find(|&index| sum[index] != expected(index)) {
        let (found, expected) = (sum[index], expected(index));
        return Err(format!("a first sum over the GPUs' memory gave {found} where {expected} belongs"));
    }
    one_shot.set_patience(limit);
    Ok(one_shot)
}

fn first_sum(cuda: &Cuda, one_shot: &mut OneShot, rank: usize, size: usize) -> kernels::Result<Vec<f32>> {
    let buffer = || cuda.buffer(DType::F32, 1, PROOF_ELEMENTS);
    let numbers: Vec<f32> = (0..PROOF_ELEMENTS).map(|index| number(rank, index)).collect();
    let (mut own, mut out): (Buffer, Buffer) = (buffer()?, buffer()?);
    own.write(&numbers)?;
    let tree = Tree { units: size };
    let subtrees: Vec<_> = (0..size).map(|rank| tree.subtrees(&(rank..rank + 1))).collect();
    let partial = Partial { units: rank..rank + 1, sum: own };
    one_shot.reduce(tree, PROOF_ELEMENTS, &subtrees, &[partial], &mut out)?;
    out.read(PROOF_ELEMENTS)
}

/// What a rank brings to the first sum; small whole numbers, so the sum is exact.
fn number(rank: usize, index: usize) -> f32 {
    (index % 1021 * (rank + 1)) as f32
}
