//! Memory of the GPU: allocations, and copies to and from it.

use std::cell::RefCell;
use std::rc::Rc;

use cudarc::driver::{CudaEvent, DriverError, result};

use super::device::{Device, failed};
use crate::{Error, Result};

/// Regions begin on a multiple of this: a line of the cache, and what the matrix units like.
pub(crate) const ALIGNMENT: usize = 256;
/// What memory is for. All else is counted as [`WORK_SPACE`].
pub(crate) const WEIGHTS: &str = "weights";
pub(crate) const ACTIVATIONS: &str = "activations";
pub(crate) const KV_CACHE: &str = "the KV cache";
const WORK_SPACE: &str = "work space";
/// Bytes that an upload moves at a time.
const STAGE_BYTES: usize = 8 << 20;

/// An allocation, given back when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    device: Rc<Device>,
    pointer: u64,
    bytes: usize,
    what: &'static str,
}

impl Memory {
    /// At least `bytes` bytes of whatever was there.
    pub(crate) fn allocate(device: &Rc<Device>, what: &'static str, bytes: usize) -> Result<Self> {
        device.bind()?;
        let bytes = bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        // SAFETY: asks for memory, which `drop` gives back.
        let pointer = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error {
            DriverError(cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                Error::OutOfMemory { what, bytes }
            }
            other => failed(format!("allocating {what}"), other),
        })?;
        device.note_allocated(what, bytes);
        Ok(Self { device: device.clone(), pointer, bytes, what })
    }

    /// Likewise, of zeros.
    pub(crate) fn zeroed(device: &Rc<Device>, what: &'static str, bytes: usize) -> Result<Self> {
        let memory = Self::allocate(device, what, bytes)?;
        // SAFETY: the allocation is that long.
        unsafe { result::memset_d8_async(memory.pointer, 0, memory.bytes, device.stream().cu_stream()) }
            .map_err(|e| failed(format!("clearing {what}"), e))?;
        Ok(memory)
    }

    /// Its address on the device.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that it is on.
    pub(crate) fn device(&self) -> &Rc<Device> {
        &self.device
    }

    /// Copies `bytes` to it, from byte `first` on; returns when the source may be changed.
    pub(crate) fn write(&self, first: usize, bytes: &[u8]) -> Result<()> {
        self.check(first, bytes.len())?;
        // SAFETY: the range was checked; the stream is waited for before the source is let go.
        unsafe {
            result::memcpy_htod_async(self.pointer + first as u64, bytes, self.device.stream().cu_stream())
        }
        .map_err(|e| failed("copying to the GPU", e))?;
        self.device.synchronize()
    }

    /// Reads `bytes.len()` bytes from byte `first` on, when all that was begun before has ended.
    pub(crate) fn read(&self, first: usize, bytes: &mut [u8]) -> Result<()> {
        self.check(first, bytes.len())?;
        // SAFETY: the range was checked; the stream is waited for before the target is used.
        unsafe {
            result::memcpy_dtoh_async(bytes, self.pointer + first as u64, self.device.stream().cu_stream())
        }
        .map_err(|e| failed("copying from the GPU", e))?;
        self.device.synchronize()
    }

    fn check(&self, first: usize, len: usize) -> Result<()> {
        if first.checked_add(len).is_some_and(|end| end <= self.bytes) {
            return Ok(());
        }
        let detail = format!("bytes {first}+{len} of {}", self.bytes);
        Err(Error::Shape { op: "copy", detail })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.note_freed(self.what, self.bytes);
        // Work that uses it may be under way; freeing waits for that. After a failure of the device nothing can be done.
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `allocate`, and nobody else knows it any more.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// Copies to the device through two page-locked buffers in turn: one is filled while the other travels.
#[derive(Debug)]
pub(crate) struct Uploader {
    device: Rc<Device>,
    stages: [Pinned; 2],
    /// Which is next, and when each was last read.
    turn: RefCell<(usize, [Option<CudaEvent>; 2])>,
}

impl Uploader {
    pub(crate) fn new(device: &Rc<Device>) -> Result<Self> {
        let stage = || Pinned::allocate(device, STAGE_BYTES);
        Ok(Self { device: device.clone(), stages: [stage()?, stage()?], turn: RefCell::default() })
    }

    /// Begins to copy to an address that has room; returns when the source may be changed.
    pub(crate) fn copy(&self, target: u64, bytes: &[u8]) -> Result<()> {
        let mut turn = self.turn.borrow_mut();
        for (index, part) in bytes.chunks(STAGE_BYTES).enumerate() {
            let stage = &self.stages[turn.0];
            if let Some(read) = &turn.1[turn.0] {
                self.device.wait(read)?;
            }
            stage.write(part);
            let target = target + (index * STAGE_BYTES) as u64;
            let read = stage.send(target, part.len())?;
            let current = turn.0;
            turn.1[current] = Some(read);
            turn.0 = 1 - current;
        }
        Ok(())
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // The buffers must not be freed while they travel.
        let _ = self.device.synchronize();
    }
}

/// Memory between the kernels of one op, as large as the largest use so far.
#[derive(Debug)]
pub(crate) struct Scratch {
    device: Rc<Device>,
    memory: Option<Memory>,
    /// It moved: whoever kept its address must forget it.
    moved: bool,
}

impl Scratch {
    pub(crate) fn new(device: &Rc<Device>) -> Self {
        Self { device: device.clone(), memory: None, moved: false }
    }

    /// The address of at least `bytes` bytes.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<u64> {
        match &self.memory {
            Some(memory) if memory.bytes() >= bytes => Ok(memory.pointer()),
            _ => {
                self.memory = None;
                self.moved = true;
                let memory = Memory::allocate(&self.device, WORK_SPACE, bytes)?;
                Ok(self.memory.insert(memory).pointer())
            }
        }
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, Memory::bytes)
    }

    /// Gives its memory back.
    pub(crate) fn release(&mut self) {
        if self.memory.take().is_some() {
            self.moved = true;
        }
    }

    /// Whether it moved since the last time this was asked.
    pub(crate) fn take_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }
}

/// Page-locked memory of the host, which the device reads and writes by itself.
#[derive(Debug)]
pub(crate) struct Pinned {
    device: Rc<Device>,
    pointer: *mut u8,
    bytes: usize,
}

impl Pinned {
    /// `bytes` bytes of zeros.
    pub(crate) fn allocate(device: &Rc<Device>, bytes: usize) -> Result<Self> {
        device.bind()?;
        // SAFETY: asks for memory, which `drop` gives back; cleared before anybody reads it.
        let pointer = unsafe {
            let pointer = result::malloc_host(bytes, 0)
                .map_err(|_| Error::OutOfMemory { what: "page-locked memory", bytes })?
                .cast::<u8>();
            pointer.write_bytes(0, bytes);
            pointer
        };
        Ok(Self { device: device.clone(), pointer, bytes })
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Overwrites the first bytes. The caller has waited for transfers out of it.
    pub(crate) fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes, "more bytes than there is room for");
        // SAFETY: the length was checked, and the two cannot overlap: nobody else has a reference to this memory.
        unsafe { self.pointer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The first bytes. The caller has waited for transfers into it.
    pub(crate) fn read(&self, bytes: usize) -> Vec<u8> {
        assert!(bytes <= self.bytes, "fewer bytes than asked for");
        // SAFETY: within the allocation, and initialised.
        unsafe { std::slice::from_raw_parts(self.pointer, bytes) }.to_vec()
    }

    /// All of it, as numbers. The caller has waited for transfers.
    pub(crate) fn floats(&mut self) -> &mut [f32] {
        // SAFETY: within the allocation, aligned as the driver aligns, initialised, and borrowed as this is.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes / size_of::<f32>()) }
    }

    /// Begins to copy the first bytes to the device; the event tells when they were read.
    pub(crate) fn send(&self, target: u64, bytes: usize) -> Result<CudaEvent> {
        assert!(bytes <= self.bytes, "fewer bytes than asked for");
        let stream = self.device.stream();
        // SAFETY: within the allocation; whoever writes to it next waits for the event first.
        unsafe {
            let source = std::slice::from_raw_parts(self.pointer, bytes);
            result::memcpy_htod_async(target, source, stream.cu_stream())
        }
        .and_then(|()| stream.record_event(None))
        .map_err(|e| failed("copying to the GPU", e))
    }

    /// Begins to copy from the device; the event tells when the bytes are there.
    pub(crate) fn receive(&self, source: u64, bytes: usize) -> Result<CudaEvent> {
        assert!(bytes <= self.bytes, "fewer bytes than asked for");
        let stream = self.device.stream();
        // SAFETY: within the allocation; whoever reads it waits for the event first.
        unsafe {
            let target = std::slice::from_raw_parts_mut(self.pointer, bytes);
            result::memcpy_dtoh_async(target, source, stream.cu_stream())
        }
        .and_then(|()| stream.record_event(None))
        .map_err(|e| failed("copying from the GPU", e))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `allocate`; owners wait for transfers before they drop it.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}
