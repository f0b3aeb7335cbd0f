//! What can be told without measuring.

use std::fs;
use std::net::{IpAddr, ToSocketAddrs};
use std::time::Duration;

use cluster::doctor::{Facts, Library};
use tokio::time::timeout;

use super::interface::interface_of;
use crate::WorkerConfig;

/// A name that is not resolved by then is as good as unknown.
const RESOLVE_LIMIT: Duration = Duration::from_secs(2);

/// Gathers what there is; what cannot be found out is left empty.
pub(super) async fn gather(config: &WorkerConfig, libraries: Vec<Library>) -> Facts {
    let host = config.advertised_host.clone();
    let listen = config.listen.ip();
    let interface = tokio::task::spawn_blocking(move || interface_of(&addresses(&host, listen)));
    let system = rustix::system::uname();
    Facts {
        program: env!("CARGO_PKG_VERSION").into(),
        machine: system.nodename().to_string_lossy().into_owned(),
        boot: read("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        kernel: system.release().to_string_lossy().into_owned(),
        libraries,
        interface: timeout(RESOLVE_LIMIT, interface).await.ok().and_then(Result::ok).flatten(),
    }
}

/// Addresses under which this worker is reached: those of the name that it gives others, then that on which it listens.
fn addresses(host: &str, listen: IpAddr) -> Vec<IpAddr> {
    let resolved = (host, 0).to_socket_addrs().into_iter().flatten().map(|address| address.ip());
    resolved.chain((!listen.is_unspecified()).then_some(listen)).collect()
}

/// A line of one of the operating system's files.
pub(super) fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}
