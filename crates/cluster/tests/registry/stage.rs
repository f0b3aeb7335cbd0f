//! What a test of the suite runs on, whichever registry it is.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use cluster::registry::{
    ClusterName, EtcdOptions, EtcdRegistry, LeaseId, MemoryRegistry, Registry, RegistryError, Snapshot,
};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::etcd::Etcd;

/// Nothing here takes so long, unless it hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// The shortest that etcd grants.
pub(crate) const TTL: Duration = Duration::from_secs(2);

pub(crate) trait Stage {
    /// The registry as a cluster sees it, over a connection of its own.
    async fn registry(&self, cluster: &str) -> Arc<dyn Registry>;
    /// Ends a lease as if its holder had not been heard of in time.
    async fn expire(&self, lease: LeaseId);
}

#[derive(Default)]
pub(crate) struct MemoryStage(OnceLock<MemoryRegistry>);

impl Stage for MemoryStage {
    async fn registry(&self, cluster: &str) -> Arc<dyn Registry> {
        let first = || MemoryRegistry::new(&name("first"));
        Arc::new(self.0.get_or_init(first).seen_by(&name(cluster)))
    }

    async fn expire(&self, lease: LeaseId) {
        self.0.get().expect("there was a lease").expire(lease);
    }
}

pub(crate) struct EtcdStage(pub(crate) Mutex<Etcd>);

impl EtcdStage {
    pub(crate) fn start() -> Option<Self> {
        Etcd::start().map(|etcd| Self(Mutex::new(etcd)))
    }

    pub(crate) fn url(&self) -> String {
        self.0.lock().expect("no panic").url.clone()
    }

    /// etcd's own client.
    pub(crate) async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect([self.url()], None).await.expect("etcd answers")
    }
}

impl Stage for EtcdStage {
    async fn registry(&self, cluster: &str) -> Arc<dyn Registry> {
        connect(&self.url(), cluster).await
    }

    async fn expire(&self, lease: LeaseId) {
        self.client().await.lease_revoke(lease.0).await.expect("there is such a lease");
    }
}

pub(crate) fn name(cluster: &str) -> ClusterName {
    cluster.parse().expect("a name")
}

/// Connects, as often as a busy machine needs.
pub(crate) async fn connect(url: &str, cluster: &str) -> Arc<dyn Registry> {
    connect_with(&EtcdOptions { endpoints: vec![url.into()], ..EtcdOptions::default() }, cluster).await
}

pub(crate) async fn connect_with(options: &EtcdOptions, cluster: &str) -> Arc<dyn Registry> {
    let connected = async {
        loop {
            match EtcdRegistry::connect(options, &name(cluster)).await {
                Ok(registry) => return registry,
                Err(RegistryError::Away(_)) => sleep(Duration::from_millis(100)).await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    Arc::new(timeout(LIMIT, connected).await.expect("etcd answers"))
}

/// Waits until a watched value is as wanted.
pub(crate) async fn until<T: Clone>(values: &mut watch::Receiver<T>, wanted: impl FnMut(&T) -> bool) -> T {
    timeout(LIMIT, values.wait_for(wanted)).await.expect("in time").expect("the watch goes on").clone()
}

/// Keys and values of a snapshot.
pub(crate) fn texts(snapshot: &Snapshot) -> Vec<(&str, &str)> {
    let text = |bytes| std::str::from_utf8(bytes).expect("text");
    snapshot.entries.iter().map(|(key, entry)| (key.as_str(), text(&entry.value))).collect()
}
