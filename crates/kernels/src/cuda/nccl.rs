//! Collectives over NCCL, on the stream that everything else runs on, and messages from one GPU to another.
//!
//! Communicators are non-blocking: a call that waits for other machines (connecting, the first use of a connection) returns at once and
//! is asked about, so that this thread can give up. One thread drives a communicator, and aborts it.

mod calls;
mod library;
mod outbox;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{CudaEvent, CudaStream};

pub use self::outbox::Outbox;

use self::library::{Config, Handle, IN_PROGRESS, Nccl, RawId, SUCCESS, Status};
use super::Cuda;
use super::device::{Device, failed};
use super::memory::Memory;
use super::record::Records;
use crate::{Error, Result};

/// What fails while nothing in particular is done.
const RUNNING: &str = "running NCCL";
/// Calls whose work may be ahead of the device. With more the driver's queue could fill, and this thread would wait in the driver,
/// where it cannot give up.
const AHEAD: usize = 16;
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

/// NCCL's version, for example 22809 for 2.28.9.
///
/// # Errors
/// [`Error::Unsupported`] where NCCL is missing or older than 2.18: in a sentence for users.
pub fn nccl_version() -> Result<u32> {
    Ok(Nccl::open()?.version)
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
    /// What its calls run on.
    stream: Arc<CudaStream>,
    /// Null once it was aborted.
    handle: Handle,
    rank: usize,
    size: usize,
    /// What others send, and earlier ones that were too small: recorded steps still know them.
    inboxes: Vec<Memory>,
    /// NCCL waits for those that name the communicator.
    records: Rc<RefCell<Records>>,
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
            stream: device.stream().clone(),
            device,
            handle: ptr::null_mut(),
            rank,
            size,
            inboxes: Vec::new(),
            records: cuda.records().clone(),
            ahead: VecDeque::new(),
        };
        let mut config = Config::non_blocking();
        // For ever, as it is small: NCCL may write there until it is connected, also when nobody waits for that any more.
        let handle = Box::leak(Box::new(ptr::null_mut()));
        // SAFETY: `handle` stays; the others are values, or read before this returns.
        let status =
            unsafe { (nccl.functions.begin)(handle, size as i32, RawId(id.0), rank as i32, &raw mut config) };
        communicator.handle = *handle;
        communicator.accept("connecting by NCCL", status)?;
        communicator.settle("connecting by NCCL", go_on)?;
        Ok(communicator)
    }

    /// Whether NCCL knows of nothing wrong.
    ///
    /// # Errors
    /// [`Error::Device`] in its words.
    pub fn check(&self) -> Result<()> {
        self.state(RUNNING).map(drop)
    }

    /// Waits until everything that was begun before has ended well.
    ///
    /// # Errors
    /// [`Error::Device`] in NCCL's words, or where `go_on` said no.
    pub fn wait(&self, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let ended = self.stream.record_event(None).map_err(|e| failed(RUNNING, e))?;
        self.reach(&ended, go_on)
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

    /// Waits until what this rank began has ended and the others have what it sent, then closes the communicator; aborts it where
    /// that takes too long.
    pub fn close(&mut self, go_on: &mut dyn FnMut() -> bool) {
        let limit = Instant::now() + LEAVE_LIMIT;
        let mut go_on = || Instant::now() < limit && go_on();
        let ended = self.wait(&mut go_on);
        if self.handle.is_null() {
            return;
        }
        self.records.borrow_mut().clear();
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
        let stream = &self.stream;
        let status = stream.capture_status().map_err(|e| failed(RUNNING, e))?;
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        self.ahead.push_back(stream.record_event(None).map_err(|e| failed(RUNNING, e))?);
        if self.ahead.len() > AHEAD
            && let Some(event) = self.ahead.pop_front()
        {
            self.reach(&event, go_on)?;
        }
        Ok(())
    }

    fn reach(&self, event: &CudaEvent, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let mut wait = Wait::default();
        while !event.try_is_complete().map_err(|e| failed(RUNNING, e))? {
            self.check()?;
            wait.turn(RUNNING, go_on)?;
        }
        // What failed has ended too.
        self.check()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Who wants to leave in peace has closed it.
        self.abort();
        self.records.borrow_mut().clear();
        let _ = self.device.synchronize();
        let _ = self.stream.synchronize();
    }
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
