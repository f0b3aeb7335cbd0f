//! The seam between gateway and coordinator.

use cluster::proto::ClusterStatus;
use engine::{FinishReason, Request, Usage};
use tokio::sync::mpsc;

/// What is being served, as the workers reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// Name for people (the checkpoint's folder).
    pub name: String,
    /// Ids are below this.
    pub vocabulary: u32,
    /// Tokens that prompt and answer may have together.
    pub max_context: u32,
    /// Ids that end a sequence.
    pub eos: Vec<u32>,
    /// Ranks that serve it, in all groups.
    pub ranks: u32,
    /// Groups that serve it.
    pub groups: u32,
    /// Model, data types, instruction path: what the bits depend on. Where groups differ in it, that of one of them.
    pub fingerprint: String,
}

/// Why a request is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The request itself is at fault; the text says what to change.
    #[error("{0}")]
    Invalid(String),
    /// No group stands at the moment; trying again may help.
    #[error("{0}")]
    Unavailable(String),
    /// Another coordinator leads, or none does yet.
    #[error("this coordinator stands by: {}", whereabouts(.0.as_deref()))]
    Standby(Option<String>),
}

/// Where the leader's public service is, for people.
pub(crate) fn whereabouts(leader: Option<&str>) -> String {
    leader.map_or_else(|| "no leader is known yet".to_owned(), |leader| format!("the leader is at {leader}"))
}

/// What a submitted request gets to see; the channel ends after `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineEvent {
    /// A generated token.
    Token {
        /// Its id.
        id: u32,
        /// Natural logarithm of its probability.
        logprob: f32,
        /// As [`Usage::cached_tokens`], for who ends the answer here.
        cached_tokens: u32,
    },
    /// Tokens that follow are computed under another fingerprint, and may differ from those that would have come.
    Moved {
        /// The new one.
        fingerprint: String,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Token counts.
        usage: Usage,
    },
    /// The group was lost and the request with it.
    Failed(EngineError),
}

/// A running request. Dropping it cancels the request, which frees its blocks at the next step.
#[derive(Debug)]
pub struct Submission {
    /// Its events, in order.
    pub events: mpsc::UnboundedReceiver<EngineEvent>,
    /// What its tokens are computed under, until an event says otherwise.
    pub fingerprint: String,
}

/// Whatever generates tokens for the gateway: the coordinator of this process, or a remote one.
#[tonic::async_trait]
pub trait Engine: Send + Sync + 'static {
    /// The model, once a group has served; until then why not.
    fn model(&self) -> Result<ModelInfo, EngineError>;
    /// Whether steps run at this moment; if not, why. Requests are taken meanwhile, and wait.
    fn health(&self) -> Result<(), EngineError>;
    /// What goes on, in detail.
    async fn status(&self) -> Result<ClusterStatus, EngineError>;
    /// Starts a request.
    async fn submit(&self, request: Request) -> Result<Submission, EngineError> {
        self.submit_under(request, None).await
    }
    /// Starts a request or goes on with one, under this fingerprint if any group has it.
    async fn submit_under(
        &self,
        request: Request,
        fingerprint: Option<String>,
    ) -> Result<Submission, EngineError>;
}
