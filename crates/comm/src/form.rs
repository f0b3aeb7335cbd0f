//! Forming a group: every rank connects to the ranks below it that it has to do with, and accepts those above it.
//!
//! Each connection is made on a thread of its own, so that neither a silent stranger nor a slow peer holds up the
//! others. Whoever does not belong is told so, and does no harm.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::collective::{AbortHandle, Error, Result};
use crate::group::{GroupSpec, Member};
use crate::handshake::{self, Channel, Failure};
use crate::link::Neighbours;
use crate::tcp::TcpTransport;

/// Whoever connects and takes longer than this to say who it is, is not of the group.
const STRANGER_LIMIT: Duration = Duration::from_secs(2);
/// Connections that may be in a handshake at once; more are dropped, and ranks try again.
const MAX_HANDSHAKES: usize = 64;
/// How long a connection may take to be made before it is tried again.
const DIAL_LIMIT: Duration = Duration::from_millis(250);
const RETRY_INTERVAL: Duration = Duration::from_millis(25);
/// How often a wait looks whether it is still wanted.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// Where this worker's collectives are reached; serves one epoch after another.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Listens on `address`; port 0 takes a free one.
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connects with the other ranks of this rank's stage, and with the neighbouring stages where this one sends or receives. All ranks
    /// of `spec` must call this within `limit`. Blocks; `abort` frees it, and later every `exchange`, `send` and `receive`.
    ///
    /// # Errors
    /// [`Error::Refused`] as soon as a rank below turns out not to be of this group, or the other way round, and [`Error::Lost`]
    /// when a rank is still missing after `limit`; both in [`Error::Stage`] where it is of another stage. Peers in an older epoch
    /// are waited for.
    pub fn form(
        &self,
        spec: &GroupSpec,
        abort: AbortHandle,
        limit: Duration,
    ) -> Result<(TcpTransport, Neighbours)> {
        connected(spec, form(self, spec, &abort, limit)?, abort)
    }
}

/// A rank's ends of its streams.
pub(crate) fn connected(
    spec: &GroupSpec,
    mut streams: BTreeMap<Member, TcpStream>,
    abort: AbortHandle,
) -> Result<(TcpTransport, Neighbours)> {
    let ranks = 0..spec.width(spec.stage);
    let own = ranks.map(|rank| streams.remove(&Member { stage: spec.stage, rank })).collect();
    let neighbours = Neighbours::new(spec, streams, abort.clone())?;
    Ok((TcpTransport::new(spec.rank, own, abort.among(spec.number(spec.stage, 0))), neighbours))
}

/// The streams to all ranks that this one has to do with, non-blocking.
pub(crate) fn form(
    listener: &Listener,
    spec: &GroupSpec,
    abort: &AbortHandle,
    limit: Duration,
) -> Result<BTreeMap<Member, TcpStream>> {
    spec.check()?;
    let forming = Forming { spec, abort, deadline: Instant::now() + limit, over: AtomicBool::new(false) };
    thread::scope(|scope| {
        let result = forming.run(scope, &listener.listener);
        abort.wait_for(None);
        forming.over.store(true, Ordering::Relaxed);
        result
    })
}

struct Forming<'a> {
    spec: &'a GroupSpec,
    abort: &'a AbortHandle,
    deadline: Instant,
    /// Ends the handshakes that are still going on when the group stands or cannot stand any more.
    over: AtomicBool,
}

/// How an attempt to connect ended.
enum Outcome {
    Joined(Member, TcpStream),
    /// A rank below cannot be reached: there will be no group.
    Failed(Error),
    /// Somebody who connected does not belong.
    Refused(String),
}

impl Forming<'_> {
    fn run<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        listener: &TcpListener,
    ) -> Result<BTreeMap<Member, TcpStream>> {
        let (outcomes, arrived) = mpsc::channel();
        // The receiver is gone only when nobody wants the outcome any more.
        let start = |attempt: Box<dyn FnOnce() -> Outcome + Send + 's>| {
            let outcomes = outcomes.clone();
            scope.spawn(move || drop(outcomes.send(attempt())))
        };
        let (below, above) = (self.spec.below(), self.spec.above());
        for &member in &below {
            start(Box::new(move || self.connect(member)));
        }
        let mut streams = BTreeMap::new();
        let mut handshakes = Vec::new();
        let mut trouble = None;
        loop {
            for outcome in arrived.try_iter() {
                match outcome {
                    // A rank that comes twice did not hear the end of its first handshake.
                    Outcome::Joined(member, stream) => drop(streams.insert(member, stream)),
                    Outcome::Failed(error) => return Err(error),
                    Outcome::Refused(why) => {
                        tracing::warn!(group = self.spec.group, why, "refused a connection");
                        trouble = Some(why);
                    }
                }
            }
            let mut peers = below.iter().chain(&above);
            let Some(&missing) = peers.find(|member| !streams.contains_key(member)) else {
                return Ok(streams);
            };
            self.abort.wait_for_member(Some(self.spec.number(missing.stage, missing.rank)));
            self.in_time(missing, trouble.as_deref())?;
            handshakes.retain(|handshake: &ScopedJoinHandle<'_, ()>| !handshake.is_finished());
            match listener.accept() {
                Ok((stream, address)) if handshakes.len() < MAX_HANDSHAKES => {
                    handshakes.push(start(Box::new(move || self.accept(stream, address))));
                }
                Ok((_, address)) => tracing::warn!(%address, "dropped a connection: too many at once"),
                // Nobody there, or a passing trouble such as a connection that was aborted meanwhile.
                Err(_) => wait(listener),
            }
        }
    }

    /// Connects to a rank below. That rank may not have been told of this epoch yet, so it is tried again.
    fn connect(&self, member: Member) -> Outcome {
        let address = self.spec.address(member);
        let mut trouble = None;
        loop {
            if let Err(error) = self.in_time(member, trouble.as_deref()) {
                return Outcome::Failed(error);
            }
            match self.dial(member, address).and_then(ready) {
                Ok(stream) => return Outcome::Joined(member, stream),
                Err(failure) if failure.may_pass() => trouble = Some(format!("{address}: {failure}")),
                Err(failure) => {
                    let error = Error::Refused { rank: member.rank, why: format!("{address}: {failure}") };
                    return Outcome::Failed(self.spec.of(member, error));
                }
            }
            thread::sleep(RETRY_INTERVAL);
        }
    }

    fn dial(&self, member: Member, address: &str) -> std::result::Result<TcpStream, Failure> {
        let mut failure = io::Error::new(ErrorKind::NotFound, "the name has no address");
        for address in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, DIAL_LIMIT) {
                Ok(stream) => {
                    let mut channel = self.limited(&stream, self.deadline)?;
                    handshake::initiate(&mut channel, self.spec, member)?;
                    return Ok(stream);
                }
                Err(error) => failure = error,
            }
        }
        Err(failure.into())
    }

    fn accept(&self, stream: TcpStream, address: SocketAddr) -> Outcome {
        let deadline = self.deadline.min(Instant::now() + STRANGER_LIMIT);
        let channel = self.limited(&stream, deadline).map_err(Failure::Broken);
        let peer = channel.and_then(|mut channel| handshake::respond(&mut channel, self.spec));
        match peer.and_then(|peer| Ok((peer, ready(stream)?))) {
            Ok((peer, stream)) => Outcome::Joined(peer, stream),
            Err(failure) => Outcome::Refused(format!("{address}: {failure}")),
        }
    }

    fn limited<'s>(&'s self, stream: &'s TcpStream, deadline: Instant) -> io::Result<Limited<'s>> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CHECK_INTERVAL))?;
        stream.set_write_timeout(Some(DIAL_LIMIT))?;
        Ok(Limited { stream, forming: self, deadline })
    }

    fn wanted(&self) -> bool {
        !self.over.load(Ordering::Relaxed) && !self.abort.is_aborted()
    }

    /// Whether there is still time; `trouble` is what the last attempt ran into.
    fn in_time(&self, missing: Member, trouble: Option<&str>) -> Result<()> {
        if !self.wanted() {
            return Err(Error::Aborted);
        }
        if Instant::now() < self.deadline {
            return Ok(());
        }
        let mut what = "not connected when the time to form the group was over".to_owned();
        if let Some(trouble) = trouble {
            what += &format!("; last trouble with {trouble}");
        }
        let source = io::Error::new(ErrorKind::TimedOut, what);
        Err(self.spec.of(missing, Error::Lost { rank: missing.rank, source }))
    }
}

/// A stream whose waits end when the time is over or the group is not wanted any more.
struct Limited<'a> {
    stream: &'a TcpStream,
    forming: &'a Forming<'a>,
    deadline: Instant,
}

impl Channel for Limited<'_> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    fn receive(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if !self.forming.wanted() || Instant::now() >= self.deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            match self.stream.read(bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => bytes = &mut bytes[read..],
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn ready(stream: TcpStream) -> std::result::Result<TcpStream, Failure> {
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn wait(listener: &TcpListener) {
    let interval = Timespec { tv_sec: 0, tv_nsec: CHECK_INTERVAL.subsec_nanos().into() };
    // However it ends, the caller looks again.
    let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&interval));
}
