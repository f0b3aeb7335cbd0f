//! What the registry says of the election, and how it is changed.

use serde::{Deserialize, Serialize};

use super::super::entries::{Entries, to_json};
use super::super::{Entry, LeaseId, Registry, RegistryError, Revision, Transaction};
use super::Leader;

const PREFIX: &str = "election/";
const LEADER: &str = "election/leader";
const TERM: &str = "election/term";
/// No clock and no number of elections leads so far; what does is rubbish.
const HIGHEST_TERM: u64 = u64::MAX / 2;

/// The last term that was given.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Term {
    term: u64,
    /// Its leader gave it up, and will not come back.
    resigned: bool,
}

/// The state of the election at one time.
#[derive(Debug, Clone)]
pub(super) struct Ballot {
    pub(super) leader: Option<Leader>,
    term: Term,
    leader_revision: Revision,
    term_revision: Revision,
}

impl Ballot {
    /// The highest term so far; 0 where there was none.
    pub(super) fn term(&self) -> u64 {
        self.leader.as_ref().map_or(0, |leader| leader.term).max(self.term.term)
    }

    /// A term higher than any before. It takes the time as long as that is higher.
    pub(super) fn next_term(&self, now: u64) -> u64 {
        (self.term() + 1).max(now.min(HIGHEST_TERM))
    }

    /// Whether there was a leader that may live.
    pub(super) fn may_return(&self) -> bool {
        self.term.term > 0 && !self.term.resigned
    }

    /// Makes `leader` lead, unless the election has changed.
    pub(super) fn elect(&self, leader: &Leader, lease: LeaseId) -> Transaction {
        let term = Term { term: leader.term, resigned: false };
        self.unchanged().put(LEADER, to_json(leader), Some(lease)).put(TERM, to_json(&term), None)
    }

    /// Has the leader leave for good, unless the election has changed.
    pub(super) fn resign(&self) -> Transaction {
        let term = Term { term: self.term(), resigned: true };
        self.unchanged().delete(LEADER).put(TERM, to_json(&term), None)
    }

    fn unchanged(&self) -> Transaction {
        Transaction::default()
            .if_unchanged(LEADER, self.leader_revision)
            .if_unchanged(TERM, self.term_revision)
    }
}

/// Ballots as they come.
#[derive(Debug)]
pub(super) struct Ballots(Entries);

impl Ballots {
    pub(super) async fn watch(registry: &dyn Registry) -> Result<Self, RegistryError> {
        Ok(Self(Entries::new(registry.watch(PREFIX).await?)))
    }

    /// The latest ballot. Rubbish counts as nothing, but is overwritten only if it is still the same.
    pub(super) fn latest(&mut self) -> Ballot {
        let snapshot = self.0.latest();
        let (leader, term) = (snapshot.entries.get(LEADER), snapshot.entries.get(TERM));
        let revision = |entry: Option<&Entry>| entry.map_or(Revision(0), |entry| entry.revision);
        let given = |term: u64| match term {
            1..=HIGHEST_TERM => Ok(()),
            _ => Err(format!("term {term} is out of range")),
        };
        let check_leader = |leader: &Leader, entry: &Entry| match entry.lease {
            Some(_) => given(leader.term),
            None => Err("a leader without a lease".into()),
        };
        Ballot {
            leader_revision: revision(leader),
            term_revision: revision(term),
            leader: leader
                .and_then(|entry| self.0.parse(LEADER, entry, |leader| check_leader(leader, entry)).ok()),
            term: term
                .and_then(|entry| self.0.parse(TERM, entry, |term: &Term| given(term.term)).ok())
                .unwrap_or_default(),
        }
    }

    pub(super) async fn changed(&mut self) {
        self.0.changed().await;
    }
}
