//! The side that answers probes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use auth::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::{CHUNK, LARGEST_BLOCK, Request, clock, pour, respond, swallow};

/// Whoever connects and takes longer than this to prove itself is a stranger.
const STRANGER_LIMIT: Duration = Duration::from_secs(2);
/// No probe takes so long.
const PROBE_LIMIT: Duration = Duration::from_secs(10);
/// Probes at once; more wait until they are accepted.
const MAX_PROBES: usize = 64;
/// After a connection could not be accepted, most likely for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// A port on which probes are answered, until this is dropped.
#[derive(Debug)]
pub(crate) struct Answering {
    address: SocketAddr,
    _task: JoinSet<()>,
}

impl Answering {
    /// Begins; port 0 takes a free one.
    pub(crate) async fn bind(address: SocketAddr, secret: Secret) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let mut task = JoinSet::new();
        task.spawn(accept(listener, secret));
        Ok(Self { address, _task: task })
    }

    /// The port.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }
}

async fn accept(listener: TcpListener, secret: Secret) {
    let mut probes = JoinSet::new();
    loop {
        while probes.try_join_next().is_some() {}
        if probes.len() >= MAX_PROBES {
            probes.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, from)) => {
                let secret = secret.clone();
                probes.spawn(async move {
                    match timeout(PROBE_LIMIT, answer(stream, &secret)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => debug!(%from, %error, "a probe ended"),
                        Err(_) => debug!(%from, "a probe took too long"),
                    }
                });
            }
            Err(error) => {
                debug!(%error, "cannot accept a probe");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, secret: &Secret) -> io::Result<()> {
    stream.set_nodelay(true)?;
    timeout(STRANGER_LIMIT, respond(&mut stream, secret)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let mut chunk = Vec::new();
    loop {
        let mut request = [0; 9];
        match stream.read_exact(&mut request).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        let arrived = clock();
        let [kind, bytes @ ..] = request;
        let bytes = u64::from_le_bytes(bytes);
        let Some(request) = Request::of(kind).filter(|_| bytes <= LARGEST_BLOCK) else {
            return Err(io::Error::other("it asks for what no worker asks for"));
        };
        if request != Request::Echo {
            chunk.resize(CHUNK, 0);
        }
        match request {
            Request::Echo => {
                let mut times = [0; 16];
                times[..8].copy_from_slice(&arrived.to_le_bytes());
                times[8..].copy_from_slice(&clock().to_le_bytes());
                stream.write_all(&times).await?;
            }
            Request::Take => {
                swallow(&mut stream, bytes, &mut chunk).await?;
                stream.write_all(&[0]).await?;
            }
            Request::Give => pour(&mut stream, bytes, &chunk).await?,
        }
    }
}
