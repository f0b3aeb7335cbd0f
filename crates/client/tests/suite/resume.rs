//! Generations whose servers are lost at every position, in every way: no token is repeated and none is missing.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use client::{
    Client, Error, Event, FinishReason, Finished, GenerateRequest, Prompt, SamplingOptions, Started, Token,
    TokenIds,
};
use cluster::LEADER_METADATA;
use cluster::proto::generation_server::{Generation, GenerationServer};
use cluster::proto::{
    DetokenizeRequest, DetokenizeResponse, GenerateResponse, GetModelRequest, Model, TokenizeRequest,
    TokenizeResponse,
};
use futures_util::StreamExt;
use proptest::prelude::*;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

const PROMPT: &[u32] = &[5, 6, 7];
const SEED: u64 = 99;

/// How a server is lost.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Before it takes the request.
    Refuse,
    /// It does not take the request at all.
    Forbid,
    /// It says that it stops, behind so many tokens.
    Stop(usize),
    /// The stream ends without its last message.
    End(usize),
    /// The connection is cut; the last tokens may not arrive.
    Cut(usize),
}

/// A server that generates by a formula and is lost as it is told.
#[derive(Clone)]
struct Scripted {
    length: usize,
    faults: Arc<Mutex<VecDeque<Fault>>>,
    /// Cuts all connections.
    cut: watch::Sender<u32>,
    fingerprints: Arc<Mutex<VecDeque<&'static str>>>,
    /// It knows nothing of resuming, and begins again each time.
    older: bool,
    /// It stands by, and tells of this leader.
    leader: Option<String>,
    /// What it was asked.
    asked: Arc<Mutex<Vec<GenerateRequest>>>,
}

fn id(seed: u64, index: usize) -> u32 {
    (seed as u32).wrapping_mul(2_654_435_761).wrapping_add(index as u32 * 40_503) % 1000
}

fn token(seed: u64, index: usize) -> Token {
    let id = id(seed, index);
    Token { id, text: format!("{index}:{id} "), logprob: -(index as f32) }
}

/// What nobody disturbs.
fn undisturbed(length: usize) -> Vec<Event> {
    let started = Started {
        request_id: "r".into(),
        seed: SEED,
        prompt_token_ids: PROMPT.to_vec(),
        fingerprint: "a".into(),
        ..Started::default()
    };
    let tokens = (0..length).map(|index| Event::Token(token(SEED, index)));
    [Event::Started(started)].into_iter().chain(tokens).chain([finished()]).collect()
}

fn finished() -> Event {
    Event::Finished(Finished { reason: FinishReason::Length.into(), text: "end".into(), usage: None })
}

#[tonic::async_trait]
impl Generation for Scripted {
    type GenerateStream = ReceiverStream<Result<GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        self.lead()?;
        let request = request.into_inner();
        self.asked.lock().expect("no panic").push(request.clone());
        let fault = self.faults.lock().expect("no panic").pop_front();
        if fault == Some(Fault::Refuse) {
            return Err(Status::unavailable("it is not ready"));
        }
        if fault == Some(Fault::Forbid) {
            return Err(Status::invalid_argument("never"));
        }
        let fingerprint = self.fingerprints.lock().expect("no panic").pop_front().unwrap_or("a");
        let resume = request.resume.filter(|_| !self.older).unwrap_or_default();
        let seed = request.sampling.and_then(|sampling| sampling.seed).unwrap_or(SEED);
        let previous = Some(resume.fingerprint).filter(|f| !f.is_empty() && f != fingerprint);
        let first = resume.token_ids.len();
        let started = Started {
            request_id: "r".into(),
            seed,
            prompt_token_ids: PROMPT.to_vec(),
            fingerprint: fingerprint.into(),
            resumed_tokens: first as u32,
            previous_fingerprint: previous,
        };
        let mut events = vec![Event::Started(started)];
        events.extend((first..self.length).map(|index| Event::Token(token(seed, index))));
        events.push(finished());
        let (sender, receiver) = mpsc::channel(1);
        let cut = self.cut.clone();
        tokio::spawn(async move {
            let (count, status) = match fault {
                Some(Fault::Stop(tokens)) => (tokens + 1, Some(Status::unavailable("it stops"))),
                Some(Fault::End(tokens) | Fault::Cut(tokens)) => (tokens + 1, None),
                Some(Fault::Refuse | Fault::Forbid) | None => (events.len(), None),
            };
            for event in events.into_iter().take(count) {
                let _ = sender.send(Ok(GenerateResponse { event: Some(event) })).await;
            }
            if let Some(status) = status {
                let _ = sender.send(Err(status)).await;
            }
            if let Some(Fault::Cut(_)) = fault {
                cut.send_modify(|count| *count += 1);
                sender.closed().await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn tokenize(&self, _: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        Err(Status::unimplemented("no text here"))
    }

    async fn detokenize(
        &self,
        _: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        Err(Status::unimplemented("no text here"))
    }

    async fn get_model(&self, _: Request<GetModelRequest>) -> Result<Response<Model>, Status> {
        self.lead()?;
        Ok(Response::new(Model { name: "scripted".into(), ..Model::default() }))
    }
}

impl Scripted {
    fn new(length: usize, faults: impl IntoIterator<Item = Fault>) -> Self {
        Self {
            length,
            faults: Arc::new(Mutex::new(faults.into_iter().collect())),
            cut: watch::Sender::new(0),
            fingerprints: Arc::default(),
            older: false,
            leader: None,
            asked: Arc::default(),
        }
    }

    /// A server that stands by for the leader at `address`.
    fn standby(address: impl ToString) -> Self {
        Self { leader: Some(address.to_string()), ..Self::new(0, []) }
    }

    fn lead(&self) -> Result<(), Status> {
        let Some(leader) = &self.leader else { return Ok(()) };
        let mut status = Status::unavailable("this coordinator stands by");
        status.metadata_mut().insert(LEADER_METADATA, leader.parse().expect("ASCII"));
        Err(status)
    }

    async fn start(&self) -> SocketAddr {
        self.start_on(TcpListener::bind("127.0.0.1:0").await.expect("a free port")).await
    }

    /// Serves behind a proxy whose connections can be cut.
    async fn start_on(&self, listener: TcpListener) -> SocketAddr {
        let inner = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = inner.local_addr().expect("an address");
        let server = tonic::transport::Server::builder().add_service(GenerationServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(inner)));
        let proxy = listener.local_addr().expect("an address");
        let cut = self.cut.clone();
        tokio::spawn(async move {
            while let Ok((mut outside, _)) = listener.accept().await {
                let mut cut = cut.subscribe();
                tokio::spawn(async move {
                    let mut inside = TcpStream::connect(address).await.expect("the server runs");
                    tokio::select! {
                        _ = copy_bidirectional(&mut outside, &mut inside) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        proxy
    }
}

/// An address where nobody listens.
async fn nowhere() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    listener.local_addr().expect("an address")
}

fn request() -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::Text("three words here".into())),
        max_tokens: Some(1000),
        sampling: Some(SamplingOptions { temperature: Some(0.5), ..SamplingOptions::default() }),
        stop: vec!["never".into()],
        ..GenerateRequest::default()
    }
}

async fn generate(client: &Client) -> Vec<Event> {
    let stream = client.generate(request()).await.expect("a server takes it");
    stream.map(|event| event.expect("no error")).collect().await
}

/// What a server must have been asked after the first `Started`.
fn check_resumed(asked: &[GenerateRequest]) {
    for resumed in asked.iter().filter(|request| request.resume.is_some()) {
        let resume = resumed.resume.as_ref().expect("filtered");
        assert_eq!((resume.request_id.as_str(), resume.fingerprint.as_str()), ("r", "a"));
        let expected: Vec<u32> = (0..resume.token_ids.len()).map(|index| id(SEED, index)).collect();
        assert_eq!(resume.token_ids, expected);
        let sampling =
            Some(SamplingOptions { seed: Some(SEED), temperature: Some(0.5), ..SamplingOptions::default() });
        let prompt = Some(Prompt::TokenIds(TokenIds { ids: PROMPT.to_vec() }));
        let expected = GenerateRequest { prompt, sampling, resume: resumed.resume.clone(), ..request() };
        assert_eq!(*resumed, expected);
    }
}

#[tokio::test]
async fn a_server_lost_at_any_token_costs_none() {
    const LENGTH: usize = 8;
    for tokens in 0..=LENGTH {
        for fault in [Fault::Stop(tokens), Fault::End(tokens), Fault::Cut(tokens)] {
            let server = Scripted::new(LENGTH, [fault]);
            let client = Client::connect(&server.start().await.to_string()).await.expect("a server");
            assert_eq!(generate(&client).await, undisturbed(LENGTH), "{fault:?}");
            let asked = server.asked.lock().expect("no panic").clone();
            assert_eq!(asked.len(), 2, "{fault:?}");
            check_resumed(&asked);
        }
    }
}

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let fault = prop_oneof![
        Just(Fault::Refuse),
        (0usize..6).prop_map(Fault::Stop),
        (0usize..6).prop_map(Fault::End),
        (0usize..6).prop_map(Fault::Cut),
    ];
    prop::collection::vec(fault, 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn servers_lost_again_and_again_cost_no_token(
        length in 0usize..20,
        faults in faults(),
        others in 0usize..3,
    ) {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let server = Scripted::new(length, faults);
            let mut addresses = vec![nowhere().await.to_string()];
            for _ in 0..=others {
                addresses.push(server.start().await.to_string());
            }
            let client = Client::connect(&addresses.join(",")).await.expect("a server");
            assert_eq!(generate(&client).await, undisturbed(length));
            check_resumed(&server.asked.lock().expect("no panic"));
        });
    }
}

#[tokio::test]
async fn the_leader_is_followed_where_a_server_tells_of_it() {
    let leader = Scripted::new(5, [Fault::Stop(2)]);
    let standby = Scripted::standby(leader.start().await).start().await;
    let client = Client::connect(&standby.to_string()).await.expect("a server");
    assert_eq!(client.model().await.expect("the leader's").name, "scripted");
    assert_eq!(generate(&client).await, undisturbed(5));
}

#[tokio::test]
async fn leaders_that_are_none_lead_nowhere_and_soon() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let one = listener.local_addr().expect("an address");
    let other = Scripted::standby(one).start().await;
    Scripted::standby(other).start_on(listener).await;
    let gone = Scripted::standby(nowhere().await).start().await;
    let nonsense = Scripted::standby("no address").start().await;
    for standby in [one, other, gone, nonsense] {
        let client = Client::connect(&standby.to_string()).await.expect("a server");
        let error = client.model().await.expect_err("nobody leads");
        assert_eq!(error.to_string(), "this coordinator stands by");
    }
}

#[tokio::test]
async fn patience_ends_and_the_last_reason_is_told() {
    let server = Scripted::new(5, [Fault::Refuse; 1000]);
    let client = Client::connect(&server.start().await.to_string()).await.expect("a server");
    let begun = Instant::now();
    let error =
        client.with_patience(Duration::from_millis(300)).generate(request()).await.expect_err("no one");
    assert!(begun.elapsed() < Duration::from_secs(20));
    let Error::GaveUp { source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(
        (error.to_string().as_str(), source.to_string().as_str()),
        ("gave up after 300ms", "it is not ready")
    );

    // A server that takes the request again and again, and never gets further, does not hold a client for ever.
    let server = Scripted::new(5, [Fault::Stop(0); 1000]);
    let client = Client::connect(&server.start().await.to_string()).await.expect("a server");
    let stream = client.with_patience(Duration::from_millis(300)).generate(request()).await.expect("taken");
    let events: Vec<_> = stream.collect().await;
    assert!(matches!(&events[..], [Ok(Event::Started(_)), Err(Error::GaveUp { .. })]), "{events:?}");
}

#[tokio::test]
async fn a_change_of_fingerprint_is_told_once() {
    let server = Scripted::new(4, [Fault::Stop(1), Fault::Stop(1)]);
    server.fingerprints.lock().expect("no panic").extend(["a", "b", "b"]);
    let client = Client::connect(&server.start().await.to_string()).await.expect("a server");
    let events = generate(&client).await;
    let Event::Started(second) = &events[2] else { panic!("{events:?}") };
    assert_eq!((second.fingerprint.as_str(), second.previous_fingerprint.as_deref()), ("b", Some("a")));
    let without: Vec<_> = [&events[..2], &events[3..]].concat();
    assert_eq!(without, undisturbed(4));
    let last = server.asked.lock().expect("no panic").pop().expect("three");
    assert_eq!(last.resume.expect("it goes on").fingerprint, "b");
}

#[tokio::test]
async fn a_server_that_begins_again_is_an_error_and_repeats_no_token() {
    let server = Scripted { older: true, ..Scripted::new(4, [Fault::Stop(2)]) };
    let client = Client::connect(&server.start().await.to_string()).await.expect("a server");
    let events: Vec<_> = client.generate(request()).await.expect("taken").collect().await;
    assert!(matches!(&events[3..], [Err(Error::Protocol(_))]), "{events:?}");
}

#[tokio::test]
async fn a_refusal_in_the_middle_is_final() {
    let server = Scripted::new(4, [Fault::Stop(2), Fault::Forbid]);
    let client = Client::connect(&server.start().await.to_string()).await.expect("a server");
    let events: Vec<_> = client.generate(request()).await.expect("taken").collect().await;
    assert!(matches!(&events[3..], [Err(Error::Refused(_))]), "{events:?}");
}
