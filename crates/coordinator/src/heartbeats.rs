//! What workers told of themselves, and when. Pure.

use std::collections::BTreeMap;
use std::time::Instant;

use cluster::{Progress, WorkerId};

/// The last heartbeat of every worker.
#[derive(Debug, Default)]
pub(crate) struct Heartbeats(BTreeMap<WorkerId, Seen>);

/// A worker's last heartbeat.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// What it said.
    pub(crate) progress: Progress,
    /// When that was new.
    pub(crate) changed: Instant,
    /// When it was said last.
    pub(crate) heard: Instant,
}

impl Heartbeats {
    /// A heartbeat came.
    pub(crate) fn heard(&mut self, worker: WorkerId, progress: Progress, now: Instant) {
        let seen = self.0.entry(worker).or_insert(Seen { progress, changed: now, heard: now });
        if seen.progress != progress {
            seen.changed = now;
        }
        (seen.progress, seen.heard) = (progress, now);
    }

    /// The last one of a worker.
    pub(crate) fn last(&self, worker: WorkerId) -> Option<Seen> {
        self.0.get(&worker).copied()
    }

    /// A worker is gone.
    pub(crate) fn forget(&mut self, worker: WorkerId) {
        self.0.remove(&worker);
    }
}
