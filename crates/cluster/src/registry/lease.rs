//! A lease and the task that keeps it.

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::LeaseId;

/// A lease, kept until it is dropped: then it ends, and its entries with it.
#[derive(Debug)]
pub struct Lease {
    id: LeaseId,
    lost: CancellationToken,
    stop: CancellationToken,
    keeper: Option<JoinHandle<()>>,
}

impl Lease {
    /// A lease that a task keeps. The task gets `lost`, to tell that the lease has ended against its will, and `stop`, upon
    /// which it ends the lease.
    pub(crate) fn kept_by<F>(
        id: LeaseId,
        keeper: impl FnOnce(CancellationToken, CancellationToken) -> F,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (lost, stop) = (CancellationToken::new(), CancellationToken::new());
        let keeper = tokio::spawn(keeper(lost.clone(), stop.clone()));
        Self { id, lost, stop, keeper: Some(keeper) }
    }

    /// Its number.
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// Ends when the registry says that the lease has ended. As long as it is away it says nothing.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Ends the lease; unless the registry is away, its entries are gone when this returns.
    pub async fn end(mut self) {
        self.stop.cancel();
        if let Some(keeper) = self.keeper.take() {
            // A keeper that panicked has been reported by its thread; the lease ends by itself.
            let _ = keeper.await;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
