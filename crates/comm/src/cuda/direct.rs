//! Collectives on the devices themselves, each rank a process with a GPU of its own.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::rc::Rc;

use kernels::cuda::{Buffer, Communicator, Missed, OneShot};
use kernels::{Cuda, Partial, Tree};

use super::guard::Guard;
use crate::collective::{AbortHandle, Collective, Error, Result};
use crate::ranges::Ranges;
use crate::transport::Transport;

/// Up to this many bytes (of a sum, or of the most that a rank gives to a gather) every rank reads the memory of all others; above, NCCL
/// sends each byte fewer times. It is where vLLM's one-shot kernel of the same kind gives way, for up to 4 GPUs
/// (`custom_all_reduce.cuh`).
const ONE_SHOT_BYTES: usize = 512 << 10;

/// One rank's end of a group whose GPUs exchange by themselves: by kernels over memory that they share, by NCCL, or short messages by the
/// one and long ones by the other. [`connect`](super::connect) makes it.
///
/// It keeps the [`Transport`] that it was formed over. That mesh is proven (secret, group, epoch, ranks), so NCCL's id and the
/// places of mailboxes go round on it and not through the coordinator, which need not know what connects a group; and a rank that ends
/// closes its connections, which the others notice sooner than their GPUs do.
///
/// Calls only begin work. While this thread waits for its GPU it looks after the abort flag, NCCL's errors and the other ranks, and ends
/// what waits on the device: kernels by their abort word, NCCL by aborting its communicator. [`Collective::check`] then tells why. It
/// serves one epoch: to go on, drop this, have the backend forget its steps ([`Backend::settle`](kernels::Backend::settle)), and form anew.
///
/// NCCL's symmetric windows are not used: they speed up short sums of GPUs that reach each other's memory, and there those sums go by our
/// kernels; the rest would pay for them with a copy out of the window.
#[derive(Debug)]
pub(super) struct DirectCollective<T: Transport> {
    group: Rc<RefCell<Group<T>>>,
    rank: usize,
    ranges: Ranges,
    deterministic: bool,
    abort: AbortHandle,
}

#[derive(Debug)]
struct Group<T> {
    ways: Ways,
    guard: Guard<T>,
    /// Why what waited was ended, not told yet.
    failure: Option<Error>,
    lost: bool,
}

/// How the devices reach each other: by at least one.
#[derive(Debug)]
pub(super) struct Ways {
    pub(super) peers: Option<OneShot>,
    pub(super) nccl: Option<Communicator>,
}

/// The way of one call.
enum Way<'a> {
    Peers(&'a mut OneShot),
    Nccl(&'a mut Communicator),
}

impl Ways {
    /// The way for messages of so many bytes.
    fn of(&mut self, bytes: usize) -> Result<Way<'_>> {
        let by_peers = bytes <= ONE_SHOT_BYTES || self.nccl.is_none();
        match (self.peers.as_mut().filter(|_| by_peers), &mut self.nccl) {
            (Some(one_shot), _) => Ok(Way::Peers(one_shot)),
            (None, Some(communicator)) => Ok(Way::Nccl(communicator)),
            (None, None) => Err(Error::Ended),
        }
    }

    /// Ends all that waits on the device.
    fn abort(&mut self) {
        if let Some(one_shot) = &self.peers {
            one_shot.abort();
        }
        if let Some(communicator) = &mut self.nccl {
            communicator.abort();
        }
    }
}

impl<T: Transport + 'static> DirectCollective<T> {
    /// Over `ways` of the ranks of `guard`'s transport. `ranges`: the units of every rank, in order. With `deterministic` all sums are added
    /// along the tree, so that their bits are those of every other collective; else NCCL's in its own order, which moves fewer bytes.
    pub(super) fn new(cuda: &Cuda, guard: Guard<T>, ways: Ways, ranges: Ranges, deterministic: bool) -> Self {
        let (rank, abort) = (guard.transport.rank(), guard.transport.abort_handle());
        let group = Rc::new(RefCell::new(Group { ways, guard, failure: None, lost: false }));
        let watched = Rc::downgrade(&group);
        cuda.while_waiting(move || {
            // In the middle of a call, that call looks.
            if let Some(group) = watched.upgrade()
                && let Ok(mut group) = group.try_borrow_mut()
            {
                group.look();
            }
        });
        Self { group, rank, ranges, deterministic, abort }
    }
}

impl<T: Transport> Group<T> {
    /// Ends what waits where there is no use in waiting.
    fn look(&mut self) {
        if self.lost {
            return;
        }
        if let Err(error) = self.guard.trouble() {
            self.lose(error);
        } else if let Some(Err(error)) = self.ways.nccl.as_ref().map(Communicator::check) {
            self.lose(self.guard.reason(error));
        }
    }

    fn lose(&mut self, error: Error) {
        self.ways.abort();
        self.lost = true;
        self.failure = Some(error);
    }

    fn check(&mut self) -> Result<()> {
        self.look();
        let missed = self.ways.peers.as_ref().and_then(OneShot::missed);
        if let (false, Some(missed)) = (self.lost, missed) {
            // A rank that is gone shows on the mesh too.
            let why = self.guard.transport.check().err().unwrap_or_else(|| lost_by(missed, LATE));
            self.lose(if missed == Missed::Aborted { Error::Aborted } else { why });
        }
        match self.failure.take() {
            Some(error) => Err(error),
            None if self.lost => Err(Error::Ended),
            None => Ok(()),
        }
    }

    /// Runs a call whose arguments were `checked`, with messages of so many `bytes`, unless the group is lost.
    fn call(
        &mut self,
        checked: Result<()>,
        bytes: usize,
        body: impl FnOnce(Way<'_>, &mut dyn FnMut() -> bool) -> kernels::Result<()>,
    ) -> Result<()> {
        self.check()?;
        let Self { ways, guard, .. } = self;
        let called = checked
            .and_then(|()| ways.of(bytes))
            .and_then(|way| Ok(body(way, &mut || guard.trouble().is_ok())?));
        if let Err(error) = called {
            let why = match error {
                Error::Device(error) => self.guard.reason(error),
                other => other,
            };
            self.lose(why);
        }
        self.failure.take().map_or(Ok(()), Err)
    }
}

const LATE: &str = "its kernel did not run in time";

/// What a kernel's wait that failed says of the group; `late` explains a rank that did not come in time.
pub(super) fn lost_by(missed: Missed, late: &'static str) -> Error {
    match missed {
        Missed::Aborted => Error::Aborted,
        Missed::Left(rank) => Error::Lost { rank, source: ErrorKind::ConnectionAborted.into() },
        Missed::Late(rank) => Error::Lost { rank, source: io::Error::new(ErrorKind::TimedOut, late) },
    }
}

impl<T: Transport> Collective<Buffer> for DirectCollective<T> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.ranges.size()
    }

    fn tree_reduce(
        &mut self,
        tree: Tree,
        len: usize,
        partials: &[Partial<Buffer>],
        out: &mut Buffer,
    ) -> Result<()> {
        let checked =
            self.ranges.check_reduce(tree, self.rank, partials.iter().map(|partial| &partial.units));
        self.group.borrow_mut().call(checked, len * size_of::<f32>(), |way, go_on| match way {
            Way::Peers(one_shot) => one_shot.reduce(tree, len, &self.ranges.subtrees(tree), partials, out),
            Way::Nccl(communicator) if self.deterministic => {
                communicator.tree_reduce(tree, len, &self.ranges.subtrees(tree), partials, out, go_on)
            }
            Way::Nccl(communicator) => communicator.all_reduce(len, partials, out, go_on),
        })
    }

    fn gather(
        &mut self,
        root: usize,
        rows: usize,
        x: &Buffer,
        counts: &[usize],
        out: &mut Buffer,
    ) -> Result<()> {
        let checked = self.ranges.check_gather(root, counts);
        let most = rows.saturating_mul(counts.iter().copied().max().unwrap_or(0));
        let bytes = most.saturating_mul(size_of::<f32>());
        self.group.borrow_mut().call(checked, bytes, |way, go_on| match way {
            Way::Peers(one_shot) => one_shot.gather(root, rows, x, counts, out),
            Way::Nccl(communicator) => communicator.gather(root, rows, x, counts, out, go_on),
        })
    }

    fn broadcast(&mut self, root: usize, len: usize, x: &mut Buffer) -> Result<()> {
        let checked = self.ranges.check_broadcast(root);
        self.group.borrow_mut().call(checked, len * size_of::<f32>(), |way, go_on| match way {
            Way::Peers(one_shot) => one_shot.broadcast(root, len, x),
            Way::Nccl(communicator) => communicator.broadcast(root, len, x, go_on),
        })
    }

    /// Records hold the communicator: they are of no use once it was aborted.
    fn can_be_recorded(&self) -> bool {
        true
    }

    fn check(&mut self) -> Result<()> {
        self.group.borrow_mut().check()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl<T: Transport> Drop for DirectCollective<T> {
    fn drop(&mut self) {
        let Group { ways, guard, lost, .. } = &mut *self.group.borrow_mut();
        if *lost {
            return;
        }
        if let Some(one_shot) = &ways.peers {
            one_shot.finish(&mut || guard.trouble().is_ok());
        }
        if let Some(communicator) = &mut ways.nccl {
            // Others that leave have no part in what is still under way.
            communicator.close(&mut || !guard.transport.abort_handle().is_aborted());
        }
    }
}
