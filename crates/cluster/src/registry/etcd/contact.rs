//! Calls of bounded duration, and what they say of etcd's health.

use std::time::Duration;

use etcd_client::Error;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Code, Status};
use tracing::{info, warn};

use super::super::{Health, RegistryError};

/// No call takes longer.
pub(super) const LIMIT: Duration = Duration::from_secs(3);

/// How it stands with etcd.
pub(super) struct Contact {
    /// Its endpoints, for people.
    name: String,
    health: watch::Sender<Health>,
}

impl Contact {
    pub(super) fn new(endpoints: &[String]) -> Self {
        let name = format!("etcd at {}", endpoints.join(","));
        Self { name, health: watch::Sender::new(Health::Answers) }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Makes a call, for [`LIMIT`] at most, and takes note of whether there was an answer.
    pub(super) async fn bounded<T>(
        &self,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, RegistryError> {
        let result = match timeout(LIMIT, call).await {
            Ok(result) => result.map_err(|error| self.meaning(error)),
            Err(_) => Err(self.away(&format!("no answer within {LIMIT:?}"))),
        };
        self.note(match &result {
            Err(RegistryError::Away(reason)) => Health::Away(reason.clone()),
            _ => Health::Answers,
        });
        result
    }

    /// Takes note of a stream that broke.
    pub(super) fn broken(&self, reason: &str) {
        let RegistryError::Away(reason) = self.away(reason) else { return };
        self.note(Health::Away(reason));
    }

    fn note(&self, health: Health) {
        self.health.send_if_modified(|before| {
            match (&*before, &health) {
                (Health::Answers, Health::Away(reason)) => warn!(reason, "the registry is away"),
                (Health::Away(_), Health::Answers) => info!("the registry answers again"),
                _ => {}
            }
            let changed = *before != health;
            *before = health;
            changed
        });
    }

    fn away(&self, reason: &str) -> RegistryError {
        RegistryError::Away(format!("{} does not answer: {reason}", self.name))
    }

    fn meaning(&self, error: Error) -> RegistryError {
        match &error {
            Error::GRpcStatus(status) => self.meaning_of_status(status),
            Error::TransportError(error) => self.away(&with_causes(error)),
            // What the client says when a lease that is to be kept is not there.
            Error::LeaseKeepAliveError(_) => RegistryError::LeaseLost,
            _ => self.refused(&error.to_string()),
        }
    }

    fn meaning_of_status(&self, status: &Status) -> RegistryError {
        match status.code() {
            Code::NotFound if status.message().contains("lease") => RegistryError::LeaseLost,
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Aborted => {
                self.away(&reason(status))
            }
            _ => self.refused(status.message()),
        }
    }

    fn refused(&self, reason: &str) -> RegistryError {
        RegistryError::Refused { registry: self.name.clone(), reason: reason.to_owned() }
    }
}

/// The deepest cause says most: which certificate, which port.
fn reason(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => with_causes(source),
        None => status.message().to_owned(),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
