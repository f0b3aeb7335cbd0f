//! Memory for weights: large regions are allocations of their own, small ones share some. What is dropped goes back to the driver, or
//! is used for the next region that fits.
//!
//! All work is on one stream, so whoever used a region before has done so when the next one writes to it.

use std::cell::RefCell;
use std::iter;
use std::ops::Range;
use std::rc::{Rc, Weak};

use super::device::Device;
use super::memory::{ALIGNMENT, Memory, Uploader, WEIGHTS};
use crate::Result;

/// Regions of more than this part of a shared allocation have one of their own: little is lost to the driver's pages of 2 MiB then, and
/// another width frees nearly all that it drops.
const SHARED_PART: usize = 8;

/// Hands out regions of memory, so that small ones do not each take a page of the driver's.
#[derive(Debug)]
pub(crate) struct Arena {
    device: Rc<Device>,
    /// Size of a shared allocation.
    shared_bytes: usize,
    /// Each is there as long as a region of it is.
    shared: RefCell<Vec<Weak<Chunk>>>,
    uploader: Uploader,
}

/// A part of an allocation, given back when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    chunk: Rc<Chunk>,
    bytes: Range<usize>,
}

/// An allocation and what is free of it.
#[derive(Debug)]
struct Chunk {
    memory: Memory,
    free: RefCell<Free>,
}

impl Arena {
    /// `shared_bytes` 0 gives every region an allocation of its own, so that tests see accesses beyond its end.
    pub(crate) fn new(device: &Rc<Device>, shared_bytes: usize) -> Result<Self> {
        let uploader = Uploader::new(device)?;
        Ok(Self { device: device.clone(), shared_bytes, shared: RefCell::default(), uploader })
    }

    /// A region that holds `bytes`.
    pub(crate) fn upload(&self, bytes: &[u8]) -> Result<Region> {
        let region = self.region(bytes.len())?;
        self.copy(region.pointer(), bytes)?;
        Ok(region)
    }

    /// Begins to copy to an address that has room; returns when the source may be changed.
    pub(crate) fn copy(&self, target: u64, bytes: &[u8]) -> Result<()> {
        self.uploader.copy(target, bytes)
    }

    /// The device that it is on.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// A region of at least `bytes` bytes.
    pub(crate) fn region(&self, bytes: usize) -> Result<Region> {
        let bytes = bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        if bytes > self.shared_bytes / SHARED_PART {
            let memory = Memory::allocate(&self.device, WEIGHTS, bytes)?;
            return Ok(Region {
                chunk: Rc::new(Chunk { memory, free: RefCell::default() }),
                bytes: 0..bytes,
            });
        }
        let mut shared = self.shared.borrow_mut();
        shared.retain(|chunk| chunk.strong_count() > 0);
        if let Some(region) = shared.iter().find_map(|chunk| chunk.upgrade()?.region(bytes)) {
            return Ok(region);
        }
        let memory = Memory::allocate(&self.device, WEIGHTS, self.shared_bytes)?;
        let free = Free::of(bytes..self.shared_bytes);
        let chunk = Rc::new(Chunk { memory, free: RefCell::new(free) });
        shared.push(Rc::downgrade(&chunk));
        Ok(Region { chunk, bytes: 0..bytes })
    }
}

impl Chunk {
    fn region(self: Rc<Self>, bytes: usize) -> Option<Region> {
        let bytes = self.free.borrow_mut().take(bytes)?;
        Some(Region { chunk: self, bytes })
    }
}

impl Region {
    /// Its address on the device.
    pub(crate) fn pointer(&self) -> u64 {
        self.chunk.memory.pointer() + self.bytes.start as u64
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.chunk.free.borrow_mut().give_back(self.bytes.clone());
    }
}

/// Runs of bytes that nobody has, ascending, with others' bytes between them.
#[derive(Debug, Default, PartialEq)]
struct Free(Vec<Range<usize>>);

impl Free {
    fn of(bytes: Range<usize>) -> Self {
        Self(iter::once(bytes).collect())
    }

    /// The first bytes of the first run that is long enough.
    fn take(&mut self, bytes: usize) -> Option<Range<usize>> {
        let index = self.0.iter().position(|run| run.len() >= bytes)?;
        let run = &mut self.0[index];
        let taken = run.start..run.start + bytes;
        run.start = taken.end;
        if run.start == run.end {
            self.0.remove(index);
        }
        Some(taken)
    }

    fn give_back(&mut self, mut bytes: Range<usize>) {
        let index = self.0.partition_point(|run| run.start < bytes.start);
        if let Some(behind) = self.0.get(index).filter(|run| run.start == bytes.end) {
            bytes.end = behind.end;
            self.0.remove(index);
        }
        match index.checked_sub(1).and_then(|before| self.0.get_mut(before)) {
            Some(before) if before.end == bytes.start => before.end = bytes.end,
            _ => self.0.insert(index, bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_given_back_is_one_run_again() {
        let mut free = Free::of(0..100);
        let taken: Vec<_> = (0..5).map(|_| free.take(20).unwrap()).collect();
        assert_eq!((free.take(1), free.0.len()), (None, 0));
        for index in [1, 3, 2] {
            free.give_back(taken[index].clone());
        }
        assert_eq!(free, Free::of(20..80));
        assert_eq!(free.take(50), Some(20..70));
        free.give_back(taken[0].clone());
        assert_eq!(free.0, [0..20, 70..80]);
    }

    proptest! {
        #[test]
        fn nothing_is_given_twice_and_nothing_is_lost(turns in prop::collection::vec((1usize..40, any::<bool>()), 1..200)) {
            let mut free = Free::of(0..256);
            let mut held: Vec<Range<usize>> = Vec::new();
            for (size, takes) in turns {
                if takes || held.is_empty() {
                    held.extend(free.take(size));
                } else {
                    free.give_back(held.swap_remove(size % held.len()));
                }
                let mut all: Vec<_> = free.0.iter().chain(&held).cloned().collect();
                all.sort_by_key(|run| run.start);
                prop_assert_eq!(all.iter().map(Range::len).sum::<usize>(), 256);
                prop_assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
                prop_assert!(free.0.windows(2).all(|pair| pair[0].end < pair[1].start), "runs that touch");
            }
        }
    }
}
