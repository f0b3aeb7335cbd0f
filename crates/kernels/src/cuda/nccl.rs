//! Collectives over NCCL, on the stream that everything else runs on.
//!
//! Communicators are non-blocking: a call that waits for other machines (connecting, the first use of a connection) returns at once and
//! is asked about, so that this thread can give up. One thread drives a communicator, and aborts it.

mod library;

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::ptr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUstreamCaptureStatus;

use self::library::{Config, FLOAT32, Handle, IN_PROGRESS, Nccl, RawId, SUCCESS, SUM, Status};
use super::Cuda;
use super::buffer::Buffer;
use super::device::{Device, failed};
use super::fold::{FoldProgram, Outputs, Parts, fold, place_columns};
use super::memory::Memory;
use crate::{Error, Partial, Result, Tree};

/// Calls whose work may be ahead of the device. With more the driver's queue could fill, and this thread would wait in the driver,
/// where it cannot give up.
const AHEAD: usize = 16;
/// Up to this many elements of a sum (256 KiB), latency counts more than bytes: everybody gets everything.
const ONE_SHOT_ELEMENTS: usize = 1 << 16;
/// Parts and shares begin on a multiple of this many elements: what `fold` needs.
const ALIGNMENT: usize = 64;
/// How long a wait looks without pause, and how long it pauses then.
const AWAKE: Duration = Duration::from_micros(100);
const NAP: Duration = Duration::from_micros(20);
/// How long the last messages may take when a rank leaves.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// What the ranks of a group must have in common to find each other; rank 0 makes it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NcclId(pub [u8; 128]);

impl NcclId {
    /// A new one. It tells an address of this machine, and is as good as a password until the group stands.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where NCCL is missing or older than 2.18; [`Error::Device`] in its words.
    pub fn new() -> Result<Self> {
        let nccl = Nccl::open()?;
        let mut id = RawId([0; 128]);
        // SAFETY: writes the id.
        match unsafe { (nccl.functions.unique_id)(&raw mut id) } {
            SUCCESS => Ok(Self(id.0)),
            status => Err(nccl.failed("making an id for NCCL", status, ptr::null_mut())),
        }
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NcclId")
    }
}

/// One rank's communicator.
///
/// Calls take `go_on`, which is asked while they wait for others: if it says no they fail, and the communicator is to be aborted.
pub struct Communicator {
    nccl: &'static Nccl,
    device: Rc<Device>,
    /// Null once it was aborted.
    handle: Handle,
    rank: usize,
    size: usize,
    /// What others send, and earlier ones that were too small: recorded steps still know them.
    inboxes: Vec<Memory>,
    /// The ends of the latest calls.
    ahead: VecDeque<CudaEvent>,
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, size, .. } = self;
        f.debug_struct("Communicator").field("rank", rank).field("size", size).finish_non_exhaustive()
    }
}

impl Communicator {
    /// Connects with the other ranks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where NCCL is missing or too old, [`Error::Device`] in its words or where it gave up.
    pub fn connect(
        cuda: &Cuda,
        id: NcclId,
        rank: usize,
        size: usize,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Self> {
        let nccl = Nccl::open()?;
        let device = cuda.device().clone();
        device.bind()?;
        let mut communicator = Self {
            nccl,
            device,
            handle: ptr::null_mut(),
            rank,
            size,
            inboxes: Vec::new(),
            ahead: VecDeque::new(),
        };
        let mut config = Config::non_blocking();
        let handle = &raw mut communicator.handle;
        // SAFETY: `handle` is written before this returns; the others are values, or read before it returns.
        let status =
            unsafe { (nccl.functions.begin)(handle, size as i32, RawId(id.0), rank as i32, &raw mut config) };
        communicator.accept("connecting by NCCL", status)?;
        communicator.settle("connecting by NCCL", go_on)?;
        Ok(communicator)
    }

    /// Whether NCCL knows of nothing wrong.
    ///
    /// # Errors
    /// [`Error::Device`] in its words.
    pub fn check(&self) -> Result<()> {
        self.state("running NCCL").map(drop)
    }

    /// Ends everything that this communicator began, on the device too. What it was to give is not there.
    pub fn abort(&mut self) {
        let handle = std::mem::replace(&mut self.handle, ptr::null_mut());
        if handle.is_null() {
            return;
        }
        // NCCL stops its kernels at once, then waits for the records that name the communicator; this thread is the one that
        // forgets them. The communicator changes hands: it is never used by two threads at a time.
        let (handle, abort) = (handle as usize, self.nccl.functions.abort);
        let body = move || {
            // SAFETY: a communicator that nobody else knows any more.
            unsafe { abort(handle as Handle) };
        };
        if std::thread::Builder::new().name("nccl-abort".into()).spawn(body).is_err() {
            body();
        }
    }

    /// Begins to add the sums of all units, in an order that is NCCL's own: `partials` are this rank's sub-trees, of each the first
    /// `len` elements. `out` is f32 of at least `len` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] for too short buffers, [`Error::Device`] where NCCL fails or gave up.
    pub fn all_reduce(
        &mut self,
        len: usize,
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let (parts, out) = self.addresses(len, partials, out)?;
        if len == 0 {
            return Ok(());
        }
        let outputs = Outputs::new(std::iter::once(out));
        let program = FoldProgram::in_order(parts.len());
        // SAFETY: the sizes were checked.
        unsafe { fold(&self.device, Parts::new(parts.into_iter()), program, outputs, len)? };
        self.group("adding by NCCL", go_on, |it| {
            let stream = it.device.stream().cu_stream().cast();
            // SAFETY: as many elements as were checked, in place.
            unsafe {
                (it.nccl.functions.all_reduce)(out as _, out as _, len, FLOAT32, SUM, it.handle, stream)
            }
        })?;
        self.stay_near(go_on)
    }

    /// Likewise along `tree`: every rank gets the same bits. `subtrees` are those of every rank.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    pub fn tree_reduce(
        &mut self,
        tree: Tree,
        len: usize,
        subtrees: &[Vec<Range<usize>>],
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let (own, out) = self.addresses(len, partials, out)?;
        if len == 0 {
            return Ok(());
        }
        let cut = |rank| if rank == self.size { len } else { len * rank / self.size / ALIGNMENT * ALIGNMENT };
        let shares: Vec<Range<usize>> = if len <= ONE_SHOT_ELEMENTS {
            vec![0..len; self.size]
        } else {
            (0..self.size).map(|rank| cut(rank)..cut(rank + 1)).collect()
        };
        let share = shares[self.rank].clone();

        let stride = share.len().next_multiple_of(ALIGNMENT);
        let inbox = self.inbox(subtrees.iter().map(Vec::len).sum::<usize>() * stride)?;
        let mut leaves = Vec::new();
        let mut messages = Vec::new();
        let mut free = inbox;
        for (rank, theirs) in subtrees.iter().enumerate() {
            if rank == self.rank {
                leaves.extend(own.iter().map(|&part| element(part, share.start)));
                continue;
            }
            messages.extend(
                own.iter().map(|&p| Message::to(rank, element(p, shares[rank].start), shares[rank].len())),
            );
            for _ in theirs {
                messages.push(Message::from(rank, free, share.len()));
                leaves.push(free);
                free = element(free, stride);
            }
        }
        self.exchange(&messages, go_on)?;
        let all: Vec<_> = subtrees.iter().flatten().cloned().collect();
        let whole = 0..tree.units;
        let program = FoldProgram::new(&all, std::slice::from_ref(&whole))?;
        let outputs = Outputs::new(std::iter::once(element(out, share.start)));
        // SAFETY: each leaf has the share's elements, aligned as shares are.
        unsafe { fold(&self.device, Parts::new(leaves.into_iter()), program, outputs, share.len())? };

        if share.len() < len {
            let others = (0..self.size).filter(|rank| *rank != self.rank);
            let both = others.flat_map(|rank| {
                let theirs = &shares[rank];
                let to = Message::to(rank, element(out, share.start), share.len());
                [to, Message::from(rank, element(out, theirs.start), theirs.len())]
            });
            self.exchange(&both.collect::<Vec<_>>(), go_on)?;
        }
        self.stay_near(go_on)
    }

    /// Begins to put the ranks' columns side by side on rank `root`: `x` is f32 `[rows, counts[rank]]`, `out` there
    /// `[rows, Σ counts]`, untouched elsewhere.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    pub fn gather(
        &mut self,
        root: usize,
        rows: usize,
        x: &Buffer,
        counts: &[usize],
        out: &mut Buffer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        const OP: &str = "gather";
        let all = counts.iter().sum::<usize>();
        if i32::try_from(rows.saturating_mul(all)).is_err() {
            return Err(Error::Shape { op: OP, detail: format!("{rows} rows of {all} columns") });
        }
        let x = x.floats(OP, &self.device, rows * counts[self.rank])?;
        if self.rank != root {
            self.exchange(&[Message::to(root, x, rows * counts[self.rank])], go_on)?;
            return self.stay_near(go_on);
        }
        let out = out.floats(OP, &self.device, rows * all)?;
        let mut free = self.inbox(rows * all)?;
        let mut sources = Vec::new();
        let mut messages = Vec::new();
        for (rank, count) in counts.iter().enumerate() {
            if rank == self.rank {
                sources.push(x);
                continue;
            }
            messages.push(Message::from(rank, free, rows * count));
            sources.push(free);
            free = element(free, rows * count);
        }
        self.exchange(&messages, go_on)?;
        let mut first = 0;
        for (source, &count) in sources.into_iter().zip(counts) {
            // SAFETY: the sizes were checked; the inbox holds what was received.
            unsafe { place_columns(&self.device, source, (rows, count), out, (first, all))? };
            first += count;
        }
        self.stay_near(go_on)
    }

    /// Waits until what this rank began has ended and the others have what it sent, then closes the communicator; aborts it where
    /// that takes too long.
    pub fn close(&mut self, go_on: &mut dyn FnMut() -> bool) {
        let limit = Instant::now() + LEAVE_LIMIT;
        let mut go_on = || Instant::now() < limit && go_on();
        let ended = self.device.stream().record_event(None);
        let ended = ended.map_err(|e| failed("leaving NCCL", e)).and_then(|e| self.reach(&e, &mut go_on));
        if self.handle.is_null() {
            return;
        }
        // SAFETY: a communicator whose work has ended.
        let finish = |it: &Self| it.accept("leaving NCCL", unsafe { (it.nccl.functions.finish)(it.handle) });
        let left = ended.and_then(|()| finish(self)).and_then(|()| self.settle("leaving NCCL", &mut go_on));
        if left.is_err() {
            return self.abort();
        }
        let handle = std::mem::replace(&mut self.handle, ptr::null_mut());
        // SAFETY: a communicator that was finished and that nobody knows any more.
        unsafe { (self.nccl.functions.destroy)(handle) };
    }

    fn addresses(&self, len: usize, partials: &[Partial<Buffer>], out: &Buffer) -> Result<(Vec<u64>, u64)> {
        const OP: &str = "tree_reduce";
        let parts = partials.iter().map(|partial| partial.sum.floats(OP, &self.device, len));
        Ok((parts.collect::<Result<_>>()?, out.floats(OP, &self.device, len)?))
    }

    /// The address of room for `len` elements.
    fn inbox(&mut self, len: usize) -> Result<u64> {
        let bytes = len.next_power_of_two() * size_of::<f32>();
        if let Some(inbox) = self.inboxes.last().filter(|inbox| inbox.bytes() >= bytes) {
            return Ok(inbox.pointer());
        }
        let inbox = Memory::allocate(&self.device, "what other ranks send", bytes)?;
        let pointer = inbox.pointer();
        self.inboxes.push(inbox);
        Ok(pointer)
    }

    /// Begins all of these at once, so that they cannot block each other.
    fn exchange(&mut self, messages: &[Message], go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        if messages.iter().all(|message| message.len == 0) {
            return Ok(());
        }
        self.group("exchanging by NCCL", go_on, |it| {
            let stream = it.device.stream().cu_stream().cast();
            let functions = &it.nccl.functions;
            for &Message { peer, address, len, sent } in messages.iter().filter(|message| message.len > 0) {
                // SAFETY: the addresses hold as many elements until the device has ended this.
                let status = unsafe {
                    match sent {
                        true => (functions.send)(address as _, len, FLOAT32, peer as i32, it.handle, stream),
                        false => {
                            (functions.receive)(address as _, len, FLOAT32, peer as i32, it.handle, stream)
                        }
                    }
                };
                if status != SUCCESS && status != IN_PROGRESS {
                    return status;
                }
            }
            SUCCESS
        })
    }

    /// Begins what `calls` calls, as one operation.
    fn group(
        &mut self,
        what: &str,
        go_on: &mut dyn FnMut() -> bool,
        calls: impl FnOnce(&Self) -> Status,
    ) -> Result<()> {
        if self.handle.is_null() {
            return Err(aborted(what));
        }
        // SAFETY: no arguments.
        let started = unsafe { (self.nccl.functions.group_start)() };
        self.accept(what, started)?;
        let called = calls(self);
        // SAFETY: as above; called also after a failure, since the group is the thread's.
        let ended = unsafe { (self.nccl.functions.group_end)() };
        self.accept(what, called)?;
        self.accept(what, ended)?;
        self.settle(what, go_on)
    }

    fn accept(&self, what: &str, status: Status) -> Result<()> {
        match status {
            SUCCESS | IN_PROGRESS => Ok(()),
            other => Err(self.nccl.failed(what, other, self.handle)),
        }
    }

    /// Whether NCCL has done what it was called for (on the host: the device may not have begun it).
    fn state(&self, what: &str) -> Result<bool> {
        if self.handle.is_null() {
            return Err(aborted(what));
        }
        let mut state = SUCCESS;
        // SAFETY: writes one integer.
        let status = unsafe { (self.nccl.functions.state)(self.handle, &raw mut state) };
        self.accept(what, status)?;
        self.accept(what, state)?;
        Ok(state == SUCCESS)
    }

    fn settle(&mut self, what: &str, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let mut wait = Wait::default();
        while !self.state(what)? {
            wait.turn(what, go_on)?;
        }
        Ok(())
    }

    /// Lets the device come near.
    fn stay_near(&mut self, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let stream = self.device.stream();
        let status = stream.capture_status().map_err(|e| failed("running NCCL", e))?;
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        self.ahead.push_back(stream.record_event(None).map_err(|e| failed("running NCCL", e))?);
        if self.ahead.len() > AHEAD
            && let Some(event) = self.ahead.pop_front()
        {
            self.reach(&event, go_on)?;
        }
        Ok(())
    }

    fn reach(&self, event: &CudaEvent, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let mut wait = Wait::default();
        while !event.try_is_complete().map_err(|e| failed("running NCCL", e))? {
            self.check()?;
            wait.turn("running NCCL", go_on)?;
        }
        Ok(())
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Who wants to leave in peace has closed it.
        self.abort();
        let _ = self.device.synchronize();
    }
}

/// One part of an exchange.
struct Message {
    peer: usize,
    address: u64,
    /// Elements.
    len: usize,
    sent: bool,
}

impl Message {
    fn to(peer: usize, address: u64, len: usize) -> Self {
        Self { peer, address, len, sent: true }
    }

    fn from(peer: usize, address: u64, len: usize) -> Self {
        Self { peer, address, len, sent: false }
    }
}

/// The address of an element of f32.
fn element(address: u64, index: usize) -> u64 {
    address + (index * size_of::<f32>()) as u64
}

fn aborted(what: &str) -> Error {
    Error::Device { what: what.into(), why: "the communicator was aborted".into() }
}

/// A wait for something that others must do.
#[derive(Default)]
struct Wait {
    begun: Option<Instant>,
}

impl Wait {
    /// Lets others run; after a while asks whether to go on.
    fn turn(&mut self, what: &str, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        if self.begun.get_or_insert_with(Instant::now).elapsed() < AWAKE {
            std::thread::yield_now();
            return Ok(());
        }
        if !go_on() {
            return Err(Error::Device { what: what.into(), why: "it was not to wait any longer".into() });
        }
        std::thread::sleep(NAP);
        Ok(())
    }
}
