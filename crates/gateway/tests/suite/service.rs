//! The public service over a socket, in front of an engine that the test drives by hand.

use cluster::proto;
use cluster::proto::generate_request::Prompt;
use cluster::proto::monitor_client::MonitorClient;
use cluster::proto::{FinishReason as Reason, GenerateRequest};
use coordinator::EngineError;
use coordinator::EngineEvent;
use engine::FinishReason;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::fake::{CACHED, Gateway, Responses, finished, model, token};
use crate::samples::nano;

fn text(prompt: &str) -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::Text(prompt.into())), ..Default::default() }
}

fn ids(ids: &[u32]) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(proto::TokenIds { ids: ids.to_vec() })),
        ..Default::default()
    }
}

fn conversation(turns: &[(&str, &str)]) -> GenerateRequest {
    let messages = turns
        .iter()
        .map(|(role, content)| proto::ChatMessage { role: (*role).into(), content: (*content).into() });
    let conversation = proto::Conversation { messages: messages.collect() };
    GenerateRequest { prompt: Some(Prompt::Conversation(conversation)), ..Default::default() }
}

fn sampling(options: proto::SamplingOptions) -> GenerateRequest {
    GenerateRequest { sampling: Some(options), ..text("a") }
}

async fn start() -> Gateway {
    Gateway::start(nano(), Ok(model())).await
}

#[tokio::test]
async fn streams_an_answer() {
    let tokenizer = nano();
    let (prompt, answer) =
        (tokenizer.encode("In the").unwrap(), tokenizer.encode(" beginning 牀前🏳.").unwrap());
    let mut gateway = start().await;
    let (mut responses, (request, engine)) = gateway.generate(text("In the")).await;
    assert_eq!(request.prompt, prompt);
    assert_eq!(
        (request.max_tokens, request.stop_ids.as_slice()),
        (100 - prompt.len() as u32, [2, 7].as_slice())
    );
    assert_eq!((request.sampling.temperature, request.sampling.top_p, request.sampling.top_k), (0.0, 1.0, 0));

    let started = responses.started().await;
    assert_eq!(started.prompt_token_ids, prompt);
    assert_eq!((started.seed, started.fingerprint.as_str()), (request.sampling.seed, "nano/bf16"));
    let mut seen = String::new();
    for &id in &answer {
        engine.send(token(id)).unwrap();
        let token = responses.token().await;
        assert_eq!((token.id, token.logprob), (id, -0.5));
        seen.push_str(&token.text);
    }
    assert_eq!(seen, " beginning 牀前🏳.");
    engine.send(token(7)).unwrap();
    assert_eq!(responses.token().await.text, "", "an end token has no text");
    engine.send(finished(FinishReason::Stop, 3, 9)).unwrap();
    let last = responses.finished().await;
    assert_eq!((last.reason(), last.text.as_str()), (Reason::Stop, ""));
    assert_eq!(
        last.usage,
        Some(proto::Usage { prompt_tokens: 3, completion_tokens: 9, cached_tokens: CACHED })
    );
}

#[tokio::test]
async fn an_end_token_has_no_text_even_where_it_is_an_ordinary_one() {
    let mut gateway = Gateway::start(nano(), Ok(coordinator::ModelInfo { eos: vec![300], ..model() })).await;
    let (mut responses, (request, engine)) = gateway.generate(text("a")).await;
    assert_eq!(request.stop_ids, [2, 7, 300]);
    responses.started().await;
    engine.send(token(300)).unwrap();
    assert_eq!(responses.token().await.text, "");
    let request = GenerateRequest { ignore_eos: true, ..text("a") };
    let (mut responses, (_, engine)) = gateway.generate(request).await;
    responses.started().await;
    engine.send(token(300)).unwrap();
    assert_eq!(responses.token().await.text, nano().decode(&[300], true));
}

#[tokio::test]
async fn a_cut_character_comes_with_the_end() {
    let mut gateway = start().await;
    let (mut responses, (_, engine)) = gateway.generate(text("a")).await;
    responses.started().await;
    engine.send(token(8 + 0xe4)).unwrap();
    engine.send(finished(FinishReason::Length, 1, 1)).unwrap();
    assert_eq!(responses.token().await.text, "");
    let last = responses.finished().await;
    assert_eq!((last.reason(), last.text.as_str()), (Reason::Length, "\u{fffd}"));
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_cancels_the_request() {
    let mut gateway = start().await;
    let request = GenerateRequest { stop: vec!["\nUser".into()], ..ids(&[300, 301]) };
    let (mut responses, (_, engine)) = gateway.generate(request).await;
    responses.started().await;
    let mut texts = Vec::new();
    for byte in *b"a\nUsa\nUser" {
        engine.send(token(8 + u32::from(byte))).unwrap();
        texts.push(responses.token().await.text);
    }
    assert_eq!(texts, ["a", "", "", "", "\nUsa", "", "", "", "", ""]);
    engine.closed().await;
    let last = responses.finished().await;
    assert_eq!((last.reason(), last.text.as_str()), (Reason::Stop, ""));
    assert_eq!(
        last.usage,
        Some(proto::Usage { prompt_tokens: 2, completion_tokens: 10, cached_tokens: CACHED })
    );
}

#[tokio::test]
async fn text_held_back_for_a_stop_string_comes_with_the_end() {
    let mut gateway = start().await;
    let request = GenerateRequest { stop: vec!["abc".into()], ..ids(&[300]) };
    let (mut responses, (_, engine)) = gateway.generate(request).await;
    responses.started().await;
    for byte in *b"ab" {
        engine.send(token(8 + u32::from(byte))).unwrap();
        assert_eq!(responses.token().await.text, "");
    }
    engine.send(finished(FinishReason::Length, 1, 2)).unwrap();
    assert_eq!(responses.finished().await.text, "ab");
}

#[tokio::test]
async fn hanging_up_cancels_the_request() {
    let mut gateway = start().await;
    let (mut responses, (_, engine)) = gateway.generate(text("a")).await;
    responses.started().await;
    engine.send(token(300)).unwrap();
    responses.token().await;
    drop(responses);
    engine.closed().await;
}

#[tokio::test]
async fn a_lost_group_ends_the_answer_with_its_reason() {
    let mut gateway = start().await;
    let (mut responses, (_, engine)) = gateway.generate(text("a")).await;
    responses.started().await;
    engine.send(EngineEvent::Failed(EngineError::Unavailable("rank 1 was lost".into()))).unwrap();
    let status = responses.0.message().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "rank 1 was lost"));
    let (Responses(mut responses), (_, engine)) = gateway.generate(text("a")).await;
    drop(engine);
    responses.message().await.unwrap();
    assert_eq!(responses.message().await.unwrap_err().code(), Code::Internal);
}

#[tokio::test]
async fn a_conversation_goes_through_the_template() {
    let mut gateway = start().await;
    let turns = [("system", "Be brief."), ("user", "hi<|im_end|>")];
    let (_responses, (request, _)) = gateway.generate(conversation(&turns)).await;
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(nano().decode(&request.prompt, false), text);
    assert_eq!(request.prompt.iter().filter(|&&id| id == 7).count(), 2, "the user wrote letters");
}

#[tokio::test]
async fn options_reach_the_engine() {
    let mut gateway = start().await;
    let options =
        proto::SamplingOptions { temperature: Some(0.7), top_p: Some(0.9), top_k: Some(40), seed: Some(5) };
    let request = GenerateRequest { ignore_eos: true, max_tokens: Some(3), ..sampling(options) };
    let (mut responses, (request, _)) = gateway.generate(request).await;
    assert_eq!((request.max_tokens, request.stop_ids), (3, vec![]));
    let expected = engine::SamplingParams { temperature: 0.7, top_p: 0.9, top_k: 40, seed: 5 };
    assert_eq!(request.sampling, expected);
    assert_eq!(responses.started().await.seed, 5);
}

#[tokio::test]
async fn refuses_what_it_can_not_serve_and_names_number_and_limit() {
    let mut gateway = start().await;
    let options = proto::SamplingOptions::default;
    let cases: Vec<(GenerateRequest, &str)> = vec![
        (GenerateRequest::default(), "no prompt"),
        (text(""), "the prompt is empty, and must have at least 1 token"),
        (ids(&[]), "the prompt is empty"),
        (ids(&[5, 4608]), "token 1 of the prompt has id 4608, and the model's ids are below 4608"),
        (
            ids(&[5; 100]),
            "the prompt has 100 tokens, and the context of 100 must hold it and at least 1 more",
        ),
        (
            text(&"a".repeat(6401)),
            "the prompt has 6401 bytes, and at most 6400 can fit a context of 100 tokens",
        ),
        (GenerateRequest { max_tokens: Some(0), ..text("a") }, "max_tokens is 0"),
        (GenerateRequest { stop: vec!["a".into(); 17], ..text("a") }, "17 stop strings, and at most 16"),
        (GenerateRequest { stop: vec![String::new()], ..text("a") }, "stop string 0 has 0 bytes"),
        (
            GenerateRequest { stop: vec!["a".repeat(257)], ..text("a") },
            "stop string 0 has 257 bytes, and must have 1 to 256",
        ),
        (sampling(proto::SamplingOptions { temperature: Some(-1.0), ..options() }), "temperature is -1"),
        (sampling(proto::SamplingOptions { temperature: Some(f32::NAN), ..options() }), "temperature is NaN"),
        (
            sampling(proto::SamplingOptions { temperature: Some(f32::INFINITY), ..options() }),
            "temperature is inf",
        ),
        (sampling(proto::SamplingOptions { top_p: Some(0.0), ..options() }), "top_p is 0"),
        (
            sampling(proto::SamplingOptions { top_p: Some(1.5), ..options() }),
            "top_p is 1.5, and must be above 0 and at most 1",
        ),
        (sampling(proto::SamplingOptions { top_p: Some(f32::NAN), ..options() }), "top_p is NaN"),
        (conversation(&[]), "no messages"),
        (conversation(&[("robot", "hi")]), "message 0: role \"robot\""),
    ];
    for (request, expected) in cases {
        let status = gateway.refusal(request).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{expected}");
        assert!(status.message().contains(expected), "{:?} should contain {expected:?}", status.message());
    }
}

#[tokio::test]
async fn an_id_above_the_embedding_is_refused_by_its_name() {
    let mut gateway =
        Gateway::start(nano(), Ok(coordinator::ModelInfo { vocabulary: 5000, ..model() })).await;
    let status = gateway.refusal(ids(&[5001])).await;
    assert!(status.message().contains("has id 5001, and"), "{status}");
    gateway.set_model(Ok(coordinator::ModelInfo { vocabulary: 4000, ..model() }));
    let status = gateway.refusal(ids(&[1])).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("4608 tokens") && status.message().contains("4000 rows"), "{status}");
}

#[tokio::test]
async fn without_a_model_it_is_unavailable_but_still_tokenizes() {
    let mut gateway = Gateway::start(nano(), Err(EngineError::Unavailable("1 of 4 workers".into()))).await;
    let status = gateway.refusal(text("a")).await;
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "1 of 4 workers"));
    assert_eq!(
        gateway.client.get_model(proto::GetModelRequest {}).await.unwrap_err().code(),
        Code::Unavailable
    );
    let request = proto::TokenizeRequest { text: "a".into() };
    assert!(gateway.client.tokenize(request).await.is_ok());
}

#[tokio::test]
async fn who_stands_by_tells_where_the_leader_is() {
    let mut gateway = Gateway::start(nano(), Err(EngineError::Standby(Some("host1:7070".into())))).await;
    let status = gateway.refusal(text("a")).await;
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.message(), "this coordinator stands by: the leader is at host1:7070");
    let leader = status.metadata().get(cluster::LEADER_METADATA).expect("it is told");
    assert_eq!(leader, "host1:7070");
    gateway.set_model(Err(EngineError::Standby(None)));
    let status = gateway.refusal(text("a")).await;
    assert_eq!(status.message(), "this coordinator stands by: no leader is known yet");
    assert!(status.metadata().get(cluster::LEADER_METADATA).is_none());
}

#[tokio::test]
async fn text_goes_to_tokens_and_back() {
    let mut gateway = start().await;
    let long = "In the beginning 牀前明月光. ".repeat(2000);
    for text in ["", "hi<|im_end|>", long.as_str()] {
        let request = proto::TokenizeRequest { text: text.to_owned() };
        let token_ids = gateway.client.tokenize(request).await.unwrap().into_inner().token_ids;
        assert_eq!(token_ids, nano().encode(text).unwrap());
        let request = proto::DetokenizeRequest { token_ids, skip_special_tokens: false };
        assert_eq!(gateway.client.detokenize(request).await.unwrap().into_inner().text, text);
    }
    let request = proto::DetokenizeRequest { token_ids: vec![6, 300, 7], skip_special_tokens: true };
    let text = gateway.client.detokenize(request).await.unwrap().into_inner().text;
    assert_eq!(text, nano().decode(&[300], false));
    let request = proto::DetokenizeRequest { token_ids: vec![1, 4608], skip_special_tokens: true };
    let status = gateway.client.detokenize(request).await.unwrap_err();
    assert_eq!(status.message(), "token_ids[1] is 4608, and the tokenizer's ids are below 4608");
}

#[tokio::test]
async fn says_what_it_serves() {
    let mut gateway = start().await;
    let served = gateway.client.get_model(proto::GetModelRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (served.name.as_str(), served.vocabulary, served.max_context, served.ranks),
        ("yi-nano", 4608, 100, 4)
    );
    assert_eq!(served.eos_token_ids, [2, 7]);
    assert!(served.has_chat_template);
}

#[tokio::test]
async fn health_follows_the_engine() {
    let gateway = Gateway::start(nano(), Err(EngineError::Unavailable("no workers".into()))).await;
    let mut health = HealthClient::new(gateway.channel.clone());
    let request = |service: &str| HealthCheckRequest { service: service.into() };
    let mut watch = health.watch(request("phalanx.v1.Generation")).await.unwrap().into_inner();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    gateway.set_model(Ok(model()));
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert_eq!(health.check(request("")).await.unwrap().into_inner().status(), ServingStatus::Serving);
    assert_eq!(health.check(request("nobody")).await.unwrap_err().code(), Code::NotFound);
    gateway.set_model(Err(EngineError::Unavailable("rank 2 was lost".into())));
    assert_eq!(health.check(request("")).await.unwrap().into_inner().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn status_is_the_engines_own_and_a_watch_ends_with_the_server() {
    let gateway = Gateway::start(nano(), Err(EngineError::Unavailable("no workers".into()))).await;
    let mut monitor = MonitorClient::new(gateway.channel.clone());
    let refused = monitor.get_status(proto::GetStatusRequest {}).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "no workers"));
    gateway.set_model(Ok(model()));
    let status = monitor.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.serving, status.state.as_str()), (true, "yi-nano"));
    let often = proto::WatchStatusRequest { interval_millis: Some(0) };
    let mut watch = monitor.watch_status(often).await.unwrap().into_inner();
    for _ in 0..3 {
        assert_eq!(watch.message().await.unwrap().unwrap(), status);
    }
    let server = gateway.stop();
    while let Some(next) = watch.message().await.unwrap() {
        assert_eq!(next, status);
    }
    drop((watch, monitor));
    server.await.unwrap().unwrap();
}

#[tokio::test]
async fn shuts_down_after_the_running_answers() {
    let mut gateway = start().await;
    let mut health = HealthClient::new(gateway.channel.clone());
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let (mut responses, (_, engine)) = gateway.generate(text("a")).await;
    responses.started().await;

    let server = gateway.stop();
    assert_eq!(watch.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert!(watch.next().await.is_none());
    engine.send(token(300)).unwrap();
    engine.send(finished(FinishReason::Length, 1, 1)).unwrap();
    responses.token().await;
    assert_eq!(responses.finished().await.reason(), Reason::Length);
    drop((responses, watch, health));
    server.await.unwrap().unwrap();
}
