//! The coordinator as the gateway sees it.

use cluster::proto::ClusterStatus;
use engine::Request;
use tokio::sync::{mpsc, oneshot, watch};

use crate::api::{Engine, EngineError, ModelInfo, Submission};
use crate::command::Command;
use crate::state::State;

/// A running coordinator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CoordinatorHandle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) state: watch::Receiver<State>,
    /// What the last group served; none before the first.
    pub(crate) model: watch::Receiver<Option<ModelInfo>>,
}

impl CoordinatorHandle {
    /// Where the groups stand, now and whenever it changes.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Sends a command to the leader and waits for its answer.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, EngineError> {
        let stopped = || EngineError::Unavailable("the coordinator has stopped".into());
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())
    }
}

#[tonic::async_trait]
impl Engine for CoordinatorHandle {
    fn model(&self) -> Result<ModelInfo, EngineError> {
        let model = self.model.borrow().clone();
        model.ok_or_else(|| EngineError::Unavailable(self.state.borrow().to_string()))
    }

    fn health(&self) -> Result<(), EngineError> {
        match &*self.state.borrow() {
            State::Serving(_) => Ok(()),
            state => Err(EngineError::Unavailable(state.to_string())),
        }
    }

    async fn status(&self) -> Result<ClusterStatus, EngineError> {
        self.ask(|reply| Command::Status { reply }).await
    }

    async fn submit_under(
        &self,
        request: Request,
        fingerprint: Option<String>,
    ) -> Result<Submission, EngineError> {
        self.ask(|reply| Command::Submit { request, fingerprint, reply }).await?
    }
}
