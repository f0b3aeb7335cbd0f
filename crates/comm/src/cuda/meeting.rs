//! Where the threads of a group within one process meet: they learn what each has, and that all make the same call.

use std::io::ErrorKind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kernels::cuda::{Board, Mailbox};

use crate::collective::{AbortHandle, Error, Result};
use crate::patience::{Patience, SLEEP};

/// What a rank is about to do, or has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Reduce {
        len: usize,
    },
    Gather {
        root: usize,
        elements: usize,
    },
    Broadcast {
        root: usize,
        len: usize,
    },
    /// The kernel of the call before is on its way.
    Begun,
    /// So is everything of the steps before.
    Step,
}

/// One for each group.
#[derive(Debug)]
pub(crate) struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    board: Option<Arc<Board>>,
    places: Vec<Place>,
}

#[derive(Debug, Default)]
struct Place {
    mailbox: Option<Arc<Mailbox>>,
    /// Calls that it came to, and the latest two: nobody is further ahead of another.
    calls: u64,
    latest: [Option<Call>; 2],
    left: bool,
}

impl Meeting {
    pub(crate) fn new(size: usize) -> Self {
        let places = (0..size).map(|_| Place::default()).collect();
        Self { state: Mutex::new(State { board: None, places }), changed: Condvar::new() }
    }

    pub(crate) fn size(&self) -> usize {
        self.lock().places.len()
    }

    /// Brings this rank's mailbox, and gets everybody's and the board, which the first to come makes.
    pub(crate) fn join(
        &self,
        rank: usize,
        mailbox: Mailbox,
        board: impl FnOnce() -> Result<Board>,
        abort: &AbortHandle,
        deadline: Instant,
    ) -> Result<(Vec<Arc<Mailbox>>, Arc<Board>)> {
        let board = {
            let mut state = self.lock();
            state.places[rank].mailbox = Some(Arc::new(mailbox));
            match &state.board {
                Some(board) => board.clone(),
                None => state.board.insert(Arc::new(board()?)).clone(),
            }
        };
        self.changed.notify_all();
        let mailboxes = self.wait(abort, Some(deadline), |state| {
            let missing = state.places.iter().position(|place| place.mailbox.is_none());
            missing.map_or_else(
                || Ok(state.places.iter().filter_map(|place| place.mailbox.clone()).collect()),
                Err,
            )
        })?;
        Ok((mailboxes, board))
    }

    /// Waits until every rank comes to this call.
    pub(crate) fn meet(&self, rank: usize, call: Call, abort: &AbortHandle) -> Result<()> {
        let number = {
            let place = &mut self.lock().places[rank];
            place.latest[(place.calls % 2) as usize] = Some(call);
            place.calls += 1;
            place.calls
        };
        self.changed.notify_all();
        let others = self.wait(abort, None, |state| {
            match state.places.iter().position(|place| place.calls < number) {
                Some(missing) => Err(missing),
                None => {
                    Ok(state.places.iter().map(|p| p.latest[((number - 1) % 2) as usize]).collect::<Vec<_>>())
                }
            }
        })?;
        match others.into_iter().enumerate().find(|(_, other)| *other != Some(call)) {
            None => Ok(()),
            Some((rank, other)) => {
                let what = format!("{other:?} in call {number} where {call:?} was expected");
                Err(Error::Protocol { rank, what })
            }
        }
    }

    /// This rank comes no more.
    pub(crate) fn leave(&self, rank: usize) {
        self.lock().places[rank].left = true;
        self.changed.notify_all();
    }

    /// Asks until there is an answer instead of a rank that is missing.
    fn wait<A>(
        &self,
        abort: &AbortHandle,
        deadline: Option<Instant>,
        mut ask: impl FnMut(&State) -> std::result::Result<A, usize>,
    ) -> Result<A> {
        let mut patience = Patience::default();
        loop {
            if abort.is_aborted() {
                return Err(Error::Aborted);
            }
            let state = self.lock();
            let rank = match ask(&state) {
                Ok(answer) => return Ok(answer),
                Err(missing) => missing,
            };
            if state.places[rank].left {
                return Err(Error::Lost { rank, source: ErrorKind::ConnectionAborted.into() });
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(Error::Lost { rank, source: ErrorKind::TimedOut.into() });
            }
            if patience.is_awake() {
                drop(state);
                std::thread::yield_now();
            } else {
                // However it ends, the next turn looks again.
                drop(self.changed.wait_timeout(state, SLEEP));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
