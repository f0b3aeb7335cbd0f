//! The time, as the runtime has it: where tests have it stand still, or pass at once, it does so here too.

use std::time::Instant;

/// Now.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
