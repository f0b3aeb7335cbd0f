//! Ranks as threads of one process: a queue of messages for each pair.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::collective::{AbortHandle, Error, Result};
use crate::patience::{Patience, SLEEP};
use crate::transport::Transport;

/// One rank of a group within this process.
#[derive(Debug)]
pub struct LocalTransport {
    rank: usize,
    /// `inboxes[to][from]`
    inboxes: Arc<Vec<Vec<Inbox>>>,
    calls: u64,
    abort: AbortHandle,
}

/// A group of `size` ranks, in order of their numbers; each goes to a thread of its own.
pub fn local_group(size: usize) -> Vec<LocalTransport> {
    let row = || (0..size).map(|_| Inbox::default()).collect();
    let inboxes: Arc<Vec<Vec<Inbox>>> = Arc::new((0..size).map(|_| row()).collect());
    let rank =
        |rank| LocalTransport { rank, inboxes: inboxes.clone(), calls: 0, abort: AbortHandle::default() };
    (0..size).map(rank).collect()
}

impl Transport for LocalTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.inboxes.len()
    }

    fn exchange(&mut self, outgoing: &[(usize, &[u8])], incoming: &mut [(usize, &mut [u8])]) -> Result<()> {
        let call = self.calls;
        self.calls += 1;
        self.abort.begin_call();
        for (to, bytes) in outgoing {
            self.inboxes[*to][self.rank].put(Message { call, payload: bytes.to_vec() });
        }
        for (from, buffer) in incoming {
            let message = self.inboxes[self.rank][*from].take(*from, &self.abort)?;
            self.abort.wait_for(None);
            if message.call != call || message.payload.len() != buffer.len() {
                let what = format!(
                    "{} bytes in call {} where {} in call {call} were expected",
                    message.payload.len(),
                    message.call,
                    buffer.len()
                );
                return Err(Error::Protocol { rank: *from, what });
            }
            buffer.copy_from_slice(&message.payload);
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        match self.inboxes[self.rank].iter().position(|inbox| inbox.lock().closed) {
            Some(rank) => Err(Error::Lost { rank, source: ErrorKind::ConnectionAborted.into() }),
            None => Ok(()),
        }
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl Drop for LocalTransport {
    fn drop(&mut self) {
        for inboxes in self.inboxes.iter() {
            inboxes[self.rank].close();
        }
    }
}

/// What one rank sent to another and it did not take yet.
#[derive(Debug, Default)]
struct Inbox {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Message>,
    /// The sender is gone.
    closed: bool,
}

#[derive(Debug)]
struct Message {
    call: u64,
    payload: Vec<u8>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, message: Message) {
        self.lock().messages.push_back(message);
        self.changed.notify_one();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    fn take(&self, from: usize, abort: &AbortHandle) -> Result<Message> {
        let mut patience = Patience::default();
        loop {
            if abort.is_aborted() {
                return Err(Error::Aborted);
            }
            let mut queue = self.lock();
            if let Some(message) = queue.messages.pop_front() {
                return Ok(message);
            }
            if queue.closed {
                return Err(Error::Lost { rank: from, source: ErrorKind::ConnectionAborted.into() });
            }
            if patience.is_awake() {
                drop(queue);
                std::thread::yield_now();
            } else {
                abort.wait_for(Some(from));
                // Poisoned or not, timed out or not: the next turn looks at the queue.
                drop(self.changed.wait_timeout(queue, SLEEP));
            }
        }
    }
}
