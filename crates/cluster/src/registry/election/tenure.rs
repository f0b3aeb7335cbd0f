//! Being the leader: keeping the place, noticing that it is gone, giving it up.

use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::super::{Lease, RegistryError};
use super::ballot::{Ballot, Ballots};
use super::{Candidate, Leader, PAUSE};

/// The lead of one term. Dropping it gives it up.
#[derive(Debug)]
pub struct Leadership {
    leader: Leader,
    over: CancellationToken,
    resign: CancellationToken,
    keeper: Option<JoinHandle<()>>,
}

impl Leadership {
    pub(super) fn new(candidate: Candidate, leader: Leader, lease: Lease, ballots: Ballots) -> Self {
        let (over, resign) = (CancellationToken::new(), CancellationToken::new());
        let tenure = Tenure { candidate, leader: leader.clone(), ballots };
        let keeper = tokio::spawn(tenure.keep(lease, over.clone(), resign.clone()));
        Self { leader, over, resign, keeper: Some(keeper) }
    }

    /// Heads every epoch of this leader; higher than that of any before it.
    pub fn term(&self) -> u64 {
        self.leader.term
    }

    /// Cancelled as soon as another leads, or this lead was given up. While the registry is away nobody else can be elected
    /// that it would tell of, and this leader goes on: whoever follows another drops what it says.
    pub fn over(&self) -> &CancellationToken {
        &self.over
    }

    /// Gives the lead up: another may be elected at once. Returns when the registry has it, or is away.
    pub async fn resign(mut self) {
        self.resign.cancel();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.await;
        }
    }
}

impl Drop for Leadership {
    fn drop(&mut self) {
        self.resign.cancel();
    }
}

struct Tenure {
    candidate: Candidate,
    leader: Leader,
    ballots: Ballots,
}

/// What a ballot says of this leader.
enum Standing {
    Leads(Ballot),
    /// It is not there, but nobody else was elected.
    Vacant(Ballot),
    /// Another was.
    Superseded,
}

impl Tenure {
    async fn keep(mut self, mut lease: Lease, over: CancellationToken, resign: CancellationToken) {
        tokio::select! {
            biased;
            () = self.hold(&mut lease) => warn!(term = self.leader.term, "another coordinator leads now"),
            () = resign.cancelled() => {}
        }
        // First of all: whoever leads by this stops.
        over.cancel();
        self.leave().await;
        lease.end().await;
    }

    /// Keeps the place until another has it.
    async fn hold(&mut self, lease: &mut Lease) {
        loop {
            match self.standing() {
                Standing::Superseded => return,
                Standing::Leads(_) => tokio::select! {
                    biased;
                    () = self.ballots.changed() => {}
                    () = lease.lost() => {
                        // The entry goes with it, which the next ballot shows; maybe it does already.
                        if let Standing::Leads(_) = self.standing() {
                            self.ballots.changed().await;
                        }
                    }
                },
                Standing::Vacant(ballot) => match self.take_again(&ballot).await {
                    Ok(again) => {
                        *lease = again;
                        self.ballots.changed().await;
                    }
                    Err(error) => {
                        warn!(%error, term = self.leader.term, "cannot take the lead again yet");
                        sleep(PAUSE).await;
                    }
                },
            }
        }
    }

    fn standing(&mut self) -> Standing {
        let ballot = self.ballots.latest();
        match &ballot.leader {
            Some(leader) if *leader == self.leader => Standing::Leads(ballot),
            Some(_) => Standing::Superseded,
            None if ballot.term() > self.leader.term => Standing::Superseded,
            None => Standing::Vacant(ballot),
        }
    }

    /// Puts this leader's entry back, in its own term. Nothing changes if another was elected since `ballot`, which the next
    /// one shows.
    async fn take_again(&self, ballot: &Ballot) -> Result<Lease, RegistryError> {
        let Candidate { registry, ttl, .. } = &self.candidate;
        let lease = registry.lease(*ttl).await?;
        if registry.transact(ballot.elect(&self.leader, lease.id())).await?.is_some() {
            info!(term = self.leader.term, "the lease was lost, and the lead taken again");
        }
        Ok(lease)
    }

    /// Says that this leader will not come back, if it still leads.
    async fn leave(&mut self) {
        if let Standing::Leads(ballot) = self.standing()
            && let Err(error) = self.candidate.registry.transact(ballot.resign()).await
        {
            warn!(%error, "could not resign: the lead ends with the lease");
        }
    }
}
