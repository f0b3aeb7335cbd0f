//! Reading ahead, on threads of its own: while a backend packs one piece, the next ones come from the disk.
//!
//! Requests are begun in order, each with a buffer that goes round between readers and the loader. So no more memory is held than
//! the buffers grow to, and whoever waits for the next piece waits for one that has a buffer.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::origin::Origin;
use super::piece::Piece;
use super::request::Reading;
use crate::error::{Error, Result};

/// More readers do not make disks faster that are known.
const MOST_READERS: usize = 8;
/// Pieces beyond those that are being read: one in the loader's hands, one that waits for it.
const WAITING: usize = 2;

/// Threads that read a checkpoint.
pub fn readers() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MOST_READERS)
}

/// Gives `work` the pieces of all requests, in order, which are read while it works.
pub(crate) fn read_ahead<T>(
    origin: &Origin,
    readings: &[Reading],
    work: impl FnOnce(&mut Pieces<'_, '_>) -> Result<T>,
) -> Result<T> {
    let readers = readers().min(readings.len());
    let state =
        State { next: 0, done: HashMap::new(), buffers: vec![Vec::new(); readers + WAITING], ended: false };
    let queue = Queue { origin, readings, state: Mutex::new(state), changed: Condvar::new() };
    thread::scope(|scope| {
        let _done = Done(&queue);
        for index in 0..readers {
            let reader = thread::Builder::new().name(format!("reader {index}"));
            reader.spawn_scoped(scope, || queue.read()).map_err(|error| {
                failed(format!("cannot start a thread that reads the checkpoint: {error}"))
            })?;
        }
        work(&mut Pieces { queue: &queue, taken: 0 })
    })
}

/// What readers and the loader share.
struct Queue<'a> {
    origin: &'a Origin,
    readings: &'a [Reading],
    state: Mutex<State<'a>>,
    changed: Condvar,
}

struct State<'a> {
    /// The first request that nobody has begun.
    next: usize,
    /// What was read and not taken, by request.
    done: HashMap<usize, Result<Piece<'a>>>,
    /// Not in use.
    buffers: Vec<Vec<u8>>,
    /// Nothing more is to be read.
    ended: bool,
}

impl<'a> Queue<'a> {
    /// Reads as long as there is something to read and memory for it.
    fn read(&self) {
        let _alive = Alive(self);
        while let Some((index, buffer)) = self.begin() {
            let piece = self.origin.read(&self.readings[index].request, buffer);
            self.lock().done.insert(index, piece);
            self.changed.notify_all();
        }
    }

    /// The next request and a buffer for it.
    fn begin(&self) -> Option<(usize, Vec<u8>)> {
        let mut state = self.lock();
        loop {
            if state.ended || state.next == self.readings.len() {
                return None;
            }
            if let Some(buffer) = state.buffers.pop() {
                state.next += 1;
                return Some((state.next - 1, buffer));
            }
            state = self.wait(state);
        }
    }

    fn take(&self, index: usize) -> Result<Piece<'a>> {
        let mut state = self.lock();
        loop {
            if let Some(piece) = state.done.remove(&index) {
                return piece;
            }
            if state.ended || index >= self.readings.len() {
                return Err(failed("a thread that reads the checkpoint has ended".into()));
            }
            state = self.wait(state);
        }
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'g>(&self, state: MutexGuard<'g, State<'a>>) -> MutexGuard<'g, State<'a>> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pieces of all requests, one after the other.
pub(crate) struct Pieces<'q, 'a> {
    queue: &'q Queue<'a>,
    taken: usize,
}

impl<'a> Pieces<'_, 'a> {
    /// The next piece and the request that it is for; waits for it. It comes back by [`Pieces::give_back`].
    pub(crate) fn take(&mut self) -> Result<(&'a Reading, Piece<'a>)> {
        let piece = self.queue.take(self.taken)?;
        self.taken += 1;
        Ok((&self.queue.readings[self.taken - 1], piece))
    }

    /// Lets the memory of a piece be used for others.
    pub(crate) fn give_back(&mut self, piece: Piece<'a>) {
        let buffer = piece.into_buffer();
        self.queue.lock().buffers.push(buffer);
        self.queue.changed.notify_all();
    }
}

/// Ends a queue when the loader is done with it, for whatever reason.
struct Done<'q, 'a>(&'q Queue<'a>);

impl Drop for Done<'_, '_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Ends a queue when a reader panics, so that nobody waits for what it began.
struct Alive<'q, 'a>(&'q Queue<'a>);

impl Drop for Alive<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end();
        }
    }
}

fn failed(why: String) -> Error {
    Error::Kernel(kernels::Error::Unsupported(why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Preset};
    use crate::weights::request::readings;
    use crate::weights::{Cut, RandomWeights, Share};

    fn with_pieces<T>(work: impl FnOnce(&[Reading], &mut Pieces<'_, '_>) -> Result<T>) -> Result<T> {
        let config = &Config::preset(Preset::Tiny);
        let origin = Origin::Random(RandomWeights::new(config));
        let cut = Cut { config, origin: &origin, units: &engine::units(&config.shape) };
        let list = readings(cut, &Share { layers: 0..2, units: 0..2 }, &|_| false);
        read_ahead(&origin, &list, |pieces| work(&list, pieces))
    }

    #[test]
    fn pieces_come_in_the_order_of_their_requests() {
        let count = with_pieces(|list, pieces| {
            for wanted in list {
                let (reading, piece) = pieces.take()?;
                assert_eq!(reading, wanted);
                pieces.give_back(piece);
            }
            assert!(pieces.take().is_err());
            Ok(list.len())
        });
        assert!(count.unwrap() > 2 * (readers() + WAITING));
    }

    #[test]
    fn readers_end_with_the_work() {
        let error = with_pieces(|_, pieces| {
            pieces.take()?;
            Err::<(), _>(Error::Option("enough".into()))
        });
        assert_eq!(error.unwrap_err().to_string(), "enough");
    }
}
