//! Zeroed memory in huge pages, and the pointer that lets a job's threads share it.

use memmap2::MmapMut;

use crate::{Error, Result};

/// An anonymous mapping: zeroed, page-aligned, in huge pages where the system has them.
///
/// 4 KiB pages cost a decode step about 15% of the read bandwidth.
#[derive(Debug)]
pub(crate) struct Memory {
    map: MmapMut,
}

impl Memory {
    /// Maps `bytes` bytes. A refusal is [`Error::OutOfMemory`].
    pub(crate) fn zeroed(bytes: usize, what: &'static str) -> Result<Self> {
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|_| Error::OutOfMemory { what, bytes })?;
        #[cfg(target_os = "linux")]
        if bytes >= 1 << 21 {
            // Advice only: without transparent huge pages the memory works as well, only slower.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Memory { map })
    }

    /// The memory as elements of `T`, for which zero bytes must be a valid value.
    pub(crate) fn as_slice<T: Element>(&self) -> &[T] {
        // SAFETY: the mapping is page-aligned, initialised (zeroed), lives as long as `self`, and any bits are a valid `T`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.map.len() / size_of::<T>()) }
    }

    /// Likewise, mutable.
    pub(crate) fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.map.len() / size_of::<T>())
        }
    }

    /// Start of the memory, for reading.
    pub(crate) fn as_ptr<T: Element>(&self) -> *const T {
        self.map.as_ptr().cast()
    }

    /// Start of the memory, for the threads of a job to write disjoint parts of.
    pub(crate) fn shared<T: Element>(&mut self) -> Shared<T> {
        Shared(self.map.as_mut_ptr().cast())
    }

    /// Grows to at least `bytes`; what it held is lost.
    pub(crate) fn reserve(&mut self, bytes: usize, what: &'static str) -> Result<()> {
        if self.map.len() < bytes {
            *self = Memory::zeroed(bytes.next_power_of_two(), what)?;
        }
        Ok(())
    }
}

/// Plain numbers: any bits are a valid value.
///
/// # Safety
/// Implementors have neither padding nor invalid bit patterns, and alignment of at most a page.
pub(crate) unsafe trait Element: Copy + Send + Sync + 'static {}

// SAFETY: plain numbers.
unsafe impl Element for u8 {}
// SAFETY: plain numbers.
unsafe impl Element for u32 {}
// SAFETY: plain numbers.
unsafe impl Element for f32 {}
// SAFETY: a transparent u16.
unsafe impl Element for half::bf16 {}

/// A pointer that the threads of one job share; each dereferences a part of its own.
#[derive(Debug)]
pub(crate) struct Shared<T>(*mut T);

impl<T> Shared<T> {
    /// The same memory from element `index` on.
    ///
    /// # Safety
    /// As for [`Shared::at`].
    pub(crate) unsafe fn shifted(self, index: usize) -> Self {
        // SAFETY: by this function's contract.
        Shared(unsafe { self.at(index) })
    }

    /// The address of element `index`.
    ///
    /// # Safety
    /// `index` lies in the shared allocation (or at its end).
    #[inline(always)]
    pub(crate) unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: by this function's contract.
        unsafe { self.0.add(index) }
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: an address; every dereference is an unsafe act that argues for itself.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Bytes of memory that can be had without swapping (`MemAvailable` of Linux); 4 GiB where the system does not tell.
pub(super) fn available() -> u64 {
    let told = || {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    told().map_or(4 << 30, |kib| kib << 10)
}
