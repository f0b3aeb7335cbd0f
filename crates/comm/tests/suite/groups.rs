//! Groups for tests: a buffer on the host, and both kinds of transport behind one trait.

use std::thread;
use std::time::Duration;

use comm::{
    AbortHandle, GroupSpec, Listener, LocalTransport, MeshCollective, Result, TcpTransport, Transport,
};
use kernels::HostBuffer;

/// Far more than any test needs.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Host(pub(crate) Vec<f32>);

impl HostBuffer for Host {
    fn as_f32(&self) -> Option<&[f32]> {
        Some(&self.0)
    }

    fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        Some(&mut self.0)
    }
}

/// A kind of transport.
pub(crate) trait Kind: Transport + Send + Sized + 'static {
    fn group(size: usize) -> Vec<Self>;
}

impl Kind for LocalTransport {
    fn group(size: usize) -> Vec<Self> {
        comm::local_group(size)
    }
}

impl Kind for TcpTransport {
    fn group(size: usize) -> Vec<Self> {
        let listeners: Vec<Listener> = (0..size).map(|_| listener()).collect();
        let secret = auth::Secret::random();
        each_rank(listeners.iter().collect(), |rank, listener: &Listener| {
            let spec = spec(rank, &listeners, &secret);
            TcpTransport::form(listener, &spec, AbortHandle::default(), LONG).unwrap()
        })
    }
}

pub(crate) fn listener() -> Listener {
    Listener::bind("127.0.0.1:0").unwrap()
}

pub(crate) fn spec(rank: usize, listeners: &[Listener], secret: &auth::Secret) -> GroupSpec {
    GroupSpec {
        group: "a".into(),
        epoch: (1, 2),
        rank,
        peers: listeners.iter().map(|listener| listener.address().to_string()).collect(),
        secret: secret.clone(),
    }
}

/// Runs `body` for every rank on a thread of its own; the results in order of ranks.
pub(crate) fn each_rank<T: Send, R: Send>(ranks: Vec<T>, body: impl Fn(usize, T) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> =
            ranks.into_iter().enumerate().map(|(rank, end)| scope.spawn(move || body(rank, end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// One unit for each rank.
pub(crate) fn one_unit_each<T: Transport>(transport: T) -> Result<MeshCollective<T>> {
    let ranges = (0..transport.size()).map(|rank| rank..rank + 1).collect();
    MeshCollective::new(transport, ranges)
}
