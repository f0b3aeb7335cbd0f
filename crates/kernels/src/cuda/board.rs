//! Words that the host and all kernels of a group see: in memory of the host that the ranks of a machine share.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{CudaContext, sys};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};

use super::Cuda;
use super::device::{Device, failed};
use super::one_shot::MAX_RANKS;
use crate::{Error, Result};

/// A page: more than the words need.
const BYTES: usize = 4096;
const WORDS: usize = 3 * MAX_RANKS;
const _: () = assert!(WORDS * size_of::<u32>() <= BYTES, "the words do not fit on the board");
/// Rows of the board.
const ABORT: usize = 0;
const LEFT: usize = 1;
const OUTCOME: usize = 2;

/// Words of a group: a file in memory, mapped and page-locked by each process.
#[derive(Debug)]
pub struct Board {
    context: Arc<CudaContext>,
    file: OwnedFd,
    pages: MmapRaw,
    /// Where devices see them.
    pointer: u64,
}

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

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aborted => f.write_str("it was aborted"),
            Self::Left(rank) => write!(f, "rank {rank} has gone"),
            Self::Late(rank) => write!(f, "nothing came of rank {rank} in time"),
        }
    }
}

impl Board {
    /// A clean one, for all ranks of a group.
    ///
    /// # Errors
    /// [`Error::Device`] where the machine or the driver refuses.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        // Sealed, so that no process can take the pages away from another.
        let file = memfd_create("phalanx-board", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .and_then(|file| {
                ftruncate(&file, BYTES as u64)?;
                fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
                Ok(file)
            })
            .map_err(|e| refused(&e))?;
        Self::map(cuda.device(), file)
    }

    /// One that another process (or thread) made and [exported](Self::export).
    ///
    /// # Errors
    /// [`Error::Unsupported`] where `file` is none; [`Error::Device`] where the machine or the driver refuses.
    pub fn import(cuda: &Cuda, file: OwnedFd) -> Result<Self> {
        let whole = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
            && fstat(&file).is_ok_and(|status| status.st_size == BYTES as i64);
        if !whole {
            return Err(Error::Unsupported("what another rank shared is not a board".into()));
        }
        Self::map(cuda.device(), file)
    }

    /// A descriptor by which others [import](Self::import) it.
    pub fn export(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn map(device: &Device, file: OwnedFd) -> Result<Self> {
        let pages = MmapOptions::new().len(BYTES).map_raw(&file).map_err(|e| refused(&e))?;
        let locking = |e| failed("page-locking memory that ranks share", e);
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        device.bind()?;
        // SAFETY: the pages stay until `drop` has unregistered them.
        unsafe { sys::cuMemHostRegister_v2(pages.as_mut_ptr().cast(), BYTES, flags) }
            .result()
            .map_err(locking)?;
        let mut board = Self { context: device.context().clone(), file, pages, pointer: 0 };
        let host = board.pages.as_mut_ptr().cast();
        // SAFETY: writes one address; the memory was registered.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut board.pointer, host, 0) }
            .result()
            .map_err(locking)?;
        Ok(board)
    }

    /// Its address on this process's devices.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
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
        let words = self.pages.as_mut_ptr().cast::<AtomicU32>();
        // SAFETY: within the pages, which cannot shrink; aligned; used by all as atomic integers alone.
        unsafe { &*words.add(row * MAX_RANKS + rank) }
    }
}

fn refused(error: &dyn std::fmt::Display) -> Error {
    Error::Device { what: "sharing memory of the host".into(), why: error.to_string() }
}

impl Drop for Board {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: registered by `map`. Every rank of this process has waited for its kernels.
            let _ = unsafe { sys::cuMemHostUnregister(self.pages.as_mut_ptr().cast()) };
        }
    }
}
