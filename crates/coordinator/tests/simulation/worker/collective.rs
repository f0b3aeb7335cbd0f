//! Where the ranks of a group meet: a meeting ends when all have come, and a rank whose process ends is missed by the others.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cluster::Progress;
use engine::Epoch;
use tokio::sync::Notify;

use super::control::Control;
use super::executor::Limits;
use crate::journal::Journal;

/// All groups' rooms.
#[derive(Clone, Default)]
pub(crate) struct Rooms(Arc<Mutex<BTreeMap<Key, Arc<Room>>>>);

/// A group's epoch, and where its ranks listen: epochs of two groups may be equal.
type Key = (Epoch, Vec<String>);

struct Room {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    ranks: Vec<Rank>,
    /// What the ranks found in each meeting; all must find the same.
    found: BTreeMap<u64, u64>,
    /// Outputs that were sent.
    outputs: u64,
}

#[derive(Debug, Clone, Default)]
struct Rank {
    /// Meetings that it has come to.
    meetings: u64,
    /// Its process has ended, or has left the group.
    gone: bool,
    /// The meeting in which the rank behind it gets something from it that cannot be right.
    garbled: Option<u64>,
    limits: Option<Limits>,
}

/// A rank's seat in its room. Dropping it breaks its connections, unless its machine is gone: then nobody is told.
pub(crate) struct Seat {
    room: Arc<Room>,
    rank: usize,
    control: Arc<Control>,
}

/// The connection with this rank broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lost(pub(crate) usize);

/// What a rank is doing, for its heartbeats.
#[derive(Debug, Clone, Default)]
pub(crate) struct Vitals(Arc<Mutex<Progress>>);

impl Vitals {
    pub(crate) fn progress(&self) -> Progress {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Rooms {
    /// Takes a seat among the ranks that listen at `addresses`.
    pub(crate) fn enter(
        &self,
        epoch: Epoch,
        addresses: Vec<String>,
        rank: usize,
        limits: Limits,
        control: Arc<Control>,
    ) -> Seat {
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.retain(|_, room| !room.state().ranks.iter().all(|rank| rank.gone));
        let ranks = vec![Rank::default(); addresses.len()];
        let room = rooms.entry((epoch, addresses)).or_insert_with(|| {
            let state = State { ranks, found: BTreeMap::new(), outputs: 0 };
            Arc::new(Room { state: Mutex::new(state), changed: Notify::new() })
        });
        room.state().ranks[rank].limits = Some(limits);
        Seat { room: room.clone(), rank, control }
    }
}

impl Seat {
    /// Comes to the next meeting and stays until all others have come to it.
    pub(crate) async fn meet(&self, found: u64, vitals: &Vitals, journal: &Journal) -> Result<(), Lost> {
        let meeting = {
            let mut state = self.room.state();
            let meeting = state.ranks[self.rank].meetings + 1;
            state.ranks[self.rank].meetings = meeting;
            if *state.found.entry(meeting).or_insert(found) != found {
                journal
                    .violation(format_args!("rank {} finds something else in meeting {meeting}", self.rank));
            }
            state.found.retain(|before, _| *before + 64 > meeting);
            meeting
        };
        self.room.changed.notify_waiters();
        if let Some(before) = self.garbled(meeting) {
            return Err(Lost(before));
        }
        loop {
            let changed = self.room.changed.notified();
            let missing = self.missing(meeting)?;
            vitals.change(|progress| progress.waits_for = missing);
            if missing.is_none() {
                vitals.change(|progress| progress.calls = meeting);
                return Ok(());
            }
            changed.await;
        }
    }

    /// In the next meeting, the rank behind it gets something from it that cannot be right; if that is there already, in the one after.
    pub(crate) fn garble(&self) {
        let mut state = self.room.state();
        let behind = state.ranks[(self.rank + 1) % state.ranks.len()].meetings;
        let rank = &mut state.ranks[self.rank];
        rank.garbled = Some(behind.max(rank.meetings) + 1);
    }

    /// The rank in front, if what came of it in a meeting cannot be right.
    fn garbled(&self, meeting: u64) -> Option<usize> {
        let state = self.room.state();
        let before = self.rank.checked_sub(1).unwrap_or(state.ranks.len() - 1);
        (state.ranks[before].garbled == Some(meeting)).then_some(before)
    }

    /// The first rank that has not come to a meeting.
    fn missing(&self, meeting: u64) -> Result<Option<usize>, Lost> {
        let state = self.room.state();
        let missing = state.ranks.iter().position(|rank| rank.meetings < meeting);
        let gone = state.ranks.iter().position(|rank| rank.gone && rank.meetings < meeting);
        gone.map_or(Ok(missing), |rank| Err(Lost(rank)))
    }

    /// Steps that may be on their way, for all that the ranks have told.
    pub(crate) fn steps_in_flight(&self) -> u64 {
        let state = self.room.state();
        let least = state.ranks.iter().filter_map(|rank| Some(rank.limits?.steps_in_flight)).min();
        u64::from(least.unwrap_or(1))
    }

    /// This rank, which samples, sends an output.
    pub(crate) fn sent_output(&self) {
        self.room.state().outputs += 1;
    }

    /// Outputs that were sent.
    pub(crate) fn outputs(&self) -> u64 {
        self.room.state().outputs
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.control.vanished.load(Ordering::Relaxed) {
            return;
        }
        self.room.state().ranks[self.rank].gone = true;
        self.room.changed.notify_waiters();
    }
}

impl Room {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
