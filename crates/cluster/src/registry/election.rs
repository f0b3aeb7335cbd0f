//! Which of a cluster's coordinators leads, and under which term.
//!
//! Two entries: `election/leader`, under the leader's lease, says who leads; `election/term`, for good, which term was the last.
//! Whoever finds no leader puts itself there with a higher term, in one transaction that fails if anybody else did. So terms are
//! given once each, and rise: a higher one fences a lower one.
//!
//! A leader whose lease was lost while nobody else was elected takes its place again, in the same term ([`tenure`]): a registry
//! that stumbles ends no term. The others leave it [`GRACE`] for that, unless it resigned.

mod ballot;
mod tenure;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::{Health, Lease, Registry, RegistryError};
use ballot::{Ballot, Ballots};
pub use tenure::Leadership;

/// A leader that lost its lease, but lives, is back within this.
const GRACE: Duration = Duration::from_secs(1);
/// Pause before a registry that is away is asked again.
const PAUSE: Duration = Duration::from_millis(500);

/// Where a coordinator is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// By clients: `host:port` of its public service.
    pub clients: String,
    /// By workers: `host:port`.
    pub workers: String,
}

/// The coordinator that leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// Its term: heads every epoch.
    pub term: u64,
    /// Tells it from any other, also at the same addresses.
    pub candidate: String,
    /// Where it is.
    #[serde(flatten)]
    pub addresses: Addresses,
}

/// Who leads, as it changes.
#[derive(Debug)]
pub struct Election(Ballots);

impl Election {
    /// Begins to watch.
    pub async fn watch(registry: &dyn Registry) -> Result<Self, RegistryError> {
        Ok(Self(Ballots::watch(registry).await?))
    }

    /// Who leads, as far as is known. While the registry is away, whoever did last.
    pub fn leader(&mut self) -> Option<Leader> {
        self.0.latest().leader
    }

    /// Waits for a change.
    pub async fn changed(&mut self) {
        self.0.changed().await;
    }
}

/// A coordinator that would lead.
#[derive(Debug, Clone)]
pub struct Candidate {
    registry: Arc<dyn Registry>,
    id: String,
    addresses: Addresses,
    ttl: Duration,
}

impl Candidate {
    /// A candidate that is reached at `addresses`. If it falls silent, another is elected after `ttl` and [`GRACE`].
    pub fn new(registry: Arc<dyn Registry>, addresses: Addresses, ttl: Duration) -> Self {
        Self { registry, id: format!("{:016x}", rand::random::<u64>()), addresses, ttl }
    }

    /// Whether the registry that elects answers.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.registry.health()
    }

    /// Waits until this candidate leads: for as long as another does, or the registry is away.
    pub async fn elected(&self) -> Result<Leadership, RegistryError> {
        let mut campaign = Campaign { candidate: self, lease: None };
        loop {
            match campaign.run().await {
                Err(RegistryError::Away(reason)) => {
                    debug!(reason, "no election at present");
                    sleep(PAUSE).await;
                }
                ended => return ended,
            }
        }
    }
}

struct Campaign<'a> {
    candidate: &'a Candidate,
    /// Kept over tries: a transaction without an answer may have been made, and then this candidate leads by it.
    lease: Option<Lease>,
}

impl Campaign<'_> {
    async fn run(&mut self) -> Result<Leadership, RegistryError> {
        let Candidate { registry, id, .. } = self.candidate;
        let mut ballots = Ballots::watch(registry.as_ref()).await?;
        loop {
            let ballot = ballots.latest();
            match &ballot.leader {
                Some(leader) if leader.candidate == *id => {
                    if let Some(lease) = self.lease.take() {
                        return Ok(Leadership::new(self.candidate.clone(), leader.clone(), lease, ballots));
                    }
                    // What a lease that is over has left.
                    ballots.changed().await;
                }
                Some(_) => {
                    self.lease = None;
                    ballots.changed().await;
                }
                None if ballot.may_return() && timeout(GRACE, ballots.changed()).await.is_ok() => {}
                None => self.stand(&ballot, &mut ballots).await?,
            }
        }
    }

    /// Tries to be elected where nobody leads. What comes of it, the next ballot tells.
    async fn stand(&mut self, ballot: &Ballot, ballots: &mut Ballots) -> Result<(), RegistryError> {
        let Candidate { registry, id, addresses, ttl } = self.candidate;
        // One from an earlier try may have ended meanwhile.
        let lease = self.lease.insert(registry.lease(*ttl).await?);
        let term = ballot.next_term(now());
        let leader = Leader { term, candidate: id.clone(), addresses: addresses.clone() };
        registry.transact(ballot.elect(&leader, lease.id())).await?;
        ballots.changed().await;
        Ok(())
    }
}

/// Milliseconds since 1970: terms rise also where the registry began anew, or none had been there.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
