//! Watches in etcd, delivered as whole snapshots: read all, then follow the changes; when that breaks, read all again.

use std::time::Duration;

use etcd_client::{GetOptions, KeyValue, WatchOptions};
use tokio::sync::watch::{Receiver, Sender, channel};
use tokio::time::sleep;
use tracing::debug;

use super::super::{Entry, LeaseId, RegistryError, Revision, Snapshot};
use super::EtcdRegistry;

/// Pause before a broken watch begins again.
const PAUSE: Duration = Duration::from_millis(500);

/// Reads everything below `prefix`, and follows it from there on in a task of its own.
pub(super) async fn start(
    registry: EtcdRegistry,
    prefix: String,
) -> Result<Receiver<Snapshot>, RegistryError> {
    let snapshot = read(&registry, &prefix).await?;
    let (sender, receiver) = channel(snapshot);
    tokio::spawn(async move {
        tokio::select! {
            () = sender.closed() => {}
            () = follow(&registry, &prefix, &sender) => {}
        }
    });
    Ok(receiver)
}

/// Everything below `prefix`.
pub(super) async fn read(registry: &EtcdRegistry, prefix: &str) -> Result<Snapshot, RegistryError> {
    let mut client = registry.client.kv_client();
    let options = GetOptions::new().with_prefix();
    let response = registry.contact.bounded(client.get(prefix, Some(options))).await?;
    let revision = Revision(response.header().map_or(0, |header| header.revision()).cast_unsigned());
    let entries = response.kvs().iter().map(|kv| (key(registry, kv), entry(kv))).collect();
    Ok(Snapshot { revision, entries })
}

/// Goes on for ever: what etcd does not answer now it may answer later.
async fn follow(registry: &EtcdRegistry, prefix: &str, sender: &Sender<Snapshot>) {
    loop {
        let reason = match changes(registry, prefix, sender).await {
            Ok(reason) => {
                registry.contact.broken(&reason);
                reason
            }
            Err(error) => error.to_string(),
        };
        debug!(prefix, reason, "a watch broke and begins again");
        sleep(PAUSE).await;
        match read(registry, prefix).await {
            Ok(snapshot) => drop(sender.send_replace(snapshot)),
            Err(error) => debug!(prefix, %error, "cannot read the registry yet"),
        }
    }
}

/// Follows the changes from the last snapshot on; returns how that ended.
async fn changes(
    registry: &EtcdRegistry,
    prefix: &str,
    sender: &Sender<Snapshot>,
) -> Result<String, RegistryError> {
    let next = sender.borrow().revision.0.cast_signed().saturating_add(1);
    let options = WatchOptions::new().with_prefix().with_start_revision(next);
    let mut client = registry.client.watch_client();
    let mut stream = registry.contact.bounded(client.watch(prefix, Some(options))).await?;
    loop {
        let response = match stream.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Ok("it closed a watch".into()),
            Err(error) => return Ok(error.to_string()),
        };
        if response.canceled() {
            return Ok(format!("it cancelled a watch: {}", response.cancel_reason()));
        }
        if response.events().is_empty() {
            continue;
        }
        sender.send_modify(|snapshot| {
            if let Some(header) = response.header() {
                snapshot.revision = Revision(header.revision().cast_unsigned());
            }
            for kv in response.events().iter().filter_map(|event| event.kv()) {
                // A key that was deleted has no version any more.
                if kv.version() == 0 {
                    snapshot.entries.remove(&key(registry, kv));
                } else {
                    snapshot.entries.insert(key(registry, kv), entry(kv));
                }
            }
        });
    }
}

/// A key as the cluster knows it. One that is no text is rubbish, and shown as such.
fn key(registry: &EtcdRegistry, kv: &KeyValue) -> String {
    let key = String::from_utf8_lossy(kv.key());
    key.strip_prefix(&registry.prefix).unwrap_or(&key).to_owned()
}

fn entry(kv: &KeyValue) -> Entry {
    Entry {
        value: kv.value().to_vec(),
        revision: Revision(kv.mod_revision().cast_unsigned()),
        lease: Some(LeaseId(kv.lease())).filter(|lease| lease.0 != 0),
    }
}
