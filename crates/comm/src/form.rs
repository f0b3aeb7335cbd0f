//! Forming a group: every rank connects to all ranks below it and accepts all above it.
//!
//! Each connection is made on a thread of its own, so that neither a silent stranger nor a slow peer holds up the
//! others. Whoever does not belong is told so, and does no harm.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use auth::Secret;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::collective::{AbortHandle, Error, Result};
use crate::handshake::{self, Channel, Failure, MAX_NAME, Terms};

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
}

/// The group that is to form.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// Its name, of at most 64 bytes.
    pub group: String,
    /// Its epoch: election term and counter.
    pub epoch: (u64, u64),
    /// This rank.
    pub rank: usize,
    /// `host:port` of every rank, in order.
    pub peers: Vec<String>,
    /// What its members know.
    pub secret: Secret,
}

impl GroupSpec {
    fn check(&self) -> Result<()> {
        let detail = if self.rank >= self.peers.len() {
            format!("rank {} of {} ranks", self.rank, self.peers.len())
        } else if self.group.len() > MAX_NAME {
            format!("the group's name has {} bytes, {MAX_NAME} are allowed", self.group.len())
        } else {
            return Ok(());
        };
        Err(Error::Shape { op: "form", detail })
    }
}

/// Connects with all other ranks; returns the streams by rank, non-blocking, none for this rank.
pub(crate) fn form(
    listener: &Listener,
    spec: &GroupSpec,
    abort: &AbortHandle,
    limit: Duration,
) -> Result<Vec<Option<TcpStream>>> {
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
    Joined(usize, TcpStream),
    /// A rank below cannot be reached: there will be no group.
    Failed(Error),
    /// Somebody who connected does not belong.
    Refused(String),
}

impl Forming<'_> {
    fn run<'s>(&'s self, scope: &'s Scope<'s, '_>, listener: &TcpListener) -> Result<Vec<Option<TcpStream>>> {
        let (outcomes, arrived) = mpsc::channel();
        // The receiver is gone only when nobody wants the outcome any more.
        let start = |attempt: Box<dyn FnOnce() -> Outcome + Send + 's>| {
            let outcomes = outcomes.clone();
            scope.spawn(move || drop(outcomes.send(attempt())))
        };
        for rank in 0..self.spec.rank {
            start(Box::new(move || self.connect(rank)));
        }
        let mut streams: Vec<Option<TcpStream>> = self.spec.peers.iter().map(|_| None).collect();
        let mut handshakes = Vec::new();
        let mut trouble = None;
        loop {
            for outcome in arrived.try_iter() {
                match outcome {
                    // A rank that comes twice did not hear the end of its first handshake.
                    Outcome::Joined(rank, stream) => streams[rank] = Some(stream),
                    Outcome::Failed(error) => return Err(error),
                    Outcome::Refused(why) => {
                        tracing::warn!(group = self.spec.group, why, "refused a connection");
                        trouble = Some(why);
                    }
                }
            }
            let Some(missing) =
                (0..streams.len()).find(|&rank| rank != self.spec.rank && streams[rank].is_none())
            else {
                return Ok(streams);
            };
            self.abort.wait_for(Some(missing));
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
    fn connect(&self, rank: usize) -> Outcome {
        let address = &self.spec.peers[rank];
        let mut trouble = None;
        loop {
            if let Err(error) = self.in_time(rank, trouble.as_deref()) {
                return Outcome::Failed(error);
            }
            match self.dial(rank, address).and_then(ready) {
                Ok(stream) => return Outcome::Joined(rank, stream),
                Err(failure) if failure.may_pass() => trouble = Some(format!("{address}: {failure}")),
                Err(failure) => {
                    return Outcome::Failed(Error::Refused { rank, why: format!("{address}: {failure}") });
                }
            }
            thread::sleep(RETRY_INTERVAL);
        }
    }

    fn dial(&self, rank: usize, address: &str) -> std::result::Result<TcpStream, Failure> {
        let mut failure = io::Error::new(ErrorKind::NotFound, "the name has no address");
        for address in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, DIAL_LIMIT) {
                Ok(stream) => {
                    let spec = self.spec;
                    let terms = Terms {
                        group: &spec.group,
                        epoch: spec.epoch,
                        size: spec.peers.len(),
                        initiator: spec.rank,
                        responder: rank,
                    };
                    let mut channel = self.limited(&stream, self.deadline)?;
                    handshake::initiate(&mut channel, &terms, &spec.secret)?;
                    return Ok(stream);
                }
                Err(error) => failure = error,
            }
        }
        Err(failure.into())
    }

    fn accept(&self, stream: TcpStream, address: SocketAddr) -> Outcome {
        let GroupSpec { group, epoch, rank, peers, secret } = self.spec;
        let deadline = self.deadline.min(Instant::now() + STRANGER_LIMIT);
        let peer = self.limited(&stream, deadline).map_err(Failure::Broken).and_then(|mut channel| {
            handshake::respond(&mut channel, group, *epoch, peers.len(), *rank, secret)
        });
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
    fn in_time(&self, missing: usize, trouble: Option<&str>) -> Result<()> {
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
        Err(Error::Lost { rank: missing, source: io::Error::new(ErrorKind::TimedOut, what) })
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
