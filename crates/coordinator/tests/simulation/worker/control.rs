//! What faults do to one process of a worker.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tokio::sync::Notify;

/// How a process fares.
pub(crate) struct Control {
    /// It was stopped: none of its tasks goes on.
    pub(crate) stopped: Gate,
    /// Its steps and its loading stand still, the rest goes on.
    pub(crate) hung: Gate,
    /// Steps take so many times as long.
    pub(crate) slowness: AtomicU32,
    /// Its machine is gone.
    pub(crate) vanished: AtomicBool,
    /// The next load fails.
    pub(crate) fails_load: AtomicBool,
    /// The next step fails.
    pub(crate) fails_step: AtomicBool,
    /// False outputs of the epoch before come in front of its own.
    pub(crate) echoes: AtomicBool,
    /// In the next step it says that the connection with another rank broke.
    pub(crate) accuses: AtomicBool,
    /// In the next step, the rank behind it gets something from it that cannot be right.
    pub(crate) garbles: AtomicBool,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            stopped: Gate::default(),
            hung: Gate::default(),
            slowness: AtomicU32::new(1),
            vanished: AtomicBool::new(false),
            fails_load: AtomicBool::new(false),
            fails_step: AtomicBool::new(false),
            echoes: AtomicBool::new(false),
            accuses: AtomicBool::new(false),
            garbles: AtomicBool::new(false),
        }
    }
}

/// Whether a fault that happens once happens now.
pub(crate) fn strikes(fault: &AtomicBool) -> bool {
    fault.swap(false, Ordering::Relaxed)
}

/// Lets through, or not yet.
#[derive(Default)]
pub(crate) struct Gate {
    shut: AtomicBool,
    changed: Notify,
}

impl Gate {
    /// Shuts or opens it.
    pub(crate) fn shut(&self, shut: bool) {
        self.shut.store(shut, Ordering::Relaxed);
        self.changed.notify_waiters();
    }

    /// Waits until it is open.
    pub(crate) async fn pass(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.shut.load(Ordering::Relaxed) {
                return;
            }
            changed.await;
        }
    }
}
