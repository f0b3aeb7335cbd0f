//! The events of one generation, which goes on by itself when its server is lost.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use cluster::proto::generate_request::Prompt;
use cluster::proto::{GenerateRequest, GenerateResponse, Resume, SamplingOptions, Started, TokenIds};
use futures_util::{Stream, StreamExt, stream};
use tokio::time::{Instant, sleep};
use tonic::{Status, Streaming};
use tracing::warn;

use crate::servers::Servers;
use crate::{Error, Event};

/// Pauses between the rounds in which all servers are asked.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A running generation: `Started`, `Token`s, `Finished`. Dropping it cancels the generation.
///
/// Where a server is lost or unavailable, another (or the same again) goes on with the answer: no token is repeated and none
/// is missing. A second `Started` comes only if the model's fingerprint had to change, and says so.
pub struct Generation {
    events: Pin<Box<dyn Stream<Item = Result<Event, Error>> + Send>>,
}

impl Generation {
    /// Waits until a server has taken the request, for `patience` at most.
    pub(crate) async fn open(
        servers: Arc<Servers>,
        request: GenerateRequest,
        patience: Duration,
    ) -> Result<Self, Error> {
        let mut answer = Answer::new(servers, request, patience);
        let stream = answer.open(None).await?;
        let events = stream::unfold(Some((answer, stream)), |state| async {
            let (mut answer, mut stream) = state?;
            match answer.next(&mut stream).await {
                Ok(Some(event)) => Some((Ok(event), Some((answer, stream)))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Self { events: Box::pin(events) })
    }
}

impl Stream for Generation {
    type Item = Result<Event, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_next_unpin(context)
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation").finish_non_exhaustive()
    }
}

/// What is known of an answer.
struct Answer {
    servers: Arc<Servers>,
    /// Asks for what is missing of the answer. From the first `Started` on it has a `resume`.
    request: GenerateRequest,
    patience: Duration,
    /// Time without a server, and the next pause, since the last token.
    spent: Duration,
    pause: Duration,
    /// Tokens came, but no `started`: there is nothing to resume with.
    blind: bool,
    /// The last event was there.
    finished: bool,
}

/// What one server sends.
struct Responses {
    address: String,
    stream: Streaming<GenerateResponse>,
    started: bool,
}

impl Answer {
    fn new(servers: Arc<Servers>, request: GenerateRequest, patience: Duration) -> Self {
        Self {
            servers,
            request,
            patience,
            spent: Duration::ZERO,
            pause: FIRST_PAUSE,
            blind: false,
            finished: false,
        }
    }

    /// The next event; none after the last one.
    async fn next(&mut self, responses: &mut Responses) -> Result<Option<Event>, Error> {
        while !self.finished {
            let status = match responses.stream.message().await {
                Ok(Some(response)) => match self.take(response, &mut responses.started)? {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                },
                Ok(None) => Status::unavailable("the answer ended without its last message"),
                Err(status) => status,
            };
            let error = self.servers.failed(&responses.address, status);
            if self.blind {
                return Err(error);
            }
            *responses = self.open(Some(error)).await?;
        }
        Ok(None)
    }

    /// Asks the servers, in rounds, until one takes the request. `lost`: why none has it any more.
    async fn open(&mut self, mut lost: Option<Error>) -> Result<Responses, Error> {
        let begun = Instant::now();
        loop {
            if let Some(error) = lost {
                let spent = self.spent + begun.elapsed() + self.pause;
                if !error.is_passing() {
                    return Err(error);
                }
                if spent > self.patience {
                    return Err(Error::GaveUp { patience: self.patience, source: Box::new(error) });
                }
                warn!(%error, pause = ?self.pause, "asking again");
                sleep(self.pause).await;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
            let asked = self.servers.ask(|mut service| {
                let request = self.request.clone();
                async move { service.generation.generate(request).await }
            });
            match asked.await {
                Ok((address, stream)) => {
                    self.spent += begun.elapsed();
                    return Ok(Responses { address, stream, started: false });
                }
                Err(error) => lost = Some(error),
            }
        }
    }

    /// Takes note of a response; returns what it is for whoever reads the answer.
    fn take(&mut self, response: GenerateResponse, started: &mut bool) -> Result<Option<Event>, Error> {
        let event = response.event.ok_or(Error::Protocol("an unknown event"))?;
        match &event {
            Event::Started(start) => {
                *started = true;
                Ok(self.start(start)?.then_some(event))
            }
            Event::Token(token) => {
                match &mut self.request.resume {
                    Some(resume) if *started => resume.token_ids.push(token.id),
                    Some(_) => {
                        return Err(Error::Protocol("an answer that goes on without saying where"));
                    }
                    None => self.blind = true,
                }
                (self.spent, self.pause) = (Duration::ZERO, FIRST_PAUSE);
                Ok(Some(event))
            }
            Event::Finished(_) => {
                self.finished = true;
                Ok(Some(event))
            }
        }
    }

    /// Makes the request one for the rest of the answer; returns whether the reader has to know.
    fn start(&mut self, start: &Started) -> Result<bool, Error> {
        let Some(resume) = &mut self.request.resume else {
            self.request.prompt = Some(Prompt::TokenIds(TokenIds { ids: start.prompt_token_ids.clone() }));
            let sampling = self.request.sampling.unwrap_or_default();
            self.request.sampling = Some(SamplingOptions { seed: Some(start.seed), ..sampling });
            self.request.resume = Some(Resume {
                request_id: start.request_id.clone(),
                fingerprint: start.fingerprint.clone(),
                token_ids: Vec::new(),
            });
            return Ok(true);
        };
        if start.resumed_tokens as usize != resume.token_ids.len() {
            return Err(Error::Protocol("an answer that does not go on where the last one broke off"));
        }
        resume.fingerprint.clone_from(&start.fingerprint);
        Ok(start.previous_fingerprint.is_some())
    }
}
