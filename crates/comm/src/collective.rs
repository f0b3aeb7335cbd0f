//! The seam between the forward pass and the network.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kernels::{Partial, Tree};

/// Why a collective ended without a result. The group is then lost: no call on it will succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The abort flag was raised.
    #[error("the collective was aborted")]
    Aborted,
    /// The connection to a rank broke.
    #[error("lost rank {rank}: {source}")]
    Lost {
        /// Which.
        rank: usize,
        /// How it showed.
        source: std::io::Error,
    },
    /// A connection could not be made because one side does not accept the other.
    #[error("no connection with rank {rank}: {why}")]
    Refused {
        /// Which.
        rank: usize,
        /// Who refused, and why.
        why: String,
    },
    /// A peer sent something that is not of this protocol or call.
    #[error("rank {rank} sent {what}")]
    Protocol {
        /// Which.
        rank: usize,
        /// What was wrong.
        what: String,
    },
    /// Arguments whose sizes do not fit together.
    #[error("shapes do not fit in {op}: {detail}")]
    Shape {
        /// The call.
        op: &'static str,
        /// Which sizes.
        detail: String,
    },
    /// A call after one that failed.
    #[error("the group was lost in an earlier collective")]
    Ended,
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Frees every wait of a collective from another thread.
#[derive(Debug, Clone, Default)]
pub struct AbortHandle(Arc<AtomicBool>);

impl AbortHandle {
    /// Raises the flag; waits end with [`Error::Aborted`] within milliseconds.
    pub fn abort(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was raised.
    pub fn is_aborted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// One rank's end of a group, for buffers of type `B`.
pub trait Collective<B> {
    /// This rank's number.
    fn rank(&self) -> usize;
    /// Ranks of the group.
    fn size(&self) -> usize;
    /// Adds the partial sums of all units along `tree`, in f32; every rank gets the same bits. `partials` are this
    /// rank's whole sub-trees in order, `len` the number of leading elements of each that count; `out` gets `len`.
    fn tree_reduce(&mut self, tree: Tree, len: usize, partials: &[Partial<B>], out: &mut B) -> Result<()>;
    /// Collects runs of columns on rank `root`: `x` is f32 `[rows, counts[rank]]`, `out` on the root `[rows, Σ counts]`
    /// (untouched elsewhere).
    fn gather(&mut self, root: usize, rows: usize, x: &B, counts: &[usize], out: &mut B) -> Result<()>;
    /// Whether a call only begins work on the device, so that a backend may record it with the ops around it.
    fn can_be_recorded(&self) -> bool {
        false
    }
    /// The handle that frees this rank's waits.
    fn abort_handle(&self) -> AbortHandle;
}
