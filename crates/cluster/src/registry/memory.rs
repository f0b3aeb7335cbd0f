//! A registry in the memory of one process: for a cluster with a single coordinator, and for tests.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Change, ClusterName, Entry, Health, Lease, LeaseId, Registry, RegistryError, Revision, Snapshot,
    Transaction,
};

/// Entries in this process. Clones share them.
#[derive(Clone)]
pub struct MemoryRegistry {
    store: Arc<Store>,
    prefix: String,
}

struct Store {
    state: Mutex<State>,
    health: watch::Sender<Health>,
}

#[derive(Default)]
struct State {
    revision: Revision,
    entries: BTreeMap<String, Entry>,
    last_lease: i64,
    /// The token tells a lease's holder that it was lost.
    leases: BTreeMap<LeaseId, CancellationToken>,
    /// Told of every change, in the order in which they came.
    watchers: Vec<Watcher>,
}

/// Whoever watches the entries below a prefix.
struct Watcher {
    prefix: String,
    /// Bytes of their keys that are left out.
    cut: usize,
    snapshots: watch::Sender<Snapshot>,
}

impl MemoryRegistry {
    /// An empty registry, as `cluster` sees it.
    pub fn new(cluster: &ClusterName) -> Self {
        let store = Store { state: Mutex::default(), health: watch::Sender::new(Health::Answers) };
        Self { store: Arc::new(store), prefix: cluster.prefix() }
    }

    /// The same registry, as another cluster sees it.
    pub fn seen_by(&self, cluster: &ClusterName) -> Self {
        Self { store: self.store.clone(), prefix: cluster.prefix() }
    }

    /// Ends a lease as if its holder had not been heard of in time.
    pub fn expire(&self, lease: LeaseId) {
        if let Some(lost) = self.store.end_lease(lease) {
            lost.cancel();
        }
    }
}

#[tonic::async_trait]
impl Registry for MemoryRegistry {
    async fn watch(&self, prefix: &str) -> Result<watch::Receiver<Snapshot>, RegistryError> {
        let (prefix, cut) = (format!("{}{prefix}", self.prefix), self.prefix.len());
        let mut state = self.store.lock();
        let (snapshots, receiver) = watch::channel(state.snapshot(&prefix, cut));
        state.watchers.push(Watcher { prefix, cut, snapshots });
        Ok(receiver)
    }

    async fn transact(&self, transaction: Transaction) -> Result<Option<Revision>, RegistryError> {
        let key = |key: &str| format!("{}{key}", self.prefix);
        let mut state = self.store.lock();
        let revision = |state: &State, key: &str| state.entries.get(key).map_or(Revision(0), |e| e.revision);
        if transaction.unchanged.iter().any(|(name, expected)| revision(&state, &key(name)) != *expected) {
            return Ok(None);
        }
        for (_, change) in &transaction.changes {
            if let Change::Put(_, Some(lease)) = change
                && !state.leases.contains_key(lease)
            {
                return Err(RegistryError::LeaseLost);
            }
        }
        state.revision.0 += 1;
        let revision = state.revision;
        for (name, change) in transaction.changes {
            match change {
                Change::Put(value, lease) => {
                    state.entries.insert(key(&name), Entry { value, revision, lease });
                }
                Change::Delete => drop(state.entries.remove(&key(&name))),
            }
        }
        state.publish();
        Ok(Some(revision))
    }

    /// The holder is this process, so it is heard of for as long as it holds the lease, whatever `ttl` says.
    async fn lease(&self, _ttl: Duration) -> Result<Lease, RegistryError> {
        let id = {
            let mut state = self.store.lock();
            state.last_lease += 1;
            LeaseId(state.last_lease)
        };
        let store = self.store.clone();
        Ok(Lease::kept_by(id, |lost, stop| {
            store.lock().leases.insert(id, lost);
            async move {
                stop.cancelled().await;
                store.end_lease(id);
            }
        }))
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.store.health.subscribe()
    }
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a lease and all entries with it.
    fn end_lease(&self, id: LeaseId) -> Option<CancellationToken> {
        let mut state = self.lock();
        let lost = state.leases.remove(&id)?;
        state.entries.retain(|_, entry| entry.lease != Some(id));
        state.revision.0 += 1;
        state.publish();
        Some(lost)
    }
}

impl State {
    /// Entries below `prefix`; `cut` bytes of their keys are left out.
    fn snapshot(&self, prefix: &str, cut: usize) -> Snapshot {
        let below = self.entries.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        let entries = below.map(|(key, entry)| (key[cut..].to_owned(), entry.clone())).collect();
        Snapshot { revision: self.revision, entries }
    }

    /// Tells all who still watch of the state that it has now.
    fn publish(&mut self) {
        self.watchers.retain(|watcher| !watcher.snapshots.is_closed());
        for Watcher { prefix, cut, snapshots } in &self.watchers {
            let now = self.snapshot(prefix, *cut);
            snapshots.send_if_modified(|before| {
                let changed = before.entries != now.entries;
                *before = now;
                changed
            });
        }
    }
}

impl fmt::Debug for MemoryRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegistry").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}
