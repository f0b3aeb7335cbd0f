//! What takes the hidden state from one stage of a pipeline to the next.
//!
//! Every rank of a stage holds all of it, so a rank gets it from one of the ranks of the stage before, and stages may be of any widths.
//! Rows travel as f32, in messages whose lengths both sides know.

mod host;
mod local;
mod neighbours;
mod tcp;

use crate::collective::{AbortHandle, Error, Result};

pub use host::HostLink;
pub use local::local_pipeline;
#[cfg(feature = "cuda")]
pub(crate) use neighbours::Neighbour;
pub use neighbours::Neighbours;

/// One rank's connections with the stages in front of its own and behind it, for buffers of type `B`. Messages arrive in their order.
pub trait StageLink<B> {
    /// This rank's stage.
    fn stage(&self) -> usize;
    /// Stages of the pipeline.
    fn stages(&self) -> usize;
    /// Whether a rank of the next stage gets its rows from this one. Where that stage is narrower, not all send.
    fn sends(&self) -> bool;
    /// Takes the memory that messages of up to `len` numbers need, so that none is taken in a step.
    ///
    /// # Errors
    /// [`Error::Device`] where there is none.
    fn reserve(&mut self, _len: usize) -> Result<()> {
        Ok(())
    }
    /// Sends the first `len` numbers of `x`, f32, to the ranks of the next stage that get them from this one; returns when they are under
    /// way, and `x` may be changed. The device was waited for: what `x` holds is a result. At least one message waits for a slow receiver;
    /// more hold this rank up.
    ///
    /// # Errors
    /// [`Error::Aborted`], and in [`Error::Stage`] [`Error::Lost`] for a receiver that is gone, maybe at an earlier message. After an
    /// error every call gives [`Error::Ended`].
    fn send(&mut self, len: usize, x: &B) -> Result<()>;
    /// Waits for the next message from the stage before, which must be of `len` numbers and becomes the first of `x`, f32.
    ///
    /// # Errors
    /// [`Error::Aborted`], [`Error::Shape`] in the first stage, and in [`Error::Stage`] [`Error::Lost`] where the sender is gone and
    /// [`Error::Protocol`] for a message of another length or order, or a damaged one. After an error every call gives
    /// [`Error::Ended`].
    fn receive(&mut self, len: usize, x: &mut B) -> Result<()>;
}

/// The link of the only stage: nobody sends to it, and it sends to nobody.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl<B> StageLink<B> for Alone {
    fn stage(&self) -> usize {
        0
    }

    fn stages(&self) -> usize {
        1
    }

    fn sends(&self) -> bool {
        false
    }

    fn send(&mut self, _len: usize, _x: &B) -> Result<()> {
        Ok(())
    }

    fn receive(&mut self, _len: usize, _x: &mut B) -> Result<()> {
        Err(nobody_in_front())
    }
}

/// Runs calls of a link until one fails: what would come next is not known any more.
#[derive(Debug)]
pub(crate) struct Calls {
    abort: AbortHandle,
    lost: bool,
}

impl Calls {
    pub(crate) fn new(abort: AbortHandle) -> Self {
        Self { abort, lost: false }
    }

    pub(crate) fn run(&mut self, body: impl FnOnce(&AbortHandle) -> Result<()>) -> Result<()> {
        if self.lost {
            return Err(Error::Ended);
        }
        self.abort.begin_call();
        let result = body(&self.abort);
        self.abort.wait_for_member(None);
        self.lost = result.is_err();
        result
    }
}

pub(crate) fn nobody_in_front() -> Error {
    Error::Shape { op: "receive", detail: "there is no stage in front of the first".into() }
}
