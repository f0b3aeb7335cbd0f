//! The workers of a cluster, each with an entry under a lease of its own.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::entries::{Entries, to_json};
use super::{Listing, Registry, RegistryError, Transaction};

const PREFIX: &str = "workers/";
/// Pause before a registry that did not take an entry is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// What a worker says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerEntry {
    /// Its machine, for people.
    pub host: String,
    /// Where its collectives listen.
    pub collective_address: String,
    /// The model's name, for people.
    pub model: String,
    /// What the bits of its answers depend on.
    pub fingerprint: String,
}

/// A worker's entry, there until this is dropped. If its lease is lost it is made again.
#[derive(Debug)]
pub struct Registration {
    stop: CancellationToken,
    keeper: Option<JoinHandle<()>>,
}

impl Registration {
    /// Puts an entry into the registry as soon as that answers, with leases of `ttl`.
    pub fn new(registry: Arc<dyn Registry>, worker: WorkerEntry, ttl: Duration) -> Self {
        let stop = CancellationToken::new();
        let keeper = tokio::spawn(keep(registry, worker, ttl, stop.clone()));
        Self { stop, keeper: Some(keeper) }
    }

    /// Takes the entry back; unless the registry is away it is gone when this returns.
    pub async fn end(mut self) {
        self.stop.cancel();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.await;
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn keep(registry: Arc<dyn Registry>, worker: WorkerEntry, ttl: Duration, stop: CancellationToken) {
    let key = format!("{PREFIX}{:016x}", rand::random::<u64>());
    loop {
        let registered = async {
            let lease = registry.lease(ttl).await?;
            let put = Transaction::default().put(&key, to_json(&worker), Some(lease.id()));
            registry.transact(put).await.map(|_| lease)
        };
        let lease = tokio::select! {
            () = stop.cancelled() => return,
            registered = registered => match registered {
                Ok(lease) => lease,
                Err(error) => {
                    warn!(%error, "this worker is not in the registry");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = sleep(PAUSE) => continue,
                    }
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => return lease.end().await,
            () = lease.lost() => warn!("this worker's lease was lost: registering again"),
        }
    }
}

/// All workers that are registered.
#[derive(Debug)]
pub struct Members(Entries);

impl Members {
    /// Begins to watch.
    pub async fn watch(registry: &dyn Registry) -> Result<Self, RegistryError> {
        Ok(Self(Entries::new(registry.watch(PREFIX).await?)))
    }

    /// The workers there are, as far as is known.
    pub fn now(&mut self) -> Listing<WorkerEntry> {
        let mut listing = Listing { found: Default::default(), rubbish: Default::default() };
        for (key, entry) in self.0.latest().entries {
            match self.0.parse(&key, &entry, |_: &WorkerEntry| Ok(())) {
                Ok(worker) => {
                    let id = key.strip_prefix(PREFIX).unwrap_or(&key);
                    listing.found.insert(id.to_owned(), worker);
                }
                Err(reason) => drop(listing.rubbish.insert(key, reason)),
            }
        }
        listing
    }

    /// Waits for a change.
    pub async fn changed(&mut self) {
        self.0.changed().await;
    }
}
