//! The events of one generation.

use std::pin::Pin;
use std::task::{Context, Poll};

use cluster::proto::GenerateResponse;
use futures_util::{Stream, StreamExt};
use tonic::Streaming;

use crate::{Client, Error, Event};

/// A running generation: `Started`, `Token`s, `Finished`. Dropping it cancels the generation.
#[derive(Debug)]
pub struct Generation {
    client: Client,
    responses: Streaming<GenerateResponse>,
}

impl Generation {
    pub(crate) fn new(client: Client, responses: Streaming<GenerateResponse>) -> Self {
        Self { client, responses }
    }
}

impl Stream for Generation {
    type Item = Result<Event, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { client, responses } = self.get_mut();
        let event = |response: Result<GenerateResponse, tonic::Status>| match response {
            Ok(response) => response.event.ok_or(Error::Protocol("an unknown event")),
            Err(status) => Err(client.error(status)),
        };
        responses.poll_next_unpin(context).map(|response| response.map(event))
    }
}
