//! Collectives by kernels of our own, for ranks that see each other's memory: on several devices of a machine, each in a process of its
//! own or as threads of one, or (threads) on one device.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytemuck::{Pod, Zeroable};

use super::Cuda;
use super::board::{Board, Missed};
use super::buffer::Buffer;
use super::device::{Arguments, Device, Launch};
use super::fold::{FoldProgram, MAX_UNITS, Parts};
use super::mailbox::Mailbox;
use crate::{Error, Partial, Result, Tree};

/// The largest group of ranks that see each other's memory.
pub const MAX_RANKS: usize = 16;

const THREADS: u32 = 256;
/// Blocks of a rank's kernel.
const MAX_BLOCKS: usize = 16;
/// Elements that a block exchanges at a time.
const CHUNK: usize = 1024;
/// Sub-trees that a rank can send.
const MAX_PARTS: usize = 16;
/// Where the letters begin in a mailbox, behind the flags of the blocks, which are zeros at first.
pub(crate) const LETTERS_BYTE: usize = 4096;
/// For rounds in turn: while one is read, the next is written.
pub(crate) const MAILBOX_BYTES: usize = LETTERS_BYTE + 2 * MAX_BLOCKS * MAX_PARTS * CHUNK * size_of::<f32>();
/// Elements that can be gathered: the kernel counts them in 32 bits.
const MAX_GATHERED: usize = 1 << 30;

/// One rank's end of a group. Its calls only begin work; every rank makes the same calls in the same order.
///
/// The kernels of all ranks wait for each other, so they must be able to run at the same time: between two calls a rank may do
/// anything, but once a rank has begun a call, all others begin it without waiting for the device before.
#[derive(Debug)]
pub struct OneShot {
    device: Rc<Device>,
    rank: usize,
    group: Group,
    /// Kept as long as kernels may read them.
    _mailboxes: Vec<Arc<Mailbox>>,
    board: Arc<Board>,
}

/// What a kernel knows of the group (see `one_shot.cu`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Group {
    mailbox: [u64; MAX_RANKS],
    board: u64,
    patience: u64,
    rank: i32,
    size: i32,
    parts: i32,
    unused: i32,
}

/// Where the leaves of a program come from.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Leaves {
    rank: [u8; MAX_UNITS],
    part: [u8; MAX_UNITS],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Columns {
    count: [i32; MAX_RANKS],
    root: i32,
    unused: i32,
}

impl OneShot {
    /// Rank `rank` of as many ranks as there are mailboxes, of which that number is its own; one board is for all. A rank waits for
    /// another for `patience` at most.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for more than [`MAX_RANKS`] ranks, or where a device cannot read another's memory.
    pub fn new(
        cuda: &Cuda,
        rank: usize,
        mailboxes: Vec<Arc<Mailbox>>,
        board: Arc<Board>,
        patience: Duration,
    ) -> Result<Self> {
        let size = mailboxes.len();
        if size > MAX_RANKS || rank >= size {
            return Err(Error::Unsupported(format!(
                "rank {rank} of {size} ranks that share memory: at most {MAX_RANKS} can"
            )));
        }
        let device = cuda.device().clone();
        let mut mailbox = [0; MAX_RANKS];
        for (pointer, of_rank) in mailbox.iter_mut().zip(&mailboxes) {
            of_rank.open_to(&device)?;
            *pointer = of_rank.pointer();
        }
        let patience = nanoseconds(patience);
        let (rank_number, size) = (rank as i32, size as i32);
        let board_pointer = board.pointer();
        let group =
            Group { mailbox, board: board_pointer, patience, rank: rank_number, size, parts: 0, unused: 0 };
        let one_shot = Self { device, rank, group, _mailboxes: mailboxes, board };
        one_shot.load_kernels()?;
        Ok(one_shot)
    }

    /// The driver may load a kernel when it is first launched, and wait for the whole device to do so: never while ranks wait for
    /// each other. So both run once with nothing to do.
    fn load_kernels(&self) -> Result<()> {
        let launch = Launch { grid: (1, 1), threads: THREADS, shared_bytes: 0 };
        let nothing = Reduction {
            own: Parts::new(std::iter::empty()),
            program: FoldProgram::in_order(0),
            leaves: Zeroable::zeroed(),
        };
        // SAFETY: of no elements nothing is read or written but the group's own words.
        unsafe {
            self.device.launch("one_shot_reduce", launch, self.reduce_arguments(0, nothing, 0, 0))?;
            let columns = Zeroable::zeroed();
            self.device.launch("one_shot_gather", launch, self.gather_arguments(0, columns, 0, 0, 0))?;
        }
        self.device.synchronize()
    }

    /// Begins to add the sums of all units along `tree`: `subtrees` are those of every rank, `partials` this rank's, in order, of
    /// each the first `len` elements. `out`, f32 of at least `len` elements, gets the same bits on all ranks.
    ///
    /// # Errors
    /// [`Error::Shape`] for other sub-trees or too short buffers.
    pub fn reduce(
        &mut self,
        tree: Tree,
        len: usize,
        subtrees: &[Vec<Range<usize>>],
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
    ) -> Result<()> {
        const OP: &str = "tree_reduce";
        let own = partials.iter().map(|partial| partial.sum.floats(OP, &self.device, len));
        let own = own.collect::<Result<Vec<u64>>>()?;
        if own.len() > MAX_PARTS || subtrees.iter().any(|theirs| theirs.len() > MAX_PARTS) {
            return Err(Error::Unsupported(format!("a rank with more than {MAX_PARTS} sub-trees")));
        }
        let out = out.floats(OP, &self.device, len)?;
        let all: Vec<Range<usize>> = subtrees.iter().flatten().cloned().collect();
        let whole = 0..tree.units;
        let program = FoldProgram::new(&all, std::slice::from_ref(&whole))?;
        let mut leaves = Leaves { rank: [0; MAX_UNITS], part: [0; MAX_UNITS] };
        let sources =
            subtrees.iter().enumerate().flat_map(|(r, theirs)| (0..theirs.len()).map(move |p| (r, p)));
        for (index, (rank, part)) in sources.enumerate() {
            (leaves.rank[index], leaves.part[index]) = (rank as u8, part as u8);
        }
        let work = Reduction { own: Parts::new(own.iter().copied()), program, leaves };
        let arguments = self.reduce_arguments(own.len(), work, out, len);
        // SAFETY: buffers of as many elements as were checked; mailboxes and board are kept until the device has ended.
        unsafe { self.device.launch("one_shot_reduce", grid(len), arguments) }
    }

    /// Begins to put the ranks' columns side by side on rank `root`: `x` is f32 `[rows, counts[rank]]`, `out` there
    /// `[rows, Σ counts]`, untouched elsewhere.
    ///
    /// # Errors
    /// [`Error::Shape`] for too short buffers or counts that are not of this group.
    pub fn gather(
        &mut self,
        root: usize,
        rows: usize,
        x: &Buffer,
        counts: &[usize],
        out: &mut Buffer,
    ) -> Result<()> {
        const OP: &str = "gather";
        let all = rows.saturating_mul(counts.iter().sum());
        if counts.len() != self.group.size as usize || root >= counts.len() || all > MAX_GATHERED {
            let detail = format!("{rows} rows of {counts:?} columns on rank {root} of {}", self.group.size);
            return Err(Error::Shape { op: OP, detail });
        }
        let x = x.floats(OP, &self.device, rows * counts[self.rank])?;
        let out = out.floats(OP, &self.device, if root == self.rank { all } else { 0 })?;
        let mut columns = Columns { count: [0; MAX_RANKS], root: root as i32, unused: 0 };
        columns.count.iter_mut().zip(counts).for_each(|(to, &count)| *to = count as i32);
        let longest = counts.iter().max().map_or(0, |count| rows * count);
        let arguments = self.gather_arguments(x, columns, rows, out, longest);
        // SAFETY: as above.
        unsafe { self.device.launch("one_shot_gather", grid(longest), arguments) }
    }

    /// Begins to copy the first `len` elements of `x`, f32, from rank `root` to all others, as bits: every rank gathers the columns of
    /// the one that has any.
    ///
    /// # Errors
    /// [`Error::Shape`] for a too short buffer or a root that is not of this group.
    pub fn broadcast(&mut self, root: usize, len: usize, x: &mut Buffer) -> Result<()> {
        const OP: &str = "broadcast";
        if root >= self.group.size as usize || len > MAX_GATHERED {
            let detail = format!("{len} elements of rank {root} of {}", self.group.size);
            return Err(Error::Shape { op: OP, detail });
        }
        let x = x.floats(OP, &self.device, len)?;
        let mut columns = Columns { count: [0; MAX_RANKS], root: self.rank as i32, unused: 0 };
        columns.count[root] = len as i32;
        let arguments = self.gather_arguments(x, columns, 1, x, len);
        // SAFETY: as above. The root's elements are written where they were read, by the same threads.
        unsafe { self.device.launch("one_shot_gather", grid(len), arguments) }
    }

    /// How long this rank waits for another from the next call on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.group.patience = nanoseconds(patience);
    }

    /// Waits until what this rank began has ended; ends it where `go_on`, which is asked again and again, says no.
    pub fn finish(&self, go_on: &mut dyn FnMut() -> bool) {
        if !matches!(self.device.synchronize_while(go_on), Ok(true)) {
            self.abort();
        }
    }

    /// Ends this rank's waits for others; what it began gives no result.
    pub fn abort(&self) {
        self.board.abort(self.rank);
    }

    /// Why a call that the device has ended gave no result; then no later one does.
    pub fn missed(&self) -> Option<Missed> {
        self.board.missed(self.rank)
    }

    fn reduce_arguments(&self, parts: usize, work: Reduction, out: u64, len: usize) -> Arguments {
        let group = Group { parts: parts as i32, ..self.group };
        let arguments = Arguments::default().with(group).with(work.own).with(work.program);
        arguments.with(work.leaves).with(out).with(len as i64)
    }

    fn gather_arguments(&self, x: u64, columns: Columns, rows: usize, out: u64, longest: usize) -> Arguments {
        let arguments = Arguments::default().with(self.group).with(x).with(columns);
        arguments.with(rows as i32).with(out).with(longest as i64)
    }
}

impl Drop for OneShot {
    fn drop(&mut self) {
        // What this rank began is for the others too. Its kernels wait no longer than they may.
        let _ = self.device.synchronize();
        self.board.leave(self.rank);
    }
}

/// What is added, and how.
struct Reduction {
    own: Parts,
    program: FoldProgram,
    leaves: Leaves,
}

fn nanoseconds(patience: Duration) -> u64 {
    u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// The same on all ranks.
fn grid(len: usize) -> Launch {
    Launch { grid: (len.div_ceil(CHUNK).min(MAX_BLOCKS) as u32, 1), threads: THREADS, shared_bytes: 0 }
}
