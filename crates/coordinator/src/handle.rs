//! The coordinator as the gateway sees it.

use std::sync::{Arc, OnceLock};

use engine::Request;
use tokio::sync::{mpsc, oneshot, watch};

use crate::api::{Engine, EngineError, ModelInfo, Submission};
use crate::command::Command;
use crate::group::State;

/// A running coordinator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CoordinatorHandle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) state: watch::Receiver<State>,
    /// Set when a group first serves, and the same ever after.
    pub(crate) model: Arc<OnceLock<ModelInfo>>,
}

impl CoordinatorHandle {
    /// Where the group stands, now and whenever it changes.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }
}

#[tonic::async_trait]
impl Engine for CoordinatorHandle {
    fn model(&self) -> Result<ModelInfo, EngineError> {
        self.model.get().cloned().ok_or_else(|| EngineError::Unavailable(self.state.borrow().to_string()))
    }

    async fn submit(&self, request: Request) -> Result<Submission, EngineError> {
        let stopped = || EngineError::Unavailable("the coordinator has stopped".into());
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Submit { request, reply }).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }
}
