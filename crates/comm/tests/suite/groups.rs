//! Groups for tests: every kind of collective behind one trait.

use std::ops::Range;
use std::thread;
use std::time::Duration;

use comm::{
    AbortHandle, Collective, GroupSpec, Listener, LocalTransport, MeshCollective, Result, TcpTransport,
    Transport,
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

/// A kind of collective.
pub(crate) trait Kind {
    /// What the thread that is to be a rank gets.
    type End: Send;
    /// What that thread has besides the collective.
    type Site;
    type Buffer;
    type Collective: Collective<Self::Buffer>;

    /// Says so where this machine cannot test it.
    fn present() -> bool {
        true
    }
    fn group(size: usize) -> Vec<Self::End>;
    fn abort_handle(end: &Self::End) -> AbortHandle;
    fn join(end: Self::End, ranges: &[Range<usize>]) -> Result<(Self::Site, Self::Collective)>;
    fn buffer(site: &Self::Site, values: &[f32]) -> Self::Buffer;
    fn values(buffer: &Self::Buffer) -> Vec<f32>;
    /// Waits for calls that only began work.
    fn settle(_: &Self::Site) {}
}

/// A kind of transport.
pub(crate) trait Connected: Transport + Send + Sized + 'static {
    fn connect(size: usize) -> Vec<Self>;
}

impl Connected for LocalTransport {
    fn connect(size: usize) -> Vec<Self> {
        comm::local_group(size)
    }
}

impl Connected for TcpTransport {
    fn connect(size: usize) -> Vec<Self> {
        let listeners: Vec<Listener> = (0..size).map(|_| listener()).collect();
        let secret = auth::Secret::random();
        each_rank(listeners.iter().collect(), |rank, listener: &Listener| {
            let spec = spec(rank, &listeners, &secret);
            listener.form(&spec, AbortHandle::default(), LONG).unwrap().0
        })
    }
}

/// Buffers on the host.
impl<T: Connected> Kind for MeshCollective<T> {
    type End = T;
    type Site = ();
    type Buffer = Host;
    type Collective = Self;

    fn group(size: usize) -> Vec<T> {
        T::connect(size)
    }

    fn abort_handle(end: &T) -> AbortHandle {
        end.abort_handle()
    }

    fn join(end: T, ranges: &[Range<usize>]) -> Result<((), Self)> {
        Ok(((), MeshCollective::new(end, ranges.to_vec())?))
    }

    fn buffer((): &(), values: &[f32]) -> Host {
        Host(values.to_vec())
    }

    fn values(buffer: &Host) -> Vec<f32> {
        buffer.0.clone()
    }
}

pub(crate) fn listener() -> Listener {
    Listener::bind("127.0.0.1:0").unwrap()
}

pub(crate) fn spec(rank: usize, listeners: &[Listener], secret: &auth::Secret) -> GroupSpec {
    GroupSpec {
        group: "a".into(),
        epoch: (1, 2),
        stage: 0,
        rank,
        stages: vec![listeners.iter().map(|listener| listener.address().to_string()).collect()],
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
pub(crate) fn one_unit_each<K: Kind>(end: K::End, size: usize) -> Result<(K::Site, K::Collective)> {
    let ranges: Vec<_> = (0..size).map(|rank| rank..rank + 1).collect();
    K::join(end, &ranges)
}
