//! Which registry a cluster shares, as the command line gets it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use cluster::registry::{ClusterName, EtcdOptions, EtcdRegistry, Registry};

/// The environment variable that holds etcd's password; an argument would show in the list of processes.
const PASSWORD_VARIABLE: &str = "PHALANX_ETCD_PASSWORD";

/// Where etcd is, and how to get in.
#[derive(Debug, Args)]
pub(crate) struct RegistryArgs {
    /// etcd, which elects one of several coordinators and tells workers where it is
    #[arg(long, value_name = "URL[,URL]", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Name of the cluster in etcd; clusters of other names are apart from it
    #[arg(long, value_name = "NAME", default_value = "default", requires = "etcd")]
    cluster: ClusterName,
    /// File with the certificate (PEM) of the authority that etcd's own is checked against
    #[arg(long, value_name = "FILE", requires = "etcd")]
    etcd_ca: Option<PathBuf>,
    /// File with this process's certificate (PEM), where etcd asks for one
    #[arg(long, value_name = "FILE", requires = "etcd", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// File with the key (PEM) of --etcd-cert
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// etcd's user; the password is in the environment variable PHALANX_ETCD_PASSWORD
    #[arg(long, value_name = "NAME", requires = "etcd")]
    etcd_user: Option<String>,
}

impl RegistryArgs {
    /// Connects with etcd, where the command line names it.
    pub(crate) async fn open(self) -> Result<Option<Arc<dyn Registry>>> {
        if self.etcd.is_empty() {
            return Ok(None);
        }
        let user = self.etcd_user.map(|name| {
            let password = std::env::var(PASSWORD_VARIABLE);
            password
                .map(|password| (name, password))
                .with_context(|| format!("--etcd-user: the password is missing: set {PASSWORD_VARIABLE}"))
        });
        let options = EtcdOptions {
            endpoints: self.etcd,
            ca: self.etcd_ca,
            identity: self.etcd_cert.zip(self.etcd_key),
            user: user.transpose()?,
        };
        Ok(Some(Arc::new(EtcdRegistry::connect(&options, &self.cluster).await?)))
    }
}
