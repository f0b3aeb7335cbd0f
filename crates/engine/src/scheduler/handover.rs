//! Requests that leave a scheduler, to go on in another one.

use super::Scheduler;
use crate::{Request, SeqId};

impl Scheduler {
    /// Gives up everything: the group was lost, and others are there. Requests come in their order, with the answers that they have as
    /// what is to be resumed. What is in flight comes to nothing; [`Self::restart`] belongs before the next plan.
    pub fn hand_over(&mut self) -> Vec<(SeqId, Request)> {
        let running = self.running.drain(..).filter(|running| !running.ended).map(|running| running.sequence);
        let sequences: Vec<_> = running.chain(self.waiting.drain(..)).collect();
        sequences.into_iter().map(|sequence| (sequence.id, sequence.into_request())).collect()
    }

    /// Gives up what waits, likewise.
    pub fn hand_over_waiting(&mut self) -> Vec<(SeqId, Request)> {
        self.waiting.drain(..).map(|sequence| (sequence.id, sequence.into_request())).collect()
    }
}
