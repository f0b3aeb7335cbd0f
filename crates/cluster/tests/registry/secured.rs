//! etcd that asks who is there: TLS on both sides, and users with passwords.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use cluster::registry::{EtcdOptions, EtcdRegistry, RegistryError, Transaction};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::entries::put;
use crate::etcd::Etcd;
use crate::stage::{EtcdStage, LIMIT, TTL, connect_with, name, until};

/// An authority, and certificates of it for a server and for a client.
struct Certificates {
    folder: TempDir,
}

impl Certificates {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut params = CertificateParams::new(vec![]).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let authority = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        let write = |name: &str, pem: String| fs::write(folder.path().join(name), pem).expect("written");
        write("ca.pem", authority.pem());
        for owner in ["server", "client"] {
            let key = KeyPair::generate().expect("a key");
            let params = CertificateParams::new(vec!["127.0.0.1".into()]).expect("an address");
            write(&format!("{owner}.pem"), params.signed_by(&key, &authority).expect("signed").pem());
            write(&format!("{owner}.key"), key.serialize_pem());
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn identity(&self) -> Option<(PathBuf, PathBuf)> {
        Some((self.path("client.pem"), self.path("client.key")))
    }
}

fn options(url: &str, ca: &Path, identity: Option<(PathBuf, PathBuf)>) -> EtcdOptions {
    EtcdOptions { endpoints: vec![url.into()], ca: Some(ca.into()), identity, user: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_checked_on_both_sides() {
    let ours = Certificates::new();
    let path = |name: &str| OsString::from(ours.path(name));
    let flags: Vec<OsString> = vec![
        "--client-cert-auth".into(),
        "--trusted-ca-file".into(),
        path("ca.pem"),
        "--cert-file".into(),
        path("server.pem"),
        "--key-file".into(),
        path("server.key"),
    ];
    let Some(etcd) = Etcd::start_with("https", &flags) else { return };
    let ca = ours.path("ca.pem");
    let registry = connect_with(&options(&etcd.url, &ca, ours.identity()), "first").await;
    put(registry.as_ref(), "a", "1").await;
    let mut watch = registry.watch("").await.expect("it answers");
    until(&mut watch, |snapshot| snapshot.entries.contains_key("a")).await;

    let connect =
        async |options: EtcdOptions| EtcdRegistry::connect(&options, &name("first")).await.map(drop);
    let others = Certificates::new();
    for (options, expected) in [
        (options(&etcd.url, &ca, None), "does not answer"),
        (options(&etcd.url, &ca, others.identity()), "does not answer"),
        (options(&etcd.url, &others.path("ca.pem"), ours.identity()), "invalid peer certificate"),
    ] {
        let error = connect(options).await.expect_err(expected).to_string();
        assert!(error.contains(&etcd.url) && error.contains(expected), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_and_passwords_are_checked_and_tokens_renewed() {
    let Some(stage) = EtcdStage::start() else { return };
    let mut admin = stage.client().await;
    admin.user_add("root", "the root", None).await.expect("added");
    admin.user_grant_role("root", "root").await.expect("granted");
    admin.user_add("stranger", "a stranger", None).await.expect("added");
    admin.auth_enable().await.expect("enabled");
    let with = |user: Option<(&str, &str)>| EtcdOptions {
        endpoints: vec![stage.url()],
        user: user.map(|(name, password)| (name.into(), password.into())),
        ..EtcdOptions::default()
    };
    for (user, expected) in [
        (None, "user name is empty"),
        (Some(("root", "wrong")), "invalid user ID or password"),
        (Some(("nobody", "wrong")), "invalid user ID or password"),
        (Some(("stranger", "a stranger")), "permission denied"),
    ] {
        let error = EtcdRegistry::connect(&with(user), &name("first")).await.expect_err(expected);
        assert!(matches!(error, RegistryError::Refused { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }

    let registry = connect_with(&with(Some(("root", "the root"))), "first").await;
    let mut watch = registry.watch("").await.expect("it answers");
    let lease = registry.lease(TTL).await.expect("it answers");
    let kept = Transaction::default().put("kept", vec![], Some(lease.id()));
    registry.transact(kept).await.expect("it answers").expect("no condition");
    // etcd forgets all tokens when it is started anew.
    let etcd: &Mutex<Etcd> = &stage.0;
    tokio::task::block_in_place(|| {
        let mut etcd = etcd.lock().expect("no panic");
        etcd.kill();
        etcd.restart();
    });
    let again = async {
        while registry.transact(Transaction::default().put("b", vec![], None)).await.is_err() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(LIMIT, again).await.expect("it is let in again");
    until(&mut watch, |snapshot| snapshot.entries.contains_key("b")).await;
    sleep(TTL * 2).await;
    assert!(timeout(Duration::ZERO, lease.lost()).await.is_err(), "it was kept");
    assert!(watch.borrow().entries.contains_key("kept"));
}
