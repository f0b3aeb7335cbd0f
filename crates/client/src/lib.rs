//! Client library: generate, tokenize, detokenize, what is being served, and by whom; an operator's orders.
//!
//! A thin layer over the public gRPC service: addresses as people write them, typed events, and one [`Error`] whose
//! messages are for people. A generation outlives its server: the client asks the servers in turn, follows the leader, and
//! resumes the answer where it broke off.

mod error;
mod generation;
mod operator;
mod servers;

use std::sync::Arc;
use std::time::Duration;

use cluster::proto::{
    DetokenizeRequest, GetModelRequest, GetStatusRequest, TokenizeRequest, WatchStatusRequest,
};
use futures_util::{Stream, StreamExt};
use tonic::Response;

use crate::servers::Servers;

pub use cluster::proto::generate_request::Prompt;
pub use cluster::proto::generate_response::Event;
pub use cluster::proto::{
    ChatMessage, ClusterStatus, Complaint, Conversation, DiskSpeed, DoctorReport, ExaminedLink,
    ExaminedWorker, Facts, FinishReason, Finished, GenerateRequest, GroupStatus, Incident, Library,
    LinkMeasures, Loss, Model, NetworkInterface, RankStatus, SamplingOptions, Started, Token, TokenIds,
    Usage, WorkerStatus,
};
pub use error::Error;
pub use generation::Generation;
pub use operator::{examine, operate};

/// How long a generation waits for a server, unless told otherwise: another coordinator takes over, workers load the model.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a cluster. Cheap to clone: clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    servers: Arc<Servers>,
    patience: Duration,
}

impl Client {
    /// Connects with the first server of `host:port[,host:port…]` that is there.
    pub async fn connect(addresses: &str) -> Result<Self, Error> {
        let servers = Arc::new(Servers::parse(addresses)?);
        servers.ask(|_| async { Ok(Response::new(())) }).await?;
        Ok(Self { servers, patience: PATIENCE })
    }

    /// The same, but a generation goes without a server for `patience` at most. With none it ends at the first failure.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Generates a continuation, and goes on with it when the server is lost or unavailable. Dropping the stream cancels it.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, Error> {
        Generation::open(self.servers.clone(), request, self.patience).await
    }

    /// Text to token ids.
    pub async fn tokenize(&self, text: impl Into<String>) -> Result<Vec<u32>, Error> {
        let request = TokenizeRequest { text: text.into() };
        let asked = self.servers.ask(|mut service| {
            let request = request.clone();
            async move { service.generation.tokenize(request).await }
        });
        Ok(asked.await?.1.token_ids)
    }

    /// Token ids to text; special tokens may be left out.
    pub async fn detokenize(&self, token_ids: Vec<u32>, skip_special_tokens: bool) -> Result<String, Error> {
        let request = DetokenizeRequest { token_ids, skip_special_tokens };
        let asked = self.servers.ask(|mut service| {
            let request = request.clone();
            async move { service.generation.detokenize(request).await }
        });
        Ok(asked.await?.1.text)
    }

    /// What is being served.
    pub async fn model(&self) -> Result<Model, Error> {
        let asked = self
            .servers
            .ask(|mut service| async move { service.generation.get_model(GetModelRequest {}).await });
        Ok(asked.await?.1)
    }

    /// How the cluster stands.
    pub async fn status(&self) -> Result<ClusterStatus, Error> {
        let asked = self
            .servers
            .ask(|mut service| async move { service.monitor.get_status(GetStatusRequest {}).await });
        Ok(asked.await?.1)
    }

    /// How the cluster stands, again after every `interval`.
    pub async fn watch_status(
        &self,
        interval: Duration,
    ) -> Result<impl Stream<Item = Result<ClusterStatus, Error>> + use<>, Error> {
        let interval_millis = Some(u32::try_from(interval.as_millis()).unwrap_or(u32::MAX));
        let asked = self.servers.ask(|mut service| async move {
            service.monitor.watch_status(WatchStatusRequest { interval_millis }).await
        });
        let (address, statuses) = asked.await?;
        let servers = self.servers.clone();
        Ok(statuses.map(move |status| status.map_err(|status| servers.failed(&address, status))))
    }
}
