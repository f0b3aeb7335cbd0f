//! Where the coordinator is: at one address, or wherever the registry says that it leads from.

use std::fmt;
use std::sync::Arc;

use cluster::registry::election::Election;
use cluster::registry::members::{Registration, WorkerEntry};
use cluster::registry::{LEASE, Registry};
use tokio::sync::Mutex;

use crate::{Coordinators, WorkerError};

/// Where to look for the coordinator that leads.
#[derive(Debug)]
pub(crate) enum Whereabouts {
    At(String),
    Elected(Arc<dyn Registry>, Mutex<Election>),
}

/// A coordinator to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leader {
    /// `host:port`.
    pub(crate) address: String,
    /// What it was elected for, where there are elections.
    pub(crate) term: Option<u64>,
}

impl Whereabouts {
    pub(crate) async fn open(coordinators: &Coordinators) -> Result<Self, WorkerError> {
        match coordinators {
            Coordinators::At(address) => Ok(Self::At(address.clone())),
            Coordinators::Elected(registry) => {
                let election = Election::watch(registry.as_ref()).await;
                let election = Mutex::new(election.map_err(WorkerError::Registry)?);
                Ok(Self::Elected(registry.clone(), election))
            }
        }
    }

    /// Puts a worker's entry into the registry, if there is one.
    pub(crate) fn register(&self, worker: WorkerEntry) -> Option<Registration> {
        match self {
            Self::At(_) => None,
            Self::Elected(registry, _) => Some(Registration::new(registry.clone(), worker, LEASE)),
        }
    }

    /// Who leads, as far as is known.
    pub(crate) async fn leader(&self) -> Option<Leader> {
        match self {
            Self::At(address) => Some(Leader { address: address.clone(), term: None }),
            Self::Elected(_, election) => {
                let leader = election.lock().await.leader()?;
                Some(Leader { address: leader.addresses.workers, term: Some(leader.term) })
            }
        }
    }

    /// Ends when a later leader than `joined` leads.
    pub(crate) async fn superseded(&self, joined: &Leader) {
        let (Self::Elected(_, election), Some(term)) = (self, joined.term) else {
            return std::future::pending().await;
        };
        let mut election = election.lock().await;
        while election.leader().is_none_or(|leader| leader.term <= term) {
            election.changed().await;
        }
    }
}

impl From<&str> for Whereabouts {
    fn from(address: &str) -> Self {
        Self::At(address.to_owned())
    }
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => f.write_str(address),
            Self::Elected(..) => f.write_str("where the registry says"),
        }
    }
}
