//! What this worker tells and measures when its cluster is examined.

mod disk;
mod facts;
mod interface;

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use auth::Secret;
use cluster::doctor::{Disk, Examine, Facts, Findings, Library};
use cluster::proto::WorkerMessage;
use cluster::proto::worker_message::Message as Up;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use crate::join::send;
use crate::probe::{Answering, probe};
use crate::{WorkerConfig, WorkerError};

/// No examination takes so long, whatever the coordinator says.
const LONGEST: Duration = Duration::from_secs(30);
/// Bytes of a hash that are told.
const HASH_BYTES: usize = 6;
const HASHED_AT_ONCE: usize = 1 << 20;

/// A worker as it is examined: what it told of itself, and what it needs to measure.
#[derive(Debug)]
pub(crate) struct Examinee {
    /// What it tells without measuring.
    pub(crate) facts: Facts,
    /// Where it answers the probes of others.
    pub(crate) probe_address: String,
    secret: Secret,
    model: PathBuf,
    program_hash: OnceLock<String>,
    _answering: Answering,
}

impl Examinee {
    /// Gathers facts, and begins to answer probes.
    pub(crate) async fn start(config: &WorkerConfig, libraries: Vec<Library>) -> Result<Self, WorkerError> {
        let address = SocketAddr::new(config.listen.ip(), config.probe_port);
        let answering = Answering::bind(address, config.secret.clone());
        let answering = answering.await.map_err(|source| WorkerError::Listen { address, source })?;
        Ok(Self {
            facts: facts::gather(config, libraries).await,
            probe_address: crate::load::host_and_port(&config.advertised_host, answering.port()),
            secret: config.secret.clone(),
            model: config.model.clone(),
            program_hash: OnceLock::new(),
            _answering: answering,
        })
    }

    /// Measures what is asked for, and sends what was found, if the stream is still there by then.
    pub(crate) fn begin(self: Arc<Self>, examine: Examine, up: mpsc::WeakSender<WorkerMessage>) {
        tokio::spawn(async move {
            let findings = self.examine(examine).await;
            debug!(?findings, "examined");
            if let Some(up) = up.upgrade() {
                send(&up, Up::Findings(findings.into())).await;
            }
        });
    }

    async fn examine(self: Arc<Self>, examine: Examine) -> Findings {
        let Examine { number, limit, peers, bandwidth, program, disk } = examine;
        let deadline = Instant::now() + limit.min(LONGEST);
        let mut findings = Findings { number, ..Findings::default() };
        if program || disk {
            let this = self.clone();
            let own = tokio::task::spawn_blocking(move || this.examine_itself(program, disk));
            if let Ok(Ok((program_hash, disk))) = timeout_at(deadline, own).await {
                (findings.program_hash, findings.disk) = (program_hash, disk);
            }
        }
        for peer in peers {
            // A probe that is over at once would be told however late it begins.
            if Instant::now() >= deadline {
                break;
            }
            match timeout_at(deadline, probe(&peer.address, &self.secret, bandwidth)).await {
                Ok(probed) => findings.links.push((peer.worker, probed)),
                Err(_) => break,
            }
        }
        findings
    }

    /// Blocks.
    fn examine_itself(&self, program: bool, disk: bool) -> (String, Option<Disk>) {
        let program_hash =
            if program { self.program_hash.get_or_init(program_hash).clone() } else { String::new() };
        let disk = disk
            .then(|| disk::read_speed(&self.model))
            .and_then(|read| read.inspect_err(|error| debug!(%error, "cannot read the checkpoint")).ok());
        (program_hash, disk)
    }
}

/// What tells this build from others of the same version; empty where the program cannot be read.
fn program_hash() -> String {
    let hash = || -> io::Result<String> {
        let (mut file, mut hasher) = (File::open("/proc/self/exe")?, Sha256::new());
        let mut chunk = vec![0; HASHED_AT_ONCE];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                read => hasher.update(&chunk[..read]),
            }
        }
        Ok(hasher.finalize().iter().take(HASH_BYTES).map(|byte| format!("{byte:02x}")).collect())
    };
    hash().unwrap_or_default()
}

#[cfg(test)]
impl Examinee {
    /// One on the loopback.
    pub(crate) async fn of_test(secret: &Secret) -> Arc<Self> {
        let any = SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 0));
        let answering = Answering::bind(any, secret.clone()).await.expect("a free port");
        Arc::new(Self {
            facts: Facts { program: "test".into(), ..Facts::default() },
            probe_address: format!("127.0.0.1:{}", answering.port()),
            secret: secret.clone(),
            model: PathBuf::from("nowhere"),
            program_hash: OnceLock::new(),
            _answering: answering,
        })
    }
}

#[cfg(test)]
mod tests {
    use cluster::WorkerId;
    use cluster::doctor::Peer;

    use super::*;

    #[tokio::test]
    async fn what_is_asked_for_is_measured() {
        let secret = Secret::random();
        let (one, other) = (Examinee::of_test(&secret).await, Examinee::of_test(&secret).await);
        let peer = |worker, address: &str| Peer { worker: WorkerId(worker), address: address.to_owned() };
        let examine = Examine {
            number: 5,
            limit: Duration::from_secs(20),
            peers: vec![peer(2, &other.probe_address), peer(3, "127.0.0.1:1")],
            bandwidth: false,
            program: true,
            disk: true,
        };
        let findings = one.clone().examine(examine.clone()).await;
        assert_eq!((findings.number, findings.program_hash.len()), (5, 2 * HASH_BYTES));
        assert_eq!(findings.disk, None, "there is no checkpoint");
        let [(WorkerId(2), Ok(_)), (WorkerId(3), Err(_))] = &findings.links[..] else {
            panic!("{findings:?}")
        };

        // What there is no time for is not told.
        let findings = one.examine(Examine { limit: Duration::ZERO, program: false, ..examine }).await;
        assert_eq!(findings, Findings { number: 5, ..Findings::default() });
    }
}
