//! Leases in etcd: granted, and kept by a task that only etcd's own word makes give up.

use std::time::Duration;

use tokio::time::sleep;
use tracing::debug;

use super::super::{Lease, LeaseId, RegistryError};
use super::EtcdRegistry;

/// A lease is kept so many times while it lasts: one answer that is lost does not end it.
const BEATS: u32 = 3;

/// A new lease, kept until it is dropped.
pub(super) async fn grant(registry: EtcdRegistry, ttl: Duration) -> Result<Lease, RegistryError> {
    let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
    let mut client = registry.client.lease_client();
    let granted = registry.contact.bounded(client.grant(seconds, None)).await?;
    let id = LeaseId(granted.id());
    Ok(Lease::kept_by(id, |lost, stop| async move {
        tokio::select! {
            () = keep(&registry, id, ttl / BEATS) => lost.cancel(),
            () = stop.cancelled() => {
                if let Err(error) = registry.contact.bounded(client.revoke(id.0)).await {
                    debug!(%error, "a lease was not taken back, and ends by itself");
                }
            }
        }
    }))
}

/// Keeps a lease until etcd says that it has ended.
async fn keep(registry: &EtcdRegistry, id: LeaseId, interval: Duration) {
    let mut client = registry.client.lease_client();
    loop {
        sleep(interval).await;
        match registry.contact.bounded(client.keep_alive(id.0)).await {
            Err(RegistryError::LeaseLost) => return,
            Err(error) => debug!(%error, "a lease was not kept, and may end"),
            Ok(_) => {}
        }
    }
}
