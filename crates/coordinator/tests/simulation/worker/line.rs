//! How a worker reaches coordinators.

use std::sync::{Arc, Mutex, PoisonError};

use cluster::proto::{CoordinatorMessage, StepFrame, StepReply, WorkerMessage};
use cluster::registry::election::Leader;
use tokio::sync::{Notify, mpsc};
use tonic::Status;

/// What comes down; ends after the first error.
pub(crate) type Down<T> = mpsc::UnboundedReceiver<Result<T, Status>>;

/// One connection.
#[tonic::async_trait]
pub(crate) trait Line: Send + Sync {
    async fn join(
        &self,
        up: mpsc::UnboundedReceiver<WorkerMessage>,
    ) -> Result<Down<CoordinatorMessage>, Status>;
    async fn steps(&self, up: mpsc::UnboundedReceiver<StepReply>) -> Result<Down<StepFrame>, Status>;
}

/// Makes connections.
#[tonic::async_trait]
pub(crate) trait Dialer: Send + Sync + 'static {
    async fn dial(&self, worker: &str, coordinator: &str) -> Result<Box<dyn Line>, Status>;
}

/// Who leads, as all workers know it; whoever waits for a change is told in the order in which they came.
#[derive(Clone, Default)]
pub(crate) struct Directory(Arc<(Mutex<Option<Leader>>, Notify)>);

impl Directory {
    pub(crate) fn set(&self, leader: Option<Leader>) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = leader;
        self.0.1.notify_waiters();
    }

    pub(crate) fn leader(&self) -> Option<Leader> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends when somebody else leads than `leader`.
    pub(crate) async fn superseded(&self, leader: &Leader) {
        loop {
            let changed = self.0.1.notified();
            if self.leader().is_some_and(|now| now.term != leader.term) {
                return;
            }
            changed.await;
        }
    }
}
