//! One answer: the engine's events as the stream that a client reads.
//!
//! The stream is pulled by the connection, so a slow client is parked and holds up nobody; when the client hangs up
//! the stream is dropped, and with it the submission, which cancels the request.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use cluster::proto;
use cluster::proto::generate_response::Event;
use coordinator::{EngineError, EngineEvent, Submission};
use engine::{FinishReason, Usage};
use futures_util::Stream;
use tonic::Status;

use crate::detokenize::Detokenizer;
use crate::stop::StopFilter;
use crate::tokenizer::Tokenizer;

/// The responses of one request.
#[derive(Debug)]
pub struct Answer {
    tokenizer: Option<Arc<Tokenizer>>,
    /// What the stream opened with.
    started: proto::Started,
    /// Gone once the answer is over, and not there before it is submitted.
    submission: Option<Submission>,
    /// Responses that the client has not read.
    ready: VecDeque<Event>,
    detokenizer: Detokenizer,
    stop: StopFilter,
    stop_ids: Vec<u32>,
    usage: Usage,
    span: tracing::Span,
}

impl Answer {
    /// An answer that opens with `started`, and then [follows](Self::follow) a submission.
    pub(crate) fn new(
        tokenizer: Option<Arc<Tokenizer>>,
        started: proto::Started,
        stop: StopFilter,
        stop_ids: Vec<u32>,
    ) -> Self {
        let prompt_tokens = u32::try_from(started.prompt_token_ids.len()).unwrap_or(u32::MAX);
        let span = tracing::info_span!("answer", request = started.request_id, prompt_tokens);
        Self {
            tokenizer,
            ready: VecDeque::from([Event::Started(started.clone())]),
            started,
            submission: None,
            detokenizer: Detokenizer::default(),
            stop,
            stop_ids,
            usage: Usage { prompt_tokens, ..Usage::default() },
            span,
        }
    }

    /// Goes through tokens that the client has: what follows continues their text. If they are the whole answer, it is over.
    /// Fails if they go on after its end.
    pub(crate) fn replay(&mut self, tokens: &[u32], max_tokens: u32) -> Result<(), Status> {
        for (index, &id) in tokens.iter().enumerate() {
            if self.is_over() {
                return Err(Status::invalid_argument(format!(
                    "resume.token_ids has {} tokens, and the answer ended after {index}",
                    tokens.len()
                )));
            }
            self.text(id);
            if self.stop.stopped() || self.stop_ids.contains(&id) {
                self.finish(FinishReason::Stop, self.usage);
            } else if self.usage.completion_tokens >= max_tokens {
                self.finish(FinishReason::Length, self.usage);
            }
        }
        Ok(())
    }

    /// Whether the last response is there already.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.ready.back(), Some(Event::Finished(_)))
    }

    /// Goes on with what the engine generates.
    pub(crate) fn follow(&mut self, submission: Submission) {
        if submission.fingerprint != self.started.fingerprint {
            // What it opens with was written before a group was chosen.
            self.ready.clear();
            let resumed_tokens = self.started.resumed_tokens;
            let previous = self.started.previous_fingerprint.take();
            let previous =
                previous.or_else(|| (resumed_tokens > 0).then(|| self.started.fingerprint.clone()));
            self.go_on_under(submission.fingerprint.clone(), previous, resumed_tokens);
        }
        self.submission = Some(submission);
    }

    fn go_on_under(&mut self, fingerprint: String, previous: Option<String>, resumed_tokens: u32) {
        self.started.previous_fingerprint = previous.filter(|previous| *previous != fingerprint);
        (self.started.fingerprint, self.started.resumed_tokens) = (fingerprint, resumed_tokens);
        self.ready.push_back(Event::Started(self.started.clone()));
    }

    fn take(&mut self, event: Option<EngineEvent>) -> Result<(), Status> {
        match event {
            Some(EngineEvent::Token { id, logprob, cached_tokens }) => {
                self.usage.cached_tokens = cached_tokens;
                self.token(id, logprob);
                Ok(())
            }
            Some(EngineEvent::Moved { fingerprint }) => {
                let previous = Some(self.started.fingerprint.clone());
                self.go_on_under(fingerprint, previous, self.usage.completion_tokens);
                Ok(())
            }
            Some(EngineEvent::Finished { reason, usage }) => {
                self.finish(reason, usage);
                Ok(())
            }
            Some(EngineEvent::Failed(error)) => Err(self.fail(engine_status(error))),
            None => Err(self.fail(Status::internal("the engine broke off the answer"))),
        }
    }

    /// The text that becomes certain with a token.
    fn text(&mut self, id: u32) -> String {
        self.usage.completion_tokens += 1;
        let ends = self.stop_ids.contains(&id);
        let tokenizer = self.tokenizer.as_ref().filter(|_| !ends);
        let piece = tokenizer.map_or_else(Vec::new, |tokenizer| tokenizer.piece(id, true));
        self.stop.push(&self.detokenizer.push(&piece))
    }

    fn token(&mut self, id: u32, logprob: f32) {
        let text = self.text(id);
        self.ready.push_back(Event::Token(proto::Token { id, text, logprob }));
        if self.stop.stopped() {
            self.finish(FinishReason::Stop, self.usage);
        }
    }

    /// Ends the answer; dropping the submission cancels what may still be running.
    fn finish(&mut self, reason: FinishReason, usage: Usage) {
        let mut text = self.stop.push(&std::mem::take(&mut self.detokenizer).finish());
        let reason = if self.stop.stopped() { FinishReason::Stop } else { reason };
        text.push_str(&std::mem::take(&mut self.stop).finish());
        self.submission = None;
        self.span
            .in_scope(|| tracing::info!(?reason, completion_tokens = usage.completion_tokens, "finished"));
        let reason = match reason {
            FinishReason::Stop => proto::FinishReason::Stop,
            FinishReason::Length => proto::FinishReason::Length,
        };
        let Usage { prompt_tokens, completion_tokens, cached_tokens } = usage;
        let usage = proto::Usage { prompt_tokens, completion_tokens, cached_tokens };
        self.ready.push_back(Event::Finished(proto::Finished {
            reason: reason.into(),
            text,
            usage: Some(usage),
        }));
    }

    fn fail(&mut self, status: Status) -> Status {
        self.submission = None;
        self.span.in_scope(|| tracing::warn!(reason = status.message(), "failed"));
        status
    }
}

impl Stream for Answer {
    type Item = Result<proto::GenerateResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let answer = self.get_mut();
        loop {
            if let Some(event) = answer.ready.pop_front() {
                return Poll::Ready(Some(Ok(proto::GenerateResponse { event: Some(event) })));
            }
            let Some(submission) = &mut answer.submission else { return Poll::Ready(None) };
            let event = ready!(submission.events.poll_recv(context));
            if let Err(status) = answer.take(event) {
                return Poll::Ready(Some(Err(status)));
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.submission.is_some() {
            let completion_tokens = self.usage.completion_tokens;
            self.span.in_scope(|| tracing::info!(completion_tokens, "the client hung up"));
        }
    }
}

/// What a client is told of an engine's error.
pub(crate) fn engine_status(error: EngineError) -> Status {
    let mut status = match &error {
        EngineError::Invalid(reason) => Status::invalid_argument(reason),
        EngineError::Unavailable(_) | EngineError::Standby(_) => Status::unavailable(error.to_string()),
    };
    if let EngineError::Standby(Some(leader)) = &error
        && let Ok(leader) = leader.parse()
    {
        status.metadata_mut().insert(cluster::LEADER_METADATA, leader);
    }
    status
}
