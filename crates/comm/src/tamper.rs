//! Wires that fail on purpose, for tests: beyond each of a rank's connections stands a relay, which can lose or damage what the rank
//! sends, or end the connection. Ranks that are asked for no fault have none ([`Listener::form`]).

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::collective::{AbortHandle, Error, Result};
use crate::form::{Listener, connected, form};
use crate::frame::{HEADER_BYTES, message_bytes};
use crate::group::GroupSpec;
use crate::link::Neighbours;
use crate::tcp::TcpTransport;

/// What may happen to a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireFault {
    /// All connections are shut down.
    Cut,
    /// The next message is lost, and with it all that would come after it on that connection: it stands still.
    Drop,
    /// A bit of the next message is flipped.
    Corrupt,
}

/// A rank's wires, those of one epoch after the other. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Wires(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// What happens to the next message.
    next: Option<WireFault>,
    /// The connections of the last epoch.
    streams: Vec<TcpStream>,
}

impl Wires {
    /// Lets a fault happen.
    pub fn strike(&self, fault: WireFault) {
        let mut state = self.state();
        match fault {
            WireFault::Cut => state.streams.iter().for_each(end),
            WireFault::Drop | WireFault::Corrupt => state.next = Some(fault),
        }
    }

    /// Puts a relay before a connection; returns what is on this side of it.
    fn relay(&self, outside: TcpStream) -> io::Result<TcpStream> {
        let (near, inside) = pair()?;
        // The relay's threads may wait, whatever the handshake had asked for.
        outside.set_nonblocking(false)?;
        outside.set_read_timeout(None)?;
        outside.set_write_timeout(None)?;
        let (wires, from, to) = (self.clone(), inside.try_clone()?, outside.try_clone()?);
        start(move || wires.send(&from, &to))?;
        let (from, to) = (outside.try_clone()?, inside);
        start(move || {
            let _ = io::copy(&mut &from, &mut &to);
            end(&from);
            end(&to);
        })?;
        self.state().streams.push(outside);
        near.set_nonblocking(true)?;
        Ok(near)
    }

    /// Passes on what a rank sends, message after message, until either end is gone.
    fn send(&self, mut from: &TcpStream, mut to: &TcpStream) {
        let (mut frame, mut stands_still) = (Vec::new(), false);
        while receive(&mut from, &mut frame).is_ok() {
            match self.state().next.take() {
                Some(WireFault::Drop) => stands_still = true,
                Some(WireFault::Corrupt) => flip(&mut frame),
                Some(WireFault::Cut) | None => {}
            }
            if !stands_still && to.write_all(&frame).is_err() {
                break;
            }
        }
        end(from);
        end(to);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listener {
    /// As [`Listener::form`], over wires that may fail.
    pub fn form_over(
        &self,
        wires: &Wires,
        spec: &GroupSpec,
        abort: AbortHandle,
        limit: Duration,
    ) -> Result<(TcpTransport, Neighbours)> {
        wires.state().streams.clear();
        let relayed = form(self, spec, &abort, limit)?.into_iter().map(|(member, stream)| {
            let lost = |source| spec.of(member, Error::Lost { rank: member.rank, source });
            Ok((member, wires.relay(stream).map_err(lost)?))
        });
        connected(spec, relayed.collect::<Result<_>>()?, abort)
    }
}

/// Both ends of a connection within this process.
fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    loop {
        let (far, address) = listener.accept()?;
        if address == near.local_addr()? {
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            return Ok((near, far));
        }
    }
}

fn start(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("relay".into()).spawn(work).map(drop)
}

/// Reads a whole message.
fn receive(from: &mut impl Read, frame: &mut Vec<u8>) -> io::Result<()> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header)?;
    frame.clear();
    frame.extend_from_slice(&header);
    frame.resize(message_bytes(&header), 0);
    from.read_exact(&mut frame[HEADER_BYTES..])
}

/// Of the payload, or of the checksum where there is none.
fn flip(frame: &mut [u8]) {
    if let Some(last) = frame.last_mut() {
        *last ^= 1;
    }
}

/// However it ends, nothing passes any more.
fn end(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}
