//! What can go wrong, in words for people.

use std::error::Error as _;
use std::time::Duration;

use tonic::Code;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an address.
    #[error("'{0}' is not an address such as localhost:8000")]
    Address(String),
    /// Nobody answers there.
    #[error("no phalanx server at {address}")]
    Unreachable {
        /// Where.
        address: String,
        /// How it showed.
        source: tonic::transport::Error,
    },
    /// The connection broke.
    #[error("the connection to {address} was lost")]
    Lost {
        /// Where.
        address: String,
        /// How it showed.
        source: Box<tonic::Status>,
    },
    /// An operator's secret is not the cluster's.
    #[error("the coordinator at {0} has another secret")]
    Secret(String),
    /// The server said no; its own words.
    #[error("{}", .0.message())]
    Refused(Box<tonic::Status>),
    /// No server went on with an answer.
    #[error("gave up after {patience:?}")]
    GaveUp {
        /// How long it was tried.
        patience: Duration,
        /// How the last try ended.
        source: Box<Error>,
    },
    /// Something that this version does not understand.
    #[error("the server sent {0}, which this client does not understand")]
    Protocol(&'static str),
}

impl Error {
    /// Whether another server, or the same one later, may do what this one did not.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Lost { .. } => true,
            Self::Refused(status) => status.code() == Code::Unavailable,
            Self::Address(_) | Self::Secret(_) | Self::GaveUp { .. } | Self::Protocol(_) => false,
        }
    }

    /// A status is the server's own unless the transport made it, in which case it has a cause.
    pub(crate) fn from_status(address: &str, status: tonic::Status) -> Self {
        if status.source().is_some() {
            Self::Lost { address: address.to_owned(), source: Box::new(status) }
        } else {
            Self::Refused(Box::new(status))
        }
    }
}
