//! What takes the hidden state from one stage of a pipeline to the next.
//!
//! Every rank of a stage holds all of it, so a rank gets it from one of the ranks of the stage before, and stages may be of any widths.
//! Rows travel as f32 in the host's memory: a backend on a device copies them there and back.

mod local;
mod tcp;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use crate::collective::{AbortHandle, Error, Result};
use crate::patience::{Patience, SLEEP};

pub use local::local_pipeline;

/// How often a sender looks whether a full queue has room again: whoever is at its end has enough to do.
const NAP: Duration = Duration::from_millis(1);

/// One rank's connections with the stages in front of its own and behind it. Messages arrive in their order.
#[derive(Debug)]
pub struct StageLink {
    stage: usize,
    stages: usize,
    /// With the number of the member at its other end, as outlets.
    inlet: Option<(usize, Box<dyn Inlet>)>,
    outlets: Vec<(usize, Box<dyn Outlet>)>,
    /// Messages so far.
    received: u64,
    sent: u64,
    abort: AbortHandle,
    /// A call failed: what comes next is not known any more.
    lost: bool,
}

impl StageLink {
    /// Of a pipeline of one stage, which nobody sends to.
    pub fn alone() -> Self {
        Self::new(0, 1, AbortHandle::default())
    }

    /// Without connections yet.
    fn new(stage: usize, stages: usize, abort: AbortHandle) -> Self {
        Self { stage, stages, inlet: None, outlets: Vec::new(), received: 0, sent: 0, abort, lost: false }
    }

    /// This rank's stage.
    pub fn stage(&self) -> usize {
        self.stage
    }

    /// Stages of the pipeline.
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// Whether a rank of the next stage gets its rows from this one. Where that stage is narrower, not all send.
    pub fn sends(&self) -> bool {
        !self.outlets.is_empty()
    }

    /// Sends rows, row-major, to the ranks of the next stage that get them from this one; returns when they are under way. Up to as many
    /// messages as there are stages wait for a slow receiver; more hold this rank up.
    ///
    /// # Errors
    /// [`Error::Aborted`], and in [`Error::Stage`] [`Error::Lost`] for a receiver that is gone, maybe at an earlier message. After an
    /// error every call gives [`Error::Ended`].
    pub fn send(&mut self, rows: Vec<f32>) -> Result<()> {
        let message = Message { number: self.sent, rows: Arc::new(rows) };
        self.sent += 1;
        let next = self.stage + 1;
        self.call(|link| {
            let send = |(to, outlet): &mut (usize, Box<dyn Outlet>)| {
                link.abort.wait_for_member(Some(*to));
                outlet.send(message.clone(), &link.abort)
            };
            link.outlets.iter_mut().try_for_each(send).map_err(|error| error.of_stage(next))
        })
    }

    /// Waits for the next message from the stage before, which must be as long as `rows`.
    ///
    /// # Errors
    /// [`Error::Aborted`], [`Error::Shape`] in the first stage, and in [`Error::Stage`] [`Error::Lost`] where the sender is gone and
    /// [`Error::Protocol`] for a message of another length or order, or a damaged one. After an error every call gives
    /// [`Error::Ended`].
    pub fn receive(&mut self, rows: &mut [f32]) -> Result<()> {
        let number = self.received;
        self.received += 1;
        let before = self.stage.saturating_sub(1);
        self.call(|link| match &mut link.inlet {
            Some((from, inlet)) => {
                link.abort.wait_for_member(Some(*from));
                inlet.receive(number, rows, &link.abort).map_err(|error| error.of_stage(before))
            }
            None => {
                let detail = "there is no stage in front of the first".to_owned();
                Err(Error::Shape { op: "receive", detail })
            }
        })
    }

    /// The handle that frees this rank's waits.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    /// Runs a call, unless an earlier one failed.
    fn call(&mut self, body: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.lost {
            return Err(Error::Ended);
        }
        self.abort.begin_call();
        let result = body(self);
        self.abort.wait_for_member(None);
        self.lost = result.is_err();
        result
    }
}

/// Where rows come from.
trait Inlet: Send + fmt::Debug {
    /// Waits for message `number`, which must be as long as `rows`.
    fn receive(&mut self, number: u64, rows: &mut [f32], abort: &AbortHandle) -> Result<()>;
}

/// Where rows go.
trait Outlet: Send + fmt::Debug {
    /// Waits for no more than room for the message.
    fn send(&mut self, message: Message, abort: &AbortHandle) -> Result<()>;
}

/// Rows on their way, maybe to several ranks.
#[derive(Debug, Clone)]
struct Message {
    /// Counted from 0.
    number: u64,
    rows: Arc<Vec<f32>>,
}

/// Puts a message into a queue, when there is room; false if nobody is at its other end.
fn put(queue: &SyncSender<Message>, mut message: Message, abort: &AbortHandle) -> Result<bool> {
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
fn take(queue: &Receiver<Message>, abort: &AbortHandle) -> Result<Option<Message>> {
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
