//! Messages through the host's memory: on the CPU there is no other, and devices copy them there and back.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use kernels::HostBuffer;

use super::{Calls, StageLink, nobody_in_front};
use crate::collective::{AbortHandle, Error, Result};
use crate::patience::{Patience, SLEEP};

/// How often a sender looks whether a full queue has room again: whoever is at its end has enough to do.
const NAP: Duration = Duration::from_millis(1);

/// A [`StageLink`] of rows in the host's memory. As many messages as there are stages wait for a slow receiver.
#[derive(Debug)]
pub struct HostLink {
    stage: usize,
    stages: usize,
    /// With the number of the member at its other end, as outlets.
    pub(super) inlet: Option<(usize, Box<dyn Inlet>)>,
    pub(super) outlets: Vec<(usize, Box<dyn Outlet>)>,
    /// Messages so far.
    received: u64,
    sent: u64,
    calls: Calls,
    abort: AbortHandle,
}

impl HostLink {
    /// Without connections yet.
    pub(super) fn new(stage: usize, stages: usize, abort: AbortHandle) -> Self {
        let calls = Calls::new(abort.clone());
        Self { stage, stages, inlet: None, outlets: Vec::new(), received: 0, sent: 0, calls, abort }
    }

    /// See [`StageLink::stage`].
    pub fn stage(&self) -> usize {
        self.stage
    }

    /// See [`StageLink::stages`].
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// See [`StageLink::sends`].
    pub fn sends(&self) -> bool {
        !self.outlets.is_empty()
    }

    /// Whether rows come to this rank this way.
    #[cfg(feature = "cuda")]
    pub(crate) fn receives(&self) -> bool {
        self.inlet.is_some()
    }

    /// The handle that frees this rank's waits.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    /// See [`StageLink::send`].
    ///
    /// # Errors
    /// Likewise.
    pub fn send_rows(&mut self, rows: Vec<f32>) -> Result<()> {
        let message = Message { number: self.sent, rows: Arc::new(rows) };
        self.sent += 1;
        let Self { outlets, calls, stage, .. } = self;
        calls.run(|abort| {
            let send = |(to, outlet): &mut (usize, Box<dyn Outlet>)| {
                abort.wait_for_member(Some(*to));
                outlet.send(message.clone(), abort)
            };
            outlets.iter_mut().try_for_each(send).map_err(|error| error.of_stage(*stage + 1))
        })
    }

    /// See [`StageLink::receive`].
    ///
    /// # Errors
    /// Likewise.
    pub fn receive_rows(&mut self, rows: &mut [f32]) -> Result<()> {
        let number = self.received;
        self.received += 1;
        let Self { inlet, calls, stage, .. } = self;
        calls.run(|abort| {
            let Some((from, inlet)) = inlet else { return Err(nobody_in_front()) };
            abort.wait_for_member(Some(*from));
            inlet.receive(number, rows, abort).map_err(|error| error.of_stage(stage.saturating_sub(1)))
        })
    }
}

impl<B: HostBuffer> StageLink<B> for HostLink {
    fn stage(&self) -> usize {
        self.stage
    }

    fn stages(&self) -> usize {
        self.stages
    }

    fn sends(&self) -> bool {
        self.sends()
    }

    fn send(&mut self, len: usize, x: &B) -> Result<()> {
        let rows = x.as_f32().and_then(|all| all.get(..len)).ok_or_else(|| shape("send", len))?;
        self.send_rows(rows.to_vec())
    }

    fn receive(&mut self, len: usize, x: &mut B) -> Result<()> {
        let rows = x.as_f32_mut().and_then(|all| all.get_mut(..len)).ok_or_else(|| shape("receive", len))?;
        self.receive_rows(rows)
    }
}

fn shape(op: &'static str, len: usize) -> Error {
    Error::Shape { op, detail: format!("{len} numbers of a buffer that is shorter, or not f32") }
}

/// Where rows come from.
pub(super) trait Inlet: Send + fmt::Debug {
    /// Waits for message `number`, which must be as long as `rows`.
    fn receive(&mut self, number: u64, rows: &mut [f32], abort: &AbortHandle) -> Result<()>;
}

/// Where rows go.
pub(super) trait Outlet: Send + fmt::Debug {
    /// Waits for no more than room for the message.
    fn send(&mut self, message: Message, abort: &AbortHandle) -> Result<()>;
}

/// Rows on their way, maybe to several ranks.
#[derive(Debug, Clone)]
pub(super) struct Message {
    /// Counted from 0.
    pub(super) number: u64,
    pub(super) rows: Arc<Vec<f32>>,
}

/// Puts a message into a queue, when there is room; false if nobody is at its other end.
pub(super) fn put(queue: &SyncSender<Message>, mut message: Message, abort: &AbortHandle) -> Result<bool> {
    let mut patience = Patience::default();
    loop {
        if abort.is_aborted() {
            return Err(Error::Aborted);
        }
        message = match queue.try_send(message) {
            Ok(()) => return Ok(true),
            Err(TrySendError::Disconnected(_)) => return Ok(false),
            Err(TrySendError::Full(message)) => message,
        };
        if patience.is_awake() {
            thread::yield_now();
        } else {
            thread::sleep(NAP);
        }
    }
}

/// Takes the next message out of a queue, when there is one; none if nothing more can come.
pub(super) fn take(queue: &Receiver<Message>, abort: &AbortHandle) -> Result<Option<Message>> {
    loop {
        if abort.is_aborted() {
            return Err(Error::Aborted);
        }
        match queue.recv_timeout(SLEEP) {
            Ok(message) => return Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}
