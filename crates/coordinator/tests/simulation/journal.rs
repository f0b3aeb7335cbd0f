//! What happened in a run, at which time: its last lines, a hash of all of them, and what must not have happened.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::{Arguments, Write};
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::Epoch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Clones are the same journal.
#[derive(Clone)]
pub(crate) struct Journal {
    state: Arc<Mutex<State>>,
    violated: CancellationToken,
}

struct State {
    begun: Instant,
    /// Lines that are kept; with none, nothing is written down but violations.
    kept: usize,
    lines: VecDeque<String>,
    hasher: DefaultHasher,
    violation: Option<String>,
    /// Terms as they were first seen, with the coordinator that led: their numbers come from the clock on the wall.
    terms: BTreeMap<u64, (usize, String)>,
    /// Workers that may rightly be sent away.
    suspects: BTreeSet<String>,
}

impl Journal {
    /// A journal that keeps so many lines.
    pub(crate) fn new(kept: usize) -> Self {
        let state = State {
            begun: Instant::now(),
            kept,
            lines: VecDeque::new(),
            hasher: DefaultHasher::new(),
            violation: None,
            terms: BTreeMap::new(),
            suspects: BTreeSet::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), violated: CancellationToken::new() }
    }

    /// Something happened.
    pub(crate) fn note(&self, what: Arguments<'_>) {
        let mut state = self.state();
        if state.kept == 0 {
            return;
        }
        let mut line =
            if state.lines.len() >= state.kept { state.lines.pop_front() } else { None }.unwrap_or_default();
        line.clear();
        let _ = write!(line, "{:>9.3} {what}", state.begun.elapsed().as_secs_f64());
        state.hasher.write(line.as_bytes());
        state.lines.push_back(line);
    }

    /// Something happened that must not; the first one counts.
    pub(crate) fn violation(&self, what: Arguments<'_>) {
        self.note(format_args!("VIOLATION {what}"));
        self.state().violation.get_or_insert_with(|| what.to_string());
        self.violated.cancel();
    }

    /// Ends when something happened that must not.
    pub(crate) async fn violated(&self) {
        self.violated.cancelled().await;
    }

    /// What must not have happened, and did.
    pub(crate) fn verdict(&self) -> Option<String> {
        self.state().violation.clone()
    }

    /// An epoch in which `coordinator` leads; no other one may have led in its term.
    pub(crate) fn led(&self, epoch: Epoch, coordinator: &str) {
        let mut state = self.state();
        let next = state.terms.len() + 1;
        let leader = &state.terms.entry(epoch.term).or_insert_with(|| (next, coordinator.to_owned())).1;
        if leader != coordinator {
            let both = format!("{leader} and {coordinator} both lead in epoch {epoch}");
            drop(state);
            self.violation(format_args!("{both}"));
        }
    }

    /// An epoch by the order of its term.
    pub(crate) fn epoch(&self, epoch: Epoch) -> Epoch {
        let term = self.state().terms.get(&epoch.term).map_or(0, |(number, _)| *number as u64);
        Epoch { term, ..epoch }
    }

    /// Something is wrong with a worker, or was said of it.
    pub(crate) fn suspect(&self, worker: &str) {
        self.state().suspects.insert(worker.to_owned());
    }

    /// A coordinator that leads sent a worker away; one with which nothing was ever wrong must not be.
    pub(crate) fn sent_away(&self, worker: &str, reason: &str) {
        if !self.state().suspects.contains(worker) {
            self.violation(format_args!("{worker} was sent away: {reason}"));
        }
    }

    /// A hash of everything that happened.
    pub(crate) fn digest(&self) -> u64 {
        self.state().hasher.finish()
    }

    /// The last lines.
    pub(crate) fn lines(&self) -> String {
        self.state().lines.iter().fold(String::new(), |text, line| text + line + "\n")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
