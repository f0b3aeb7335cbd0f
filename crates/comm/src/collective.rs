//! The seam between the forward pass and the network.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kernels::{Partial, Tree};

use crate::choice::CollectiveChoice;

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
    /// The way that was asked for between GPUs is not open to all ranks. Forming again would not change that.
    #[error("--collective {choice} is not possible: rank {rank}: {why}")]
    Unavailable {
        /// What was asked for.
        choice: CollectiveChoice,
        /// A rank that cannot.
        rank: usize,
        /// In a sentence for users.
        why: String,
    },
    /// The device failed, or has too little memory.
    #[error(transparent)]
    Device(#[from] kernels::Error),
    /// What happened is about a rank of another stage of the pipeline.
    #[error("stage {stage}: {source}")]
    Stage {
        /// Which.
        stage: usize,
        /// What happened; its ranks are numbers within that stage.
        source: Box<Self>,
    },
    /// A call after one that failed.
    #[error("the group was lost in an earlier collective")]
    Ended,
}

impl Error {
    /// Says that a rank is of stage `stage`, where the error names one.
    pub(crate) fn of_stage(self, stage: usize) -> Self {
        match self {
            Self::Lost { .. } | Self::Refused { .. } | Self::Protocol { .. } => {
                Self::Stage { stage, source: Box::new(self) }
            }
            other => other,
        }
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The part of a collective that other threads may hold: frees every wait, and tells what this rank waits for.
#[derive(Clone, Default)]
pub struct AbortHandle {
    shared: Arc<Abort>,
    /// Number of the member that rank 0 is where this is used.
    first: usize,
}

#[derive(Default)]
struct Abort {
    raised: AtomicBool,
    hooks: Mutex<Vec<Hook>>,
    calls: AtomicU64,
    /// One more than the number of the member that is waited for; 0: none.
    waits_for: AtomicUsize,
}

/// Tells somebody who cannot look at the flag.
type Hook = Box<dyn Fn() + Send>;

impl AbortHandle {
    /// Raises the flag; waits end with [`Error::Aborted`] within milliseconds.
    pub fn abort(&self) {
        self.shared.raised.store(true, Ordering::SeqCst);
        self.hooks().iter().for_each(|hook| hook());
    }

    /// Whether it was raised.
    pub fn is_aborted(&self) -> bool {
        self.shared.raised.load(Ordering::Relaxed)
    }

    /// Has `hook` called when the flag is raised, on the thread that does it, or at once if it was raised. It may be called more
    /// than once.
    pub fn on_abort(&self, hook: impl Fn() + Send + 'static) {
        let mut hooks = self.hooks();
        if self.shared.raised.load(Ordering::SeqCst) {
            hook();
        }
        hooks.push(Box::new(hook));
    }

    /// Exchanges with other ranks that began so far, and whatever else [`AbortHandle::gets_on`] told of: it grows as long as this rank
    /// gets on.
    pub fn calls(&self) -> u64 {
        self.shared.calls.load(Ordering::Relaxed)
    }

    /// The member of the group without which this rank cannot go on, if it waits at the moment. Members are numbered through all
    /// stages, rank after rank ([`GroupSpec::number`](crate::GroupSpec::number)).
    pub fn waits_for(&self) -> Option<usize> {
        self.shared.waits_for.load(Ordering::Relaxed).checked_sub(1)
    }

    /// This rank gets on: a part of its weights was loaded, say.
    pub fn gets_on(&self) {
        self.shared.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// An exchange begins.
    pub(crate) fn begin_call(&self) {
        self.gets_on();
    }

    /// From now on it waits for `rank`, of the ranks that this is used among, or for none.
    pub(crate) fn wait_for(&self, rank: Option<usize>) {
        self.wait_for_member(rank.map(|rank| self.first + rank));
    }

    /// From now on it waits for this member of the group, or for none.
    pub(crate) fn wait_for_member(&self, number: Option<usize>) {
        self.shared.waits_for.store(number.map_or(0, |number| number + 1), Ordering::Relaxed);
    }

    /// The same handle, to be used among ranks of which rank 0 is member `first`.
    pub(crate) fn among(&self, first: usize) -> Self {
        Self { shared: self.shared.clone(), first }
    }

    fn hooks(&self) -> MutexGuard<'_, Vec<Hook>> {
        self.shared.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AbortHandle").field(&self.is_aborted()).finish()
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
    /// Copies the first `len` elements of `x`, f32, from rank `root` to all others. They travel as bits, whatever these stand for.
    fn broadcast(&mut self, root: usize, len: usize, x: &mut B) -> Result<()>;
    /// A step of the model begins; steps before it may still run on the device. Tells what [`Collective::check`] does.
    fn begin_step(&mut self) -> Result<()> {
        self.check()
    }
    /// Whether a call only begins work on the device, so that a backend may record it with the ops around it.
    fn can_be_recorded(&self) -> bool {
        false
    }
    /// Tells of calls that only began work, once the device was waited for: whether what it has ended gave results. Elsewhere
    /// every call tells by itself.
    fn check(&mut self) -> Result<()> {
        Ok(())
    }
    /// The handle that frees this rank's waits.
    fn abort_handle(&self) -> AbortHandle;
}

impl<B, C: Collective<B> + ?Sized> Collective<B> for Box<C> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn size(&self) -> usize {
        (**self).size()
    }

    fn tree_reduce(&mut self, tree: Tree, len: usize, partials: &[Partial<B>], out: &mut B) -> Result<()> {
        (**self).tree_reduce(tree, len, partials, out)
    }

    fn gather(&mut self, root: usize, rows: usize, x: &B, counts: &[usize], out: &mut B) -> Result<()> {
        (**self).gather(root, rows, x, counts, out)
    }

    fn broadcast(&mut self, root: usize, len: usize, x: &mut B) -> Result<()> {
        (**self).broadcast(root, len, x)
    }

    fn begin_step(&mut self) -> Result<()> {
        (**self).begin_step()
    }

    fn can_be_recorded(&self) -> bool {
        (**self).can_be_recorded()
    }

    fn check(&mut self) -> Result<()> {
        (**self).check()
    }

    fn abort_handle(&self) -> AbortHandle {
        (**self).abort_handle()
    }
}
