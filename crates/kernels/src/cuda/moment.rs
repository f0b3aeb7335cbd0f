//! Moments in a GPU's work, for measuring what lies between two of them by the GPU's own clock.

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;

use super::Cuda;
use super::device::{Device, failed};
use crate::Result;

/// When the GPU has done all that was begun before.
#[derive(Debug)]
pub struct Moment(CudaEvent);

impl Cuda {
    /// The moment at which the GPU will have done all that was begun so far.
    pub fn moment(&self) -> Result<Moment> {
        Moment::now(self.device())
    }
}

impl Moment {
    pub(crate) fn now(device: &Device) -> Result<Self> {
        let event = device.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Self(event.map_err(|e| failed("taking the time", e))?))
    }

    /// Seconds from an earlier moment of the same GPU to this one, more than zero; waits until both have come. The clock ticks about
    /// every half microsecond.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64> {
        let milliseconds = earlier.0.elapsed_ms(&self.0).map_err(|e| failed("taking the time", e))?;
        Ok((f64::from(milliseconds) / 1e3).max(1e-9))
    }
}
