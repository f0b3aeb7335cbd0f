//! Ranks as threads of one process, whose GPUs read each other's memory, or that share one GPU.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::cuda::{Board, Buffer, Mailbox, OneShot};
use kernels::{Cuda, Partial, Tree};

use super::direct::lost_by;
use super::meeting::{Call, Meeting};
use crate::collective::{AbortHandle, Collective, Error, Result};
use crate::ranges::Ranges;

const LATE: &str =
    "its kernel did not run in time; with several ranks on one GPU, CUDA_DEVICE_MAX_CONNECTIONS=32 may help";

/// A place in a group, for the thread that is to be this rank. What it becomes there does not leave that thread.
#[derive(Debug)]
pub struct LocalGpuSeat {
    rank: usize,
    meeting: Arc<Meeting>,
}

/// The places of a group of `size` ranks, in order of their numbers.
pub fn local_gpu_group(size: usize) -> Vec<LocalGpuSeat> {
    let meeting = Arc::new(Meeting::new(size));
    (0..size).map(|rank| LocalGpuSeat { rank, meeting: meeting.clone() }).collect()
}

impl Drop for LocalGpuSeat {
    fn drop(&mut self) {
        self.meeting.leave(self.rank);
    }
}

/// One rank's end of a group of threads: one-shot kernels over memory that all of the group's devices see, which add along the
/// tree, so the bits are those of every other collective.
///
/// Kernels wait for each other on the device, so all ranks must be able to run at once. What makes the driver wait for a whole
/// device (freeing memory, loading a kernel) must therefore not fall between one rank's launch and another's: the threads meet
/// before they launch, and again after. A recorded call does not meet; within a step that is replayed nothing of the kind
/// happens, and before the next step begins they meet once more. Drop this before other memory of the device is freed, so that the others see it go. Several ranks on one device need a hardware
/// queue each: set `CUDA_DEVICE_MAX_CONNECTIONS=32` for more than four.
#[derive(Debug)]
pub struct LocalGpu {
    // Dropped first: it tells the kernels of the others.
    one_shot: OneShot,
    seat: LocalGpuSeat,
    ranges: Ranges,
    abort: AbortHandle,
    /// A call failed: the ranks may disagree about what comes next.
    lost: bool,
}

impl LocalGpuSeat {
    /// The number of this place.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Takes the place with this thread's GPU, and waits for the others. `ranges`: the units of every rank, in order. `abort` frees
    /// every wait; `limit` is how long a rank waits here for the others, and a kernel for the kernels of others.
    ///
    /// # Errors
    /// [`Error::Lost`] where another does not come, [`Error::Device`] where a GPU cannot read another's memory, [`Error::Shape`] for
    /// false ranges.
    pub fn join(
        self,
        cuda: &Cuda,
        ranges: Vec<Range<usize>>,
        abort: AbortHandle,
        limit: Duration,
    ) -> Result<LocalGpu> {
        let ranges = Ranges::new(ranges, self.meeting.size())?;
        let board = || Ok(Board::new(cuda)?);
        let deadline = Instant::now() + limit;
        let (mailboxes, board) =
            self.meeting.join(self.rank, Mailbox::new(cuda)?, board, &abort, deadline)?;
        let (rank, told) = (self.rank, Arc::downgrade(&board));
        abort.on_abort(move || {
            if let Some(board) = told.upgrade() {
                board.abort(rank);
            }
        });
        let one_shot = OneShot::new(cuda, rank, mailboxes, board, limit)?;
        Ok(LocalGpu { one_shot, seat: self, ranges, abort, lost: false })
    }
}

impl LocalGpu {
    /// Has all ranks begin a kernel that waits for the kernels of the others.
    fn call(&mut self, call: Call, begin: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.check()?;
        let result = self.together(call, begin);
        self.lost = result.is_err();
        result
    }

    fn together(&mut self, call: Call, begin: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let (meeting, rank) = (self.seat.meeting.clone(), self.seat.rank);
        meeting.meet(rank, call, &self.abort)?;
        begin(self)?;
        meeting.meet(rank, Call::Begun, &self.abort)
    }
}

impl Collective<Buffer> for LocalGpu {
    fn rank(&self) -> usize {
        self.seat.rank
    }

    fn size(&self) -> usize {
        self.seat.meeting.size()
    }

    fn tree_reduce(
        &mut self,
        tree: Tree,
        len: usize,
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
    ) -> Result<()> {
        self.call(Call::Reduce { len }, |it| {
            it.ranges.check_reduce(tree, it.seat.rank, partials.iter().map(|partial| &partial.units))?;
            Ok(it.one_shot.reduce(tree, len, &it.ranges.subtrees(tree), partials, out)?)
        })
    }

    fn gather(
        &mut self,
        root: usize,
        rows: usize,
        x: &Buffer,
        counts: &[usize],
        out: &mut Buffer,
    ) -> Result<()> {
        self.call(Call::Gather { root, elements: rows * counts.iter().sum::<usize>() }, |it| {
            it.ranges.check_gather(root, counts)?;
            Ok(it.one_shot.gather(root, rows, x, counts, out)?)
        })
    }

    fn broadcast(&mut self, root: usize, len: usize, x: &mut Buffer) -> Result<()> {
        self.call(Call::Broadcast { root, len }, |it| {
            it.ranges.check_broadcast(root)?;
            Ok(it.one_shot.broadcast(root, len, x)?)
        })
    }

    fn begin_step(&mut self) -> Result<()> {
        self.check()?;
        let met = self.seat.meeting.meet(self.seat.rank, Call::Step, &self.abort);
        self.lost = met.is_err();
        met
    }

    fn can_be_recorded(&self) -> bool {
        true
    }

    fn check(&mut self) -> Result<()> {
        if self.lost {
            return Err(Error::Ended);
        }
        let Some(missed) = self.one_shot.missed() else { return Ok(()) };
        self.lost = true;
        Err(lost_by(missed, LATE))
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}
