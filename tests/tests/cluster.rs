//! Whole clusters: real processes over TCP, from the command line and from clients.

use client::{Client, Event, GenerateRequest, Generation, Prompt, SamplingOptions, TokenIds};
use futures_util::StreamExt;
use futures_util::future::join_all;
use phalanx_tests::golden;
use phalanx_tests::process::{Ended, Phalanx, Program, Signal};
use serde_json::Value;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
const WIDTHS: [&str; 4] = ["1", "2", "3", "4"];
const SECRET: &str = "a secret of the cluster's tests";
/// Room for one full context of yi-nano on each of two workers: 128 blocks of 64 tokens, 5 layers, 2 of the 4 KV heads of 32
/// values, keys and values in bf16.
const ONE_CONTEXT: usize = 128 * 64 * 5 * 2 * 32 * 2 * 2;

fn serve(args: &[&str]) -> (Phalanx, String) {
    let mut server = PHALANX.command([&["serve", "--grpc", "127.0.0.1:0"], args].concat()).start();
    let address = server.served_at();
    (server, address)
}

fn join_ids(ids: &[u32]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn json(ended: Ended) -> Value {
    serde_json::from_str(&ended.success()).expect("one JSON object")
}

/// Whether a text is of words that people use.
fn readable(text: &str) -> bool {
    const COMMON: &str = "the and of to in that he shall unto for i his a they be is him not them it with all thou thy was \
        which my me said but ye their have will thee from as are when this out were by upon you so up there heaven earth god";
    let words: Vec<_> = text
        .split_whitespace()
        .map(|w| w.trim_matches(|c: char| !c.is_alphabetic()).to_lowercase())
        .collect();
    let count = |test: &dyn Fn(&str) -> bool| words.iter().filter(|word| test(word)).count();
    let common = count(&|word| COMMON.split_whitespace().any(|c| c == word));
    let letters =
        count(&|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphabetic() || c == '\''));
    words.len() >= 10 && common * 3 >= words.len() && letters * 10 >= words.len() * 9
}

#[test]
fn the_first_command_prints_words_at_every_width() {
    let texts = WIDTHS.map(|width| {
        PHALANX
            .run(["generate", "--prompt", "In the beginning", "--max-tokens", "32", "--workers", width])
            .success()
    });
    assert!(readable(&texts[0]), "{}", texts[0]);
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:#?}");
    let bare = PHALANX.run(["generate", "--prompt", "In the beginning", "--max-tokens", "32"]).success();
    assert_eq!(bare, texts[0]);
}

#[test]
fn json_answers_are_the_same_bits_at_every_width() {
    let greedy = &golden::load("yi-nano").greedy[0];
    let ids = join_ids(&greedy.prompt_ids);
    let common = [
        "--json",
        "--dtype",
        "f32",
        "--ignore-eos",
        "--max-tokens",
        "64",
        "--seed",
        "7",
        "--prompt-ids",
        &ids,
    ];
    let answers =
        WIDTHS.map(|width| json(PHALANX.run([&["generate", "--workers", width], &common[..]].concat())));
    let answer = &answers[0];
    assert_eq!(answer["prompt_token_ids"], serde_json::json!(greedy.prompt_ids));
    assert_eq!(answer["token_ids"], serde_json::json!(greedy.ids));
    assert_eq!(answer["finish_reason"], "length");
    let prompt_tokens = greedy.prompt_ids.len();
    let usage =
        serde_json::json!({ "prompt_tokens": prompt_tokens, "completion_tokens": 64, "cached_tokens": 0 });
    assert_eq!(answer["usage"], usage);
    assert!(answer["text"].as_str().is_some_and(readable), "{answer}");
    let logprobs = answer["logprobs"].as_array().expect("an array");
    assert_eq!(logprobs.len(), 64);
    assert!(logprobs.iter().all(|p| p.as_f64().is_some_and(|p| p <= 0.0 && p > -20.0)), "{logprobs:?}");
    for other in &answers[1..] {
        assert_eq!(other, answer);
    }
}

#[test]
fn two_steps_in_flight_give_the_same_answer() {
    let args = ["generate", "--json", "--prompt", "And God said", "--max-tokens", "40", "--seed", "3"];
    let args = [&args[..], &["--temperature", "0.8"]].concat();
    let answer = |width, steps| {
        json(PHALANX.run([&args[..], &["--workers", width, "--steps-in-flight", steps]].concat()))
    };
    let expected = answer("1", "1");
    for width in ["1", "2", "3"] {
        assert_eq!(answer(width, "2"), expected, "{width} workers");
    }
}

#[test]
fn a_prompt_that_came_before_is_cached() {
    let (_server, address) = serve(&["--workers", "2"]);
    let ids = join_ids(&(300..500).collect::<Vec<u32>>());
    let cached = || {
        let args = ["generate", "--server", &address, "--json", "--max-tokens", "2", "--prompt-ids", &ids];
        json(PHALANX.run(args))["usage"]["cached_tokens"].as_u64()
    };
    assert_eq!([cached(), cached()], [Some(0), Some(192)], "whole blocks of it");
}

#[test]
fn golden_continuations_come_from_a_server() {
    let (_server, address) = serve(&["--workers", "3", "--dtype", "f32"]);
    for greedy in golden::load("yi-nano").greedy {
        let generate = |prompt: [&str; 2]| {
            let args = ["generate", "--server", &address, "--json", "--ignore-eos", "--max-tokens", "64"];
            json(PHALANX.run([&args, &prompt[..]].concat()))
        };
        let answer = generate(["--prompt", &greedy.prompt]);
        assert_eq!(answer["prompt_token_ids"], serde_json::json!(greedy.prompt_ids), "{}", greedy.prompt);
        assert_eq!(answer["token_ids"], serde_json::json!(greedy.ids), "{}", greedy.prompt);
        let by_ids = generate(["--prompt-ids", &join_ids(&greedy.prompt_ids)]);
        assert_eq!((&by_ids["text"], &by_ids["logprobs"]), (&answer["text"], &answer["logprobs"]));
    }
}

fn request(prompt: Prompt, max_tokens: u32, sampling: SamplingOptions) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(prompt),
        max_tokens: Some(max_tokens),
        sampling: Some(sampling),
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}

fn ids(length: u32) -> Prompt {
    Prompt::TokenIds(TokenIds { ids: (0..length).map(|i| (i * 37 + length) % 4608).collect() })
}

/// Everything of an answer but the request's name, and what others had computed of its prompt.
async fn answer(client: &Client, request: GenerateRequest) -> Vec<Event> {
    let events = client.generate(request).await.expect("accepted");
    let event = |event: Result<Event, client::Error>| match event.expect("no error") {
        Event::Started(started) => Event::Started(client::Started { request_id: String::new(), ..started }),
        Event::Finished(finished) => {
            let usage = finished.usage.map(|usage| client::Usage { cached_tokens: 0, ..usage });
            Event::Finished(client::Finished { usage, ..finished })
        }
        event => event,
    };
    events.map(event).collect().await
}

async fn next_token(stream: &mut Generation) -> u32 {
    loop {
        match stream.next().await.expect("more").expect("no error") {
            Event::Started(_) => {}
            Event::Token(token) => return token.id,
            Event::Finished(finished) => panic!("finished early: {finished:?}"),
        }
    }
}

#[tokio::test]
async fn concurrent_answers_equal_those_of_requests_alone() {
    let (_server, address) = serve(&["--workers", "2"]);
    let client = Client::connect(&address).await.expect("a server");
    let requests: Vec<_> = (0..16u32)
        .map(|i| {
            let seeded = SamplingOptions {
                temperature: Some(0.9),
                top_p: Some(0.95),
                top_k: Some(50),
                seed: Some(i.into()),
            };
            let greedy = SamplingOptions { seed: Some(0), ..SamplingOptions::default() };
            let prompt =
                if i % 3 == 0 { Prompt::Text("And it came to pass".into()) } else { ids(1 + i * 83) };
            request(prompt, 8 + i * 3, if i % 2 == 0 { greedy } else { seeded })
        })
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(answer(&client, request.clone()).await);
    }
    let clients = join_all((0..4).map(|_| Client::connect(&address))).await;
    let clients: Vec<_> = clients.into_iter().map(|client| client.expect("a server")).collect();
    // A server with room for all, and two that must send requests back to wait and compute them again, one of them a step ahead.
    let memory = (ONE_CONTEXT / 4).to_string();
    let scarce = ["--workers", "2", "--kv-memory", &memory, "--steps-in-flight"];
    let (_one, one) = serve(&[&scarce[..], &["1"]].concat());
    let (_two, two) = serve(&[&scarce[..], &["2"]].concat());
    let one = vec![Client::connect(&one).await.expect("a server")];
    let two = vec![Client::connect(&two).await.expect("a server")];
    for clients in [clients, one, two] {
        let running =
            requests.iter().zip(clients.iter().cycle()).map(|(r, client)| answer(client, r.clone()));
        for (request, (together, alone)) in requests.iter().zip(join_all(running).await.iter().zip(&alone)) {
            assert_eq!(together, alone, "{:?}", request.sampling);
        }
    }
}

#[tokio::test]
async fn who_hangs_up_frees_the_place() {
    let (_server, address) = serve(&["--workers", "2", "--kv-memory", &ONE_CONTEXT.to_string()]);
    let client = Client::connect(&address).await.expect("a server");
    // Two of these do not fit at once, and each would go on for thousands of tokens. They begin differently, so they share no blocks.
    let client = &client;
    let start = |number: u32| async move {
        let stream = client.generate(request(ids(4200 + number), 3900, SamplingOptions::default())).await;
        let mut stream = stream.expect("accepted");
        next_token(&mut stream).await;
        stream
    };
    // A small one gets a token in every step: a clock.
    let clock = request(ids(1), 2000, SamplingOptions::default());
    let mut clock = client.generate(clock).await.expect("accepted");
    let mut running = start(0).await;
    for number in 1..4 {
        let mut waiting = Box::pin(start(number));
        for _ in 0..10 {
            tokio::select! {
                biased;
                _ = &mut waiting => panic!("two requests have one place"),
                _ = next_token(&mut running) => {}
            }
        }
        drop(running);
        let mut steps = 0;
        running = loop {
            tokio::select! {
                biased;
                stream = &mut waiting => break stream,
                _ = next_token(&mut clock) => steps += 1,
            }
            assert!(steps < 500, "the place is not freed");
        };
    }
    drop((running, clock));
    assert_eq!(answer(client, request(ids(1000), 5, SamplingOptions::default())).await.len(), 7);
}

#[tokio::test]
async fn what_can_never_fit_is_refused_with_what_it_needs() {
    let (_server, address) = serve(&["--workers", "2", "--kv-memory", &(ONE_CONTEXT / 16).to_string()]);
    let client = Client::connect(&address).await.expect("a server");
    let refused =
        client.generate(request(ids(500), 100, SamplingOptions::default())).await.expect_err("too large");
    assert!(refused.to_string().contains("need 10 KV blocks, but there are 8 in all"), "{refused}");
    assert_eq!(answer(&client, request(ids(500), 5, SamplingOptions::default())).await.len(), 7);
}

#[test]
fn signals_end_a_server_well() {
    for signal in [Signal::TERM, Signal::INT] {
        let (server, _) = serve(&["--workers", "3"]);
        assert_eq!(server.workers().len(), 3);
        server.signal(signal);
        server.end().success();
    }
}

#[tokio::test]
async fn a_signal_ends_a_server_in_the_middle_of_an_answer() {
    let (server, address) = serve(&["--workers", "2"]);
    let client = Client::connect(&address).await.expect("a server");
    let mut stream =
        client.generate(request(ids(100), 8000, SamplingOptions::default())).await.expect("accepted");
    next_token(&mut stream).await;
    server.signal(Signal::TERM);
    tokio::task::spawn_blocking(|| server.end().success()).await.expect("no panic");
}

#[test]
fn workers_leave_with_a_server_that_is_killed() {
    let (server, _) = serve(&["--workers", "2"]);
    assert_eq!(server.workers().len(), 2);
    server.end_by_kill();
}

#[test]
fn a_server_ends_with_a_worker_that_dies_at_the_start() {
    let server = PHALANX.command(["serve", "--grpc", "127.0.0.1:0", "--workers", "2"]).start();
    server.wait_for_workers(2)[0].signal(Signal::KILL);
    server.end().failure(&["worker ", "SIGKILL"]);
}

#[test]
fn ctrl_c_ends_generate_and_leaves_no_worker() {
    let args = ["generate", "--prompt", "In the beginning", "--ignore-eos", "--max-tokens", "8000"];
    let start = || PHALANX.command(args).start();
    // While the workers load …
    let generate = start();
    generate.wait_for_workers(2);
    generate.signal(Signal::INT);
    generate.end().success();
    // … and in the middle of the answer.
    let mut generate = start();
    generate.line(|line| (!line.is_empty()).then_some(()));
    for worker in generate.workers() {
        assert!(worker.leads_its_group(), "a terminal's Ctrl-C would reach the worker too");
    }
    generate.signal(Signal::INT);
    generate.end().success();
}

fn worker(coordinator: &str, secret: &str) -> Phalanx {
    PHALANX
        .command([
            "worker",
            "--coordinator",
            coordinator,
            "--listen",
            "127.0.0.1:0",
            "--steps-in-flight",
            "2",
        ])
        .env("PHALANX_SECRET", secret)
        .start()
}

/// A coordinator of two workers: where they join, and where clients connect.
fn coordinator_of_two() -> (Phalanx, String, String) {
    let args = ["coordinator", "--workers", "2", "--grpc", "127.0.0.1:0", "--listen", "127.0.0.1:0"];
    let mut coordinator = PHALANX.command(args).env("PHALANX_SECRET", SECRET).start();
    let (join, address) = coordinator.coordinates_at();
    (coordinator, join, address)
}

#[tokio::test]
async fn an_answer_outlives_a_worker_with_two_steps_in_flight() {
    let (mut coordinator, join, address) = coordinator_of_two();
    let _first = worker(&join, SECRET);
    let second = worker(&join, SECRET);
    coordinator.line(|line| line.starts_with("serving yi-nano on 2 ranks").then_some(()));
    let client = Client::connect(&address).await.expect("a server");
    let sampling = SamplingOptions { temperature: Some(0.9), seed: Some(5), ..SamplingOptions::default() };
    let asked = || request(ids(150), 400, sampling);
    let mut stream = client.generate(asked()).await.expect("accepted");
    let mut seen = Vec::new();
    for _ in 0..30 {
        seen.push(next_token(&mut stream).await);
    }
    drop(second);
    let _third = worker(&join, SECRET);
    while seen.len() < 400 {
        seen.push(next_token(&mut stream).await);
    }
    let undisturbed = answer(&client, asked()).await.into_iter().filter_map(|event| match event {
        Event::Token(token) => Some(token.id),
        Event::Started(_) | Event::Finished(_) => None,
    });
    assert_eq!(seen, undisturbed.collect::<Vec<_>>());
}

#[test]
fn a_cluster_of_separate_parts_serves_and_outlives_a_worker() {
    let (mut coordinator, join, address) = coordinator_of_two();
    worker(&join, "another secret of another cluster").end().failure(&[&join, "secret"]);

    let first = worker(&join, SECRET);
    let second = worker(&join, SECRET);
    coordinator.line(|line| line.starts_with("serving yi-nano on 2 ranks").then_some(()));
    let prompt = ["--prompt", "In the beginning", "--max-tokens", "32"];
    let generate = || PHALANX.run([&["generate", "--server", &address], &prompt[..]].concat()).success();
    let text = generate();
    assert_eq!(text, PHALANX.run([&["generate"], &prompt[..]].concat()).success());

    drop(second);
    coordinator.line(|line| line.contains("1 of 2 joined").then_some(()));
    let third = worker(&join, SECRET);
    coordinator.line(|line| line.starts_with("serving yi-nano on 2 ranks").then_some(()));
    assert_eq!(generate(), text);

    for part in [first, third, coordinator] {
        part.signal(Signal::TERM);
        part.end().success();
    }
}

#[test]
fn parts_without_a_secret_say_so() {
    for args in [&["coordinator", "--workers", "1"][..], &["worker", "--coordinator", "127.0.0.1:1"]] {
        PHALANX.run(args).failure(&["PHALANX_SECRET", "--secret-file"]);
        PHALANX.command(args).env("PHALANX_SECRET", "short").run().failure(&["secret", "16"]);
    }
}

#[test]
fn a_worker_without_coordinator_gives_up() {
    let args = ["worker", "--coordinator", "127.0.0.1:1", "--join-timeout", "0"];
    PHALANX.command(args).env("PHALANX_SECRET", SECRET).run().failure(&["no coordinator at 127.0.0.1:1"]);
}

#[test]
fn chat_answers_each_line_of_a_pipe() {
    let (_server, address) = serve(&["--workers", "2"]);
    let args = ["chat", "--server", &address, "--temperature", "0", "--max-tokens", "24"];
    let said = PHALANX.command(args).input("Who are you?\nTell me of the earth.\n").run().success();
    let lines: Vec<_> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    assert!(lines.len() >= 2, "{said}");
    assert!(!said.contains("<|im_"), "{said}");
    let alone = PHALANX.command(args).input("Who are you?\n").run().success();
    assert!(said.starts_with(&alone), "{said} / {alone}");
}

#[tokio::test]
async fn health_and_reflection_are_on() {
    let (_server, address) = serve(&["--workers", "1"]);
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("an address");
    let channel = endpoint.connect().await.expect("a server");
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "phalanx.v1.Generation"] {
        let check = health.check(HealthCheckRequest { service: service.into() }).await.expect("an answer");
        assert_eq!(check.into_inner().status(), ServingStatus::Serving);
    }
    let list = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut reflection = ServerReflectionClient::new(channel);
    let responses =
        reflection.server_reflection_info(tokio_stream::iter([request])).await.expect("an answer");
    let response = responses.into_inner().message().await.expect("an answer").expect("one message");
    let Some(MessageResponse::ListServicesResponse(list)) = response.message_response else {
        panic!("{response:?}")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"phalanx.v1.Generation"), "{names:?}");
    assert!(names.contains(&"grpc.health.v1.Health"), "{names:?}");
    assert!(!names.iter().any(|name| name.contains("Cluster")), "{names:?}");
}
