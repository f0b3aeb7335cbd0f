//! Answers that run while something happens to their cluster: each token with the moment at which it came.

use std::time::{Duration, Instant};

use client::{Client, Event, GenerateRequest, Prompt, SamplingOptions, TokenIds};
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// An answer as its client saw it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Ids, with the bits of their log-probabilities.
    pub tokens: Vec<(u32, u32)>,
}

/// Running answers of seeded requests.
#[derive(Debug)]
pub struct Streams {
    running: Vec<JoinHandle<(Answer, Vec<Instant>)>>,
    counts: Vec<watch::Receiver<usize>>,
}

/// All answers, and how they came.
#[derive(Debug)]
pub struct Ended {
    /// In the order of their seeds.
    pub answers: Vec<Answer>,
    /// The moments of all tokens of all answers, in order.
    moments: Vec<Instant>,
}

impl Streams {
    /// Starts `count` answers of `tokens` tokens, each of another prompt and another seed from `seed` on. An answer that fails, or for
    /// longer than `patience` has no server, ends the test.
    pub async fn start(servers: &str, count: u32, seed: u32, tokens: u32, patience: Duration) -> Self {
        let client = Client::connect(servers).await.expect("a server").with_patience(patience);
        let (counts, running) = (seed..seed + count)
            .map(|seed| {
                let (sender, receiver) = watch::channel(0);
                (receiver, tokio::spawn(answer(client.clone(), request(seed, tokens), sender)))
            })
            .unzip();
        Self { running, counts }
    }

    /// Waits until every answer has so many tokens.
    pub async fn until(&mut self, tokens: usize) {
        for count in &mut self.counts {
            // One that has ended says what is wrong when it is waited for.
            let _ = count.wait_for(|&count| count >= tokens).await;
        }
    }

    /// Waits for all answers.
    pub async fn end(self) -> Ended {
        let (mut answers, mut moments) = (Vec::new(), Vec::new());
        for running in self.running {
            let (answer, came) = running.await.expect("an answer without an error");
            answers.push(answer);
            moments.extend(came);
        }
        moments.sort_unstable();
        Ended { answers, moments }
    }
}

impl Ended {
    /// Checks that the answers are the beginnings of others.
    pub fn check(&self, name: &str, expected: &[Answer]) {
        for (seed, (answer, expected)) in self.answers.iter().zip(expected).enumerate() {
            assert!(expected.tokens.starts_with(&answer.tokens), "{name}: other tokens of seed {seed}");
        }
    }

    /// The longest time without any token that ended after `moment`, counted from then on: how long clients saw nothing.
    pub fn pause_after(&self, moment: Instant) -> Duration {
        let gaps = self.moments.windows(2).filter(|gap| gap[1] > moment);
        gaps.map(|gap| gap[1] - gap[0].max(moment)).max().unwrap_or_default()
    }
}

/// A seeded request: prompts of different lengths, some greedy, some not.
pub fn request(seed: u32, tokens: u32) -> GenerateRequest {
    let length = 1 + (seed * 53) % 260;
    let ids = (0..length).map(|i| (i * 37 + seed * 101) % 4608).collect();
    let sampling = SamplingOptions {
        temperature: Some(if seed.is_multiple_of(3) { 0.0 } else { 0.9 }),
        top_p: Some(0.95),
        top_k: Some(50),
        seed: Some(seed.into()),
    };
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids })),
        max_tokens: Some(tokens),
        sampling: Some(sampling),
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}

async fn answer(
    client: Client,
    request: GenerateRequest,
    count: watch::Sender<usize>,
) -> (Answer, Vec<Instant>) {
    let wanted = request.max_tokens.unwrap_or_default() as usize;
    let mut events = client.generate(request).await.expect("it is taken");
    let (mut answer, mut moments, mut ends) = (Answer { tokens: Vec::new() }, Vec::new(), 0);
    while let Some(event) = events.next().await {
        match event.expect("no error") {
            Event::Started(_) => {}
            Event::Token(token) => {
                answer.tokens.push((token.id, token.logprob.to_bits()));
                moments.push(Instant::now());
                count.send_replace(moments.len());
            }
            Event::Finished(_) => ends += 1,
        }
    }
    assert_eq!((answer.tokens.len(), ends), (wanted, 1), "tokens and ends of an answer");
    (answer, moments)
}

/// Answers one batch after the other, as long as it is not told to end.
#[derive(Debug)]
pub struct Load {
    end: watch::Sender<bool>,
    task: JoinHandle<usize>,
}

impl Load {
    /// Begins; every batch is of requests with the seeds from 0, whose answers begin as `expected` does.
    /// For `patience`, see [`Streams::start`].
    pub fn start(servers: String, expected: &'static [Answer], tokens: u32, patience: Duration) -> Self {
        let (end, ended) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut answers = 0;
            while !*ended.borrow() {
                let count = expected.len() as u32;
                let streams = Streams::start(&servers, count, 0, tokens, patience).await;
                streams.end().await.check("under load", expected);
                answers += expected.len();
            }
            answers
        });
        Self { end, task }
    }

    /// Waits for the last batch; returns the number of answers.
    pub async fn end(self) -> usize {
        self.end.send_replace(true);
        self.task.await.expect("no error")
    }
}
