//! The client against a server that the test plays.

use std::net::SocketAddr;

use client::{Client, Error, Event, GenerateRequest, Model, Prompt, Token};
use cluster::proto::generation_server::{Generation, GenerationServer};
use cluster::proto::{
    DetokenizeRequest, DetokenizeResponse, GenerateResponse, GetModelRequest, TokenizeRequest,
    TokenizeResponse,
};
use futures_util::StreamExt;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Answers with one token for each letter of a text, then with a message that no client knows.
struct Letters;

#[tonic::async_trait]
impl Generation for Letters {
    type GenerateStream = tokio_stream::Iter<std::vec::IntoIter<Result<GenerateResponse, Status>>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let Some(Prompt::Text(text)) = request.into_inner().prompt else {
            return Err(Status::invalid_argument("the prompt is empty"));
        };
        let token = |letter: char| Token { id: letter.into(), text: letter.into(), logprob: 0.0 };
        let mut events: Vec<_> = text
            .chars()
            .map(|letter| Ok(GenerateResponse { event: Some(Event::Token(token(letter))) }))
            .collect();
        events.push(Ok(GenerateResponse { event: None }));
        Ok(Response::new(tokio_stream::iter(events)))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let token_ids = request.into_inner().text.chars().map(u32::from).collect();
        Ok(Response::new(TokenizeResponse { token_ids }))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let text = request.into_inner().token_ids.into_iter().filter_map(char::from_u32).collect();
        Ok(Response::new(DetokenizeResponse { text }))
    }

    async fn get_model(&self, _: Request<GetModelRequest>) -> Result<Response<Model>, Status> {
        Err(Status::unavailable("waiting for workers: 1 of 2 joined"))
    }
}

async fn server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let server = tonic::transport::Server::builder().add_service(GenerationServer::new(Letters));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

#[tokio::test]
async fn calls_are_answered() {
    let client = Client::connect(&server().await.to_string()).await.expect("it is there");
    assert_eq!(client.tokenize("ab").await.expect("ids"), [97, 98]);
    assert_eq!(client.detokenize(vec![97, 98], false).await.expect("text"), "ab");

    let request = GenerateRequest { prompt: Some(Prompt::Text("hi".into())), ..GenerateRequest::default() };
    let events: Vec<_> = client.generate(request).await.expect("a stream").collect().await;
    assert!(matches!(&events[0], Ok(Event::Token(token)) if token.text == "h"));
    assert!(matches!(&events[1], Ok(Event::Token(token)) if token.text == "i"));
    assert!(matches!(&events[2], Err(Error::Protocol(_))));
}

#[tokio::test]
async fn errors_are_for_people() {
    let client = Client::connect(&format!("http://{}/", server().await)).await.expect("it is there");
    let refused = client.generate(GenerateRequest::default()).await.expect_err("nothing to continue");
    assert_eq!(refused.to_string(), "the prompt is empty");
    let unavailable = client.model().await.expect_err("nobody serves");
    assert_eq!(unavailable.to_string(), "waiting for workers: 1 of 2 joined");

    let closed =
        TcpListener::bind("127.0.0.1:0").await.expect("a free port").local_addr().expect("an address");
    let unreachable = Client::connect(&closed.to_string()).await.expect_err("nobody is there");
    assert_eq!(unreachable.to_string(), format!("no phalanx server at {closed}"));
    let address = Client::connect("nowhere").await.expect_err("it has no port");
    assert_eq!(address.to_string(), "'nowhere' is not an address such as localhost:8000");
}
