//! Stages as processes: a connection for each rank that receives, at whose sending end a thread writes, so that the sender can go on.

use std::net::TcpStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::host::{Inlet, Message, Outlet, put, take};
use crate::collective::{AbortHandle, Error, Result};
use crate::frame::{Incoming, Outgoing};
use crate::patience::{Patience, SLEEP};

/// From a rank of the stage before.
#[derive(Debug)]
pub(super) struct TcpInlet {
    pub(super) rank: usize,
    pub(super) stream: TcpStream,
}

/// To a rank of the next stage.
#[derive(Debug)]
pub(super) struct TcpOutlet {
    queue: SyncSender<Message>,
    /// Ends by abort or a broken connection, or, when this is dropped, after what is in the queue.
    writer: Option<JoinHandle<Result<()>>>,
}

impl Inlet for TcpInlet {
    fn receive(&mut self, number: u64, rows: &mut [f32], abort: &AbortHandle) -> Result<()> {
        let mut message = Incoming::new(self.rank, number, bytemuck::cast_slice_mut(rows));
        until_done(&self.stream, PollFlags::IN, abort, |stream| {
            let moved = message.advance(stream)?;
            Ok((moved, message.done()))
        })
    }
}

impl TcpOutlet {
    /// At most `bound` messages wait for the one that is being written.
    pub(super) fn start(rank: usize, stream: TcpStream, bound: usize, abort: AbortHandle) -> Result<Self> {
        let (queue, inbox) = sync_channel(bound);
        let writer = thread::Builder::new()
            .name("stage link".into())
            .spawn(move || write(rank, &stream, &inbox, &abort))
            .map_err(|source| Error::Lost { rank, source })?;
        Ok(Self { queue, writer: Some(writer) })
    }
}

impl Outlet for TcpOutlet {
    fn send(&mut self, message: Message, abort: &AbortHandle) -> Result<()> {
        if put(&self.queue, message, abort)? {
            return Ok(());
        }
        // The writer ended before its queue did: it has something to say.
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => Err(error),
            _ => Err(Error::Ended),
        }
    }
}

/// Writes messages as they come.
fn write(rank: usize, stream: &TcpStream, queue: &Receiver<Message>, abort: &AbortHandle) -> Result<()> {
    while let Some(Message { number, rows }) = take(queue, abort)? {
        let mut message = Outgoing::new(rank, number, bytemuck::cast_slice(&rows));
        until_done(stream, PollFlags::OUT, abort, |stream| {
            let moved = message.advance(stream)?;
            Ok((moved, message.done()))
        })?;
    }
    Ok(())
}

/// Moves a message on until it is done; `advance` tells whether anything moved, and whether that is all.
fn until_done(
    stream: &TcpStream,
    direction: PollFlags,
    abort: &AbortHandle,
    mut advance: impl FnMut(&TcpStream) -> Result<(bool, bool)>,
) -> Result<()> {
    let mut patience = Patience::default();
    loop {
        if abort.is_aborted() {
            return Err(Error::Aborted);
        }
        match advance(stream)? {
            (_, true) => return Ok(()),
            (true, false) => patience.renew(),
            (false, false) if patience.is_awake() => thread::yield_now(),
            (false, false) => {
                let limit = Timespec { tv_sec: 0, tv_nsec: SLEEP.subsec_nanos().into() };
                // A poll that fails is only an early look at the stream, which tells what is wrong.
                let _ = poll(&mut [PollFd::new(stream, direction)], Some(&limit));
            }
        }
    }
}
