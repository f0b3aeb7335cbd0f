//! An engine that the test drives by hand, behind a real gateway on a loopback socket.

use std::sync::{Arc, Mutex};

use cluster::proto::generate_response::Event;
use cluster::proto::generation_client::GenerationClient;
use cluster::proto::{ClusterStatus, Finished, GenerateRequest, GenerateResponse, Started, Token};
use coordinator::{Engine, EngineError, EngineEvent, ModelInfo, Submission};
use engine::{FinishReason, Request, Usage};
use gateway::{ServeError, Tokenizer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// A request that reached the engine, and the line back.
pub(crate) type Submitted = (Request, mpsc::UnboundedSender<EngineEvent>);

struct FakeEngine {
    model: Mutex<Result<ModelInfo, EngineError>>,
    submitted: mpsc::UnboundedSender<Submitted>,
}

#[tonic::async_trait]
impl Engine for FakeEngine {
    fn model(&self) -> Result<ModelInfo, EngineError> {
        self.model.lock().unwrap().clone()
    }

    fn health(&self) -> Result<(), EngineError> {
        self.model().map(drop)
    }

    async fn status(&self) -> Result<ClusterStatus, EngineError> {
        let model = self.model()?;
        Ok(ClusterStatus { serving: true, state: model.name, ..ClusterStatus::default() })
    }

    async fn submit_under(&self, request: Request, _: Option<String>) -> Result<Submission, EngineError> {
        let (sender, events) = mpsc::unbounded_channel();
        self.submitted
            .send((request, sender))
            .map_err(|_| EngineError::Unavailable("test is over".into()))?;
        let fingerprint = self.model()?.fingerprint;
        Ok(Submission { events, fingerprint })
    }
}

/// A gateway that runs.
pub(crate) struct Gateway {
    pub(crate) channel: Channel,
    pub(crate) client: GenerationClient<Channel>,
    pub(crate) submitted: mpsc::UnboundedReceiver<Submitted>,
    engine: Arc<FakeEngine>,
    shutdown: oneshot::Sender<()>,
    server: JoinHandle<Result<(), ServeError>>,
}

impl Gateway {
    /// Starts one on a free port.
    pub(crate) async fn start(tokenizer: Tokenizer, model: Result<ModelInfo, EngineError>) -> Self {
        let (sender, submitted) = mpsc::unbounded_channel();
        let engine = Arc::new(FakeEngine { model: Mutex::new(model), submitted: sender });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (shutdown, stopped) = oneshot::channel::<()>();
        let served = Arc::clone(&engine);
        let server = tokio::spawn(gateway::serve(listener, served, Some(Arc::new(tokenizer)), async {
            stopped.await.ok();
        }));
        let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
        let client = GenerationClient::new(channel.clone());
        Self { channel, client, submitted, engine, shutdown, server }
    }

    /// What the engine says of its model from now on.
    pub(crate) fn set_model(&self, model: Result<ModelInfo, EngineError>) {
        *self.engine.model.lock().unwrap() = model;
    }

    /// Sends a request and waits until the engine has it.
    pub(crate) async fn generate(&mut self, request: GenerateRequest) -> (Responses, Submitted) {
        let responses = self.client.generate(request).await.unwrap().into_inner();
        (Responses(responses), self.submitted.recv().await.unwrap())
    }

    /// The status that refuses a request.
    pub(crate) async fn refusal(&mut self, request: GenerateRequest) -> Status {
        let status = self.client.generate(request).await.unwrap_err();
        assert!(self.submitted.try_recv().is_err(), "the engine must not see it");
        status
    }

    /// Begins the shutdown; the handle ends with the server.
    pub(crate) fn stop(self) -> JoinHandle<Result<(), ServeError>> {
        self.shutdown.send(()).unwrap();
        self.server
    }
}

/// Tokens of any prompt that the engine says it had in its cache.
pub(crate) const CACHED: u32 = 1;

/// The client's end of an answer.
pub(crate) struct Responses(pub(crate) Streaming<GenerateResponse>);

impl Responses {
    pub(crate) async fn next(&mut self) -> Option<Event> {
        self.0.message().await.unwrap().map(|response| response.event.unwrap())
    }

    pub(crate) async fn started(&mut self) -> Started {
        let Some(Event::Started(started)) = self.next().await else { panic!("not started") };
        started
    }

    pub(crate) async fn token(&mut self) -> Token {
        let Some(Event::Token(token)) = self.next().await else { panic!("no token") };
        token
    }

    /// The last response; nothing follows it.
    pub(crate) async fn finished(&mut self) -> Finished {
        let Some(Event::Finished(finished)) = self.next().await else { panic!("not finished") };
        assert_eq!(self.next().await, None);
        finished
    }
}

/// The model that the bundled tokenizer belongs to, with a small context.
pub(crate) fn model() -> ModelInfo {
    ModelInfo {
        name: "yi-nano".into(),
        vocabulary: 4608,
        max_context: 100,
        eos: vec![2],
        ranks: 4,
        groups: 1,
        fingerprint: "nano/bf16".into(),
    }
}

pub(crate) fn token(id: u32) -> EngineEvent {
    EngineEvent::Token { id, logprob: -0.5, cached_tokens: CACHED }
}

pub(crate) fn finished(reason: FinishReason, prompt_tokens: u32, completion_tokens: u32) -> EngineEvent {
    let usage = Usage { prompt_tokens, completion_tokens, cached_tokens: CACHED };
    EngineEvent::Finished { reason, usage }
}
