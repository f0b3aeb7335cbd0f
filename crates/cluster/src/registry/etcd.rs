//! A registry in etcd (v3), for clusters with several coordinators.
//!
//! Every call is bounded in time, and what it says of etcd's health is kept ([`contact`]). Leases are kept and watches resumed by
//! tasks that try again for as long as etcd is away ([`lease`], [`watch`]).

mod contact;
mod lease;
mod watch;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Identity, PutOptions, TlsOptions, Txn, TxnOp,
};
use tokio::sync::watch::Receiver;

use super::{Change, ClusterName, Health, Lease, Registry, RegistryError, Revision, Snapshot, Transaction};
use contact::Contact;

/// HTTP/2 pings. etcd hangs up on who pings more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Where etcd is, and how to get in.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// `http://host:port` or `https://host:port` of its members.
    pub endpoints: Vec<String>,
    /// File with the certificate (PEM) of the authority that etcd's own are checked against. `https` needs it.
    pub ca: Option<PathBuf>,
    /// Files with this client's certificate and its key (PEM), where etcd asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name and password.
    pub user: Option<(String, String)>,
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoints, ca, identity, user } = self;
        f.debug_struct("EtcdOptions")
            .field("endpoints", endpoints)
            .field("ca", ca)
            .field("identity", identity)
            .field("user", &user.as_ref().map(|(name, _)| name))
            .finish()
    }
}

/// Entries of one cluster in etcd, below `/phalanx/CLUSTER/`. Clones share the connection.
#[derive(Clone)]
pub struct EtcdRegistry {
    client: Client,
    contact: Arc<Contact>,
    prefix: String,
}

impl EtcdRegistry {
    /// Connects, and makes sure that etcd answers and lets us read the cluster's entries.
    pub async fn connect(options: &EtcdOptions, cluster: &ClusterName) -> Result<Self, RegistryError> {
        let contact = Arc::new(Contact::new(&options.endpoints));
        let connect = Client::connect(&options.endpoints, Some(connect_options(options)?));
        let client = contact.bounded(connect).await?;
        let registry = Self { client, contact, prefix: cluster.prefix() };
        watch::read(&registry, &registry.prefix).await?;
        Ok(registry)
    }
}

#[tonic::async_trait]
impl Registry for EtcdRegistry {
    async fn watch(&self, prefix: &str) -> Result<Receiver<Snapshot>, RegistryError> {
        watch::start(self.clone(), format!("{}{prefix}", self.prefix)).await
    }

    async fn transact(&self, transaction: Transaction) -> Result<Option<Revision>, RegistryError> {
        let key = |name: &str| format!("{}{name}", self.prefix);
        let unchanged = transaction.unchanged.iter().map(|(name, revision)| {
            Compare::mod_revision(key(name), CompareOp::Equal, revision.0.cast_signed())
        });
        let changes = transaction.changes.into_iter().map(|(name, change)| match change {
            Change::Put(value, lease) => {
                let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
                TxnOp::put(key(&name), value, options)
            }
            Change::Delete => TxnOp::delete(key(&name), None),
        });
        let txn = Txn::new().when(unchanged.collect::<Vec<_>>()).and_then(changes.collect::<Vec<_>>());
        let response = self.contact.bounded(self.client.kv_client().txn(txn)).await?;
        let revision = response.header().map_or(0, |header| header.revision());
        Ok(response.succeeded().then_some(Revision(revision.cast_unsigned())))
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, RegistryError> {
        lease::grant(self.clone(), ttl).await
    }

    fn health(&self) -> Receiver<Health> {
        self.contact.health()
    }
}

impl fmt::Debug for EtcdRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdRegistry")
            .field("etcd", &self.contact.name())
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

fn connect_options(options: &EtcdOptions) -> Result<ConnectOptions, RegistryError> {
    let mut connect = ConnectOptions::new()
        .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
        .with_keep_alive_while_idle(true)
        .with_connect_timeout(contact::LIMIT)
        .with_require_leader(true);
    if let Some((name, password)) = &options.user {
        connect = connect.with_user(name, password).with_auto_token_refresh(true);
    }
    if let Some(tls) = tls(options)? {
        connect = connect.with_tls(tls);
    }
    Ok(connect)
}

/// Checks that endpoints and files fit together.
fn tls(options: &EtcdOptions) -> Result<Option<TlsOptions>, RegistryError> {
    let wrong = |reason: String| Err(RegistryError::Options(reason));
    let EtcdOptions { endpoints, ca, identity, .. } = options;
    if endpoints.is_empty() {
        return wrong("there is no etcd endpoint: give --etcd URL[,URL]".into());
    }
    if let Some(odd) = endpoints.iter().find(|url| !is_url(url)) {
        return wrong(format!("--etcd: '{odd}' is not a URL such as http://localhost:2379"));
    }
    let encrypted = endpoints.iter().filter(|url| url.starts_with("https://")).count();
    if encrypted == 0 {
        return match (ca, identity) {
            (None, None) => Ok(None),
            _ => wrong("--etcd-ca and --etcd-cert are for https: give --etcd https://…".into()),
        };
    }
    if encrypted < endpoints.len() {
        return wrong("--etcd: either all URLs are https or none is".into());
    }
    let Some(ca) = ca else { return wrong("--etcd with https needs --etcd-ca FILE".into()) };
    let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(pem("--etcd-ca", ca)?));
    if let Some((certificate, key)) = identity {
        tls = tls.identity(Identity::from_pem(pem("--etcd-cert", certificate)?, pem("--etcd-key", key)?));
    }
    Ok(Some(tls))
}

/// A scheme, a host, a port, and nothing behind them.
fn is_url(url: &str) -> bool {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let authority = rest.map(|rest| rest.strip_suffix('/').unwrap_or(rest));
    let parsed =
        authority.and_then(|authority| authority.parse::<tonic::codegen::http::uri::Authority>().ok());
    parsed.is_some_and(|authority| authority.port_u16().is_some())
}

fn pem(flag: &str, path: &Path) -> Result<Vec<u8>, RegistryError> {
    let shown = path.display();
    let text = std::fs::read(path)
        .map_err(|error| RegistryError::Options(format!("cannot read {flag} {shown}: {error}")))?;
    let armoured = text.windows(11).any(|window| window == b"-----BEGIN ");
    armoured
        .then_some(text)
        .ok_or_else(|| RegistryError::Options(format!("{flag} {shown} is not a PEM file")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(endpoints: &[&str]) -> EtcdOptions {
        EtcdOptions {
            endpoints: endpoints.iter().map(ToString::to_string).collect(),
            ..EtcdOptions::default()
        }
    }

    #[test]
    fn what_does_not_fit_together_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        let with_ca = |url: &str, ca: PathBuf| EtcdOptions { ca: Some(ca), ..options(&[url]) };
        let cases = [
            (options(&[]), "give --etcd URL[,URL]"),
            (options(&["localhost:2379"]), "'localhost:2379' is not a URL"),
            (options(&["http://localhost"]), "'http://localhost' is not a URL"),
            (options(&["http://localhost:2379/a"]), "'http://localhost:2379/a' is not a URL"),
            (options(&["http://a:1", "https://a:2"]), "either all URLs are https or none is"),
            (options(&["https://a:1"]), "needs --etcd-ca FILE"),
            (with_ca("http://a:1", path.clone()), "are for https"),
            (with_ca("https://a:1", "/nowhere".into()), "cannot read --etcd-ca /nowhere"),
            (with_ca("https://a:1", path), "is not a PEM file"),
        ];
        for (options, expected) in cases {
            let error = tls(&options).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
        assert!(tls(&options(&["http://[::1]:2379", "http://b:1/"])).unwrap().is_none());
    }

    #[test]
    fn passwords_are_not_shown() {
        let options = EtcdOptions { user: Some(("root".into(), "hunter2".into())), ..options(&[]) };
        let shown = format!("{options:?}");
        assert!(shown.contains("root") && !shown.contains("hunter2"), "{shown}");
    }
}
