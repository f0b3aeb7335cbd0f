//! A client: it knows what its answer must be, and goes on with it at another coordinator when its own is lost.

use std::sync::atomic::Ordering;
use std::time::Duration;

use coordinator::{Engine, EngineError, EngineEvent, Submission};
use engine::{FinishReason, Request, Usage};
use tokio::time::sleep;

use crate::coordinators::{Coordinators, Site};
use crate::journal::Journal;
use crate::worker::model::answer;

/// Pauses between the rounds in which all coordinators are asked.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// One request.
pub(crate) struct Client {
    pub(crate) number: usize,
    pub(crate) request: Request,
    /// It hangs up after so many tokens.
    pub(crate) hangs_up_after: Option<usize>,
    /// Tokens of the model's context.
    pub(crate) context: u32,
    pub(crate) coordinators: Coordinators,
    pub(crate) journal: Journal,
}

/// An answer in the making.
struct Answer {
    client: Client,
    /// All tokens, those that are there among them.
    expected: Vec<u32>,
    tokens: Vec<u32>,
    /// What tokens come under since the answer began.
    fingerprint: Option<String>,
}

/// How a coordinator's part in an answer ended.
enum End {
    /// The answer is over.
    Done,
    /// Another coordinator may go on with it.
    Lost,
}

impl Client {
    /// Asks until the answer is there.
    pub(crate) async fn run(self) {
        let mut answer = Answer { client: self, expected: Vec::new(), tokens: Vec::new(), fingerprint: None };
        let mut pause = FIRST_PAUSE;
        loop {
            for site in answer.client.coordinators.alive() {
                let before = answer.tokens.len();
                if let End::Done = answer.ask(&site).await {
                    return;
                }
                if answer.tokens.len() > before {
                    pause = FIRST_PAUSE;
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

impl Answer {
    /// Has one coordinator give the rest of the answer, as far as it can.
    async fn ask(&mut self, site: &Site) -> End {
        let began = self.fingerprint.is_some();
        if began && self.tokens.len() == self.expected.len() {
            // Only the last message is missing, which the gateway makes up.
            return self.done();
        }
        let resume = began.then(|| self.tokens.clone());
        let request = Request { resume, ..self.client.request.clone() };
        let submission = site.contender.submit_under(request, self.fingerprint.clone());
        let Some(submission) = site.dead.run_until_cancelled(submission).await else { return End::Lost };
        match submission {
            Ok(submission) => {
                self.goes_on_under(&submission.fingerprint);
                site.dead.run_until_cancelled(self.follow(site, submission)).await.unwrap_or(End::Lost)
            }
            Err(EngineError::Unavailable(reason)) if began && reason.contains("queue is full") => {
                self.wrong("an answer that began waits in the queue")
            }
            Err(EngineError::Unavailable(_) | EngineError::Standby(_)) => End::Lost,
            Err(error) => self.wrong(&format!("{} refuses it: {error}", site.name)),
        }
    }

    async fn follow(&mut self, site: &Site, mut submission: Submission) -> End {
        let number = self.client.number;
        self.client.journal.note(format_args!("request {number} is taken by {}", site.name));
        loop {
            if self.client.hangs_up_after.is_some_and(|after| self.tokens.len() >= after) {
                self.client.journal.note(format_args!("request {number} is cancelled"));
                return End::Done;
            }
            match submission.events.recv().await {
                Some(EngineEvent::Token { id, .. }) => {
                    if self.expected.get(self.tokens.len()) != Some(&id) {
                        let (at, wanted) = (self.tokens.len(), self.expected.get(self.tokens.len()));
                        return self.wrong(&format!("token {at} is {id}, not {wanted:?}"));
                    }
                    self.tokens.push(id);
                }
                Some(EngineEvent::Moved { fingerprint }) => self.goes_on_under(&fingerprint),
                Some(EngineEvent::Finished { reason, usage }) => return self.finish(reason, usage),
                Some(EngineEvent::Failed(EngineError::Unavailable(reason)))
                    if site.may_lose_lead.load(Ordering::Relaxed) =>
                {
                    self.client.journal.note(format_args!("request {number} lost {}: {reason}", site.name));
                    return End::Lost;
                }
                other => {
                    let after = self.tokens.len();
                    return self.wrong(&format!("{other:?} after {after} tokens from {}", site.name));
                }
            }
        }
    }

    fn goes_on_under(&mut self, fingerprint: &str) {
        if self.fingerprint.as_deref() != Some(fingerprint) {
            let Client { number, request, context, journal, .. } = &self.client;
            journal.note(format_args!("request {number} goes on under {fingerprint}"));
            self.expected = answer(request, *context, &self.tokens, fingerprint);
            self.fingerprint = Some(fingerprint.to_owned());
        }
    }

    fn finish(&self, reason: FinishReason, usage: Usage) -> End {
        let Request { prompt, stop_ids, .. } = &self.client.request;
        let (prompt_tokens, completion_tokens) = (prompt.len() as u32, self.expected.len() as u32);
        let stops = self.expected.last().is_some_and(|last| stop_ids.contains(last));
        let right = if stops { FinishReason::Stop } else { FinishReason::Length };
        let whole = self.tokens.len() == self.expected.len();
        let counted = Usage { prompt_tokens, completion_tokens, cached_tokens: usage.cached_tokens };
        if !whole || usage != counted || usage.cached_tokens > prompt_tokens || reason != right {
            let after = self.tokens.len();
            return self.wrong(&format!("{reason:?} with {usage:?} after {after} tokens"));
        }
        self.done()
    }

    fn done(&self) -> End {
        self.client.journal.note(format_args!("request {} is answered", self.client.number));
        End::Done
    }

    fn wrong(&self, what: &str) -> End {
        self.client.journal.violation(format_args!("request {}: {what}", self.client.number));
        End::Done
    }
}
