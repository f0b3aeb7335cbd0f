//! The registry: small, consistent state that all processes of one cluster share. Who is there, and who leads.
//!
//! [`Registry`] is the seam: entries by key, watched as whole snapshots, changed in transactions, and tied to leases that end
//! with their holder. [`MemoryRegistry`] keeps them in this process, [`EtcdRegistry`] in etcd. What the entries mean lies on
//! top, once for both: [`members`], [`election`] and [`orders`].

pub mod election;
mod entries;
pub mod etcd;
mod lease;
pub mod members;
pub mod memory;
pub mod orders;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tokio::sync::watch;

pub use entries::Listing;
pub use etcd::{EtcdOptions, EtcdRegistry};
pub use lease::Lease;
pub use memory::MemoryRegistry;

/// How long a holder's entries outlive it, unless told otherwise: a pause of the process or of the network is shorter.
pub const LEASE: Duration = Duration::from_secs(5);

/// Bytes of a cluster's name.
const MAX_NAME: usize = 64;

/// State that the processes of one cluster share. Keys are relative to the cluster: two clusters in one registry do not see
/// each other.
#[tonic::async_trait]
pub trait Registry: fmt::Debug + Send + Sync + 'static {
    /// All entries whose keys begin with `prefix`, now and whenever they change. A receiver that is slow, or cut off for a while,
    /// misses states in between, never the latest.
    async fn watch(&self, prefix: &str) -> Result<watch::Receiver<Snapshot>, RegistryError>;

    /// Makes all changes of a transaction at once if all its conditions hold; returns the revision that they got, or none where a
    /// condition does not hold. An error leaves open whether they were made.
    async fn transact(&self, transaction: Transaction) -> Result<Option<Revision>, RegistryError>;

    /// A lease that is kept until it is dropped. Entries with it are gone `ttl` (whole seconds) after this process fell silent.
    async fn lease(&self, ttl: Duration) -> Result<Lease, RegistryError>;

    /// Whether the registry answers, now and whenever that changes.
    fn health(&self) -> watch::Receiver<Health>;
}

/// When an entry, or the whole registry, was changed: later is higher. 0 is an entry that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub u64);

/// The number of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Whatever was put there.
    pub value: Vec<u8>,
    /// Its last change.
    pub revision: Revision,
    /// The lease that it ends with.
    pub lease: Option<LeaseId>,
}

/// Some entries as they were at one time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The time: no change up to it is missing.
    pub revision: Revision,
    /// By key.
    pub entries: BTreeMap<String, Entry>,
}

/// Changes to make together, and what must hold for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transaction {
    pub(crate) unchanged: Vec<(String, Revision)>,
    /// No key is in two changes.
    pub(crate) changes: Vec<(String, Change)>,
}

/// What becomes of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Put(Vec<u8>, Option<LeaseId>),
    Delete,
}

impl Transaction {
    /// On condition that the last change of `key` is still `revision`; 0: that it is not there.
    pub fn if_unchanged(mut self, key: &str, revision: Revision) -> Self {
        self.unchanged.push((key.to_owned(), revision));
        self
    }

    /// Sets an entry, with a lease or for good.
    pub fn put(mut self, key: &str, value: Vec<u8>, lease: Option<LeaseId>) -> Self {
        self.changes.push((key.to_owned(), Change::Put(value, lease)));
        self
    }

    /// Removes an entry, if it is there.
    pub fn delete(mut self, key: &str) -> Self {
        self.changes.push((key.to_owned(), Change::Delete));
        self
    }
}

/// Whether a registry answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It did when it was last asked.
    Answers,
    /// It does not, for this reason. What was known of it may be out of date; nothing can change in it.
    Away(String),
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answers => f.write_str("the registry answers"),
            Self::Away(reason) => write!(f, "the registry is away, elections are frozen: {reason}"),
        }
    }
}

/// Why the registry did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// It does not answer; trying again may help.
    #[error("{0}")]
    Away(String),
    /// It answers, but does not let us; its own words.
    #[error("{registry} refused: {reason}")]
    Refused {
        /// Which.
        registry: String,
        /// Why.
        reason: String,
    },
    /// The lease of an entry has ended.
    #[error("the lease has ended: its holder was not heard of in time")]
    LeaseLost,
    /// It cannot be reached as it was asked for.
    #[error("{0}")]
    Options(String),
}

/// The name of a cluster, which keeps its entries apart from those of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterName(String);

impl FromStr for ClusterName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let fits = (1..=MAX_NAME).contains(&name.len());
        if fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            Ok(Self(name.to_owned()))
        } else {
            Err(format!(
                "'{name}' is not a cluster's name: 1 to {MAX_NAME} letters, digits, '-', '_' and '.'"
            ))
        }
    }
}

impl ClusterName {
    /// What all keys of this cluster begin with. A name has no '/', so none is the beginning of another.
    pub(crate) fn prefix(&self) -> String {
        format!("/phalanx/{}/", self.0)
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_clusters_keep_them_apart() {
        let prefix = |name: &str| name.parse::<ClusterName>().map(|name| name.prefix());
        assert_eq!(prefix("yi-34B_a.1"), Ok("/phalanx/yi-34B_a.1/".into()));
        for wrong in ["", "a/b", "a b", "ä", &"a".repeat(65)] {
            let error = prefix(wrong).unwrap_err();
            assert!(error.contains("is not a cluster's name: 1 to 64 letters"), "{error}");
        }
    }
}
