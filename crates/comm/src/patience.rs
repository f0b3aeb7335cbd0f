//! How a rank waits: awake for a moment, since messages usually come within microseconds, then asleep.

use std::time::{Duration, Instant};

/// How long a rank stays awake without anything happening.
const AWAKE: Duration = Duration::from_micros(50);

/// How long a rank sleeps at most before it looks at the abort flag, which does not wake it.
pub(crate) const SLEEP: Duration = Duration::from_millis(10);

/// One wait.
#[derive(Default)]
pub(crate) struct Patience {
    idle_since: Option<Instant>,
}

impl Patience {
    /// Something happened: the wait begins anew.
    pub(crate) fn renew(&mut self) {
        self.idle_since = None;
    }

    /// Whether it is too early to sleep: let other threads run and look again.
    pub(crate) fn is_awake(&mut self) -> bool {
        self.idle_since.get_or_insert_with(Instant::now).elapsed() < AWAKE
    }
}
