//! Collectives over NCCL: one process for each GPU, on one machine or many.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use kernels::cuda::{Buffer, Communicator, NcclId};
use kernels::{Cuda, Partial, Tree};

use crate::collective::{AbortHandle, Collective, Error, Result};
use crate::ranges::Ranges;
use crate::transport::Transport;

/// How often a wait looks after the other ranks.
const LOOK: Duration = Duration::from_millis(5);
/// A rank that left in peace finished first what it sent: what this rank waits for then comes within this time.
const GRACE: Duration = Duration::from_millis(500);

/// One rank's end of a group that NCCL connects.
///
/// It keeps the [`Transport`] that it was formed over. That mesh is proven (secret, group, epoch, ranks), so the communicator's id
/// goes round on it and not through the coordinator, which need not know what connects a group; and a rank that ends closes its
/// connections, which the others notice sooner than NCCL does.
///
/// Calls only begin work. While this thread waits for its GPU it looks after the abort flag, NCCL's errors and the other ranks, and aborts
/// its own communicator, which ends the work; [`Collective::check`] then tells why. A communicator serves one epoch: to go on,
/// forget what was recorded ([`Backend::reset`](kernels::Backend::reset)), drop this, and form anew; in this order, since NCCL waits
/// for the records that name its communicator.
///
/// Buffers are not registered as symmetric windows: that would need NCCL's own allocations for all partial sums.
#[derive(Debug)]
pub struct NcclCollective<T: Transport> {
    group: Rc<RefCell<Group<T>>>,
    rank: usize,
    ranges: Ranges,
    deterministic: bool,
    abort: AbortHandle,
}

#[derive(Debug)]
struct Group<T> {
    communicator: Communicator,
    guard: Guard<T>,
    /// Why the communicator was aborted, not told yet.
    failure: Option<Error>,
    lost: bool,
}

/// Looks after the others.
#[derive(Debug)]
struct Guard<T> {
    transport: T,
    looked: Instant,
    /// Since when a rank is gone.
    gone: Option<Instant>,
}

impl<T: Transport> Guard<T> {
    /// Why it is no use to wait any longer.
    fn trouble(&mut self) -> Result<()> {
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
}

impl<T: Transport + 'static> NcclCollective<T> {
    /// Connects the ranks of `transport`, each of which calls this within `limit`. `ranges`: the units of every rank, in order. With
    /// `deterministic` sums are added along the tree, so that their bits are those of every other collective; else in NCCL's own order,
    /// which moves fewer bytes.
    ///
    /// # Errors
    /// [`Error::Device`] where NCCL is missing or older than 2.18, or fails; [`Error::Aborted`] and [`Error::Lost`] as the
    /// transport's; [`Error::Shape`] for false ranges.
    pub fn form(
        cuda: &Cuda,
        mut transport: T,
        ranges: Vec<Range<usize>>,
        deterministic: bool,
        limit: Duration,
    ) -> Result<Self> {
        let (rank, size, abort) = (transport.rank(), transport.size(), transport.abort_handle());
        let ranges = Ranges::new(ranges, size)?;
        let id = share_id(&mut transport)?;
        let deadline = Instant::now() + limit;
        let mut guard = Guard { transport, looked: Instant::now(), gone: None };
        let mut go_on = || guard.trouble().is_ok() && Instant::now() < deadline;
        let connected = Communicator::connect(cuda, id, rank, size, &mut go_on);
        let communicator = connected.map_err(|error| guard.trouble().err().unwrap_or(error.into()))?;
        let group = Rc::new(RefCell::new(Group { communicator, guard, failure: None, lost: false }));
        let watched = Rc::downgrade(&group);
        cuda.while_waiting(move || {
            // In the middle of a call, that call looks.
            if let Some(group) = watched.upgrade()
                && let Ok(mut group) = group.try_borrow_mut()
            {
                group.look();
            }
        });
        Ok(Self { group, rank, ranges, deterministic, abort })
    }
}

/// Rank 0 makes the communicator's id and sends it to all.
fn share_id<T: Transport>(transport: &mut T) -> Result<NcclId> {
    if transport.rank() > 0 {
        let mut id = [0; 128];
        transport.exchange(&[], &mut [(0, &mut id)])?;
        return Ok(NcclId(id));
    }
    let id = NcclId::new()?;
    let others: Vec<(usize, &[u8])> = (1..transport.size()).map(|rank| (rank, &id.0[..])).collect();
    transport.exchange(&others, &mut [])?;
    Ok(id)
}

impl<T: Transport> Group<T> {
    /// Aborts the communicator where there is no use in waiting.
    fn look(&mut self) {
        if self.lost {
            return;
        }
        if let Err(error) = self.guard.trouble().and_then(|()| Ok(self.communicator.check()?)) {
            self.lose(error);
        }
    }

    fn lose(&mut self, error: Error) {
        self.communicator.abort();
        self.lost = true;
        self.failure = Some(error);
    }

    fn check(&mut self) -> Result<()> {
        self.look();
        match self.failure.take() {
            Some(error) => Err(error),
            None if self.lost => Err(Error::Ended),
            None => Ok(()),
        }
    }

    /// Runs a call whose arguments were `checked`, unless the group is lost.
    fn call(
        &mut self,
        checked: Result<()>,
        body: impl FnOnce(&mut Communicator, &mut dyn FnMut() -> bool) -> kernels::Result<()>,
    ) -> Result<()> {
        self.check()?;
        let Self { communicator, guard, .. } = self;
        let called = checked.and_then(|()| Ok(body(communicator, &mut || guard.trouble().is_ok())?));
        if let Err(error) = called {
            let why = self.guard.trouble().err().unwrap_or(error);
            self.lose(why);
        }
        self.failure.take().map_or(Ok(()), Err)
    }
}

impl<T: Transport> Collective<Buffer> for NcclCollective<T> {
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
        self.group.borrow_mut().call(checked, |communicator, go_on| {
            if self.deterministic {
                communicator.tree_reduce(tree, len, &self.ranges.subtrees(tree), partials, out, go_on)
            } else {
                communicator.all_reduce(len, partials, out, go_on)
            }
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
        self.group
            .borrow_mut()
            .call(checked, |communicator, go_on| communicator.gather(root, rows, x, counts, out, go_on))
    }

    fn broadcast(&mut self, root: usize, len: usize, x: &mut Buffer) -> Result<()> {
        let checked = self.ranges.check_broadcast(root);
        self.group
            .borrow_mut()
            .call(checked, |communicator, go_on| communicator.broadcast(root, len, x, go_on))
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

impl<T: Transport> Drop for NcclCollective<T> {
    fn drop(&mut self) {
        let Group { communicator, guard, lost, .. } = &mut *self.group.borrow_mut();
        if !*lost {
            // Others that leave have no part in what is still under way.
            communicator.close(&mut || !guard.transport.abort_handle().is_aborted());
        }
    }
}
