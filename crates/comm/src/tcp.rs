//! Ranks as processes, connected by TCP: one connection between any two.

use std::io::ErrorKind;
use std::net::TcpStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::collective::{AbortHandle, Error, Result};
use crate::frame::{Incoming, Outgoing};
use crate::patience::{Patience, SLEEP};
use crate::transport::Transport;

/// One rank of a group of processes; [`Listener::form`](crate::Listener::form) makes it.
#[derive(Debug)]
pub struct TcpTransport {
    rank: usize,
    /// By rank, non-blocking; none for this one.
    streams: Vec<Option<TcpStream>>,
    calls: u64,
    abort: AbortHandle,
}

impl TcpTransport {
    /// `streams` by rank, non-blocking, none for this rank.
    pub(crate) fn new(rank: usize, streams: Vec<Option<TcpStream>>, abort: AbortHandle) -> Self {
        Self { rank, streams, calls: 0, abort }
    }

    /// Of one connection, as rank `rank` of two.
    #[cfg(feature = "cuda")]
    pub(crate) fn pair(rank: usize, stream: TcpStream, abort: AbortHandle) -> Self {
        let streams = if rank == 0 { vec![None, Some(stream)] } else { vec![Some(stream), None] };
        Self::new(rank, streams, abort)
    }

    /// That connection.
    #[cfg(feature = "cuda")]
    pub(crate) fn into_stream(self) -> Option<TcpStream> {
        self.streams.into_iter().flatten().next()
    }

    fn stream(&self, rank: usize) -> Result<&TcpStream> {
        self.streams.get(rank).and_then(Option::as_ref).ok_or_else(|| Error::Shape {
            op: "exchange",
            detail: format!("rank {} has no connection to rank {rank}", self.rank),
        })
    }

    /// Sleeps until an unfinished message can move, or for [`SLEEP`].
    fn sleep(&self, outgoing: &[Outgoing<'_>], incoming: &[Incoming<'_>]) -> Result<()> {
        let mut waits = Vec::with_capacity(outgoing.len() + incoming.len());
        for message in outgoing.iter().filter(|message| !message.done()) {
            waits.push(PollFd::new(self.stream(message.rank)?, PollFlags::OUT));
        }
        for message in incoming.iter().filter(|message| !message.done()) {
            waits.push(PollFd::new(self.stream(message.rank)?, PollFlags::IN));
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: SLEEP.subsec_nanos().into() };
        // A poll that fails is only an early look at the streams, which tell what is wrong.
        let _ = poll(&mut waits, Some(&limit));
        Ok(())
    }
}

impl Transport for TcpTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.streams.len()
    }

    fn exchange(&mut self, outgoing: &[(usize, &[u8])], incoming: &mut [(usize, &mut [u8])]) -> Result<()> {
        let call = self.calls;
        self.calls += 1;
        self.abort.begin_call();
        let mut outgoing: Vec<_> =
            outgoing.iter().map(|(to, bytes)| Outgoing::new(*to, call, bytes)).collect();
        let mut incoming: Vec<_> =
            incoming.iter_mut().map(|(from, buffer)| Incoming::new(*from, call, buffer)).collect();
        let mut patience = Patience::default();
        loop {
            if self.abort.is_aborted() {
                return Err(Error::Aborted);
            }
            let mut moved = false;
            for message in outgoing.iter_mut().filter(|message| !message.done()) {
                moved |= message.advance(self.stream(message.rank)?)?;
            }
            for message in incoming.iter_mut().filter(|message| !message.done()) {
                moved |= message.advance(self.stream(message.rank)?)?;
            }
            if outgoing.iter().all(Outgoing::done) && incoming.iter().all(Incoming::done) {
                self.abort.wait_for(None);
                return Ok(());
            }
            if moved {
                patience.renew();
                self.abort.wait_for(None);
            } else if patience.is_awake() {
                std::thread::yield_now();
            } else {
                let sender = incoming.iter().find(|message| !message.done()).map(|message| message.rank);
                let receiver = outgoing.iter().find(|message| !message.done()).map(|message| message.rank);
                self.abort.wait_for(sender.or(receiver));
                self.sleep(&outgoing, &incoming)?;
            }
        }
    }

    fn check(&self) -> Result<()> {
        for (rank, stream) in self.streams.iter().enumerate() {
            let Some(stream) = stream else { continue };
            let source = match stream.peek(&mut [0]) {
                Ok(0) => ErrorKind::ConnectionAborted.into(),
                Err(error) if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    error
                }
                _ => continue,
            };
            return Err(Error::Lost { rank, source });
        }
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}
