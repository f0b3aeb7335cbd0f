//! Messages to one other GPU, which take their time while this one computes.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, result};

use super::calls::Message;
use super::{Communicator, RUNNING};
use crate::Result;
use crate::cuda::buffer::Buffer;
use crate::cuda::device::failed;
use crate::cuda::memory::Memory;

/// Sends to the other rank of a communicator of two, on a stream of its own. One message may wait there for its receiver, in memory that
/// is a copy, so that what it was made of may be changed.
#[derive(Debug)]
pub struct Outbox {
    // Dropped first: it ends what reads the copy.
    communicator: Communicator,
    to: usize,
    copy: Option<Memory>,
    /// When the latest message has gone.
    gone: Option<CudaEvent>,
}

impl Outbox {
    /// Of a communicator that nothing else was begun on.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device has no other stream.
    pub fn new(mut communicator: Communicator) -> Result<Self> {
        let stream = communicator.device.context().new_stream();
        communicator.stream = stream.map_err(|e| failed("sending by NCCL", e))?;
        let to = usize::from(communicator.rank == 0);
        Ok(Self { communicator, to, copy: None, gone: None })
    }

    /// Takes the memory that messages of up to `len` elements need.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn reserve(&mut self, len: usize) -> Result<()> {
        let bytes = len * size_of::<f32>();
        if self.copy.as_ref().is_none_or(|copy| copy.bytes() < bytes) {
            // Released before the larger one is taken, when what was sent from it has gone.
            self.copy = None;
            self.copy =
                Some(Memory::allocate(&self.communicator.device, "messages to the next stage", bytes)?);
        }
        Ok(())
    }

    /// Begins to send the first `len` elements of `x`, f32, as all that was begun before leaves them. Waits for the message before to
    /// have gone, as long as `go_on` says so.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a too short buffer, [`Error::Device`](crate::Error::Device) where NCCL fails or gave up.
    pub fn send(&mut self, len: usize, x: &Buffer, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        let source = x.floats("send", &self.communicator.device, len)?;
        if let Some(gone) = self.gone.take() {
            self.communicator.reach(&gone, go_on)?;
        }
        self.reserve(len)?;
        let Some(copy) = self.copy.as_ref().map(Memory::pointer) else { return Ok(()) };
        let (compute, own): (Arc<CudaStream>, Arc<CudaStream>) =
            (self.communicator.device.stream().clone(), self.communicator.stream.clone());
        // SAFETY: both have as many elements, and stay until this has ended: the copy in this, the source by the caller's stream.
        unsafe { result::memcpy_dtod_async(copy, source, len * size_of::<f32>(), compute.cu_stream()) }
            .and_then(|()| own.join(&compute))
            .map_err(|e| failed("sending by NCCL", e))?;
        self.communicator.exchange(&[Message::to(self.to, copy, len)], go_on)?;
        self.gone = Some(own.record_event(None).map_err(|e| failed(RUNNING, e))?);
        Ok(())
    }

    /// Ends what it began, on the device too.
    pub fn abort(&mut self) {
        self.communicator.abort();
    }

    /// As [`Communicator::close`]: waits until the other rank has what was sent.
    pub fn close(&mut self, go_on: &mut dyn FnMut() -> bool) {
        self.communicator.close(go_on);
    }
}
