//! The registry as one coordinator reaches it, or does not.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster::registry::{
    Health, Lease, LeaseId, MemoryRegistry, Registry, RegistryError, Revision, Snapshot, Transaction,
};
use tokio::sync::{Notify, watch};

/// Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Reach {
    registry: MemoryRegistry,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    away: bool,
    /// One more transaction is made, but its answer is lost.
    swallows_answer: bool,
    leases: Vec<LeaseId>,
}

impl Reach {
    pub(crate) fn new(registry: &MemoryRegistry) -> Self {
        Self { registry: registry.clone(), state: Arc::default(), changed: Arc::default() }
    }

    /// The registry is out of reach from now on, or in reach again.
    pub(crate) fn set_away(&self, away: bool) {
        self.change(|state| (state.away, state.swallows_answer) = (away, away));
        self.changed.notify_waiters();
    }

    pub(crate) fn is_away(&self) -> bool {
        self.change(|state| state.away)
    }

    /// Ends all leases that were given, as if nothing had been heard for too long.
    pub(crate) fn expire(&self) {
        let leases = self.change(|state| std::mem::take(&mut state.leases));
        leases.into_iter().for_each(|lease| self.registry.expire(lease));
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the registry is in reach.
    async fn reached(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.is_away() {
                return;
            }
            changed.await;
        }
    }

    fn check(&self) -> Result<(), RegistryError> {
        if self.is_away() { Err(RegistryError::Away("it is out of reach".into())) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl Registry for Reach {
    async fn watch(&self, prefix: &str) -> Result<watch::Receiver<Snapshot>, RegistryError> {
        self.check()?;
        let mut snapshots = self.registry.watch(prefix).await?;
        let (sender, receiver) = watch::channel(snapshots.borrow_and_update().clone());
        let reach = self.clone();
        tokio::spawn(async move {
            while !sender.is_closed() && snapshots.changed().await.is_ok() {
                reach.reached().await;
                sender.send_replace(snapshots.borrow_and_update().clone());
            }
        });
        Ok(receiver)
    }

    async fn transact(&self, transaction: Transaction) -> Result<Option<Revision>, RegistryError> {
        let made = self.change(|state| !state.away || std::mem::take(&mut state.swallows_answer));
        let answer = if made { self.registry.transact(transaction).await } else { Ok(None) };
        self.check()?;
        answer
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, RegistryError> {
        self.check()?;
        let lease = self.registry.lease(ttl).await?;
        self.change(|state| state.leases.push(lease.id()));
        Ok(lease)
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.registry.health()
    }
}
