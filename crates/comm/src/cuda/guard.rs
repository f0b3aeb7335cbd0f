//! Looking after the other ranks while this thread waits for its GPU.

use std::thread;
use std::time::{Duration, Instant};

use crate::collective::{Error, Result};
use crate::transport::Transport;

/// How often a wait looks after the other ranks.
const LOOK: Duration = Duration::from_millis(5);
/// A rank that left in peace finished first what it sent: what this rank waits for then comes within this time.
const GRACE: Duration = Duration::from_millis(500);

/// The mesh that a group was formed over, kept for as long as the group is: a rank that ends closes its connections, which the others
/// notice sooner than their GPUs do.
#[derive(Debug)]
pub(super) struct Guard<T> {
    pub(super) transport: T,
    looked: Instant,
    /// Since when a rank is gone.
    gone: Option<Instant>,
}

impl<T: Transport> Guard<T> {
    pub(super) fn new(transport: T) -> Self {
        Self { transport, looked: Instant::now(), gone: None }
    }

    /// Why it is no use to wait any longer.
    pub(super) fn trouble(&mut self) -> Result<()> {
        if self.transport.abort_handle().is_aborted() {
            return Err(Error::Aborted);
        }
        if self.looked.elapsed() < LOOK {
            return Ok(());
        }
        self.looked = Instant::now();
        match self.transport.check() {
            Err(error) if self.gone.get_or_insert_with(Instant::now).elapsed() > GRACE => Err(error),
            _ => Ok(()),
        }
    }

    /// Why a call failed of which this GPU or its library says `error`: mostly because a rank is gone, of which the library may know
    /// sooner, but not which it was.
    pub(super) fn reason(&self, error: kernels::Error) -> Error {
        let until = Instant::now() + GRACE;
        loop {
            if self.transport.abort_handle().is_aborted() {
                return Error::Aborted;
            }
            if let Err(gone) = self.transport.check() {
                return gone;
            }
            if !matches!(error, kernels::Error::Device { .. }) || Instant::now() > until {
                return error.into();
            }
            thread::sleep(LOOK);
        }
    }
}
