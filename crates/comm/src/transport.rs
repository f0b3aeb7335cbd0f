//! Point-to-point messages between the ranks of a group: what collectives are made of.

use crate::collective::{AbortHandle, Result};

/// One rank's connections to all others.
pub trait Transport {
    /// This rank's number.
    fn rank(&self) -> usize;
    /// Ranks of the group.
    fn size(&self) -> usize;
    /// Sends and receives at once, so that large messages in both directions cannot block each other: one message
    /// to each rank of `outgoing`, one from each of `incoming`. Every rank makes the same sequence of calls, and both
    /// sides know the lengths: a message of another call or length is an error. A rank occurs at most once in either
    /// list, and never is this one. After an error the transport is of no use.
    fn exchange(&mut self, outgoing: &[(usize, &[u8])], incoming: &mut [(usize, &mut [u8])]) -> Result<()>;
    /// Whether every other rank is still there, as far as can be seen without waiting; [`Error::Lost`](crate::Error::Lost) names one
    /// that is not.
    fn check(&self) -> Result<()>;
    /// The handle that frees a blocked `exchange`.
    fn abort_handle(&self) -> AbortHandle;
}
