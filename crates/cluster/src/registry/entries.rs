//! Entries as values: JSON, so that `etcdctl` shows them to people.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::warn;

use super::{Entry, Revision, Snapshot};

/// Bytes of a value that anybody here would write; more is rubbish.
pub(super) const MAX_VALUE: usize = 64 << 10;

/// What was found below a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing<T> {
    /// By what follows the prefix.
    pub found: BTreeMap<String, T>,
    /// Keys with something else, and why it is none.
    pub rubbish: BTreeMap<String, String>,
}

/// Entries below one prefix, parsed as they come; rubbish is reported once and ignored.
#[derive(Debug)]
pub(crate) struct Entries {
    snapshots: watch::Receiver<Snapshot>,
    reported: BTreeMap<String, Revision>,
}

impl Entries {
    pub(crate) fn new(snapshots: watch::Receiver<Snapshot>) -> Self {
        Self { snapshots, reported: BTreeMap::new() }
    }

    /// The latest snapshot; [`Self::changed`] waits for a later one.
    pub(crate) fn latest(&mut self) -> Snapshot {
        let snapshot = self.snapshots.borrow_and_update().clone();
        self.reported.retain(|key, _| snapshot.entries.contains_key(key));
        snapshot
    }

    /// Ends when there is a later snapshot; never, once the registry is gone for good.
    pub(crate) async fn changed(&mut self) {
        if self.snapshots.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// The value of an entry, or why it is none; the latter is reported, once.
    pub(crate) fn parse<T: DeserializeOwned>(
        &mut self,
        key: &str,
        entry: &Entry,
        check: impl Fn(&T) -> Result<(), String>,
    ) -> Result<T, String> {
        let parsed = match entry.value.len() {
            ..=MAX_VALUE => serde_json::from_slice(&entry.value).map_err(|error| error.to_string()),
            length => Err(format!("it has {length} bytes, and at most {MAX_VALUE} are read")),
        };
        let parsed = parsed.and_then(|value| check(&value).map(|()| value));
        if let Err(reason) = &parsed
            && self.reported.insert(key.to_owned(), entry.revision) != Some(entry.revision)
        {
            warn!(key, reason, "ignored rubbish in the registry");
        }
        parsed
    }
}

/// The value of an entry.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    // Fails for maps with keys that are no texts, which no entry has.
    serde_json::to_vec(value).unwrap_or_default()
}
