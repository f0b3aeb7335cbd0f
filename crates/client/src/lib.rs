//! Client library: generate, tokenize, detokenize, what is being served, and by whom.
//!
//! A thin layer over the public gRPC service: addresses as people write them, typed events, and one [`Error`] whose
//! messages are for people.

mod error;
mod generation;

use std::time::Duration;

use cluster::proto::generation_client::GenerationClient;
use cluster::proto::monitor_client::MonitorClient;
use cluster::proto::{
    DetokenizeRequest, GetModelRequest, GetStatusRequest, TokenizeRequest, WatchStatusRequest,
};
use cluster::{KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, PUBLIC_MESSAGE_LIMIT};
use futures_util::{Stream, StreamExt};
use tonic::transport::{Channel, Endpoint};

pub use cluster::proto::generate_request::Prompt;
pub use cluster::proto::generate_response::Event;
pub use cluster::proto::{
    ChatMessage, ClusterStatus, Conversation, FinishReason, Finished, GenerateRequest, GroupStatus, Incident,
    Loss, Model, RankStatus, SamplingOptions, Started, Token, TokenIds, Usage, WorkerStatus,
};
pub use error::Error;
pub use generation::Generation;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to a server. Cheap to clone: clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    service: GenerationClient<Channel>,
    monitor: MonitorClient<Channel>,
    address: String,
}

impl Client {
    /// Connects with the server at `host:port`.
    pub async fn connect(address: &str) -> Result<Self, Error> {
        let authority = address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/');
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))
            .ok()
            .filter(|endpoint| endpoint.uri().port().is_some())
            .ok_or_else(|| Error::Address(address.to_owned()))?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .connect()
            .await
            .map_err(|source| Error::Unreachable { address: authority.to_owned(), source })?;
        let monitor = MonitorClient::new(channel.clone());
        let service = GenerationClient::new(channel)
            .max_decoding_message_size(PUBLIC_MESSAGE_LIMIT)
            .max_encoding_message_size(PUBLIC_MESSAGE_LIMIT);
        Ok(Self { service, monitor, address: authority.to_owned() })
    }

    /// Generates a continuation. Dropping the stream cancels it.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, Error> {
        let response = self.service.clone().generate(request).await.map_err(|status| self.error(status))?;
        Ok(Generation::new(self.clone(), response.into_inner()))
    }

    /// Text to token ids.
    pub async fn tokenize(&self, text: impl Into<String>) -> Result<Vec<u32>, Error> {
        let request = TokenizeRequest { text: text.into() };
        let response = self.service.clone().tokenize(request).await.map_err(|status| self.error(status))?;
        Ok(response.into_inner().token_ids)
    }

    /// Token ids to text; special tokens may be left out.
    pub async fn detokenize(&self, token_ids: Vec<u32>, skip_special_tokens: bool) -> Result<String, Error> {
        let request = DetokenizeRequest { token_ids, skip_special_tokens };
        let response = self.service.clone().detokenize(request).await.map_err(|status| self.error(status))?;
        Ok(response.into_inner().text)
    }

    /// What is being served.
    pub async fn model(&self) -> Result<Model, Error> {
        let response = self.service.clone().get_model(GetModelRequest {}).await;
        Ok(response.map_err(|status| self.error(status))?.into_inner())
    }

    /// How the cluster stands.
    pub async fn status(&self) -> Result<ClusterStatus, Error> {
        let response = self.monitor.clone().get_status(GetStatusRequest {}).await;
        Ok(response.map_err(|status| self.error(status))?.into_inner())
    }

    /// How the cluster stands, again after every `interval`.
    pub async fn watch_status(
        &self,
        interval: Duration,
    ) -> Result<impl Stream<Item = Result<ClusterStatus, Error>> + use<>, Error> {
        let interval_millis = Some(u32::try_from(interval.as_millis()).unwrap_or(u32::MAX));
        let response = self.monitor.clone().watch_status(WatchStatusRequest { interval_millis }).await;
        let client = self.clone();
        let statuses = response.map_err(|status| self.error(status))?.into_inner();
        Ok(statuses.map(move |status| status.map_err(|status| client.error(status))))
    }

    fn error(&self, status: tonic::Status) -> Error {
        Error::from_status(&self.address, status)
    }
}
