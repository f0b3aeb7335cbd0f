//! How sequences spread over the steps of a pipeline, so that every stage has one.

use super::Scheduler;
use crate::config::SchedulerConfig;
use crate::sequence::{Running, Sequence};

impl Scheduler {
    /// Sequences that the next step may take. In a pipeline they are no more than one stage's part of all that are active, so that
    /// all steps take about as long; and while stages are idle, those that could run now are dealt out among them.
    pub(super) fn seats(&self) -> usize {
        let stages = self.config.stages();
        if stages == 1 {
            return usize::MAX;
        }
        let newcomers = self.newcomers();
        let active = self.running.iter().filter(|running| !running.ended).count() + newcomers;
        let could_run = self.running.iter().filter(|running| ready(&self.config, running) > 0).count();
        let idle = stages.saturating_sub(self.in_flight() as usize).max(1);
        active.div_ceil(stages).min((could_run + newcomers).div_ceil(idle))
    }

    /// Waiting sequences for which there are slots and blocks at the moment.
    fn newcomers(&self) -> usize {
        let mut blocks = self.pool.available();
        let fits = |sequence: &Sequence| {
            let rest = blocks.checked_sub(self.pool.needed(&sequence.tokens));
            blocks = rest.unwrap_or(0);
            rest.is_some()
        };
        self.waiting.iter().take(self.free_slots.len()).map(fits).take_while(|fits| *fits).count()
    }
}

/// Tokens of a running sequence that a step may take now: in a pipeline none while its next token is being sampled.
pub(super) fn ready(config: &SchedulerConfig, running: &Running) -> usize {
    if config.stages() > 1 && running.sampling() > 0 { 0 } else { running.remaining() }
}
