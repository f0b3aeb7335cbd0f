//! Memory that the ranks of a group share, each on a thread of its own: mailboxes on the devices, and a board on the host.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{CudaContext, result, sys};

use super::device::{Device, failed};
use crate::{Error, Result};

/// The largest group of ranks that see each other's memory.
pub const MAX_RANKS: usize = 16;

/// Blocks of a rank's kernel.
pub(crate) const MAX_BLOCKS: usize = 16;
/// Elements that a block exchanges at a time.
pub(crate) const CHUNK: usize = 1024;
/// Sub-trees that a rank can send.
pub(crate) const MAX_PARTS: usize = 16;
/// Where the letters begin, behind the flags of the blocks.
const LETTERS_BYTE: usize = 4096;
/// For rounds in turn: while one is read, the next is written.
const MAILBOX_BYTES: usize = LETTERS_BYTE + 2 * MAX_BLOCKS * MAX_PARTS * CHUNK * size_of::<f32>();

/// What a rank sends, in its device's memory (`one_shot.cu` says how it is laid out). All ranks of a group hold all mailboxes.
#[derive(Debug)]
pub struct Mailbox {
    context: Arc<CudaContext>,
    pointer: u64,
}

impl Mailbox {
    /// An empty one, of 2 MiB.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        // SAFETY: asks for memory, which `drop` gives back.
        let pointer = unsafe { result::malloc_sync(MAILBOX_BYTES) }
            .map_err(|_| Error::OutOfMemory { what: "a mailbox", bytes: MAILBOX_BYTES })?;
        let mailbox = Self { context: device.context().clone(), pointer };
        // SAFETY: the allocation is that long.
        unsafe { result::memset_d8_async(pointer, 0, MAILBOX_BYTES, device.stream().cu_stream()) }
            .map_err(|e| failed("clearing a mailbox", e))?;
        // Before any rank looks into it.
        device.synchronize()?;
        Ok(mailbox)
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Lets `device` read it.
    pub(crate) fn open_to(&self, device: &Device) -> Result<()> {
        let (own, other) = (device.context(), &self.context);
        if own.ordinal() == other.ordinal() {
            return Ok(());
        }
        device.bind()?;
        let between = || format!("sharing memory between GPU {} and GPU {}", own.ordinal(), other.ordinal());
        let mut possible = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDeviceCanAccessPeer(&raw mut possible, own.cu_device(), other.cu_device()) }
            .result()
            .map_err(|e| failed(between(), e))?;
        if possible == 0 {
            return Err(Error::Unsupported(format!(
                "GPU {} cannot read the memory of GPU {}: use NCCL, or collectives over the host",
                own.ordinal(),
                other.ordinal()
            )));
        }
        // SAFETY: the context lives as long as this.
        match unsafe { sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0) } {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            other => Err(failed(between(), cudarc::driver::DriverError(other))),
        }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `new`. Every rank that knew the address has waited for its kernels.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// Words that the host and all kernels of a group see, in page-locked memory of the host.
#[derive(Debug)]
pub struct Board {
    context: Arc<CudaContext>,
    words: NonNull<AtomicU32>,
}

// SAFETY: what it points to is its own, lives as long as it, and is only used as atomic integers.
unsafe impl Send for Board {}
// SAFETY: as above.
unsafe impl Sync for Board {}

const WORDS: usize = 3 * MAX_RANKS;
/// Rows of the board.
const ABORT: usize = 0;
const LEFT: usize = 1;
const OUTCOME: usize = 2;

/// Why a rank's wait for another ended without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// The rank was told to abort.
    Aborted,
    /// This rank has gone.
    Left(usize),
    /// This rank did not come in time.
    Late(usize),
}

impl Board {
    /// A clean one.
    pub(crate) fn new(device: &Device) -> Result<Self> {
        device.bind()?;
        let bytes = WORDS * size_of::<u32>();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: asks for memory, which `drop` gives back; cleared before anybody reads it.
        let words = unsafe {
            let words = result::malloc_host(bytes, flags)
                .map_err(|_| Error::OutOfMemory { what: "page-locked memory", bytes })?
                .cast::<u8>();
            words.write_bytes(0, bytes);
            NonNull::new(words.cast::<AtomicU32>())
        };
        let words = words.ok_or(Error::OutOfMemory { what: "page-locked memory", bytes })?;
        Ok(Self { context: device.context().clone(), words })
    }

    /// Its address, which is the same on the host and, under unified addressing, on every device.
    pub(crate) fn pointer(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    /// Ends the waits of `rank`, from any thread.
    pub fn abort(&self, rank: usize) {
        self.word(ABORT, rank).store(1, Ordering::Release);
    }

    /// Tells that `rank` sends nothing any more: its device has ended all that it began.
    pub fn leave(&self, rank: usize) {
        self.word(LEFT, rank).store(1, Ordering::Release);
    }

    /// What a kernel of `rank` told about a wait that failed. Everything that was begun since gave no result.
    pub fn missed(&self, rank: usize) -> Option<Missed> {
        let outcome = self.word(OUTCOME, rank).load(Ordering::Acquire);
        let peer = (outcome >> 8) as usize;
        match outcome & 0xff {
            0 => None,
            1 => Some(Missed::Aborted),
            2 => Some(Missed::Left(peer)),
            _ => Some(Missed::Late(peer)),
        }
    }

    fn word(&self, row: usize, rank: usize) -> &AtomicU32 {
        assert!(rank < MAX_RANKS, "rank {rank} of a group of at most {MAX_RANKS}");
        // SAFETY: within the allocation, aligned, initialised, and shared only as atomic integers.
        unsafe { self.words.add(row * MAX_RANKS + rank).as_ref() }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `new`. Every rank that knew the address has waited for its kernels.
            let _ = unsafe { result::free_host(self.words.as_ptr().cast()) };
        }
    }
}
