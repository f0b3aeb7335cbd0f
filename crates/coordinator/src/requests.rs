//! The channel of every request.

use std::collections::BTreeMap;

use engine::{Event, SeqId};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tracing::{Span, info, info_span};

use crate::api::{EngineError, EngineEvent};

/// All requests that have not ended. Their channels are unbounded, but none holds more than `max_tokens` tokens and
/// the end, so a client that does not read costs a bounded amount of memory and never holds up a step.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    open: BTreeMap<SeqId, Open>,
}

/// A request that has not ended.
#[derive(Debug)]
pub(crate) struct Open {
    events: UnboundedSender<EngineEvent>,
    span: Span,
    /// What its tokens are computed under.
    fingerprint: String,
}

impl Requests {
    /// Opens the channel of a request.
    pub(crate) fn open(
        &mut self,
        seq: SeqId,
        prompt_tokens: usize,
        fingerprint: String,
    ) -> UnboundedReceiver<EngineEvent> {
        let (events, receiver) = mpsc::unbounded_channel();
        let span = info_span!("request", %seq, prompt_tokens);
        self.open.insert(seq, Open { events, span, fingerprint });
        receiver
    }

    /// Gives up the channel of a request that goes on elsewhere.
    pub(crate) fn give_up(&mut self, seq: SeqId) -> Option<Open> {
        self.open.remove(&seq)
    }

    /// Goes on with a request of another group.
    pub(crate) fn take_over(&mut self, seq: SeqId, mut request: Open, fingerprint: &str) {
        request.goes_on_under(fingerprint);
        self.open.insert(seq, request);
    }

    /// The group stands again, with this fingerprint.
    pub(crate) fn go_on_under(&mut self, fingerprint: &str) {
        self.open.values_mut().for_each(|request| request.goes_on_under(fingerprint));
    }

    /// Tells a request what happened to it. That nobody listens any more is seen by `hung_up`.
    pub(crate) fn deliver(&mut self, event: Event) {
        match event {
            Event::Token { seq, id, logprob, cached_tokens } => {
                if let Some(request) = self.open.get(&seq) {
                    let _ = request.events.send(EngineEvent::Token { id, logprob, cached_tokens });
                }
            }
            Event::Finished { seq, reason, usage } => {
                if let Some(request) = self.open.remove(&seq) {
                    let _ = request.events.send(EngineEvent::Finished { reason, usage });
                    request.span.in_scope(|| info!(?reason, tokens = usage.completion_tokens, "finished"));
                }
            }
        }
    }

    /// Ends a request that cannot go on.
    pub(crate) fn fail(&mut self, seq: SeqId, error: EngineError) {
        if let Some(request) = self.open.remove(&seq) {
            request.fail(error);
        }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Ends all requests.
    pub(crate) fn fail_all(&mut self, error: &EngineError) {
        for seq in self.open.keys().copied().collect::<Vec<_>>() {
            self.fail(seq, error.clone());
        }
    }

    /// Forgets the requests whose receiver was dropped, and returns them.
    pub(crate) fn hung_up(&mut self) -> Vec<SeqId> {
        self.open
            .extract_if(.., |_, request| request.events.is_closed())
            .map(|(seq, request)| {
                request.span.in_scope(|| info!("cancelled"));
                seq
            })
            .collect()
    }
}

impl Open {
    /// What its tokens were computed under until now.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Ends it: it cannot go on.
    pub(crate) fn fail(self, error: EngineError) {
        self.span.in_scope(|| info!(%error, "failed"));
        let _ = self.events.send(EngineEvent::Failed(error));
    }

    fn goes_on_under(&mut self, fingerprint: &str) {
        if self.fingerprint != fingerprint {
            self.fingerprint = fingerprint.to_owned();
            let _ = self.events.send(EngineEvent::Moved { fingerprint: self.fingerprint.clone() });
        }
    }
}
